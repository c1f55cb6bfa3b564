"""OUT/summary.json, tables, plots and report.html of a system, from the committed files of OUT only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from robustflow import pages
from robustflow.structured import tables
from robustflow.structured.plots import Plot, draw
from robustflow.structured.summary import read_results, summarize
from robustflow.style import colour
from robustflow.summary import to_json


def build_report(out: Path) -> Path:
    """Rebuild everything that OUT says about itself; returns OUT/report.html. The same bytes from the same files.

    Reads config.json, the cards, logs and measured files of every complete seed; no weights, no examples.

    Raises:
        UserError: a file is missing or garbled, or OUT cannot be written; what an earlier report wrote is untouched.
    """
    results = read_results(out)
    summary = summarize(results)
    plots = draw(results)
    files = {
        "summary.json": to_json(summary).encode(),
        "table.md": tables.to_markdown(summary).encode(),
        "table.csv": tables.to_csv(summary).encode(),
        **{f"plots/{plot.file}": plot.png for plot in plots},
        "report.html": to_html(summary, plots).encode(),
    }
    # All plots of the directory are this report's.
    kinds = {path.stem.split("-")[0] for path in (out / "plots").glob("*.png")}
    pages.replace(out, files, tuple(kinds))
    return out / "report.html"


def to_html(summary: dict[str, Any], plots: list[Plot]) -> str:
    names = [model["name"] for model in summary["models"]]
    return pages.render(
        "structured.html.j2",
        summary=summary,
        plots=[(plot.file, plot.caption, pages.inline(plot.caption, plot.png)) for plot in plots],
        colours={name: colour(place) for place, name in enumerate(names)},
        anchors={name: f"model-{number}" for number, name in enumerate(names)},
        spread=tables.spread,
        figure_text=tables.number,
        references=lambda figure: tables.references(summary, figure),
    )
