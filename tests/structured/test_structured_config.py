"""Configs of systems: what is read is what was written; what is wrong is one line with file, key and expectation."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from robustflow import cli
from robustflow import config as configs
from robustflow.errors import UserError
from robustflow.structured.config import StructuredExperiment, from_dict

pytestmark = pytest.mark.usefixtures("planted")


def read(path: Path) -> StructuredExperiment:
    return from_dict(*configs.read_toml(path))


def test_values_options_and_tables_shared_by_all_models(config: Path) -> None:
    experiment = read(config)
    assert (experiment.title, experiment.system, experiment.seeds) == ("Decay", "decay", (0, 1, 2))
    assert (experiment.data.train, experiment.data.validation, experiment.data.test) == (40, 10, 20)
    assert experiment.options() == {"steps": 4, "offsets": (0.5, 0.0)}
    scale, matrix = experiment.models
    assert scale.train.unroll == matrix.train.unroll == (1, 2, 4)
    assert (scale.train.optimizer, matrix.train.optimizer) == ("adam", "sgd")
    assert (scale.train.precision, matrix.train.precision) == ("float64", "float32")
    assert matrix.network == {"kind": "matrix"}
    again = StructuredExperiment.model_validate_json(json.dumps(experiment.model_dump(mode="json")))
    assert again.model_dump() | {"data": None} == experiment.model_dump() | {"data": None}
    assert again.options() == experiment.options()


WRONG: list[tuple[str, str, str]] = [
    ('title = "Decay"', 'titel = "Decay"', "title: missing|unknown key 'titel'"),
    ('system = "decay"', 'system = "decoy"', "system: one of .*decay.*'decoy'"),
    ("seeds = [0, 1, 2]", "seeds = [0, 1, 1]", "seeds: whole numbers of at least 0, every one once"),
    ("seeds = [0, 1, 2]", "seeds = [-1]", "seeds: whole numbers"),
    ("seeds = [0, 1, 2]", "seeds = []", "seeds: .*at least 1"),
    ("seeds = [0, 1, 2]", "seeds = [0.5]", "seeds.0: .*integer"),
    ("train = 40", "train = 0", "data.train: .*greater than or equal to 1"),
    ("train = 40", "", "data.train: missing"),
    ("offsets =", "offset =", "data: unknown key 'offset'"),
    ("offsets = [0.5, 0.0]", 'offsets = ["a"]', "data: offsets.0: .*number.*'a'"),
    ("epochs = 20", "epochs = 20\nepoch = 7", "unknown key 'models.0.train.epoch'"),
    ("epochs = 20", 'epochs = 20\nloss = "hinge"', "unknown key 'models.0.train.loss'"),
    ("unroll = [1, 2, 4]", "unroll = [0]", "models.0.train.unroll: every number of steps is at least 1"),
    ("unroll = [1, 2, 4]", "unroll = []", "models.0.train.unroll: "),
    ("noise = 0.01", "noise = -0.01", "models.0.train.noise: .*greater than or equal to 0"),
    ('precision = "float64"\n', 'precision = "float16"\n', "models.0.train.precision: .*'float32' or 'float64'"),
    ('optimizer = "sgd"', 'optimizer = "muon"', "models.1.train.optimizer: .*'muon'"),
    ('name = "matrix"', 'name = "scale"', "every model needs a name of its own"),
    ('name = "matrix"', 'name = "exact"', "every model needs a name of its own"),
    ('name = "matrix"', 'name = "../matrix"', "models.1.name: "),
    ("[[models]]", "[model]", "models: missing|unknown key 'model'|cannot be read"),
]


@pytest.mark.parametrize(("old", "new", "message"), WRONG)
def test_wrong_values_are_one_line(
    old: str, new: str, message: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new, 1))
    assert cli.main(["bench", str(config), "--out", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err
    assert re.search(message, line), line
    assert str(config) in line
    assert line.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('kind = "scale"', 'kind = "scale", width = 3', "decay network: unknown key 'width'"),
        ("unroll = [1, 2, 4]", "unroll = [1, 2, 5]", "unroll 5 is more than the 4 steps of a training trajectory"),
        ("batch_size = 10", "batch_size = 50", "batch_size 50 is larger than the 40 training examples"),
    ],
)
def test_what_only_the_system_knows_is_one_line_before_any_training(
    old: str, new: str, message: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(config.read_text().replace(old, new, 1))
    assert cli.main(["bench", str(config), "--out", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err
    assert message in line
    assert line.count("\n") == 1
    assert not list((tmp_path / "out").glob("seed-*"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "somewhere"], "a system makes its own data"),
        (["--executor", "workers"], "a system trains in one process"),
        (["--model", "none"], "no model 'none' here; there are: scale, matrix"),
    ],
)
def test_options_that_mean_nothing_here(
    more: list[str], message: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", str(config), *more]) == 2
    assert message in capsys.readouterr().err


def test_the_image_reader_says_what_it_got(config: Path) -> None:
    with pytest.raises(UserError, match=r"^[^\n]* is of a system, without classifiers[^\n]*$"):
        configs.read(config)
