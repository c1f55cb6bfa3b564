"""Build summary.json, the tables, the plots and report.html from a benchmark directory; all of them, or none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from robustflow import pages, tables
from robustflow.plots import Plot, draw
from robustflow.results import read_benchmark
from robustflow.seeds.reading import seed_directories
from robustflow.seeds.report import build_seeds_report
from robustflow.style import colour
from robustflow.summary import summarize, to_json

NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:e[+-]?\d+)?(?!\w)")
PLOT_KINDS = ("overview", "curves", "area", "examples", "radii", "sets", "training")


def build_report(out: Path) -> Path:
    """Rebuild everything that a benchmark directory says about itself; returns OUT/report.html.

    Reads OUT/config.json, OUT/models/*/card.json and train.jsonl, OUT/evaluations/*; writes OUT/summary.json, table.md,
    table.csv, plots/*.png and report.html, the same bytes from the same files with the same libraries.

    In a directory of seeds (OUT/seed-N) they are those of `robustflow.seeds.report`, over the seeds.

    Raises UserError, naming the file, where one is missing or garbled or OUT cannot be written; what an earlier report
    wrote is then untouched.
    """
    out = Path(out)
    if folders := seed_directories(out):
        return build_seeds_report(out, folders)
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
    pages.replace(out, files, PLOT_KINDS)
    return out / "report.html"


def to_html(summary: dict[str, Any], plots: list[Plot]) -> str:
    """The page of one benchmark, from its summary and plots."""
    models = {model["name"]: model for model in summary["models"]}
    evaluations = [
        {
            "figures": evaluation,
            "anchor": f"evaluation-{number}",
            "name": f"{evaluation['dataset']}, {evaluation['split']}",
            "quoted": tables.quoted(evaluation["epsilons"]),
            "shown": [i for i, epsilon in enumerate(evaluation["epsilons"]) if epsilon > 0],
            "sets": _members(evaluation),
            "warnings": _warnings(evaluation),
            "attacks": sorted({entry["attack"] for row in evaluation["models"] for entry in row["broken_by"] or ()}),
            "attacked": bool(evaluation["attack_sets"]),
            "kinds": tables.kinds(evaluation),
            "hidden": tables.hidden(evaluation),
            "plots": dict.fromkeys(PLOT_KINDS)
            | {plot.kind: _inline(plot) for plot in plots if plot.evaluation == evaluation["folder"]},
        }
        for number, evaluation in enumerate(summary["evaluations"])
    ]
    return pages.render(
        "report.html.j2",
        summary=summary,
        models=models,
        evaluations=evaluations,
        training=next((_inline(plot) for plot in plots if plot.kind == "training"), None),
        alarms=sum(row["alarm_count"] or 0 for e in summary["evaluations"] for row in e["models"]),
        not_attacked=tables.NOT_ATTACKED,
        anchors={name: f"model-{number}" for number, name in enumerate(models)},
        seeds=sorted({model["seed"] for model in summary["models"]}),
        colours={name: colour(place) for place, name in enumerate(models)},
        uncertified=tables.uncertified,
    )


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


def _inline(plot: Plot) -> dict[str, str]:
    return pages.inline(plot.alt, plot.png)
