"""Read OUT/seed-N: which seeds there are, and that they are trainings of the same thing, seen on the same images."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robustflow.errors import UserError
from robustflow.records import Card, EvaluationCard
from robustflow.results import Benchmark, Verdicts, place, read_benchmark

SEED = re.compile(r"seed-(0|[1-9]\d*)")
# How often a checkpoint is written decides nothing; where training began does, but by its weights, not their path.
FREE = frozenset({"config.train.checkpoint_seconds", "config.train.start"})


@dataclass(frozen=True)
class SeedEvaluation:
    """One split: for every model, its verdicts with each seed that it has."""

    folder: str
    card: EvaluationCard
    models: dict[str, dict[int, Verdicts]]

    @property
    def is_attacked(self) -> bool:
        return bool(self.card.attack_sets)


@dataclass(frozen=True)
class Seeds:
    benchmarks: dict[int, Benchmark]
    evaluations: list[SeedEvaluation]

    @property
    def cards(self) -> dict[str, dict[int, Card]]:
        """Model → seed → card, models in the order of the first seed's config, those that it lacks after them."""
        found: dict[str, dict[int, Card]] = {}
        for seed, benchmark in self.benchmarks.items():
            for card in benchmark.cards:
                found.setdefault(card.name, {})[seed] = card
        return found


def seed_directories(out: Path) -> dict[int, Path]:
    """seed → OUT/seed-N, those that hold a config, in the order of the seeds; empty where OUT is something else.

    Raises:
        UserError: OUT is itself a benchmark and has seeds, so that a report would be of the one or of the others.
    """
    out = Path(out)
    try:
        inside = [path for path in out.iterdir() if (path / "config.json").is_file()] if out.is_dir() else []
    except OSError as error:
        raise UserError(f"{out}: cannot be read ({error.strerror or error})") from None
    found = {int(match[1]): path for path in inside if (match := SEED.fullmatch(path.name))}
    if found and (out / "config.json").exists():
        raise UserError(
            f"{out} holds a benchmark of its own (config.json) and others in seed-N: move either to another directory"
        )
    return dict(sorted(found.items()))


def read_seeds(folders: dict[int, Path]) -> Seeds:
    """Every seed's cards, logs and rows; a model need not have all seeds.

    Raises:
        UserError: a file is garbled; two seeds contradict each other in a model's config, its data, the images, the ε
            or the attack sets; a directory holds another seed than its name says, or the weights of another directory;
            nothing was evaluated.
    """
    benchmarks = {seed: read_benchmark(folder, partial=True) for seed, folder in folders.items()}
    seeds = Seeds(benchmarks, _evaluations(benchmarks, folders))
    if not any(evaluation.models for evaluation in seeds.evaluations):
        raise UserError(
            f"{next(iter(folders.values())).parent}: no model of any seed was evaluated; run `robustflow certify` and"
            " `robustflow attack` first"
        )
    datasets = {seed: b.config["dataset"] for seed, b in benchmarks.items() if "dataset" in b.config}
    _agree({seed: {"dataset": name} for seed, name in datasets.items()}, folders, "config.json")
    for name, cards in seeds.cards.items():
        where = f"models/{name}/card.json"
        for seed, card in cards.items():
            if card.seed != seed:
                raise UserError(f"{folders[seed] / where}: seed: this model was trained with seed {card.seed}")
        weights = [card.sha256 for card in cards.values() if card.sha256.strip("0")]
        if len(set(weights)) < len(weights):
            twice = " and ".join(
                str(folders[seed] / where) for seed, card in cards.items() if weights.count(card.sha256) > 1
            )
            raise UserError(f"{twice}: sha256: the same weights, so no trainings of their own")
        _agree({seed: _decisive(card) for seed, card in cards.items()}, folders, where)
    return seeds


def _decisive(card: Card) -> dict[str, Any]:
    keys = ("regime", "parameters", "multiply_adds", "config")
    data = {key: card.data[key] for key in ("dataset", "sha256") if key in card.data}
    start = (card.model_extra or {}).get("start")
    began = {"start": {"sha256": start.get("sha256")}} if isinstance(start, dict) else {}
    return {key: getattr(card, key) for key in keys} | {"data": data} | began


def _evaluations(benchmarks: dict[int, Benchmark], folders: dict[int, Path]) -> list[SeedEvaluation]:
    names = list(dict.fromkeys(card.name for benchmark in benchmarks.values() for card in benchmark.cards))
    everything = [evaluation for benchmark in benchmarks.values() for evaluation in benchmark.evaluations]
    found = []
    for split in dict.fromkeys(e.folder for e in sorted(everything, key=lambda e: (place(e.card), e.folder))):
        of_seed = {
            seed: evaluation
            for seed, benchmark in benchmarks.items()
            for evaluation in benchmark.evaluations
            if evaluation.folder == split and evaluation.models
        }
        if not of_seed:
            continue
        where = f"evaluations/{split}/evaluation.json"
        keys = ("dataset", "split", "n", "epsilons", "attack_sets")
        _agree({s: {key: getattr(e.card, key) for key in keys} for s, e in of_seed.items()}, folders, where)
        first, reference = next((seed, evaluation.models[0]) for seed, evaluation in of_seed.items())
        for seed, evaluation in of_seed.items():
            for column in ("index", "label"):
                mine, other = (model.rows[column].to_numpy() for model in (evaluation.models[0], reference))
                if not np.array_equal(mine, other):
                    paths = [folders[s] / "evaluations" / split for s in (seed, first)]
                    raise UserError(f"{paths[0]} and {paths[1]} are about different images: column {column} differs")
        models = {
            name: {seed: model for seed, e in of_seed.items() for model in e.models if model.name == name}
            for name in names
        }
        card = next(iter(of_seed.values())).card
        found.append(SeedEvaluation(split, card, {name: each for name, each in models.items() if each}))
    return found


def _agree(contents: dict[int, Any], folders: dict[int, Path], where: str) -> None:
    seeds = list(contents)
    for seed in seeds[1:]:
        if found := _contradiction(contents[seeds[0]], contents[seed]):
            key, one, other = found
            raise UserError(
                f"{folders[seed] / where}: {key} is {_shown(other)}, but {_shown(one)} in {folders[seeds[0]]}: every"
                " seed of a report needs the same config; put this one into another directory"
            )


def _contradiction(one: Any, other: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first key in which both say different things. What only one of them says is an option of a later version.

    >>> _contradiction({"train": {"epochs": 8, "crop": 2}}, {"train": {"epochs": 9}, "new": 1})
    ('train.epochs', 8, 9)
    """
    if isinstance(one, dict) and isinstance(other, dict):
        inside = (_contradiction(one[k], other[k], f"{key}.{k}" if key else str(k)) for k in one if k in other)
        return next((found for found in inside if found), None)
    return (key, one, other) if one != other and key not in FREE else None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_out(out: Path, several: bool) -> None:
    """Before anything is written to OUT: a benchmark of its own and seeds do not go into one directory.

    Raises:
        UserError: OUT holds the other kind.
    """
    if several and (out / "config.json").exists():
        raise UserError(f"{out} holds a benchmark of its own: choose another --out for the seeds")
    if not several and (folders := seed_directories(out)):
        names = ", ".join(folder.name for folder in folders.values())
        raise UserError(f"{out} holds {names}: choose another --out, or give --seeds")
