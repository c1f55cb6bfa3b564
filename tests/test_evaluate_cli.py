"""`robustflow evaluate`: factories, weights, directories of ours, the files it writes, and bad input in one line."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from robustflow import certify, cli, data, evaluate, own_model
from robustflow.errors import UserError

MODULE = """
import torch
from torch import nn
from robustflow import data

def net():  # the nearest class mean: argmin |x - m|^2
    split = data.load("digits").splits["train"]
    means = torch.stack([split.images()[split.labels == label].mean(0).flatten() for label in range(10)])
    layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    with torch.no_grad():
        layers[1].weight.copy_(torch.eye(64))
        layers[1].bias.zero_()
        layers[3].weight.copy_(2 * means)
        layers[3].bias.copy_(-(means * means).sum(1))
    return layers

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = net()
    def forward(self, x):
        return torch.sin(self.inner(x))

class NaN(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :10] * float("nan")

class Vector(nn.Module):
    def forward(self, x):
        return x.sum((1, 2, 3))

def chooser():
    return Net

def broken():
    raise FileNotFoundError("no such checkpoint\\nand a second line")

def nothing():
    return None

def needs(width):
    return net()

def plain():
    weight = torch.linspace(-1, 1, 640).view(64, 10)
    return lambda x: x.flatten(1) @ weight

made = net()
number = 3
"""
FILES = {"samples.csv", "summary.csv", "summary.json", "bracket.png"}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory to work in, with a module that can be imported from nowhere else."""
    (tmp_path / "mine_h3.py").write_text(MODULE)
    (tmp_path / "hurt_h3.py").write_text("1 / 0")
    (tmp_path / "wants_h3.py").write_text("import a_library_that_nobody_has")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("mine_h3", "hurt_h3", "wants_h3"):
        sys.modules.pop(name, None)


def run(*arguments: Any, model: str = "mine_h3:net", images: int = 12) -> int:
    standard = ("evaluate", "--model", model, "--dataset", "digits", "--images", images, "--device", "cpu")
    return cli.main([str(argument) for argument in (*standard, *arguments)])


def refused(capsys: pytest.CaptureFixture[str], message: str, *arguments: Any, **options: Any) -> None:
    capsys.readouterr()
    assert run("--out", "out", *arguments, **options) == 2
    error = capsys.readouterr().err
    # tqdm's bar, if any, is ended by a return; what the user reads is the last line
    last = error.split("\r")[-1]
    assert last.startswith("robustflow: "), error
    assert last.count("\n") == 1
    assert message in last
    assert not Path("out/summary.json").exists()


def factory() -> nn.Sequential:
    namespace: dict[str, Any] = {}
    exec(MODULE, namespace)
    return namespace["net"]().eval()


def test_the_command_writes_what_the_call_returns(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--epsilons", "0.05,36/255,0.5", "--attacks", "deepfool", "--robustbench", "--seed", 3, "--out", "out")
    assert run(*arguments) == 0
    out = place / "out"
    assert {path.name for path in out.iterdir()} == FILES | {"robustbench.json"}, "shards are gone, no alarms"
    split = data.load("digits").splits["test"].head(12)
    bracket = evaluate(factory(), split.images(), split.labels, [0.05, 36 / 255, 0.5], "deepfool", seed=3)
    rows = pd.read_csv(out / "samples.csv", keep_default_na=False, dtype=str)
    assert list(rows) == list(bracket.samples)
    assert [float(cell) for cell in rows["certified_radius"]] == bracket.samples["certified_radius"].tolist()
    assert np.allclose(rows["adversarial_norm"].astype(float), bracket.samples["adversarial_norm"], rtol=1e-5)
    assert bracket.accuracy.k >= 8
    assert bracket.summary["certified"].iloc[0] > 0
    assert bracket.summary["broken"].iloc[-1] > 0
    counted = pd.read_csv(out / "summary.csv", dtype=str)
    assert list(counted) == list(bracket.summary)
    assert counted.map(float).equals(bracket.summary.astype(float))
    facts = json.loads((out / "summary.json").read_text())
    assert facts["summary"] == bracket.summary.to_dict("records")
    assert facts["accuracy"] == bracket.accuracy.as_dict()
    assert facts["lipschitz_bound"] == bracket.certificate.lipschitz  # type: ignore[union-attr]
    assert math.prod(row["bound"] for row in facts["account"]) == pytest.approx(facts["lipschitz_bound"])
    assert facts["model"]["model"] == "mine_h3:net"
    assert (facts["seed"], facts["n"], facts["why_not_certified"]) == (3, 12, None)
    assert facts["config"]["epsilons"][1] == 36 / 255
    assert {"versions", "device", "revision"} <= set(facts["environment"])
    assert facts["wall_seconds"] > 0
    assert (out / "bracket.png").read_bytes().startswith(b"\x89PNG")
    entry = json.loads((out / "robustbench.json").read_text())
    assert (entry["dataset"], entry["eps"], entry["autoattack_acc"]) == ("digits", "0.5", None)
    printed = capsys.readouterr().out
    assert "0.141176" in printed
    assert "n = 12 images" in printed


def test_default_directory_and_a_layer_without_a_rule(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--epsilons", "0.1", "--attacks", "deepfool", model="mine_h3:Net") == 0
    facts = json.loads((place / "runs" / "evaluate" / "Net" / "summary.json").read_text())
    assert "Net" in facts["why_not_certified"]
    assert facts["summary"][0]["certified"] is None
    assert "not certified: " in capsys.readouterr().out
    rows = pd.read_csv(place / "runs" / "evaluate" / "Net" / "samples.csv")
    assert rows["certified_radius"].isna().all()


@pytest.mark.parametrize("name", ["made", "chooser", "plain", "net"])
def test_all_kinds_of_factories(name: str) -> None:
    own = own_model.load(f"mine_h3:{name}", None, "digits", None)
    assert own.name == name
    logits = own.model(own.images.splits["test"].images(0, 2))
    assert logits.shape == (2, 10)
    if isinstance(own.model, nn.Module):
        assert not own.model.training
        assert own.model.__class__.__name__ == ("Net" if name == "chooser" else "Sequential")


def test_functions_go_through_shards(place: Path) -> None:
    assert run("--epsilons", "0.1", "--attacks", "deepfool", "--out", "out", model="mine_h3:plain") == 0
    assert {path.name for path in (place / "out").iterdir()} == FILES


def test_weights_are_loaded(place: Path) -> None:
    other = factory()
    with torch.no_grad():
        other[1].weight.mul_(-2)
    save_file(other.state_dict(), place / "other.safetensors")
    own = own_model.load("mine_h3:net", place / "other.safetensors", "digits", None)
    images = own.images.splits["test"].images(0, 3)
    assert torch.equal(own.model(images), other(images))
    assert own.source["weights_sha256"]
    assert own.identity != own_model.load("mine_h3:net", None, "digits", None).identity


BAD_WEIGHTS = {
    "pickle": ("state.pt", "only .safetensors is read"),
    "missing": ("none.safetensors", "is missing"),
    "truncated": ("short.safetensors", "not a whole safetensors file"),
    "other architecture": ("wide.safetensors", "is of another architecture: 1.bias is (33,), not (64,)"),
    "NaN": ("nan.safetensors", "NaN or infinite values in 1.weight"),
}


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
def test_weights_that_do_not_fit(kind: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, message = BAD_WEIGHTS[kind]
    state = factory().state_dict()
    torch.save(state, place / "state.pt")
    save_file(state, place / "short.safetensors")
    (place / "short.safetensors").write_bytes((place / "short.safetensors").read_bytes()[:-50])
    save_file(state | {"1.bias": torch.zeros(33)}, place / "wide.safetensors")
    save_file(state | {"1.weight": torch.full((64, 64), torch.nan)}, place / "nan.safetensors")
    refused(capsys, message, "--weights", place / file)


BAD: dict[str, tuple[tuple[Any, ...], str | None, str]] = {
    "no colon": ((), "mine_h3", "neither package.module:factory nor a directory"),
    "no module": ((), "elsewhere_h3.sub:net", "no module 'elsewhere_h3'"),
    "no submodule": ((), "mine_h3.sub:net", "no module 'mine_h3.sub'"),
    "import fails": ((), "hurt_h3:net", "importing hurt_h3 failed: ZeroDivisionError"),
    "import wants more": ((), "wants_h3:net", "No module named 'a_library_that_nobody_has'"),
    "no factory": ((), "mine_h3:nett", "mine_h3 has no 'nett'"),
    "no function": ((), "mine_h3:number", "is a int, not a factory"),
    "factory raises": ((), "mine_h3:broken", "broken() failed: FileNotFoundError: no such checkpoint"),
    "factory with arguments": ((), "mine_h3:needs", "needs() failed: TypeError"),
    "factory returns nothing": ((), "mine_h3:nothing", "nothing() returned a NoneType"),
    "weights of a function": (("--weights", "x.safetensors"), "mine_h3:plain", "takes no weights"),
    "NaN model": ((), "mine_h3:NaN", "NaN or infinite logits"),
    "wrong shape": ((), "mine_h3:Vector", "logits of shape"),
    "directory": ((), ".", "is not a trained model"),
    "duplicates": (("--epsilons", "0.1,0.1"), None, "more than once"),
    "negative": (("--epsilons=-0.1,0.1",), None, "must not be negative"),
    "decreasing": (("--epsilons", "0.2,0.1"), None, "increasing"),
    "text": (("--epsilons", "0.1,large"), None, "--epsilons 0.1,large: give numbers"),
    "zero denominator": (("--epsilons", "1/0"), None, "--epsilons 1/0"),
    "attack": (("--attacks", "strongest"), None, "unknown attack 'strongest'"),
    "no images": ((), None, "--images 0"),
    "data": (("--dataset", "cifar10", "--data", "nowhere"), None, "nowhere does not exist"),
    "device": (("--device", "gpu"), None, "unknown device 'gpu'"),
    "batch": (("--batch-size", "0"), None, "batch_size"),
    "robustbench": (("--robustbench", "--epsilons", "0.1"), None, "--robustbench needs ε = 0.5"),
    "workers": (("--executor", "workers", "--workers", "0"), None, "workers must be a positive integer"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, model, message = BAD[kind]
    refused(capsys, message, *arguments, model=model or "mine_h3:net", images=0 if kind == "no images" else 2)


def test_images_that_the_model_does_not_take(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = {"x": np.zeros((20, 32, 32, 3), np.uint8), "y": np.zeros(20, int)}
    np.savez(place / "cifar10.npz", **{f"{k}_{part}": v for k, v in arrays.items() for part in ("train", "test")})
    refused(capsys, "the model fails on images of shape (3, 32, 32)", "--dataset", "cifar10", "--data", place)


def test_an_alarm_is_saved_and_fails(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from robustflow import certificates

    honest = certificates.certify

    def boastful(*arguments: Any, **options: Any) -> certificates.Certificate:
        certificate = honest(*arguments, **options)
        certificate.radii[:] = np.where(certificate.radii > 0, 2.0, 0.0)
        return certificate

    monkeypatch.setattr(certificates, "certify", boastful)
    (place / "out" / "alarms").mkdir(parents=True)
    (place / "out" / "alarms" / "999.safetensors").write_text("of an earlier run")
    assert run("--epsilons", "0.5,1", "--attacks", "deepfool", "--audit", "--out", "out") == 1
    assert "ALARM" in capsys.readouterr().err
    facts = json.loads((place / "out" / "summary.json").read_text())
    assert len(facts["alarms"]) >= 8
    assert {path.name for path in (place / "out" / "alarms").iterdir()} == {
        f"{alarm['index']}.safetensors" for alarm in facts["alarms"]
    }
    alarm = facts["alarms"][0]
    from robustflow import checkpoints

    pair, metadata = checkpoints.read_tensors(place / "out" / alarm["file"])
    assert metadata == {"index": alarm["index"]}
    assert torch.equal(pair["image"], data.load("digits").splits["test"].images()[alarm["index"]])
    distance = (pair["adversarial"].double() - pair["image"].double()).norm().item()
    assert distance == pytest.approx(alarm["adversarial_norm"], rel=1e-6)
    assert alarm["confirmed_in_float64"] is True


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
batch_size = 400
crop = 0
flip = false
[evaluate]
images = 6
epsilons = [0, 0.2]
attacks = ["deepfool"]
[[models]]
name = "one"
regime = "sharp"
"""


def test_a_directory_of_ours(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "tiny.toml").write_text(CONFIG)
    assert cli.main(["train", "tiny.toml", "--out", "bench", "--device", "cpu"]) == 0
    arguments = ["evaluate", "--model", "bench/models/one", "--images", "8", "--device", "cpu"]
    assert cli.main([*arguments, "--attacks", "deepfool", "--out", "out"]) == 0
    facts = json.loads((place / "out" / "summary.json").read_text())
    card = json.loads((place / "bench" / "models" / "one" / "card.json").read_text())
    assert facts["model"]["weights_sha256"] == card["sha256"]
    assert facts["config"]["dataset"] == "digits"
    own = own_model.load("bench/models/one", None, None, None)
    split = own.images.splits["test"].head(8)
    assert isinstance(own.model, nn.Module)
    certificate = certify(own.model, split.images(), split.labels)
    assert facts["lipschitz_bound"] == certificate.lipschitz
    rows = pd.read_csv(place / "out" / "samples.csv")
    assert np.allclose(rows["certified_radius"], certificate.radii, rtol=1e-12)
    capsys.readouterr()
    assert cli.main([*arguments, "--weights", "x.safetensors"]) == 2
    assert "has weights of its own" in capsys.readouterr().err


def test_killed_on_the_way_it_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from robustflow import bracket_files

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    arguments = ("--epsilons", "0.1,0.5", "--attacks", "deepfool", "--out", "out")
    with monkeypatch.context() as patch:
        patch.setattr(bracket_files, "save", killed)
        assert run(*arguments) == 130
    (shard,) = (place / "out" / "shards").iterdir()
    before = shard.stat().st_mtime_ns

    def unneeded(*_: Any, **__: Any) -> None:
        raise AssertionError("the shard was there")

    import attacks.shards

    with monkeypatch.context() as patch:
        patch.setattr(attacks.shards, "execute", unneeded)
        assert shard.stat().st_mtime_ns == before
        assert run(*arguments) == 0
    assert not (place / "out" / "shards").exists()
    assert (place / "out" / "summary.json").exists()


def test_loading_says_what_is_wrong_without_a_command_line() -> None:
    with pytest.raises(UserError, match="neither package"):
        own_model.load("mine_h3", None, "digits", None)
