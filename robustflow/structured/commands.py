"""What the command line does with configs and directories of systems."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

from robustflow import config, distributed, environment
from robustflow.errors import UserError
from robustflow.structured.bench import CONFIG, Bench
from robustflow.structured.catalogue import SYSTEMS
from robustflow.structured.config import from_dict
from robustflow.structured.overview import build_overview, system_directories
from robustflow.structured.report import build_report


def is_structured(name: str) -> bool:
    """Whether a config is of a system."""
    return "system" in config.read_toml(name)[0]


def holds_system(out: Path) -> bool:
    """Whether a directory is the output of a system's benchmark."""
    try:
        raw = json.loads((out / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False  # whoever reads it next says what is wrong
    return isinstance(raw, dict) and "system" in raw


def holds_systems(out: Path) -> bool:
    """Whether a directory is of a system, or of several, each in a directory of its own."""
    return holds_system(out) or bool(system_directories(out))


def report(out: Path) -> Path:
    """The report of a system's directory, or of a directory of several systems."""
    return build_overview(out) if system_directories(out) else build_report(out)


def refuse(out: Path) -> None:
    """Raise UserError where a directory holds systems, or is one's seed or model."""
    if system_directories(out) or any(holds_system(folder) for folder in (out, *out.resolve().parents[:3])):
        raise UserError(f"{out} holds a structured system: certify and attack are for classifiers")


def run(options: argparse.Namespace, *, report: bool) -> int:
    """Train what is not trained; with ``report`` measure it, too, and write the report."""
    started = time.monotonic()
    bench, name, seeds = _prepare(options)
    device = environment.choose_device(options.device)
    bench.open(name, seeds)
    bench.train(seeds, device=device, only=options.model)
    if report:
        bench.measure(seeds, options.model)
        if not bench.complete():
            print(f"{bench.out}: no report before every model of a seed is done")
            return 0
        page = build_report(bench.out)
        print((bench.out / "table.md").read_text(encoding="utf-8"))
        print(f"{page} ({time.monotonic() - started:.0f} s)")
    return 0


def _prepare(options: argparse.Namespace) -> tuple[Bench, str, tuple[int, ...]]:
    raw, origin = config.read_toml(options.config)
    experiment = from_dict(raw, origin)
    if distributed.launched() or options.executor != "serial":
        raise UserError("a system trains in one process: leave torchrun and --executor out")
    if options.data is not None:
        raise UserError("a system makes its own data: leave --data out")
    if options.model is not None:
        experiment.model(options.model)
    seeds = experiment.seeds if options.seeds is None else options.seeds
    seeds = seeds if options.seed is None else (options.seed,)
    if missing := [seed for seed in seeds if seed not in experiment.seeds]:
        there = ", ".join(map(str, experiment.seeds))
        raise UserError(f"seed {missing[0]} is none of the config's seeds, which are {there}")
    file = config.find(options.config)
    known = {str(path): name for name, path in config.list_configs().items()}
    name = known.get(str(file.resolve()))
    out = options.out or Path("runs") / (name or file.stem)
    return Bench(experiment, out), name or str(options.config), seeds


def lines() -> Iterator[str]:
    """A line a system, for `robustflow list`."""
    return (f"{name:15} {system.title}: {system.equations}" for name, system in SYSTEMS.items())
