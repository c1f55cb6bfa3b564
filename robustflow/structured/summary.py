"""summary.json of a system: every figure over the seeds, counted from the measured files and nothing else."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from robustflow.errors import UserError
from robustflow.structured import measured_files
from robustflow.structured.bench import Bench, read_directory
from robustflow.structured.measured_files import MeasuredRecord
from robustflow.structured.systems import Measured
from robustflow.trained import read_card
from robustflow.training import LOG

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Model:
    """One model of the config, or a prepared one, over the seeds; the lists are in the order of the seeds."""

    name: str
    records: list[MeasuredRecord]
    measured: list[Measured]
    cards: list[dict[str, Any]]  # none of a prepared model
    logs: list[pd.DataFrame]


@dataclass(frozen=True)
class Results:
    bench: Bench
    note: dict[str, Any]  # config.json
    seeds: list[int]  # those of which every model is measured
    waiting: list[int]
    models: list[Model]


def read_results(out: Path) -> Results:
    """Read config.json and what was trained and measured.

    Raises:
        UserError: a file is missing or garbled; no seed is complete.
    """
    bench, note = read_directory(out)
    seeds = bench.complete()
    if not seeds:
        raise UserError(f"{out}: no seed has all its models measured: run `robustflow bench` to the end")
    models = []
    for config in bench.experiment.models:
        folders = [bench.folder(seed, config) for seed in seeds]
        records, measured = _read([bench.measured(seed) for seed in seeds], config.name)
        cards = [read_card(folder) for folder in folders]
        logs = [pd.read_json(folder / LOG, lines=True) for folder in folders if (folder / LOG).is_file()]
        models.append(Model(config.name, records, measured, cards, logs))
    for name in bench.system.prepared():
        records, measured = _read([out / "prepared"], name)
        models.append(Model(name, records, measured, [], []))
    waiting = [seed for seed in bench.experiment.seeds if seed not in seeds]
    return Results(bench, note, seeds, waiting, models)


def _read(folders: Sequence[Path], name: str) -> tuple[list[MeasuredRecord], list[Measured]]:
    pairs = [measured_files.read(folder, name) for folder in folders]
    return [record for record, _ in pairs], [measured for _, measured in pairs]


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation (of the seeds: n − 1); neither where a value is not finite, no deviation of one.

    >>> spread([1.0, 2.0, 3.0])
    {'n': 3, 'mean': 2.0, 'deviation': 1.0, 'values': [1.0, 2.0, 3.0]}
    >>> spread([1.0, math.inf])
    {'n': 2, 'mean': None, 'deviation': None, 'values': [1.0, None]}
    """
    finite = all(math.isfinite(value) for value in values)
    return {
        "n": len(values),
        "mean": statistics.fmean(values) if finite else None,
        "deviation": statistics.stdev(values) if finite and len(values) > 1 else None,
        "values": [value if math.isfinite(value) else None for value in values],
    }


def summarize(results: Results) -> dict[str, Any]:
    """The content of summary.json."""
    system, data = results.bench.system, results.bench.experiment.data
    names = dict.fromkeys(key for model in results.models for one in model.measured for key in one.figures)
    return {
        "schema_version": SCHEMA_VERSION,
        "name": results.note.get("name"),
        "title": results.note.get("title"),
        "command": results.note.get("command"),
        "system": {
            "name": system.name,
            "title": system.title,
            "equations": system.equations,
            "property": system.property,
            "step": system.step,
        },
        "data": data.model_dump(mode="json") | {"options": results.bench.options},
        "seeds": results.seeds,
        "figures": list(names),
        "models": [_model(model) for model in results.models],
        "references": [
            {"figure": r.figure, "value": r.value, "source": r.source, "text": r.text, "model": r.model}
            for r in system.references
        ],
        "environment": _environment(results.models),
        "notes": [f"seed {seed} is not complete and not counted" for seed in results.waiting],
    }


def _model(model: Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "trained": bool(model.cards),
        "parameters": model.records[0].parameters,
        "figures": {
            key: spread([one.figures.get(key, math.nan) for one in model.measured])
            for key in dict.fromkeys(key for one in model.measured for key in one.figures)
        },
        "seconds": {
            # A network may begin at a fit to the training data: what that costs is part of its training.
            "train": spread([sum(card["seconds"].values()) for card in model.cards]) if model.cards else None,
            "measure": spread([record.seconds for record in model.records]),
        },
        "config": model.cards[0]["config"] if model.cards else None,
        "weights": [{"seed": card["seed"], "sha256": card["sha256"]} for card in model.cards],
        "training": [
            {"seed": card["seed"], "epochs": int(log["epoch"].iloc[-1]), "loss": float(log["loss"].iloc[-1]),
             "validation_loss": float(log["validation_loss"].iloc[-1])}
            for card, log in zip(model.cards, model.logs, strict=False)
        ],
    }  # fmt: skip


def _environment(models: Sequence[Model]) -> dict[str, Any]:
    """The first training's environment; "mixed" tells where another training has other versions or was elsewhere."""
    there = [card["environment"] for model in models for card in model.cards]
    keys = ("versions", "device", "cpu", "revision")
    return {**there[0], "mixed": [key for key in keys if any(one.get(key) != there[0].get(key) for one in there)]}
