"""The stages of a benchmark for every seed of a directory: certify and attack OUT/seed-N, report on each and on all."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from robustflow import bench, evaluation
from robustflow.config import Experiment
from robustflow.data import ImageSet
from robustflow.errors import UserError
from robustflow.report import build_report

Folders = dict[int, Path]


def certify(folders: Folders, options: argparse.Namespace) -> None:
    """Certify what is trained, with every seed. Raises UserError as `bench.certify`, or where nothing is trained."""
    explain = getattr(options, "explain", False)
    for seed, experiment, images, name in _trained(folders, options):
        for account in bench.certify(experiment, folders[seed], images, only=name, explain=explain):
            print(f"seed {seed}: {account}")


def attack(folders: Folders, options: argparse.Namespace, device: torch.device) -> int:
    """Attack what is trained, with every seed. Returns the number of alarms."""
    how = {"device": device, "executor": options.executor, "workers": options.workers}
    return sum(
        bench.attack(experiment, folders[seed], images, only=name, **how)
        for seed, experiment, images, name in _trained(folders, options)
    )


def report(out: Path, folders: Folders) -> Path:
    """The report of every seed whose models are all done, then the one over the seeds, of what there is."""
    for folder in folders.values():
        experiment, _ = bench.read_directory(folder)
        if waiting := bench.unfinished(experiment, folder):
            print(f"{folder}: no report of its own before {', '.join(waiting)} are done, too")
        else:
            print(build_report(folder))
    page = build_report(out)
    print((out / "table.md").read_text(encoding="utf-8"))
    print(page)
    return page


def seed_number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a seed is a whole number of at least 0, not {text!r}")
    return int(text)


def seed_list(text: str) -> tuple[int, ...]:
    seeds = tuple(seed_number(part) for part in text.split(","))
    if len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"every seed once, not {text!r}")
    return seeds


def _trained(folders: Folders, options: argparse.Namespace) -> Iterator[tuple[int, Experiment, ImageSet, str]]:
    """Every trained model with every seed; what a seed does not have is told and left out."""
    experiments = {seed: bench.read_directory(folder)[0] for seed, folder in folders.items()}
    chosen: list[tuple[int, str]] = []
    for seed, experiment in experiments.items():
        evaluation.check_attacks(experiment.evaluate)
        for config in bench.chosen_models(experiment, options.model):
            if (folders[seed] / "models" / config.name / bench.CARD).is_file():
                chosen.append((seed, config.name))
            else:
                print(f"{folders[seed]}: {config.name} is not trained, so it is left out")
    if not chosen:
        raise UserError(f"nothing is trained in {', '.join(map(str, folders.values()))}: run `robustflow train` first")
    loaded: dict[str, ImageSet] = {}
    for seed, name in chosen:
        experiment = experiments[seed]
        if experiment.dataset not in loaded:
            loaded[experiment.dataset] = bench.load_data(experiment, options.data)
        yield seed, experiment, loaded[experiment.dataset], name
