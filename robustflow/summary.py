"""summary.json: every figure of a benchmark, counted from the per-image rows and nothing else."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import numpy as np

from robustflow.records import Card
from robustflow.results import Benchmark, Evaluation, Verdicts
from robustflow.statistics import Rate, paired_difference

SCHEMA_VERSION = 1
REFERENCE = 0.5  # the ε at which models are compared pairwise: the grid's value nearest to it


def summarize(benchmark: Benchmark) -> dict[str, Any]:
    """The content of summary.json as plain lists, dicts, numbers and strings; NaN and ±inf become null."""
    summary = {
        "schema_version": SCHEMA_VERSION,
        "name": benchmark.config.get("name"),
        "title": benchmark.config.get("title"),
        "command": benchmark.config.get("command"),
        "models": [_model(card, benchmark) for card in benchmark.cards],
        "evaluations": [_evaluation(evaluation) for evaluation in benchmark.evaluations],
        "environment": environment_of(benchmark.cards),
        "notes": _notes(benchmark),
    }
    return plain(summary)


def to_json(summary: dict[str, Any]) -> str:
    return json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def area(distances: np.ndarray, top: float) -> float | None:
    """Area under a robust-accuracy curve over ε in [0, top]: exactly the mean over the images of min(distance, top).

    ``distances``: (n,) certified radii or norms of the smallest adversarials, 0 where misclassified, inf where none was
    found. The figure of Celledoni et al., arXiv 2210.02373, freed from the grid: the trapezoid rule would credit a
    certificate that ends at ε = 1e-9 with half the first interval. None for an empty interval.

    >>> area(np.array([0.0, 0.5, np.inf]), 1.0)
    0.5
    """
    return round(float(np.minimum(distances, top).mean()), 10) if top > 0 else None


def _model(card: Card, benchmark: Benchmark) -> dict[str, Any]:
    seen = [m for e in benchmark.evaluations for m in e.models if m.name == card.name]
    bounds = [m.card.lipschitz_bound for m in seen if m.card.lipschitz_bound is not None]
    bounds = [bound for bound in bounds if math.isfinite(bound)]
    return {
        "name": card.name,
        "regime": card.regime,
        "description": card.description,
        "parameters": card.parameters,
        "multiply_adds": card.multiply_adds,
        # The same weights give the same bound in every evaluation; were they to differ, the larger one is the safe one.
        "lipschitz_bound": max(bounds, default=None),
        "config": card.config,
        "seed": card.seed,
        "seconds": {
            "train": card.seconds.train,
            "certify": sum(m.card.seconds.certify for m in seen),
            "attack": attack_seconds(seen),
        },
        "data": card.data,
        "sha256": card.sha256,
        "environment": card.environment,
        "training": _training(card.name, benchmark),
    }


def attack_seconds(models: list[Verdicts]) -> float | None:
    """Seconds of all attacks on them; None where they were evaluated and none was attacked."""
    times = [model.card.seconds.attack or 0.0 for model in models if model.is_attacked]
    return sum(times) if times or not models else None


def alarm_count(models: list[Verdicts]) -> int | None:
    """How many alarms there are; None, not 0, where nothing was attacked, so that none could be raised."""
    alarms = sum(len(model.alarms()) for model in models)
    return alarms if alarms or not models or any(model.is_attacked for model in models) else None


def _training(name: str, benchmark: Benchmark) -> dict[str, Any] | None:
    if name not in benchmark.logs:
        return None
    last = benchmark.logs[name].iloc[-1]
    keys = ("epoch", "loss", "train_accuracy", "validation_accuracy")
    return {"epochs": len(benchmark.logs[name]), "last": {key: last[key] for key in keys}}


def _evaluation(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "folder": evaluation.folder,
        "dataset": evaluation.card.dataset,
        "split": evaluation.card.split,
        "n": evaluation.card.n,
        "epsilons": evaluation.epsilons,
        "attack_sets": evaluation.card.attack_sets,
        "area_over": [0.0, _area_top(evaluation)] if _area_top(evaluation) > 0 else None,
        "models": [_figures(model, evaluation) for model in evaluation.models],
        "paired": _paired(evaluation),
    }


def _area_top(evaluation: Evaluation) -> float:
    """Where the area ends: at 1, as in the paper, or at the largest ε that was attacked."""
    return min(1.0, evaluation.epsilons[-1])


def _figures(model: Verdicts, evaluation: Evaluation) -> dict[str, Any]:
    grid, top = evaluation.epsilons, _area_top(evaluation)
    certified = [model.certified(e) for e in grid]
    curves: dict[str, Any] = {"certified": _curve(grid, certified)}
    if evaluation.is_attacked:
        broken = [model.norms() <= e for e in grid]
        curves["attacked"] = _curve(grid, [model.attacked(e) for e in grid])
        curves["undecided"] = _curve(grid, [~c & ~b for c, b in zip(certified, broken, strict=True)])
        curves["broken"] = _curve(grid, broken)
    else:
        curves |= dict.fromkeys(("attacked", "undecided", "broken"))
    by_set = {s: _curve(grid, [model.attacked(e, s) for e in grid]) for s in evaluation.card.attack_sets}
    return {
        "name": model.name,
        "clean": Rate(int(model.correct.sum()), len(model.rows)).as_dict(),
        **curves,
        "attacked_by_set": by_set,
        "area": {
            "certified": area(model.radii, top),
            "attacked": area(model.norms(), top) if evaluation.is_attacked else None,
            "attacked_by_set": {s: area(model.norms(s), top) for s in evaluation.card.attack_sets},
        },
        # Over all n images; a wrong prediction has radius 0.
        "certified_radius": {
            "median": float(np.median(model.radii)),
            "mean": round(float(np.mean(model.radii)), 10),
            "largest": float(model.radii.max()),
        },
        "broken_by": _broken_by(model, grid) if evaluation.is_attacked else None,
        "lipschitz_bound": model.card.lipschitz_bound,
        "certified_object": model.card.certified_object,
        "account": [layer.model_dump() for layer in model.card.account],
        "falsifier": model.card.falsifier,
        "forward_passes": model.card.forward_passes,
        "seconds": model.card.seconds.model_dump(),
        "warnings": model.card.warnings,
        "alarm_count": alarm_count([model]),
        "alarms": [alarm.model_dump() for alarm in model.alarms()],
        "environment": model.card.environment,
    }


def _curve(grid: list[float], masks: list[np.ndarray]) -> list[dict[str, Any]]:
    return [{"epsilon": e, **Rate(int(m.sum()), m.size).as_dict()} for e, m in zip(grid, masks, strict=True)]


def _broken_by(model: Verdicts, grid: list[float]) -> list[dict[str, Any]]:
    """For each attack: on how many images it found the smallest adversarial, in all and with norm ≤ each ε."""
    norms, names = model.norms(), model.rows["attack"].to_numpy()
    found = model.correct & np.isfinite(norms)
    counts = Counter(str(name) for name in names[found])
    return [
        {"attack": name, "images": images, "at": [int((found & (names == name) & (norms <= e)).sum()) for e in grid]}
        for name, images in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]


def _paired(evaluation: Evaluation) -> dict[str, Any] | None:
    """Each model against the one with the most certified images at the reference ε, on the same images (McNemar)."""
    if len(evaluation.models) < 2:
        return None
    epsilon = min((e for e in evaluation.epsilons if e > 0), key=lambda e: abs(e - REFERENCE), default=0.0)
    best = max(evaluation.models, key=lambda m: int(m.certified(epsilon).sum()))
    others = [m for m in evaluation.models if m is not best]
    return {
        "epsilon": epsilon,
        "best": best.name,
        "others": [
            {
                "name": other.name,
                "clean": paired_difference(best.correct, other.correct).as_dict(),
                "certified": paired_difference(best.certified(epsilon), other.certified(epsilon)).as_dict(),
                "attacked": paired_difference(best.attacked(epsilon), other.attacked(epsilon)).as_dict()
                if evaluation.is_attacked
                else None,
            }
            for other in others
        ],
    }


def environment_of(cards: list[Card]) -> dict[str, Any]:
    """The first model's environment; "mixed" tells where another model was trained with other versions or elsewhere."""
    keys = ("versions", "device", "cpu", "revision")
    first = {"versions": {}, "device": None, "revision": None} | cards[0].environment
    mixed = [key for key in keys if any(card.environment.get(key) != cards[0].environment.get(key) for card in cards)]
    return {**first, "mixed": mixed}


def _notes(benchmark: Benchmark) -> list[str]:
    untold = [card.name for card in benchmark.cards if card.name not in benchmark.logs]
    notes = [f"{name}: no train.jsonl, so no training curve" for name in untold]
    for evaluation in benchmark.evaluations:
        missing = [m.name for m in evaluation.models if m.examples is None and m.is_attacked]
        notes += [f"{evaluation.folder}: {name}: no examples, so no images" for name in missing]
    return notes


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
