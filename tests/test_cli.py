"""The command line: stages on their own, and bad input that costs one line and nothing else."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import attacks
from robustflow import checkpoints, cli, data, networks
from robustflow import config as configs

CONFIG = """
title = "Tiny"
dataset = "digits"
[network]
channels = [4]
layers = 2
kernel = "patch"
lift = "patch"
[train]
epochs = 1
batch_size = 200
crop = 0
flip = false
[evaluate]
images = 6
epsilons = [0, 0.2]
attacks = ["deepfool"]
[[models]]
name = "one"
regime = "sharp"
[[models]]
name = "two"
regime = "nonexpansive"
"""


def run(*arguments: Any) -> int:
    return cli.main([str(argument) for argument in arguments])


def written(folder: Path, text: str = CONFIG, name: str = "tiny.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def snapshot(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by the stages, one after the other."""
    folder = tmp_path_factory.mktemp("cli")
    config, out = written(folder), folder / "out"
    assert run("train", config, "--out", out, "--device", "cpu") == 0
    assert (out / "models" / "two" / "model.safetensors").exists()
    assert not (out / "evaluations").exists()
    assert run("certify", out) == 0
    assert "adversarial_norm" not in (out / "evaluations" / "digits-test" / "one.csv").read_text()
    assert run("attack", out, "--device", "cpu") == 0
    assert "adversarial_norm" in (out / "evaluations" / "digits-test" / "one.csv").read_text()
    assert not (out / "summary.json").exists()
    assert run("report", out) == 0
    assert (out / "report.html").exists()
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def refused(capsys: pytest.CaptureFixture[str], message: str, *arguments: Any) -> None:
    capsys.readouterr()
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("robustflow: ")
    assert error.count("\n") == 1, error
    assert error.endswith("\n")
    assert message in error


def test_stages_add_up_to_bench(finished: Path, tmp_path: Path) -> None:
    assert run("bench", written(tmp_path), "--out", tmp_path / "out", "--device", "cpu") == 0
    for name in ("one", "two"):
        for part in (f"models/{name}/model.safetensors", f"evaluations/digits-test/{name}.csv"):
            assert (tmp_path / "out" / part).read_bytes() == (finished / part).read_bytes()


def test_explain_prints_an_account_that_multiplies_to_the_bound(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("certify", finished, "--explain") == 0
    printed = capsys.readouterr().out
    assert "one on digits-test" in printed
    assert "two on digits-test" in printed
    first = printed.split("two on digits-test")[0]
    # layer, kind, bound, product, formula
    lines = [re.split(r"  +", line) for line in first.splitlines() if line.startswith(("features.", "head"))]
    assert len(lines) > 3
    bound = float(first.rsplit("Lipschitz bound: ", 1)[1].split()[0].rstrip(";"))
    assert bound == pytest.approx(math.prod(float(line[2]) for line in lines), rel=1e-6)
    assert bound == float(lines[-1][3])
    assert run("certify", finished) == 0
    assert capsys.readouterr().out == ""


def test_one_model_only(finished: Path, tmp_path: Path) -> None:
    assert run("train", written(tmp_path), "--out", tmp_path / "out", "--model", "two", "--device", "cpu") == 0
    assert [path.name for path in (tmp_path / "out" / "models").iterdir()] == ["two"]
    weights = "models/two/model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (finished / weights).read_bytes()
    assert run("certify", tmp_path / "out", "--model", "two") == 0
    assert run("attack", tmp_path / "out", "--model", "two", "--device", "cpu") == 0
    assert (tmp_path / "out/evaluations/digits-test/two.csv").read_bytes() == (
        finished / "evaluations/digits-test/two.csv"
    ).read_bytes()


def test_seed_changes_the_weights(finished: Path, tmp_path: Path) -> None:
    def weights(seed: int) -> torch.Tensor:
        out = tmp_path / str(seed)
        assert run("train", written(tmp_path), "--out", out, "--model", "one", "--seed", seed, "--device", "cpu") == 0
        return checkpoints.read_tensors(out / "models" / "one" / "model.safetensors")[0]["head.weight"]

    stored = checkpoints.read_tensors(finished / "models" / "one" / "model.safetensors")[0]["head.weight"]
    assert torch.equal(weights(0), stored)
    assert not torch.equal(weights(1), stored)


def test_default_output_directory_is_named_after_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, name="mine.toml")
    assert run("train", "mine.toml", "--model", "one", "--device", "cpu") == 0
    assert (tmp_path / "runs" / "mine" / "models" / "one" / "card.json").exists()


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    wanted: dict[str, set[str]] = {
        "models": set(networks.list_models()),
        "attacks": set(attacks.ATTACKS) | {"paper", "standard"},
        "datasets": set(data.DATASETS),
        "configs": set(configs.list_configs()),
    }
    for what, names in wanted.items():
        assert run("list", what) == 0
        words = capsys.readouterr().out.replace(",", " ").split()
        assert names <= set(words), what
    assert run("list") == 0
    printed = capsys.readouterr().out
    assert all(f"{what}:" in printed and all(name in printed for name in names) for what, names in wanted.items())


def arrays(folder: Path, **changes: Any) -> Path:
    content: dict[str, Any] = {
        "x_train": np.zeros((40, 32, 32, 3), np.uint8), "y_train": np.zeros(40, int),
        "x_test": np.zeros((10, 32, 32, 3), np.uint8), "y_test": np.zeros(10, int),
    } | changes  # fmt: skip
    folder.mkdir()
    np.savez(folder / "cifar10.npz", **content)
    return folder


def truncated(folder: Path) -> Path:
    path = arrays(folder) / "cifar10.npz"
    path.write_bytes(path.read_bytes()[:-200])
    return folder


BAD_DATA: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing directory": (lambda folder: folder, "does not exist"),
    "truncated": (truncated, "cannot be read"),
    "label": (lambda folder: arrays(folder, y_test=np.full(10, 10)), "y_test[0] is 10"),
    "floats": (lambda folder: arrays(folder, x_test=np.full((10, 32, 32, 3), 1.5)), "must be uint8"),
}


@pytest.mark.parametrize("kind", BAD_DATA)
@pytest.mark.parametrize("command", ["bench", "train"])
def test_bad_data(command: str, kind: str, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, message = BAD_DATA[kind]
    config, before = written(tmp_path, CONFIG.replace('"digits"', '"cifar10"')), snapshot(out)
    refused(capsys, message, command, config, "--out", out, "--data", make(tmp_path / "data"), "--device", "cpu")
    assert snapshot(out) == before


BAD_CONFIGS = [
    ('regime = "sharp"', 'regime = "sharq"', "models.0.regime"),
    ('["deepfool"]', '["deepfooled"]', "unknown attack 'deepfooled'"),
    ("[0, 0.2]", "[-0.1, 0.2]", "evaluate.epsilons.0"),
    ("epochs = 1", "epochs = 2", "another config, seed or data"),
    ('name = "one"', 'name = "two"', "a name of its own"),
    ("channels = [4]", "channels = [4, 4, 4, 4]", "another config"),
    ("[network]", "[networks]", "unknown key"),
    ("[network]", "network]", "TOML"),
]


@pytest.mark.parametrize(("old", "new", "message"), BAD_CONFIGS)
def test_bad_configs(
    old: str, new: str, message: str, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(out)
    refused(capsys, message, "bench", written(tmp_path, CONFIG.replace(old, new)), "--out", out, "--device", "cpu")
    assert snapshot(out) == before


def test_bad_arguments(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, before = written(tmp_path), snapshot(out)
    refused(capsys, "no config", "bench", tmp_path / "none.toml", "--out", out)
    refused(capsys, "no model 'three'", "bench", config, "--out", out, "--model", "three", "--device", "cpu")
    refused(capsys, "no model 'three'", "attack", out, "--model", "three", "--device", "cpu")
    refused(capsys, "another config, seed or data", "train", config, "--out", out, "--seed", 1, "--device", "cpu")
    refused(capsys, "unknown device 'gpu'", "bench", config, "--out", out, "--device", "gpu")
    if not torch.cuda.is_available():
        for command in (
            ("bench", config, "--out", out),
            ("train", config, "--out", out),
            ("attack", out),
            ("certify", out),
        ):
            refused(capsys, "no CUDA device", *command, "--device", "cuda")
    for command in ("certify", "attack", "report"):
        refused(capsys, "director", command, tmp_path / "nowhere")
    assert snapshot(out) == before
    with pytest.raises(SystemExit) as caught:
        run("bench", config, "--seed", "-1")
    assert caught.value.code == 2
    assert "whole number" in capsys.readouterr().err


def test_a_size_that_does_not_fit_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for old, new, message in (
        ("channels = [4]", "channels = [4, 4, 4, 4]", "fewer blocks"),
        ("layers = 2", "layers = 3", "must be even"),
        ("layers = 2", 'layers = 2\nkernel_size = 4\nlift = "convolution"', "odd"),
        ("batch_size = 200", "batch_size = 1201", "larger than the 1200"),
        ("crop = 0", "crop = 8", "crop 8 is too large"),
    ):
        text = CONFIG.replace('lift = "patch"\n', "") if "lift" in new else CONFIG
        config = written(tmp_path, text.replace(old, new))
        refused(capsys, message, "train", config, "--out", tmp_path / "new", "--device", "cpu")


def test_bad_checkpoints(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = out / "models" / "one" / "model.safetensors"
    whole = weights.read_bytes()
    shutil.rmtree(out / "evaluations")
    tensors, _ = checkpoints.read_tensors(weights)
    for content, message in (
        (whole[: len(whole) // 2], "not a whole safetensors file"),
        ((out / "models" / "two" / "model.safetensors").read_bytes(), "another architecture"),
        ({**tensors, "head.weight": tensors["head.weight"] * torch.nan}, "NaN"),
        ({**tensors, "head.weight": tensors["head.weight"] + 1e-3}, "SHA-256"),
        (None, "missing"),
    ):
        weights.unlink()
        if isinstance(content, bytes):
            weights.write_bytes(content)
        elif content is not None:
            checkpoints.write_tensors(weights, content)
        for command in ("certify", "attack"):
            refused(capsys, message, command, out)
        weights.write_bytes(whole)
    refused(capsys, "run `robustflow certify` first", "attack", out, "--device", "cpu")
    (out / "models" / "one" / "card.json").unlink()
    refused(capsys, "run `robustflow train` first", "certify", out)
    (out / "config.json").write_text("{}")
    refused(capsys, "config.json", "certify", out)


def test_places_that_cannot_be_written(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = written(tmp_path)
    (tmp_path / "file").write_text("kept")
    refused(capsys, "--out", "bench", config, "--out", tmp_path / "file" / "out", "--device", "cpu")
    refused(capsys, "--out", "bench", config, "--out", tmp_path / "file", "--device", "cpu")
    assert (tmp_path / "file").read_text() == "kept"
    checkpoints.write_text(tmp_path / "new" / "models", "in the way")
    refused(capsys, "models", "train", config, "--out", tmp_path / "new", "--device", "cpu")


def test_interrupting_says_that_it_goes_on(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.bench, "train", interrupt)
    assert run("bench", written(tmp_path), "--out", out, "--device", "cpu") == 130
    assert capsys.readouterr().err.count("\n") == 1
