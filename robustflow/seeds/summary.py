"""summary.json of a directory of seeds: every figure as a mean over seeds, counted from the per-image rows of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from robustflow.records import Card
from robustflow.results import Verdicts
from robustflow.seeds.reading import SeedEvaluation, Seeds
from robustflow.seeds.statistics import difference_over_seeds, mean_over_seeds, rate_over_seeds
from robustflow.summary import alarm_count, area, attack_seconds, environment_of, plain

SCHEMA_VERSION = 1
REFERENCE = 36 / 255  # the ε at which the best model is chosen: the grid's value nearest to it


def summarize_seeds(seeds: Seeds) -> dict[str, Any]:
    """The content of summary.json; "kind" is "seeds", which the summary of one benchmark does not have."""
    config = next(iter(seeds.benchmarks.values())).config
    numbers = list(seeds.benchmarks)
    command = f"robustflow bench {config.get('name')} --seeds {','.join(map(str, numbers))}"
    content = {
        "schema_version": SCHEMA_VERSION,
        "kind": "seeds",
        "name": config.get("name"),
        "title": config.get("title"),
        "command": command if config.get("name") else None,
        "seeds": numbers,
        "models": [_model(name, cards, seeds) for name, cards in seeds.cards.items()],
        "evaluations": [_evaluation(evaluation) for evaluation in seeds.evaluations],
        "environment": environment_of([card for cards in seeds.cards.values() for card in cards.values()]),
        "notes": _notes(seeds),
    }
    return plain(content)


def _model(name: str, cards: dict[int, Card], seeds: Seeds) -> dict[str, Any]:
    first = next(iter(cards.values()))
    verdicts = [model for e in seeds.evaluations for model in e.models.get(name, {}).values()]
    bounds = [model.card.lipschitz_bound for model in verdicts if model.card.lipschitz_bound is not None]
    logs = [len(seeds.benchmarks[seed].logs[name]) for seed in cards if name in seeds.benchmarks[seed].logs]
    return {
        "name": name,
        "regime": first.regime,
        "description": first.description,
        "parameters": first.parameters,
        "multiply_adds": first.multiply_adds,
        "lipschitz_bound": max(bounds, default=None),
        "config": first.config,
        "seeds": list(cards),
        "seconds": {
            "train": mean_over_seeds([card.seconds.train for card in cards.values()]).as_dict(),
            "certify": sum(model.card.seconds.certify for model in verdicts),
            "attack": attack_seconds(verdicts),
        },
        "epochs": mean_over_seeds([float(count) for count in logs]).as_dict() if logs else None,
        "sha256": {str(seed): card.sha256 for seed, card in cards.items()},
        "alarm_count": alarm_count(verdicts),
    }


def _evaluation(evaluation: SeedEvaluation) -> dict[str, Any]:
    card = evaluation.card
    top = min(1.0, card.epsilons[-1])
    return {
        "folder": evaluation.folder,
        "dataset": card.dataset,
        "split": card.split,
        "n": card.n,
        "epsilons": card.epsilons,
        "attack_sets": card.attack_sets,
        "area_over": [0.0, top] if top > 0 else None,
        "models": [_figures(name, each, card.epsilons, top) for name, each in evaluation.models.items()],
        "differences": _differences(evaluation),
    }


def _figures(name: str, verdicts: dict[int, Verdicts], grid: list[float], top: float) -> dict[str, Any]:
    models = list(verdicts.values())
    attacked = all(model.is_attacked for model in models)
    bounds = [model.card.lipschitz_bound for model in models if model.card.lipschitz_bound is not None]
    alarms = {seed: model.alarms() for seed, model in verdicts.items()}
    warnings = {warning: None for model in models for warning in model.card.warnings}
    areas: dict[str, Any] = {"certified": None, "attacked": None}
    if top > 0:
        areas = {
            "certified": mean_over_seeds([area(m.radii, top) or 0.0 for m in models], top=top).as_dict(),
            "attacked": mean_over_seeds([area(m.norms(), top) or 0.0 for m in models], top=top).as_dict()
            if attacked
            else None,
        }
    return {
        "name": name,
        "seeds": list(verdicts),
        "clean": _rate(models, _clean),
        "certified": [{"epsilon": e} | _rate(models, _asked("certified", e)) for e in grid],
        "attacked": [{"epsilon": e} | _rate(models, _asked("attacked", e)) for e in grid] if attacked else None,
        "area": areas,
        "certifies": _certifies(models, grid),
        "lipschitz_bound": max(bounds, default=None),
        "warnings": list(warnings),
        "alarm_count": alarm_count(models),
        "alarms": [{"seed": seed, **alarm.model_dump()} for seed, found in alarms.items() for alarm in found],
    }


Answer = Callable[[Verdicts], np.ndarray]


def _answers(models: list[Verdicts], answer: Answer) -> np.ndarray:
    return np.stack([answer(model) for model in models])


def _rate(models: list[Verdicts], answer: Answer) -> dict[str, Any]:
    return rate_over_seeds(_answers(models, answer)).as_dict()


def _certifies(models: list[Verdicts], grid: list[float]) -> bool:
    """Whether a model proves anything that could be seen in a table: one image at the smallest ε above 0."""
    smallest = next((epsilon for epsilon in grid if epsilon > 0), 0.0)
    return any(bool(model.certified(smallest).any()) for model in models)


def _differences(evaluation: SeedEvaluation) -> list[dict[str, Any]]:
    """Every model with a certificate against the config's first such, and against the best where that is another.

    The first was chosen before there were figures; the best was chosen by them, so its lead is flattered by luck.
    """
    grid = evaluation.card.epsilons
    models = {name: list(each.values()) for name, each in evaluation.models.items()}
    models = {name: each for name, each in models.items() if _certifies(each, grid)}
    if len(models) < 2:
        return []
    epsilon = min((e for e in grid if e > 0), key=lambda e: abs(e - REFERENCE))
    score = {name: float(_answers(each, _asked("certified", epsilon)).mean()) for name, each in models.items()}
    first, best = next(iter(models)), max(models, key=lambda name: score[name])
    against = [(best, "best")] if best == first else [(best, "best"), (first, "first")]
    return [
        {
            "against": name,
            "why": why,
            "chosen_at": epsilon,
            "others": [
                {
                    "name": other,
                    "clean": _difference(models[other], models[name], _clean),
                    **{
                        kind: [{"epsilon": e} | _difference(models[other], models[name], _asked(kind, e)) for e in grid]
                        if kind == "certified" or evaluation.is_attacked
                        else None
                        for kind in ("certified", "attacked")
                    },
                }
                for other in models
                if other != name
            ],
        }
        for name, why in against
    ]


def _clean(model: Verdicts) -> np.ndarray:
    return model.correct


def _asked(kind: str, epsilon: float) -> Answer:
    return lambda model: model.certified(epsilon) if kind == "certified" else model.attacked(epsilon)


def _difference(a: list[Verdicts], b: list[Verdicts], answer: Answer) -> dict[str, Any]:
    return difference_over_seeds(_answers(a, answer), _answers(b, answer)).as_dict()


def _notes(seeds: Seeds) -> list[str]:
    numbers, notes = list(seeds.benchmarks), []
    for name, cards in seeds.cards.items():
        if untrained := [seed for seed in numbers if seed not in cards]:
            notes.append(f"{name}: not trained with {_named(untrained)}")
        for evaluation in seeds.evaluations:
            there = evaluation.models.get(name, {})
            if missing := [seed for seed in cards if seed not in there]:
                notes.append(f"{evaluation.folder}: {name}: not evaluated with {_named(missing)}")
    return notes


def _named(numbers: list[int]) -> str:
    return f"seed{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
