"""Shards in two worker processes against one, on the same images: seconds, and that the verdicts are the same."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import numpy as np

import attacks
from robustflow.measurements import targets
from robustflow.measurements.attack_counts import rates
from robustflow.measurements.family import Record, Request
from robustflow.measurements.targets import EPSILONS, Target

IMAGES, SHARD = 400, 50
ORDER = (1, 2, 2, 1)  # each twice, so that a drift of the machine meets both
GOAL = 0.6


def measure(request: Request) -> Record:
    """Wall seconds of one and of two workers, and of no worker process at all."""
    experiment, models = targets.read(request, "workers")
    epsilons = targets.grid(experiment)
    target = targets.certified_and_not(models, EPSILONS[0])[0]
    norms, serial = _timed(target, epsilons, experiment.seed, None)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    busy, same = [], True
    for workers in ORDER:
        busy.append(os.getloadavg()[0])
        found, spent = _timed(target, epsilons, experiment.seed, workers)
        seconds[workers].append(spent)
        same = same and np.array_equal(found, norms)
    ratio = sum(seconds[2]) / sum(seconds[1])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return targets.origin(request, experiment) | {
        "model": target.name,
        "n": min(IMAGES, len(target.labels)),
        "shard": SHARD,
        "epsilons": epsilons,
        "accuracy": rates(norms, epsilons),
        "same_norms": same,
        "serial_seconds": serial,
        "wall_seconds": {str(workers): spent for workers, spent in seconds.items()},
        "ratio": ratio,
        "goal": GOAL,
        "cores": cores,
        # Processes that wanted a core during the minute before each run; the run before it counts, too.
        "load_before": busy,
    }


def _timed(target: Target, epsilons: list[float], seed: int, workers: int | None) -> tuple[np.ndarray, float]:
    """Norms, and wall seconds with the start of the workers; every run from nothing, in a folder of its own."""
    count = min(IMAGES, len(target.labels))
    with tempfile.TemporaryDirectory(prefix="robustflow-shards-") as folder:
        started = time.perf_counter()
        result = attacks.sharded_sweep(
            target.model,
            target.images[:count],
            target.labels[:count],
            epsilons,
            "standard",
            folder=Path(folder),
            shard_size=SHARD,
            executor="serial" if workers is None else "workers",
            workers=workers,
            certified_radii=target.radii[:count],
            seed=seed,
        )
        return result.samples["adversarial_norm"].to_numpy(), time.perf_counter() - started
