"""OUT/summary.json, tables, plots and report.html over the seeds in OUT/seed-N, from their committed files only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from robustflow import pages
from robustflow import tables as plain_tables
from robustflow.seeds import tables
from robustflow.seeds.plots import KINDS, SeedPlot, draw_seeds
from robustflow.seeds.reading import read_seeds
from robustflow.seeds.summary import summarize_seeds
from robustflow.style import colour
from robustflow.summary import to_json


def build_seeds_report(out: Path, folders: dict[int, Path]) -> Path:
    """Rebuild the report over seeds; returns OUT/report.html. The same bytes from the same files and libraries.

    Reads of every seed config.json, models/*/card.json and train.jsonl, and the rows of evaluations/; the weights
    need not be there.

    Raises UserError as `robustflow.seeds.reading.read_seeds`; what an earlier report wrote is then untouched.
    """
    seeds = read_seeds(folders)
    summary = summarize_seeds(seeds)
    plots = draw_seeds(seeds, summary)
    files = {
        "summary.json": to_json(summary).encode(),
        "table.md": tables.to_markdown(summary).encode(),
        "table.csv": tables.to_csv(summary).encode(),
        **{f"plots/{plot.file}": plot.png for plot in plots},
        "report.html": to_html(summary, plots, folders).encode(),
    }
    pages.replace(out, files, KINDS)
    return out / "report.html"


def to_html(summary: dict[str, Any], plots: list[SeedPlot], folders: dict[int, Path]) -> str:
    names = [model["name"] for model in summary["models"]]
    pictures = [(plot.evaluation, plot.kind, pages.inline(plot.alt, plot.png)) for plot in plots]
    evaluations = [
        {
            "figures": evaluation,
            "anchor": f"evaluation-{number}",
            "name": f"{evaluation['dataset']}, {evaluation['split']}",
            "quoted": plain_tables.quoted(evaluation["epsilons"]),
            "shown": [i for i, epsilon in enumerate(evaluation["epsilons"]) if epsilon > 0],
            "attacked": bool(evaluation["attack_sets"]),
            "kinds": plain_tables.kinds(evaluation),
            "hidden": plain_tables.hidden(evaluation),
            "warnings": [(row["name"], text) for row in evaluation["models"] for text in row["warnings"]],
            "plots": dict.fromkeys(KINDS)
            | {kind: picture for folder, kind, picture in pictures if folder == evaluation["folder"]},
        }
        for number, evaluation in enumerate(summary["evaluations"])
    ]
    return pages.render(
        "seeds.html.j2",
        summary=summary,
        models={model["name"]: model for model in summary["models"]},
        evaluations=evaluations,
        alarms=sum(model["alarm_count"] or 0 for model in summary["models"]),
        not_attacked=plain_tables.NOT_ATTACKED,
        anchors={name: f"model-{number}" for number, name in enumerate(names)},
        colours={name: colour(place) for place, name in enumerate(names)},
        single=any(row["clean"]["sd"] is None for e in summary["evaluations"] for row in e["models"]),
        uncertified=tables.uncertified,
        time_spread=tables.time_spread,
        epochs=tables.epochs,
        against=tables.AGAINST,
        folders=[folder.name for folder in folders.values()],
    )
