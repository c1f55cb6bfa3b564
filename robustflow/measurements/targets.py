"""The models of a benchmark directory as targets of attacks, with what the benchmark already knows of every image."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustflow import bench, checkpoints, environment, evaluation
from robustflow.config import Experiment
from robustflow.errors import UserError
from robustflow.measurements.family import Record, Request
from robustflow.networks import Classifier

EPSILONS = (36 / 255,)  # where attacks are compared that are too dear for the whole grid


@dataclass(frozen=True)
class Target:
    """A trained model with its images, certified radii and, for each attack set of the benchmark, the norms found."""

    name: str
    regime: str
    model: Classifier
    images: Tensor  # (N, C, H, W) float32
    labels: Tensor  # (N,)
    radii: np.ndarray  # (N,) float64
    epsilons: tuple[float, ...]  # where the benchmark attacked; between them its norms say nothing
    norms: dict[str, np.ndarray]
    forward_passes: dict[str, int]  # "SET: ATTACK"
    attacked_by: str  # revision of the source that made the norms
    identity: str  # of weights, images and labels

    def certifies(self, epsilon: float) -> int:
        """How many images are certified at ε."""
        return int((self.radii > epsilon).sum())


def read(request: Request, part: str) -> tuple[Experiment, list[Target]]:
    """The models of the benchmark on the first split that it attacks.

    Raises:
        UserError: no benchmark, or a model whose rows are missing or were made of other weights or images.
    """
    if request.benchmark is None:
        raise UserError(f"the part {part} attacks trained models: name a benchmark directory with --bench DIR")
    experiment, _ = bench.read_directory(request.benchmark)
    images = bench.load_data(experiment, request.data)
    split_name = _split(experiment, request)
    split = images.splits[split_name].head(experiment.evaluate.images_of(split_name))
    folder = request.benchmark / "evaluations" / f"{images.name}-{split_name}"
    targets = []
    for config in experiment.models:
        home = request.benchmark / "models" / config.name
        model = bench.load_model(config, images, home)
        subject = evaluation.Subject(config.name, model, bench.read_card(home)["sha256"], split, folder)
        record, identity = subject.record(), subject.certificate_identity()
        same = record.get("certificate_identity") == identity and record.get("attack_identity") in {
            evaluation.attack_identity(record, experiment.evaluate, experiment.seed, kind) for kind in ("cpu", "cuda")
        }
        if not same:
            command = f"robustflow certify {request.benchmark}` and `robustflow attack {request.benchmark}"
            raise UserError(f"{subject.rows_file} is not of these weights and images: run `{command}` first")
        rows = evaluation.read_rows(subject.rows_file)
        if missing := [name for name in experiment.evaluate.attacks if f"norm_{name}" not in rows]:
            raise UserError(f"{subject.rows_file} has no norms of {', '.join(missing)}: run `robustflow attack` again")
        found = {name: rows[f"norm_{name}"].astype(float).to_numpy() for name in experiment.evaluate.attacks}
        targets.append(
            Target(
                name=config.name,
                regime=config.regime,
                model=model.to(memory_format=torch.channels_last),
                images=split.images().cpu(),
                labels=split.labels.cpu(),
                radii=rows["certified_radius"].to_numpy(float),
                epsilons=tuple(epsilon for epsilon in experiment.evaluate.epsilons if epsilon > 0),
                norms=found,
                forward_passes=record["forward_passes"],
                attacked_by=record["attack_environment"]["revision"],
                identity=identity,
            )
        )
    return experiment, targets


def _split(experiment: Experiment, request: Request) -> str:
    """The first split that the benchmark attacks."""
    if not experiment.evaluate.attacked_splits:
        raise UserError(f"{request.benchmark} attacks nothing: add a split to `attacked` in its config")
    return experiment.evaluate.attacked_splits[0]


def grid(experiment: Experiment) -> list[float]:
    """The benchmark's radii above 0, and those where everything is compared."""
    return sorted({*EPSILONS, *(epsilon for epsilon in experiment.evaluate.epsilons if epsilon > 0)})


def origin(request: Request, experiment: Experiment) -> Record:
    """What every part says of where its images and models come from."""
    split = _split(experiment, request)
    return {"benchmark": str(request.benchmark), "dataset": experiment.dataset, "split": split, "seed": experiment.seed}


def certified_and_not(targets: list[Target], epsilon: float) -> list[Target]:
    """Two models apart: the one with most images certified at ε, and a ResNet or else the one with fewest."""
    ranked = sorted(targets, key=lambda target: -target.certifies(epsilon))
    ordinary = [target for target in targets if target.regime == "resnet"]
    pair = [ranked[0], ordinary[0] if ordinary else ranked[-1]]
    return pair if pair[0] is not pair[1] else pair[:1]


def kept(path: Path, depends_on: list[Any], make: Callable[[], Record]) -> Record:
    """The record in ``path`` if it depends on the same things, else a new one, written there: a kill loses only one."""
    # Seconds of another machine would not compare; another commit of the source is noted, not refused.
    machine = {key: value for key, value in environment.describe("cpu").items() if key != "revision"}
    text = json.dumps([evaluation.ATTACK_VERSION, machine, *depends_on], sort_keys=True)
    identity = hashlib.sha256(text.encode()).hexdigest()
    if path.is_file():
        record = checkpoints.read_json(path)
        if record.get("identity") == identity:
            return record
    record = make() | {"revision": environment.revision(), "identity": identity}
    checkpoints.write_json(path, record)
    return record


class PassCounter:
    """Counts images through a module while it is entered.

    >>> model = nn.Linear(2, 2)
    >>> with PassCounter(model) as counter:
    ...     _ = model(torch.zeros(5, 2))
    >>> _ = model(torch.zeros(5, 2))
    >>> counter.passes
    5
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.passes = model, 0

    def __enter__(self) -> PassCounter:
        self._handle = self.model.register_forward_hook(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _count(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        self.passes += len(arguments[0])


def as_numbers(norms: np.ndarray) -> list[float | None]:
    """Norms for JSON: null where none was found."""
    return [float(norm) if math.isfinite(norm) else None for norm in norms]


def as_norms(numbers: list[float | None]) -> np.ndarray:
    return np.array([math.inf if number is None else number for number in numbers])
