"""`robustflow measure training`: that time goes to the phase where it was spent, and that rates are what they say."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from robustflow import cli, config, image_task, operators
from robustflow.config import ModelConfig
from robustflow.measurements import training_cost
from robustflow.networks import create_model, multiply_adds

PAUSE = 0.05


def tiny(name: str, model: str) -> ModelConfig:
    found = config.read("quickstart").model("nonexpansive")
    network = found.network.model_copy(update={"channels": (4, 6), "mirror": False})
    loss = config.HingeLoss(kind="hinge", margin=0.3)
    train = found.train.model_copy(update={"batch_size": 4, "optimizer": "sgd", "loss": loss})
    return found.model_copy(update={"network": network, "train": train})


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_cost, "_find", tiny)
    monkeypatch.setattr(training_cost, "SUBJECTS", (("cifar10/cpu", "nonexpansive"),))
    monkeypatch.setattr(training_cost, "STEPS", 3)
    monkeypatch.setattr(training_cost, "WARM", 1)


def measured(tmp_path: Path, part: str) -> dict[str, Any]:
    out = tmp_path / "training"
    assert cli.main(["measure", "training", "--out", str(out), "--only", part]) == 0
    assert (out / "plots" / f"{part}.png").is_file()
    found: dict[str, Any] = json.loads((out / f"{part}.json").read_text())
    assert f"robustflow measure training --out {out} --only {part}" in (out / "table.md").read_text()
    return found


def test_rates_are_operations_over_seconds(tmp_path: Path) -> None:
    part = measured(tmp_path, "profile")
    assert [row["precision"] for row in part["rows"]] == ["float32", "bfloat16"]
    model = create_model("nonexpansive", channels=(4, 6), layers=2, kernel="patch", lift="patch")
    for row in part["rows"]:
        seconds = row["seconds"]
        assert set(seconds) == {*training_cost.PHASES, "step"}
        assert min(seconds.values()) > 0
        assert seconds["step"] == pytest.approx(sum(seconds[phase] for phase in training_cost.PHASES))
        # A step is one pass forward and two of its cost back, at two operations a multiply-add.
        done = row["operations_per_second"] * seconds["step"]
        assert done == pytest.approx(3 * 2 * row["batch"] * multiply_adds(model))
        assert row["share_of_peak"] == pytest.approx(row["operations_per_second"] / row["convolution_peak"])


@pytest.mark.parametrize("phase", ["data", "forward", "constraint"])
def test_time_is_charged_to_the_phase_that_took_it(
    phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {
        "data": (image_task, "augment"),
        "forward": (operators.UnitRowLinear, "forward"),
        "constraint": (operators.UnitRowLinear, "constrain_"),
    }
    where, name = places[phase]
    whole = getattr(where, name)

    def slower(*arguments: Any, **options: Any) -> Any:
        time.sleep(PAUSE)
        return whole(*arguments, **options)

    monkeypatch.setattr(where, name, slower)
    for row in measured(tmp_path, "profile")["rows"]:
        assert row["seconds"][phase] >= PAUSE
        assert max(row["seconds"], key=lambda key: row["seconds"][key] if key != "step" else 0.0) == phase


def test_the_two_loops_see_the_same_number_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    whole = training_cost.PlainImages.__getitem__
    monkeypatch.setattr(
        training_cost.PlainImages, "__getitem__", lambda self, index: (seen.append(index), whole(self, index))[1]
    )
    part = measured(tmp_path, "loop")
    assert sorted(seen) == sorted(2 * list(range(4 * 4))), "every image once in each of two runs"
    for name, seconds in part["seconds_a_step"].items():
        assert part["images_per_second"][name] == pytest.approx(4 / min(seconds))
    rates = part["images_per_second"]
    assert part["ratios"] == {name: pytest.approx(rates[name] / rates["plain"]) for name in ("float32", "bfloat16")}
