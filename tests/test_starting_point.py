"""A training that begins with the weights of another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from robustflow import bench, checkpoints, data
from robustflow.config import Experiment, from_dict
from robustflow.errors import UserError
from robustflow.training import STATE, WEIGHTS

DIGITS = data.load("digits")


def experiment(**train: Any) -> Experiment:
    return from_dict(
        {
            "title": "t", "dataset": "digits",
            "network": {"channels": [4], "layers": 2, "kernel": "patch", "lift": "patch"},
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


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda first: (first / WEIGHTS).write_bytes(b"x"), "is not the file that"),
        (lambda first: (first / "card.json").unlink(), "holds no trained model"),
        (lambda first: first.rename(first.parent / "n"), "no trained model"),
    ],
)
def test_a_broken_start_is_one_line_and_no_training(tmp_path: Path, harm: Any, message: str) -> None:
    first = train(tmp_path / "first")
    harm(first)
    with pytest.raises(UserError, match=message):
        train(tmp_path / "on", start=str(first))
    assert not (tmp_path / "on" / "models" / "m" / STATE).exists()


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    first = train(tmp_path / "first")
    wider = experiment(start=str(first))
    network = wider.models[0].network.model_copy(update={"channels": (8,)})
    wider = wider.model_copy(update={"models": (wider.models[0].model_copy(update={"network": network}),)})
    with pytest.raises(UserError, match="another architecture"):
        bench.train(wider, tmp_path / "on", DIGITS, device=torch.device("cpu"))
