"""The frame of every measurement: parts that are measured once, kept as JSON, and shown on one page with plots.

Every part writes OUT/PART.json with all of its numbers, settings and the machine; table.md and plots/ are made of the
parts that are there. A part that is done is not repeated unless it is asked for by name.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from robustflow import checkpoints, environment
from robustflow.errors import UserError
from robustflow.style import house_style, png

SCHEMA = 1
Record = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What a measurement may draw on: a benchmark directory with trained weights, its data, where to keep halves."""

    out: Path
    benchmark: Path | None = None
    data: Path | None = None

    def unfinished(self, part: str) -> Path:
        """Where a part keeps what it has finished so far; gone once its JSON is written."""
        return self.out / f"{part}.partial"


@dataclass(frozen=True)
class Part:
    """One measurement: how it is made, and what the page says and draws of its JSON."""

    title: str
    measure: Callable[[Request], Record]
    section: Callable[[Record], str]
    figures: Mapping[str, Callable[[Record], Figure]]  # by file name, without its .png
    uses_benchmark: bool = False
    needs_benchmark: bool = False  # left out without one, refused if asked for by name
    uses_data: bool = False


@dataclass(frozen=True)
class Family:
    """The parts of `robustflow measure NAME`, in the order of the page."""

    name: str
    title: str
    parts: Mapping[str, Part] = field(repr=False)


def measure(family: Family, request: Request, only: Sequence[str] | None = None) -> Path:
    """Measure what is missing, or exactly the parts ``only``; returns the table.

    Raises:
        UserError: an unknown part, one without the models that it needs, or a directory that cannot be written.
    """
    for name in only or ():
        if name not in family.parts:
            raise UserError(f"unknown part {name!r}: choose from {', '.join(family.parts)}")
    try:
        request.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output directory {request.out} cannot be made: {error.strerror}") from None
    try:
        for name, part in family.parts.items():
            wanted = (name in only) if only else not _file(request, name).exists()
            if wanted and part.needs_benchmark and request.benchmark is None:
                if only:
                    raise UserError(f"{name} measures trained models: name their directory with --bench")
                wanted = False
            if wanted:
                _measure_part(family, request, name)
    except BaseException:
        # Parts that were measured have their page even if another failed, and why it failed is what is said.
        with contextlib.suppress(UserError):
            _draw_page(family, request)
        raise
    _draw_page(family, request)
    return _table(request)


def _file(request: Request, part: str) -> Path:
    return request.out / f"{part}.json"


def _table(request: Request) -> Path:
    return request.out / "table.md"


def _measure_part(family: Family, request: Request, name: str) -> None:
    started = time.perf_counter()
    found = family.parts[name].measure(request)
    record = {"schema_version": SCHEMA, "part": name, "command": _command(family, request, name)} | found
    record |= {"seconds": round(time.perf_counter() - started, 1), "environment": environment.describe("cpu")}
    checkpoints.write_json(_file(request, name), record)
    shutil.rmtree(request.unfinished(name), ignore_errors=True)


def _command(family: Family, request: Request, part: str) -> str:
    words = ["robustflow measure", family.name, "--out", str(request.out), "--only", part]
    if request.benchmark is not None and family.parts[part].uses_benchmark:
        words += ["--bench", str(request.benchmark), "--data", "DIR"]
    elif family.parts[part].uses_data:
        words += ["--data", "DIR"]
    return " ".join(words)


def _draw_page(family: Family, request: Request) -> None:
    files = {name: _file(request, name) for name in family.parts}
    results = {name: checkpoints.read_json(path) for name, path in files.items() if path.exists()}
    for name, record in results.items():
        _draw(request.out / "plots", family.parts[name], record)
    if results:
        _write_page(_table(request), family, results)


def _draw(folder: Path, part: Part, record: Record) -> None:
    for name, figure in part.figures.items():
        with house_style():
            content = png(figure(record))
        with checkpoints.replacing(folder / f"{name}.png") as partial:
            partial.write_bytes(content)


def _write_page(path: Path, family: Family, results: dict[str, Record]) -> None:
    blocks = [f"# {family.title}\n"]
    for name, record in results.items():
        part, machine = family.parts[name], record["environment"]
        plots = "\n\n".join(f"![{part.title}](plots/{file}.png)" for file in part.figures)
        blocks.append(f"## {part.title}\n\n{part.section(record)}\n\n{plots}\n")
        blocks.append(
            f"`{record['command']}`, {record['seconds']:.0f} s on {machine['cpu']} ({machine['threads']} thread), "
            f"torch {machine['versions']['torch']}. Every number: [{name}.json]({name}.json).\n"
        )
    checkpoints.write_text(path, "\n".join(blocks))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """
    >>> print(markdown_table(["ε", "n"], [["0.5", "10"]]))
    | ε | n |
    | --- | --- |
    | 0.5 | 10 |
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(rate: Sequence[float]) -> str:
    """Of (value, low, high).

    >>> percent((0.5, 0.41, 0.59))
    '50.0 (41.0–59.0)'
    """
    value, low, high = (100 * number for number in rate)
    return f"{value:.1f} ({low:.1f}–{high:.1f})"
