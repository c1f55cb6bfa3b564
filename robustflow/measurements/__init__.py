"""What the project's own claims about its certificates rest on, measured: `robustflow measure certificates`.

Every part writes OUT/PART.json with all of its numbers, settings and the machine; table.md and plots/ are made of the
parts that are there. A part that is done is not repeated unless it is asked for by name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustflow import checkpoints, environment
from robustflow.errors import UserError
from robustflow.measurements import campaign, kernels, networks
from robustflow.measurements.figures import write_figures
from robustflow.measurements.tables import write_table

SCHEMA = 1


@dataclass(frozen=True)
class Request:
    """What a measurement may draw on: a benchmark directory with trained weights, its data, where to keep halves."""

    out: Path
    benchmark: Path | None = None
    data: Path | None = None


PARTS: dict[str, Callable[[Request], dict[str, Any]]] = {
    "tightness": lambda request: kernels.tightness(),
    "cost": lambda request: kernels.cost(),
    "share": lambda request: networks.share(request.benchmark, request.data),
    "gains": lambda request: networks.gains(request.benchmark, request.data),
    "campaign": lambda request: campaign.campaign(request.out / "campaign.partial.json"),
}


USES_BENCHMARK = ("share", "gains")


def measure(request: Request, only: Sequence[str] | None = None) -> Path:
    """Measure what is missing, or exactly the parts ``only``; returns the table.

    Raises:
        UserError: an unknown part, or a directory that cannot be written.
    """
    for name in only or ():
        if name not in PARTS:
            raise UserError(f"unknown part {name!r}: choose from {', '.join(PARTS)}")
    try:
        request.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output directory {request.out} cannot be made: {error.strerror}") from None
    results: dict[str, dict[str, Any]] = {}
    for name, part in PARTS.items():
        path = request.out / f"{name}.json"
        if (name in only) if only else not path.exists():
            started = time.perf_counter()
            found = part(request)
            record = {"schema_version": SCHEMA, "part": name, "command": _command(request, name)} | found
            record |= {"seconds": round(time.perf_counter() - started, 1), "environment": environment.describe("cpu")}
            checkpoints.write_json(path, record)
        if path.exists():
            results[name] = checkpoints.read_json(path)
    write_figures(request.out / "plots", results)
    return write_table(request.out / "table.md", results)


def _command(request: Request, part: str) -> str:
    words = ["robustflow measure certificates --out", str(request.out), "--only", part]
    if request.benchmark is not None and part in USES_BENCHMARK:
        words += ["--bench", str(request.benchmark), "--data", "DIR"]
    return " ".join(words)


__all__ = ["PARTS", "Request", "measure"]
