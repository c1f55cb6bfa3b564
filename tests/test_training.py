"""Training: the same weights however often it is interrupted, never a NaN model, nothing trained twice."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from robustflow import account, bench, checkpoints, data
from robustflow.config import Experiment, TrainConfig, from_dict
from robustflow.errors import UserError
from robustflow.optimizers import build_optimizers, schedule
from robustflow.training import LOG, STATE, WEIGHTS, Training

CPU = torch.device("cpu")
DIGITS = data.load("digits")


def experiment(
    regime: str = "sharp", *, seed: int = 0, network: dict[str, Any] | None = None, **train: Any
) -> Experiment:
    lift = {} if regime in ("unconstrained", "resnet") else {"kernel": "patch", "lift": "patch"}
    return from_dict(
        {
            "title": "t", "dataset": "digits", "seed": seed,
            "network": {"channels": [4], "layers": 2} | lift | (network or {}),
            "train": {"epochs": 3, "batch_size": 150, "crop": 1, "flip": False, "validate_images": 50} | train,
            "evaluate": {"epsilons": [0.1]}, "models": [{"name": "m", "regime": regime}],
        }
    )  # fmt: skip


def train(chosen: Experiment, out: Path) -> Path:
    bench.train(chosen, out, DIGITS, device=CPU)
    return out / "models" / "m"


def result(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    tensors, _ = checkpoints.read_tensors(folder / WEIGHTS)
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    return tensors, [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def same(one: Path, other: Path) -> None:
    (weights, log), (weights_2, log_2) = result(one), result(other)
    assert weights.keys() == weights_2.keys()
    for name in weights:
        assert torch.equal(weights[name], weights_2[name]), name
    assert log == log_2
    assert (one / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()


class Killed(BaseException):
    """As SIGKILL, no handler of the training sees it: nothing is saved on the way out."""


@pytest.mark.parametrize(
    ("regime", "options"),
    [
        ("sharp", {"optimizer": "muon"}),
        ("flexible", {"optimizer": "nadam", "schedule": "cosine"}),
        ("nonexpansive", {"optimizer": "sgd", "schedule": "constant", "learning_rate": 0.05,
                          "network": {"kernel": "convolution", "lift": "convolution"}}),
        ("resnet", {"optimizer": "nadam", "flip": True}),
        ("unconstrained", {"optimizer": "sgd", "learning_rate": 0.05, "precision": "bfloat16"}),
    ],
)  # fmt: skip
def test_interrupted_again_and_again_it_ends_with_the_same_weights(
    regime: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(experiment(regime, **options), tmp_path / "whole")
    chosen = experiment(regime, checkpoint_seconds=1e-9, **options)
    step, end = Training.step, Training._end_epoch
    rng, interruptions = random.Random(regime), []

    def interrupted(self: Training, batch: torch.Tensor) -> None:
        moment = rng.random()
        if moment < 0.08:
            raise Killed
        step(self, batch)
        if moment > 0.92:  # the step is done, its checkpoint is not written
            raise Killed

    def after_the_log(self: Training) -> dict[str, Any]:
        line = end(self)
        if rng.random() < 0.4:
            if rng.random() < 0.5:
                with (self.directory / LOG).open("a") as log:
                    log.write('{"epoch": 7, "st')  # cut off in the middle of a line
            raise Killed
        return line

    monkeypatch.setattr(Training, "step", interrupted)
    monkeypatch.setattr(Training, "_end_epoch", after_the_log)
    for _ in range(200):
        try:
            folder = train(chosen, tmp_path / "parts")
            break
        except Killed:
            interruptions.append(1)
            assert not (tmp_path / "parts" / "models" / "m" / WEIGHTS).exists()
    assert len(interruptions) >= 2
    same(whole, folder)
    assert not (folder / STATE).exists()
    assert bench.read_card(folder)["sha256"] == bench.read_card(whole)["sha256"]


PROGRAM = """
import sys, time, torch
from pathlib import Path
from robustflow import bench, data
from robustflow.config import Experiment
from robustflow.training import Training
torch.set_num_threads(1)
step, taken = Training.step, 0
def held(self, batch):  # on a machine that is too quick for the test: until it is killed
    global taken
    if taken == 60:
        time.sleep(250)
        sys.exit("nobody killed it")
    step(self, batch)
    taken += 1
Training.step = held
experiment = Experiment.model_validate_json(Path(sys.argv[1]).read_text())
bench.train(experiment, Path(sys.argv[2]), data.load("digits"), device=torch.device("cpu"))
"""


def test_killed_by_the_system_at_random_moments_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    chosen = experiment("sharp", optimizer="muon", epochs=12, batch_size=50, checkpoint_seconds=1e-9)
    (tmp_path / "config.json").write_text(chosen.model_dump_json())
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "config.json"), str(tmp_path / "parts")]
    folder = tmp_path / "parts" / "models" / "m"
    rng, steps = random.Random(0), [0]
    for _ in range(3):
        process = subprocess.Popen(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        before = (folder / STATE).stat().st_mtime_ns if (folder / STATE).exists() else 0
        while process.poll() is None:
            if (folder / STATE).exists() and (folder / STATE).stat().st_mtime_ns != before:
                time.sleep(rng.uniform(0.0, 0.15))  # it is in its loop
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors.decode()[-500:]
        assert not (folder / WEIGHTS).exists()
        _, metadata = checkpoints.read_tensors(folder / STATE)  # whole, whenever the signal came
        steps.append(metadata["progress"]["step"])
        assert steps[-2] < steps[-1] <= steps[-2] + 60 < 12 * 24
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rarely = experiment("sharp", optimizer="muon", epochs=12, batch_size=50)
        same(train(rarely, tmp_path / "whole"), train(rarely, tmp_path / "parts"))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("regime", ["unconstrained", "sharp", "nonexpansive"])
def test_divergence_is_a_message_and_no_model(regime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = experiment(regime, optimizer="nadam", learning_rate=1e30, schedule="constant")
    if regime != "unconstrained":  # bounded by its constraints: a NaN has to be planted
        step = Training.step

        def poisoned(self: Training, batch: torch.Tensor) -> None:
            step(self, batch)
            if self.progress.step == 10:
                self.model.head.weight.data[0, 0] = torch.nan

        monkeypatch.setattr(Training, "step", poisoned)
    with pytest.raises(UserError, match=r"^training of m diverged at step \d+ [^\n]*learning rate[^\n]*$"):
        train(chosen, tmp_path)
    assert not (tmp_path / "models" / "m" / WEIGHTS).exists()
    assert not (tmp_path / "models" / "m" / bench.CARD).exists()


@pytest.mark.parametrize("regime", ["unconstrained", "sharp", "flexible"])
def test_divergence_in_the_very_last_step_is_seen(regime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Training.step

    def poisoned(self: Training, batch: torch.Tensor) -> None:
        step(self, batch)
        if self.progress.step == self.total:
            for parameter in self.model.parameters():
                parameter.data.fill_(torch.nan)

    monkeypatch.setattr(Training, "step", poisoned)
    with pytest.raises(UserError, match=r"^[^\n]*(NaN|not finite)[^\n]*$"):
        train(experiment(regime, epochs=1), tmp_path)
    assert not (tmp_path / "models" / "m" / WEIGHTS).exists()


def test_a_finished_model_is_left_alone_and_a_changed_config_is_an_error(tmp_path: Path) -> None:
    folder = train(experiment(epochs=1), tmp_path)
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    assert sorted(before) == sorted([bench.CARD, WEIGHTS, LOG])

    def untouched() -> None:
        assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()} == before

    train(experiment(epochs=1), tmp_path)
    train(experiment(epochs=1, checkpoint_seconds=5.0), tmp_path)  # how often it is saved decides nothing
    untouched()
    for changed in (experiment(epochs=2), experiment(epochs=1, seed=1), experiment("flexible", epochs=1)):
        with pytest.raises(UserError, match=r"^[^\n]*another config, seed or data[^\n]*--out[^\n]*$"):
            train(changed, tmp_path)
        untouched()
    other = data.ImageSet(
        DIGITS.name,
        {**DIGITS.splits, "train": DIGITS.splits["train"].head(1199)},
        DIGITS.class_names,
        DIGITS.mean,
        DIGITS.std,
        "",
    )
    with pytest.raises(UserError, match="another config, seed or data"):
        bench.train(experiment(epochs=1), tmp_path, other, device=CPU)
    untouched()


def test_a_started_training_is_not_continued_with_another_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def killed(self: Training, started: float) -> float:
            raise Killed

        patch.setattr(Training, "_finish", killed)
        with pytest.raises(Killed):
            train(experiment(checkpoint_seconds=1e-9), tmp_path)
    state = tmp_path / "models" / "m" / STATE
    before = state.read_bytes()
    with pytest.raises(UserError, match=r"^[^\n]*belongs to a training with another config[^\n]*$"):
        train(experiment(epochs=4), tmp_path)
    assert state.read_bytes() == before
    state.write_bytes(before[: len(before) // 2])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        train(experiment(), tmp_path)


def test_log_and_card(tmp_path: Path) -> None:
    folder = train(experiment(epochs=2), tmp_path)
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    assert [(line["epoch"], line["step"], line["validation_n"]) for line in lines] == [(1, 8, 50), (2, 16, 197)]
    assert lines[1]["loss"] < lines[0]["loss"]
    assert lines[0]["seconds"] < lines[1]["seconds"]
    card = bench.read_card(folder)
    chosen = experiment(epochs=2).models[0]
    model = bench.load_model(chosen, DIGITS, folder)
    split = DIGITS.splits["validation"]
    with torch.no_grad():
        right = (model(split.images()).argmax(1) == split.labels).float().mean()
    assert lines[1]["validation_accuracy"] == pytest.approx(float(right)), "the stored weights are those validated"
    assert card["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert card["data"]["train_n"] == 1200
    for weight in model.orthonormal_weights():
        assert (torch.linalg.svdvals(weight.detach().double()) - 1).abs().max() < 1e-6


def test_stored_convolutions_have_a_proved_norm_not_an_estimated_one(tmp_path: Path) -> None:
    chosen = experiment("nonexpansive", epochs=1, network={"kernel": "convolution", "lift": "convolution"})
    model = bench.load_model(chosen.models[0], DIGITS, train(chosen, tmp_path))
    assert account(model.features, (1, 8, 8)).lipschitz < 1 + 1e-6


def expected(kind: str) -> Callable[[float], float]:
    """The schedules, piece by piece."""
    if kind == "one-cycle":
        return lambda p: 0.1 + 0.9 * p / 0.25 if p < 0.25 else 0.5 + 0.5 * math.cos(math.pi * (p - 0.25) / 0.75)
    if kind == "cosine":
        return lambda p: 0.5 + 0.5 * math.cos(math.pi * p)
    if kind == "steps":
        return lambda p: 1.0 if p < 0.3 else 0.1 if p < 0.6 else 0.01 if p < 0.9 else 0.001
    return lambda p: 1.0


@pytest.mark.parametrize("kind", ["one-cycle", "cosine", "steps", "constant"])
def test_schedules(kind: str) -> None:
    config = TrainConfig(epochs=100, schedule=kind, warmup=0.25, step_every=30)  # type: ignore[arg-type]
    for progress in (0.0, 0.1, 0.24, 0.25, 0.3, 0.5, 0.61, 0.75, 0.9, 0.999):
        assert schedule(config, progress) == pytest.approx(expected(kind)(progress), abs=1e-12)
    assert schedule(TrainConfig(epochs=1, warmup=0.0), 0.0) == 1.0


@pytest.mark.parametrize("optimizer", ["sgd", "nadam", "muon"])
def test_every_parameter_has_exactly_one_optimizer(optimizer: str) -> None:
    chosen = experiment("sharp", optimizer=optimizer)
    model = bench.build_model(chosen.models[0], DIGITS)
    groups = [group for built in build_optimizers(model, chosen.models[0].train) for group in built.param_groups]
    updated = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(updated) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
