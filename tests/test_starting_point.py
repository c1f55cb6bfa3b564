"""A training that begins with the weights of another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from robustflow import bench, checkpoints, data
from robustflow.config import Experiment, from_dict
from robustflow.errors import UserError
from robustflow.operators import Convolution
from robustflow.starting_point import find_start
from robustflow.training import STATE, WEIGHTS, Training

DIGITS = data.load("digits")


def experiment(network: dict[str, Any] | None = None, **train: Any) -> Experiment:
    patches = {"channels": [4], "layers": 2, "kernel": "patch", "lift": "patch"}
    return from_dict(
        {
            "title": "t", "dataset": "digits",
            "network": patches if network is None else network,
            "train": {"epochs": 2, "batch_size": 150, "crop": 1, "flip": False, "validate_images": 50} | train,
            "evaluate": {"epsilons": [0.1]}, "models": [{"name": "m", "regime": "sharp"}],
        }
    )  # fmt: skip


def train(out: Path, **options: Any) -> Path:
    bench.train(experiment(**options), out, DIGITS, device=torch.device("cpu"))
    return out / "models" / "m"


def test_it_begins_there_and_its_seconds_count(tmp_path: Path) -> None:
    first = train(tmp_path / "first")
    still = train(tmp_path / "still", start=str(first), epochs=1, learning_rate=1e-12, muon_learning_rate=1e-12)
    before, after = (checkpoints.read_tensors(folder / WEIGHTS)[0] for folder in (first, still))
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-5)
    card, source = (json.loads((folder / "card.json").read_text()) for folder in (still, first))
    assert card["start"] == {"name": "m", "sha256": source["sha256"], "seconds": source["seconds"]}
    own = json.loads((still / "train.jsonl").read_text().splitlines()[-1])["seconds"]
    assert card["seconds"]["train"] == pytest.approx(source["seconds"]["train"] + own, abs=0.5)
    assert card["seconds"]["train"] > source["seconds"]["train"]
    fresh = json.loads((train(tmp_path / "fresh", epochs=1) / "train.jsonl").read_text().splitlines()[-1])
    on = json.loads((train(tmp_path / "on", start=str(first)) / "train.jsonl").read_text().splitlines()[-1])
    assert on["loss"] < fresh["loss"]


def test_the_weights_decide_and_not_their_path(tmp_path: Path) -> None:
    first = train(tmp_path / "first")
    (tmp_path / "moved").mkdir()
    first.rename(tmp_path / "moved" / "m")
    moved = tmp_path / "moved" / "m"
    train(tmp_path / "on", start=str(moved), epochs=1)
    moved.rename(first)
    train(tmp_path / "on", start=str(first), epochs=1)  # finished: nothing to do
    other = train(tmp_path / "other", learning_rate=1e-2)
    with pytest.raises(UserError, match="another config, seed or data"):
        train(tmp_path / "on", start=str(other), epochs=1)


def test_a_name_on_the_search_path_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(tmp_path / "models-of-mine" / "first")
    monkeypatch.setenv("ROBUSTFLOW_MODELS", str(tmp_path / "models-of-mine"))
    on = train(tmp_path / "on", start="first/m", epochs=1)
    assert json.loads((on / "card.json").read_text())["start"]["sha256"] == checkpoints.sha256(first / WEIGHTS)


def change(folder: Path, **content: Any) -> None:
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps(card | content))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda first: (first / WEIGHTS).write_bytes(b"x"), "is not the file that"),
        (lambda first: (first / "card.json").unlink(), "holds no trained model"),
        (lambda first: first.rename(first.parent / "n"), "no trained model"),
        (lambda first: (first / WEIGHTS).unlink(), "is missing"),
        (lambda first: (first / "card.json").write_text("[]"), "train.start of m: .*card.json"),
        (lambda first: change(first, seconds={}), "train.start of m: .*seconds"),
    ],
)
def test_a_broken_start_is_one_line_and_no_training(tmp_path: Path, harm: Any, message: str) -> None:
    first = train(tmp_path / "first")
    harm(first)
    with pytest.raises(UserError, match=message):
        train(tmp_path / "on", start=str(first))
    assert not (tmp_path / "on" / "models" / "m" / STATE).exists()


@pytest.mark.parametrize(
    ("network", "regime", "message"),
    [
        ({"channels": (8,)}, "sharp", r"channels is \(8,\) here and \(4,\) in"),
        ({"normalize": "standardize"}, "sharp", "normalize is standardize here and center in"),
        ({}, "prescribed", "regime is prescribed here and sharp in"),
    ],
)
def test_another_network_is_refused(network: dict[str, Any], regime: str, message: str, tmp_path: Path) -> None:
    first = train(tmp_path / "first")
    model = experiment(start=str(first)).models[0]
    model = model.model_copy(update={"regime": regime, "network": model.network.model_copy(update=network)})
    other = experiment().model_copy(update={"models": (model,)})
    with pytest.raises(UserError, match=f"train.start of m: {message}"):
        bench.train(other, tmp_path / "on", DIGITS, device=torch.device("cpu"))


def test_what_is_trained_needs_its_start_no_longer(tmp_path: Path) -> None:
    first = train(tmp_path / "first")
    on = train(tmp_path / "on", start=str(first), epochs=1)
    shutil.rmtree(first)
    before = (on / WEIGHTS).read_bytes()
    train(tmp_path / "on", start=str(first), epochs=1)
    assert (on / WEIGHTS).read_bytes() == before
    with pytest.raises(UserError, match="another config"):
        train(tmp_path / "on", start=str(first), epochs=2)


def test_a_start_of_a_start_counts_all_seconds(tmp_path: Path) -> None:
    first = train(tmp_path / "first", epochs=1)
    second = train(tmp_path / "second", start=str(first), epochs=1)
    third = json.loads((train(tmp_path / "third", start=str(second), epochs=1) / "card.json").read_text())
    one, two = (json.loads((folder / "card.json").read_text())["seconds"]["train"] for folder in (first, second))
    assert third["start"]["seconds"]["train"] == two > one
    assert third["seconds"]["train"] > two


def test_kernels_of_convolutions_are_not_stretched_by_the_first_update(tmp_path: Path) -> None:
    """Power iteration stands where the random kernels stretched most, until it is told of those that were loaded."""
    options: dict[str, Any] = {"epochs": 4, "network": {"channels": [8], "layers": 4}}
    first = train(tmp_path / "first", **options)
    subject = experiment(start=str(first), **options).models[0]
    torch.manual_seed(0)
    model = bench.build_model(subject, DIGITS)
    start = find_start(subject)
    assert start is not None
    start.load(model)
    kernels = [module for module in model.modules() if isinstance(module, Convolution)]
    assert len(kernels) > 2
    for kernel in kernels:
        before = float(kernel.weight.detach().norm())
        kernel.constrain_()
        # Stored kernels have a proved norm of at most 1, which one step of training brings to 1: a few percent.
        assert float(kernel.weight.detach().norm()) == pytest.approx(before, rel=0.08)


def test_it_goes_on_after_a_kill_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(tmp_path / "first", epochs=1)
    whole = train(tmp_path / "whole", start=str(first), epochs=3)
    step, steps = Training.step, 0

    def dies(self: Training, batch: torch.Tensor) -> None:
        nonlocal steps
        steps += 1
        if steps == 12:
            raise KeyboardInterrupt
        step(self, batch)

    monkeypatch.setattr(Training, "step", dies)
    options = {"start": str(first), "epochs": 3, "checkpoint_seconds": 1e-9}
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", **options)
    assert (tmp_path / "killed" / "models" / "m" / STATE).exists()
    killed = train(tmp_path / "killed", **options)
    assert (killed / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
