"""Configs: what is read is what was written; what is wrong is one line with file, key and expectation."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from robustflow import config, data, networks
from robustflow.config import Experiment
from robustflow.errors import UserError
from robustflow.operators import Convolution, PatchConvolution
from robustflow.structured import config as structured

GOOD = """
title = "t"
dataset = "digits"
seed = 3

[network]
channels = [4, 8]
kernel = "patch"

[train]
epochs = 2
loss = { kind = "hinge", margin = 0.5 }

[evaluate]
epsilons = [0, "36/255", 0.5, " 3 / 4 "]

[[models]]
name = "a"
regime = "sharp"

[[models]]
name = "b"
regime = "unconstrained"
network = { kernel = "convolution" }
train = { loss = { kind = "cross-entropy" }, epochs = 5 }
"""


def read(folder: Path, text: str | bytes) -> Experiment:
    path = folder / "mine.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return config.read(path)


def test_values_fractions_and_tables_shared_by_all_models(tmp_path: Path) -> None:
    experiment = read(tmp_path, GOOD)
    assert (experiment.title, experiment.dataset, experiment.seed) == ("t", "digits", 3)
    assert experiment.evaluate.epsilons == (0.0, 36 / 255, 0.5, 0.75)
    assert experiment.evaluate.splits == ("test",)
    first, second = experiment.models
    assert (first.network.kernel, second.network.kernel) == ("patch", "convolution")
    assert first.network.channels == second.network.channels == (4, 8)
    assert (first.train.epochs, second.train.epochs) == (2, 5)
    assert first.train.loss.model_dump() == {"kind": "hinge", "margin": 0.5}
    assert second.train.loss.kind == "cross-entropy"
    assert experiment.model("b") is second
    with pytest.raises(UserError, match="no model 'c' here; there are: a, b"):
        experiment.model("c")


def test_what_is_noted_in_a_directory_reads_back_as_the_same(tmp_path: Path) -> None:
    experiment = read(tmp_path, GOOD)
    assert Experiment.model_validate_json(json.dumps(experiment.model_dump(mode="json"))) == experiment


WRONG: list[tuple[str, str, str]] = [
    ("seed = 3", "sead = 3", "unknown key 'sead'"),
    ("epochs = 2", "epochs = 2\nepoch = 3", r"unknown key 'models.0.train.epoch'"),
    ('kernel = "patch"', 'kernels = "patch"', r"unknown key 'models.0.network.kernels'"),
    ("margin = 0.5", "margin = 0.5, offset = 1.0", "unknown key 'models.0.train.loss.hinge.offset'"),
    ("seed = 3", 'seed = "3"', "seed: .*integer.*'3'"),
    ("seed = 3", "seed = -1", "seed: .*greater than or equal to 0.*-1"),
    ("seed = 3", "seed = 1.5", "seed: .*integer"),
    ("seed = 3", "seed = true", "seed: .*integer"),
    ("epochs = 2", "epochs = 0", "models.0.train.epochs: .*greater than or equal to 1"),
    ("epochs = 2", "", "models.0.train.epochs: missing"),
    ("epochs = 2", 'epochs = "two"', "models.0.train.epochs: .*integer"),
    ("channels = [4, 8]", "channels = []", "models.0.network.channels: .*at least 1"),
    ("channels = [4, 8]", "channels = [4, 0]", "models.0.network.channels.1: "),
    ("channels = [4, 8]", "channels = 4", "models.0.network.channels: "),
    ('"36/255"', "-0.1", "evaluate.epsilons.1: .*greater than or equal to 0.*-0.1"),
    ('"36/255"', '"-1/255"', "evaluate.epsilons.1: .*greater than or equal to 0"),
    ('"36/255"', '"36/0"', "evaluate.epsilons.1: a number or a fraction such as '36/255'"),
    ('"36/255"', '"small"', "evaluate.epsilons.1: a number or a fraction"),
    ('"36/255"', '"1e400"', "evaluate.epsilons.1: "),
    ('"36/255"', "inf", "evaluate.epsilons.1: .*finite"),
    ('"36/255"', "nan", "evaluate.epsilons.1: "),
    ('"36/255"', "0", "evaluate.epsilons: the radii must increase"),
    ('"36/255"', "0.6", "evaluate.epsilons: the radii must increase"),
    ('[0, "36/255", 0.5, " 3 / 4 "]', "[]", "evaluate.epsilons: "),
    ('name = "b"', 'name = "a"', "models: every model needs a name of its own"),
    ('name = "b"', 'name = "../b"', "models.1.name: "),
    ('name = "b"', 'name = ""', "models.1.name: "),
    ('name = "b"', "", "models.1.name: missing"),
    ('regime = "sharp"', 'regime = "sharq"', "models.0.regime: one of unconstrained, .*'sharq'"),
    ('dataset = "digits"', 'dataset = "mnist"', "dataset: one of cifar10, cifar100, digits.*'mnist'"),
    ('kind = "hinge"', 'kind = "hing"', "models.0.train.loss: .*hing"),
    ("[network]\n", "network = 3\n[unknown]\n", "network"),
    ("[evaluate]\n", '[evaluate]\nsplits = ["train"]\n', "evaluate.splits.0: "),
    ("[evaluate]\n", "[evaluate]\nimages = 0\n", "evaluate.images: "),
    ("[evaluate]\n", "[evaluate]\nimages = { test = 0 }\n", "evaluate.images: .*at least 1"),
    ("[evaluate]\n", "[evaluate]\nimages = true\n", "evaluate.images: .*whole number"),
    ("[evaluate]\n", "[evaluate]\nimages = { validation = 9 }\n", "evaluate.images: .*what is in splits, test"),
]


@pytest.mark.parametrize(("old", "new", "message"), WRONG)
def test_wrong_values_are_one_line_with_file_key_and_expectation(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    assert old in GOOD
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, GOOD.replace(old, new, 1))
    assert str(caught.value).startswith(f"{tmp_path / 'mine.toml'}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title = ", "cannot be read as TOML"),
        (b"\xff\xfe", "cannot be read as TOML"),
        (b"PK\x03\x04", "cannot be read as TOML"),
        ("x = " + "[" * 50_000, "cannot be read as TOML"),
        ("", "title: missing"),
        ("models = 3", "title: missing|models"),
        ("# " + "x" * config.MAXIMUM_CONFIG_BYTES, "larger than"),
    ],
)
def test_what_is_no_config_is_one_line(text: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, text)
    assert "mine.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_huge_value_is_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, GOOD.replace('"digits"', f'"{"d" * 100_000}"'))
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_missing_files_name_the_configs_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="quickstart"):
        config.read(tmp_path / "none.toml")
    assert (
        config.find("quickstart")
        == config.find("configs/quickstart.toml").resolve()
        == config.list_configs()["quickstart"]
    )


@pytest.mark.parametrize("name", list(config.list_configs()))
def test_shipped_configs_parse_build_and_begin_with_their_facts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = config.list_configs()[name]
    header = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        header.append(line.lstrip("# "))
    positions = [
        [i for i, line in enumerate(header) if re.match(rf"{key} +\S", line)]
        for key in ("Source", "Command", "Cost", "Expected")
    ]
    assert all(len(found) == 1 for found in positions), positions
    assert positions == sorted(positions)
    assert f"robustflow bench {name}" in header[positions[1][0]]
    if "system" in config.read_toml(name)[0]:
        assert structured.from_dict(*config.read_toml(name)).models
        return
    experiment = config.read(name)
    # Sizes are all that is asked for here; orthogonal matrices of full size take seconds.
    monkeypatch.setattr(torch.nn.init, "orthogonal_", lambda tensor: tensor)
    for kind in (Convolution, PatchConvolution):
        monkeypatch.setattr(kind, "constrain_", lambda self, **_: None)
    colours, size, classes = {"digits": (1, 8, 10), "cifar10": (3, 32, 10), "cifar100": (3, 32, 100)}[
        experiment.dataset
    ]
    for model in {(m.regime, m.network): m for m in experiment.models}.values():
        options: dict[str, Any] = model.network.model_dump(exclude={"normalize"})
        network = networks.create_model(model.regime, input_shape=(colours, size, size), classes=classes, **options)
        assert networks.parameter_count(network) > 0


def test_the_configs_of_the_issue_are_there() -> None:
    assert set(config.list_configs()) >= {"quickstart", "cifar10/cpu", "cifar10/paper", "cifar10/gpu-day"}
    regimes = {model.regime for model in config.read("quickstart").models}
    assert regimes == {"unconstrained", "nonexpansive", "prescribed", "flexible", "sharp"}
    assert config.read("quickstart").dataset == "digits"
    grid = config.read("cifar10/cpu").evaluate.epsilons
    assert {72 / 255, 108 / 255, 8 / 255} <= set(grid)
    raw = tomllib.loads(config.find("cifar10/paper").read_text(encoding="utf-8"))
    assert "8/255" in raw["evaluate"]["epsilons"]
    assert config.read("cifar10/paper").dataset in data.DATASETS


@pytest.mark.parametrize("table", ["momentum = 0.0", "optimizer = 'nadam'"])
def test_nesterov_without_momentum_is_one_line(table: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    text = config.list_configs()["cifar10/resnet"].read_text(encoding="utf-8")
    text = text.replace('optimizer = "sgd"', "") if "optimizer" in table else text
    path.write_text(text.replace("nesterov = true", f"nesterov = true\n{table}"))
    with pytest.raises(UserError, match=r"nesterov.*needs optimizer = 'sgd' and a momentum above 0"):
        config.read(path)
