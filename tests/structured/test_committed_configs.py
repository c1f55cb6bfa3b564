"""Every config of configs/structured: what it says of itself, its control, and its whole path in a few seconds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from robustflow import cli
from robustflow import config as configs
from robustflow.structured import mechanics, populations, presnov, volumes
from robustflow.structured.bench import Bench, parameter_count
from robustflow.structured.catalogue import SYSTEMS
from robustflow.structured.config import StructuredExperiment, from_dict

ROOT = Path(__file__).parents[2]
PATHS = sorted((ROOT / "configs" / "structured").glob("*.toml"))
CONTROLS = {"free", "direct"}  # the kinds of network that keep nothing
each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def read(path: Path) -> StructuredExperiment:
    return from_dict(*configs.read_toml(path))


def controls(experiment: StructuredExperiment) -> list[str]:
    return [model.name for model in experiment.models if CONTROLS & set(map(str, model.network.values()))]


def sizes(experiment: StructuredExperiment) -> dict[str, int]:
    bench = Bench(experiment, Path("nowhere"))
    bench.__dict__["examples"] = lambda seed: (bench.test, bench.test)
    return {model.name: parameter_count(bench.build(model, 0)) for model in experiment.models}


def shrunk(raw: dict[str, Any]) -> dict[str, Any]:
    """The same models and options, two epochs of a few examples."""

    def quick(train: dict[str, Any]) -> dict[str, Any]:
        return train | {"epochs": 2, "batch_size": 4, "log_every": 1}

    small = {"train": 8, "validation": 4, "test": 4}
    if "grid" in SYSTEMS[raw["system"]].options.model_fields:
        small["grid"] = 20
    raw = raw | {"data": raw["data"] | small, "train": quick(raw["train"])}
    models = [model | ({"train": quick(model["train"])} if "train" in model else {}) for model in raw["models"]]
    return raw | {"models": models}


def test_every_system_of_ordinary_equations_has_a_config() -> None:
    there = {read(path).system for path in PATHS}
    ordinary = [*populations.SYSTEMS, *mechanics.SYSTEMS, *volumes.SYSTEMS]
    assert {system.name for system in ordinary} | {"regression", "flow-learning", "flow-mixed"} <= there <= set(SYSTEMS)
    dimensions = {read(path).options()["dimension"] for path in PATHS if read(path).system == "volume"}
    assert {dimension % 2 for dimension in dimensions} >= {1}


@each
def test_a_config_has_five_seeds_a_control_and_a_decaying_rate(path: Path) -> None:
    experiment = read(path)
    assert experiment.seeds == (0, 1, 2, 3, 4)
    names = controls(experiment)
    assert names
    assert len(names) < len(experiment.models)
    assert all(model.train.schedule in ("one-cycle", "cosine") for model in experiment.models)
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert re.match(r"# \S.*\.\n#\n# Source    \S", head), head
    assert f"# Command   robustflow bench structured/{path.stem}\n" in head
    assert re.search(r"\n# Cost      .*\d", head), head
    assert f"\n# Expected  results/structured/{path.stem}/table.md" in head
    assert cli.main(["list", "configs"]) == 0


@each
def test_the_control_has_the_size_of_a_structured_model(path: Path) -> None:
    experiment = from_dict(shrunk(configs.read_toml(path)[0]))
    count = sizes(experiment)
    free = controls(experiment)
    for name in free:
        nearest = min(abs(count[name] / count[other] - 1) for other in count if other not in free)
        assert nearest < 0.1, count


@each
def test_a_config_runs_from_one_end_to_the_other(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is trained, measured, tabulated and drawn; long orbits are cut short."""
    monkeypatch.setattr(populations, "DRIFT_STEPS", 10)
    monkeypatch.setattr(presnov, "DRIFT_STEPS", 10)
    monkeypatch.setattr(mechanics, "TIME", 40.0)
    monkeypatch.setattr(volumes, "TIME", 40.0)
    monkeypatch.setattr(volumes, "STEPS", 10)
    raw = shrunk(configs.read_toml(path)[0])
    monkeypatch.setattr(configs, "read_toml", lambda _: (raw, path.name))
    out = tmp_path / "out"
    torch.manual_seed(0)
    assert cli.main(["bench", str(path), "--seed", "0", "--out", str(out), "--device", "cpu"]) == 0
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    trained = [model for model in summary["models"] if model["trained"]]
    assert [model["name"] for model in trained] == [model["name"] for model in raw["models"]]
    assert all(model["training"][0]["epochs"] == 2 for model in trained)
    assert all(any(figure["mean"] is not None for figure in model["figures"].values()) for model in trained)
    page = (out / "report.html").read_text(encoding="utf-8")
    pictures = list((out / "plots").glob("*.png"))
    assert len(pictures) >= 2
    assert page.count("data:image/png;base64,") == len(pictures)
