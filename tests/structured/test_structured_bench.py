"""A system from its config to its report: on a planted one, whose every number is known."""

from __future__ import annotations

import json
import math
import random
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from robustflow import checkpoints, cli
from robustflow.structured import bench as stages
from robustflow.structured.config import UnrollConfig
from robustflow.structured.systems import Data, System
from robustflow.structured.task import UnrollTask, rollout
from robustflow.training import LOG, STATE, WEIGHTS, Training, generator

pytestmark = pytest.mark.usefixtures("planted")
CPU = torch.device("cpu")
EXACT = math.exp(-0.25)


def run(*arguments: Any) -> int:
    return cli.main([str(argument) for argument in arguments])


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def snapshot(out: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path.relative_to(out)): (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*.*")
            if path.is_file()}  # fmt: skip


@pytest.fixture
def out(config: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    assert run("bench", config, "--out", folder, "--device", "cpu") == 0
    return folder


def test_the_files_and_the_figures_by_hand(out: Path) -> None:
    for seed in (0, 1, 2):
        for name in ("scale", "matrix"):
            folder = out / f"seed-{seed}" / "models" / name
            assert {path.name for path in folder.iterdir()} == {WEIGHTS, LOG, "card.json"}
            assert read(folder / "card.json")["seed"] == seed
            assert (out / f"seed-{seed}" / "measured" / f"{name}.json").is_file()
            assert (out / f"seed-{seed}" / "measured" / f"{name}.safetensors").is_file()
    factors = [float(load_file(out / f"seed-{seed}/models/scale/{WEIGHTS}")["factor"]) for seed in (0, 1, 2)]
    errors = [abs(factor - EXACT) for factor in factors]
    assert len(set(factors)) == 3
    assert max(errors) < 0.02, "it has learned e^−δt"
    summary = read(out / "summary.json")
    assert summary["seeds"] == [0, 1, 2]
    scale, matrix, exact = summary["models"]
    figure = scale["figures"]["error of e^−δt"]
    assert figure["n"] == 3
    assert figure["values"] == pytest.approx(errors, rel=1e-12)
    assert figure["mean"] == pytest.approx(sum(errors) / 3, rel=1e-12)
    deviation = math.sqrt(sum((error - sum(errors) / 3) ** 2 for error in errors) / 2)
    assert figure["deviation"] == pytest.approx(deviation, rel=1e-12)
    assert (exact["name"], exact["trained"], exact["parameters"]) == ("exact", False, 1)
    assert exact["figures"]["error of e^−δt"] == {"n": 1, "mean": 0.0, "deviation": None, "values": [0.0]}
    assert matrix["figures"]["time to blow up"] == {
        "n": 3, "mean": None, "deviation": None, "values": [None, None, None]}  # fmt: skip
    assert (matrix["parameters"], matrix["config"]["train"]["optimizer"]) == (4, "sgd")
    assert scale["seconds"]["train"]["mean"] == pytest.approx(
        statistics.fmean(sum(read(out / f"seed-{s}/models/scale/card.json")["seconds"].values()) for s in (0, 1, 2))
    )
    assert torch.__version__.startswith(summary["environment"]["versions"]["torch"])
    table = (out / "table.md").read_text(encoding="utf-8")
    assert "| 0.5 (for scale, another δt, published) |" in table
    assert "| not finite in 3 of 3 |" in table
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "ẋ = −x" in page
    assert page.count("data:image/png;base64,") == 2
    assert {path.name for path in (out / "plots").iterdir()} == {"points.png", "training.png"}


def test_logs_have_the_lines_that_were_asked_for(out: Path) -> None:
    log = lines(out / "seed-0/models/scale" / LOG)
    assert [(line["epoch"], line["step"], line["validation_n"]) for line in log] == [
        (k, 4 * k, 10) for k in range(1, 21)
    ]
    assert log[-1]["validation_loss"] < log[0]["validation_loss"]
    log = lines(out / "seed-0/models/matrix" / LOG)
    assert [line["epoch"] for line in log] == [8, 16, 20], "every eighth, and the last"


def test_the_report_is_rebuilt_from_the_committed_files(out: Path, planted: System) -> None:
    before = snapshot(out)
    for name in ("summary.json", "table.md", "table.csv", "report.html"):
        (out / name).unlink()
    shutil.rmtree(out / "plots")
    for weights in out.rglob(WEIGHTS):
        weights.unlink()
    count = planted.measurements  # type: ignore[attr-defined]
    assert run("report", out) == 0
    assert planted.measurements == count  # type: ignore[attr-defined]
    after = snapshot(out)
    assert {name: content for name, (_, content) in before.items() if not name.endswith(WEIGHTS)} == {
        name: content for name, (_, content) in after.items()
    }


def test_a_second_run_does_nothing_again(out: Path, config: Path, planted: System) -> None:
    before, count = snapshot(out), planted.measurements  # type: ignore[attr-defined]
    assert run("bench", config, "--out", out) == 0
    after = snapshot(out)
    assert planted.measurements == count  # type: ignore[attr-defined]
    assert {n: c for n, (_, c) in before.items()} == {n: c for n, (_, c) in after.items()}
    kept = [name for name in before if name.startswith(("seed-", "prepared"))]
    assert all(before[name] == after[name] for name in kept)


def test_measured_again_when_the_test_examples_change_and_refused_when_the_training_does(
    out: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = checkpoints.sha256(out / "seed-0/models/scale" / WEIGHTS)
    text = config.read_text()
    config.write_text(text.replace("test = 20", "test = 21"))
    assert run("bench", config, "--out", out) == 0
    assert read(out / "seed-0/measured/scale.json")["test_n"] == 21
    assert checkpoints.sha256(out / "seed-0/models/scale" / WEIGHTS) == weights
    note = (out / "config.json").read_bytes()
    for old, new in (
        ("train = 40", "train = 41"),
        ("offsets = [0.5", "offsets = [0.6"),
        ("epochs = 20", "epochs = 21"),
    ):
        config.write_text(text.replace(old, new))
        assert run("bench", config, "--out", out) == 2
        assert "another config, seed or data" in capsys.readouterr().err
    assert (out / "config.json").read_bytes() == note


class Killed(BaseException):
    """As SIGKILL, no handler of the training sees it: nothing is saved on the way out."""


def test_killed_again_and_again_it_ends_with_the_same_weights(
    out: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.write_text(config.read_text().replace("[train]", "[train]\ncheckpoint_seconds = 1e-9"))
    step, rng, killed, parts = Training.step, random.Random(1), [], tmp_path / "parts"

    def interrupted(self: Training, batch: Tensor) -> None:
        moment = rng.random()
        if moment < 0.02:
            raise Killed
        step(self, batch)
        if moment > 0.98:
            raise Killed

    monkeypatch.setattr(Training, "step", interrupted)
    for _ in range(200):
        try:
            assert run("train", config, "--out", parts, "--device", "cpu") == 0
            break
        except Killed:
            killed.append(len(list(parts.rglob(STATE))))
    assert len(killed) > 5
    assert sum(killed) > 0, "some left a checkpoint behind"
    for file in (*out.rglob(WEIGHTS), *out.rglob(LOG)):
        other = parts / file.relative_to(out)
        if file.name == WEIGHTS:
            assert other.read_bytes() == file.read_bytes()
        else:
            assert lines(other) == lines(file)
    assert not list(parts.rglob(STATE))


def lines(path: Path) -> list[dict[str, Any]]:
    """A training's log without its times."""
    read = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read]


def test_one_seed_and_one_model_at_a_time(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run("bench", config, "--out", out, "--seed", 1, "--model", "scale") == 0
    assert "no report before" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"config.json", "seed-1", "prepared"}
    assert run("bench", config, "--out", out, "--seed", 1) == 0
    summary = read(out / "summary.json")
    assert summary["seeds"] == [1]
    assert summary["models"][0]["figures"]["test MSE"]["deviation"] is None
    assert summary["notes"] == [f"seed {seed} is not complete and not counted" for seed in (0, 2)]
    assert run("bench", config, "--out", out, "--seed", 7) == 2
    assert "seed 7 is none of the config's seeds, which are 0, 1, 2" in capsys.readouterr().err
    assert run("train", config, "--out", out, "--seeds", "0,2") == 0
    assert sorted(path.name for path in out.glob("seed-*")) == ["seed-0", "seed-1", "seed-2"]


@pytest.mark.parametrize("command", ["certify", "attack"])
def test_nothing_here_is_certified_or_attacked(command: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for target in (out, out / "seed-0", out / "seed-0" / "models" / "scale"):
        assert run(command, target) == 2
        line = capsys.readouterr().err
        assert "holds a structured system: certify and attack are for classifiers" in line
        assert line.count("\n") == 1


def test_damaged_files_are_one_line(out: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = out / "seed-0/models/scale" / WEIGHTS
    tensors = {"factor": torch.tensor(2.0, dtype=torch.float64)}
    checkpoints.write_tensors(weights, tensors)
    shutil.rmtree(out / "seed-0" / "measured")
    assert run("bench", config, "--out", out) == 2
    assert "is not the file that" in capsys.readouterr().err
    page = (out / "report.html").read_bytes()
    (out / "seed-1/measured/scale.json").write_text("{}")
    assert run("report", out) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (out / "report.html").read_bytes() == page


class Count(nn.Module):
    """x ↦ x + 1, the exact flow of the trajectories below; it counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))
        self.calls = 0
        self.seen: set[float] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen |= set(x[:, 0].tolist())
        return x + 1


def counting(**train: Any) -> tuple[Count, UnrollTask]:
    start = torch.zeros(8, 1)
    data = Data(start, torch.arange(1.0, 7.0)[None, :, None].expand(8, 6, 1))
    model = Count()
    return model, UnrollTask(model, data, data, UnrollConfig(epochs=1, batch_size=8, **train), CPU)


def test_windows_lie_anywhere_on_the_trajectory_and_are_in_order() -> None:
    model, task = counting(unroll=(2,))
    for step in range(30):
        loss, _ = task.loss(torch.arange(8), generator(0, step, 1), 0.0)
        assert float(loss) == 0.0
    assert model.seen == {0.0, 1.0, 2.0, 3.0, 4.0, 5.0}


def test_phases_of_the_unrolling_and_the_noise() -> None:
    model, task = counting(unroll=(1, 3, 6))
    calls = []
    for share in (0.0, 0.33, 0.34, 0.66, 0.67, 0.999):
        model.calls = 0
        task.loss(torch.arange(4), generator(0, 1), share)
        calls.append(model.calls)
    assert calls == [1, 1, 3, 3, 6, 6]
    model, task = counting(noise=0.5, unroll=(6,))
    batch = torch.arange(8).repeat(500)
    loss, _ = task.loss(batch, generator(0, 2), 0.0)
    assert float(loss) == pytest.approx(0.25 / 3, rel=0.05), "the variance of a uniform ±1/2, carried along"
    assert min(model.seen) < -0.45
    assert max(model.seen) <= 6.0 + 0.5
    assert float(task.figures({}, 1, False)["validation_loss"]) == 0.0, "validated without noise"


def test_rollout_and_a_regression() -> None:
    states = rollout(Count(), torch.zeros(2, 3), 4)
    assert states.shape == (2, 4, 3)
    assert np.array_equal(states[0, :, 0].numpy(), [1.0, 2.0, 3.0, 4.0])
    model = nn.Linear(3, 1)
    data = Data(torch.randn(5, 3), torch.randn(5, 1, 1))
    task = UnrollTask(model, data, data, UnrollConfig(epochs=1), CPU)
    loss, _ = task.loss(torch.tensor([0, 4]), generator(0), 0.0)
    expected = torch.nn.functional.mse_loss(model(data.inputs[[0, 4]]), data.targets[[0, 4], 0])
    assert torch.allclose(loss, expected)


def test_weights_obey_their_constraints_and_a_model_loads_in_float64(out: Path, planted: System) -> None:
    bench, _ = stages.read_directory(out)
    model = bench.load(bench.experiment.model("matrix"), 2)
    assert next(model.parameters()).dtype == torch.float64
    stored = load_file(out / "seed-2/models/matrix" / WEIGHTS)["weight"]
    assert stored.dtype == torch.float32, "the precision of its training"
    assert load_file(out / "seed-2/models/scale" / WEIGHTS)["factor"].dtype == torch.float64
    scale = bench.build(bench.experiment.model("scale"), 0)
    scale.factor.data.fill_(3.0)
    train, validation = bench.examples(0)
    UnrollTask(scale, train, validation, bench.experiment.models[0].train, CPU).constrain(exact=True)
    assert float(scale.factor.detach()) == 1.0
    assert scale.exactly == 1


def test_list_shows_systems(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list", "systems") == 0
    assert "decay           Decay: ẋ = −x" in capsys.readouterr().out
