"""What every attack set finds on the models of a benchmark, at what cost, and which attack finds it.

The sets that the benchmark was attacked with are read from its rows, on all of its images. On the first images every
set, and every attack of `standard` by itself, is run again so that they meet on equal terms. Images certified at ε are
attacked by none at ε: that no adversarial of such a norm exists is proved, and for the audit of the sweep to doubt.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

import attacks
from robustflow import checkpoints
from robustflow.measurements import targets
from robustflow.measurements.attack_counts import summary
from robustflow.measurements.family import Record, Request
from robustflow.measurements.targets import EPSILONS, Target, as_norms, as_numbers

IMAGES, BATCH = 200, 250
# Sets too dear for every ε, and on how many images.
DEAR = {"strong": 200, "autoattack": 200, "check": 50}


@dataclass(frozen=True)
class Run:
    """A set, or one attack by itself, on the first ``images`` images, at every ε or only where all are compared."""

    name: str
    images: int
    every_epsilon: bool


def runs() -> list[Run]:
    """
    >>> [run.name for run in runs()][:4]
    ['paper', 'standard', 'deepfool', 'ddn']
    """
    cheap = [Run(name, IMAGES, True) for name in ("paper", "standard", *attacks.SETS["standard"].attacks)]
    return cheap + [Run(name, count, False) for name, count in DEAR.items() if name in attacks.SETS]


def measure(request: Request) -> Record:
    """Measure all runs on all models; what is finished is kept, a file a model and run.

    Raises:
        UserError: no benchmark, or one whose rows are not of its weights.
        AttackInputError: an attack that is not here.
    """
    # Before anything else, so that a missing one is told before hours of work.
    members = {run.name: [attack.name for attack in attacks.resolve(run.name)[0]] for run in runs()}
    experiment, models = targets.read(request, "sets")
    grid = targets.grid(experiment)
    found: dict[str, dict[str, Record]] = {target.name: {} for target in models}
    bar = tqdm(list(itertools.product(runs(), models)), desc="sets", unit="run", disable=None)
    for run, target in bar:
        bar.set_postfix_str(f"{run.name}, {target.name}")
        epsilons = grid if run.every_epsilon else list(EPSILONS)
        found[target.name][run.name] = targets.kept(
            request.unfinished("sets") / target.name / f"{run.name}.json",
            [target.identity, asdict(run), epsilons, experiment.seed, BATCH],
            partial(_attack, target, run, epsilons, experiment.seed),
        )
    for target in models:
        _write_rows(request, target, found[target.name])
    return targets.origin(request, experiment) | {
        "n": len(models[0].labels),
        "epsilons": grid,
        "compared_at": list(EPSILONS),
        "batch": BATCH,
        "runs": [asdict(run) | {"attacks": members[run.name]} for run in runs()],
        "revisions": sorted({entry["revision"] for entries in found.values() for entry in entries.values()}),
        "models": [summary(target, found[target.name], grid, attacks.SETS["standard"].attacks) for target in models],
    }


def _attack(target: Target, run: Run, epsilons: list[float], seed: int) -> Record:
    """One run on one model: norms, which attack found them, cost."""
    count = min(run.images, len(target.labels))
    started, cpu = time.perf_counter(), time.process_time()
    result = attacks.sweep(
        target.model,
        target.images[:count],
        target.labels[:count],
        epsilons,
        run.name,
        certified_radii=target.radii[:count],
        batch_size=BATCH,
        seed=seed,
    )
    return {
        "epsilons": epsilons,
        "norms": as_numbers(result.samples["adversarial_norm"].to_numpy()),
        "found_by": result.samples["attack"].tolist(),
        "forward_passes": result.forward_passes,
        "seconds": {name: round(seconds, 4) for name, seconds in result.seconds.items()},
        "wall_seconds": round(time.perf_counter() - started, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
        "warnings": result.warnings,
    }


def _write_rows(request: Request, target: Target, entries: dict[str, Record]) -> None:
    """rows/MODEL.csv: for every image and run the norm and the attack that found it; empty where it was not run."""
    columns: dict[str, Any] = {"label": target.labels.numpy(), "certified_radius": target.radii}
    frame = pd.DataFrame(columns).head(max(len(entry["norms"]) for entry in entries.values()))
    for name, entry in entries.items():
        frame[f"norm_{name}"] = pd.Series(as_norms(entry["norms"]))
        frame[f"attack_{name}"] = pd.Series(entry["found_by"], dtype=object)
    text = frame.to_csv(index_label="index", lineterminator="\n")
    checkpoints.write_text(request.out / "rows" / f"{target.name}.csv", text)
