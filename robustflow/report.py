"""Build summary.json, the tables, the plots and report.html from a benchmark directory; all of them, or none."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from robustflow import tables
from robustflow.errors import UserError
from robustflow.plots import Plot, draw
from robustflow.results import read_benchmark
from robustflow.style import colour
from robustflow.summary import summarize, to_json

# The radii at which certified accuracy is usually quoted; a report of a grid without them takes four others.
QUOTED = (36 / 255, 72 / 255, 108 / 255, 1.0)
NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:e[+-]?\d+)?(?!\w)")
PLOT_KINDS = ("overview", "curves", "area", "examples", "radii", "sets", "training")


def build_report(out: Path) -> Path:
    """Rebuild everything that a benchmark directory says about itself; returns OUT/report.html.

    Reads OUT/config.json, OUT/models/*/card.json and train.jsonl, OUT/evaluations/*; writes OUT/summary.json, table.md,
    table.csv, plots/*.png and report.html, the same bytes from the same files with the same libraries.

    Raises UserError, naming the file, where one is missing or garbled or OUT cannot be written; what an earlier report
    wrote is then untouched.
    """
    out = Path(out)
    benchmark = read_benchmark(out)
    summary = summarize(benchmark)
    plots = draw(benchmark, summary)
    files = {
        "summary.json": to_json(summary).encode(),
        "table.md": tables.to_markdown(summary).encode(),
        "table.csv": tables.to_csv(summary).encode(),
        **{f"plots/{plot.file}": plot.png for plot in plots},
        "report.html": to_html(summary, plots).encode(),
    }
    try:
        _replace(out, files)
    except OSError as error:
        raise UserError(f"{out}: the report cannot be written there ({error.strerror or error})") from None
    return out / "report.html"


def _replace(out: Path, files: dict[str, bytes]) -> None:
    """Write every file beside its place first; only when all are on disk does any of them take the place of the old."""
    (out / "plots").mkdir(exist_ok=True)
    blocked = next((name for name in files if (out / name).is_dir()), None)
    if blocked:
        raise IsADirectoryError(0, f"{blocked} is a directory")
    staging = Path(tempfile.mkdtemp(prefix=".report-", dir=out))
    try:
        (staging / "plots").mkdir()
        for name, content in files.items():
            with (staging / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name in files:
            os.replace(staging / name, out / name)
        for plot in (out / "plots").glob("*.png"):
            # A plot of an evaluation that is gone would pass for a current one.
            if plot.name.split("-")[0].removesuffix(".png") in PLOT_KINDS and f"plots/{plot.name}" not in files:
                plot.unlink()
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def to_html(summary: dict[str, Any], plots: list[Plot]) -> str:
    """One page without any outside reference: its policy forbids the network and any script but its own."""
    loader = PackageLoader("robustflow", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "epsilon": tables.epsilon_label,
        "count": tables.count,
        "bound": tables.bound,
        "duration": tables.duration,
        "percent": lambda value: f"{100 * value:.1f}",
        "pretty": lambda value: json.dumps(value, indent=2, ensure_ascii=False),
        "settings": _settings,
    }
    script = loader.get_source(environment, "report.js")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    models = {model["name"]: model for model in summary["models"]}
    evaluations = [
        {
            "figures": evaluation,
            "anchor": f"evaluation-{number}",
            "name": f"{evaluation['dataset']}, {evaluation['split']}",
            "quoted": _quoted(evaluation["epsilons"]),
            "shown": [i for i, epsilon in enumerate(evaluation["epsilons"]) if epsilon > 0],
            "sets": _members(evaluation),
            "warnings": _warnings(evaluation),
            "attacks": sorted({entry["attack"] for row in evaluation["models"] for entry in row["broken_by"]}),
            "plots": dict.fromkeys(PLOT_KINDS)
            | {plot.kind: _inline(plot) for plot in plots if plot.evaluation == evaluation["folder"]},
        }
        for number, evaluation in enumerate(summary["evaluations"])
    ]
    return environment.get_template("report.html.j2").render(
        summary=summary,
        models=models,
        evaluations=evaluations,
        training=next((_inline(plot) for plot in plots if plot.kind == "training"), None),
        alarms=sum(row["alarm_count"] for e in summary["evaluations"] for row in e["models"]),
        anchors={name: f"model-{number}" for number, name in enumerate(models)},
        seeds=sorted({model["seed"] for model in summary["models"]}),
        colours={name: colour(place) for place, name in enumerate(models)},
        uncertified=tables.uncertified,
        style=Markup(loader.get_source(environment, "report.css")[0]),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
    )


def _quoted(grid: list[float]) -> list[int]:
    """Where in the grid the leaderboard's columns are: the quoted radii, filled up to four from the largest down."""
    quoted = [i for i, epsilon in enumerate(grid) if any(abs(epsilon - q) < 1e-6 for q in QUOTED)]
    others = [i for i, epsilon in reversed(list(enumerate(grid))) if epsilon > 0 and i not in quoted]
    return sorted(quoted + others[: max(0, 4 - len(quoted))])


def _members(evaluation: dict[str, Any]) -> dict[str, list[str]]:
    """The attacks of each set, from the evaluation's own count of their passes: "set: attack" → number."""
    counted = dict.fromkeys(key for row in evaluation["models"] for key in row["forward_passes"])
    parts = [key.partition(": ") for key in counted]
    return {
        name: [attack for place, _, attack in parts if place == name and attack not in ("", "clean")]
        for name in evaluation["attack_sets"]
    }


def _warnings(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Warnings that differ in their numbers only are said once, with the range of each number.

    >>> rows = [{"name": "a", "warnings": ["set l2: gap 0.3"]}, {"name": "b", "warnings": ["set l2: gap 0.25"]}]
    >>> _warnings({"models": rows})
    [{'models': ['a', 'b'], 'text': 'set l2: gap 0.25 to 0.3'}]
    """
    alike: dict[str, list[tuple[str, str]]] = {}
    for row in evaluation["models"]:
        for warning in row["warnings"]:
            alike.setdefault(NUMBER.sub("#", warning), []).append((row["name"], warning))
    return [
        {"models": list(dict.fromkeys(name for name, _ in said)), "text": _ranges([text for _, text in said])}
        for said in alike.values()
    ]


def _ranges(texts: list[str]) -> str:
    columns = iter(zip(*(NUMBER.findall(text) for text in texts), strict=True))

    def span(_: re.Match[str]) -> str:
        numbers = sorted(set(next(columns)), key=float)
        return numbers[0] if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"

    return NUMBER.sub(span, texts[0])


def _settings(config: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested configuration as lines.

    >>> _settings({"width": 8, "train": {"loss": {"kind": "offset"}, "milestones": [1, 2]}})
    [('width', '8'), ('train.loss.kind', '"offset"'), ('train.milestones', '[1, 2]')]
    """
    lines: list[tuple[str, str]] = []
    for key, value in config.items():
        if isinstance(value, dict) and value:
            lines += _settings(value, f"{prefix}{key}.")
        else:
            lines.append((f"{prefix}{key}", json.dumps(value, ensure_ascii=False)))
    return lines


def _inline(plot: Plot) -> dict[str, str]:
    return {"alt": plot.alt, "source": f"data:image/png;base64,{base64.b64encode(plot.png).decode()}"}
