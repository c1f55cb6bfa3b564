"""One page over the reports of several systems, DIR/NAME each: their main figures, and what their structure is worth.

DIR/table.md, table.csv     a row a figure: the structured model, the control, what others say
DIR/plots/properties.png    the defect of each property: at round-off with the structure, orders above without
DIR/report.html             both, with links to the systems' own reports
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from robustflow import checkpoints, pages
from robustflow.errors import UserError
from robustflow.structured import tables
from robustflow.structured.catalogue import SYSTEMS
from robustflow.structured.report import build_report
from robustflow.structured.systems import System
from robustflow.style import INK, WIDTH, colour, house_style, png
from robustflow.tables import csv_text, table

CONTROLS = ("free", "control")  # what configs call the control
TITLE = "Structured networks: every system"
HEAD = ("system", "figure", "model", "structured", "control", "by others")
CAPTION = (
    "How far each property is from being kept, mean over the seeds, models with the structure beside the control. What "
    "is 0 is drawn at the left edge. The structure keeps it at the round-off of float64, whatever the weights are."
)
FLOOR = 1e-17  # below the round-off of any figure here: a defect of exactly 0 has no logarithm


def system_directories(out: Path) -> list[Path]:
    """The directories of systems in DIR, in the order of the catalogue; none where DIR is a benchmark itself."""
    if not out.is_dir() or (out / "config.json").exists():
        return []
    found = [path for path in out.iterdir() if (path / "config.json").is_file()]
    notes = {path: checkpoints.read_json(path / "config.json") for path in found}
    named = {path: str(note.get("system")) for path, note in notes.items() if isinstance(note, dict)}
    order = list(SYSTEMS)
    return sorted((path for path in named if named[path] in order), key=lambda p: (order.index(named[p]), p.name))


def build_overview(out: Path) -> Path:
    """Rebuild every system's report, then the page over them; returns DIR/report.html.

    Raises:
        UserError: a system's files are missing or garbled, or DIR cannot be written.
    """
    folders = system_directories(out)
    if not folders:
        raise UserError(f"{out} holds no system's benchmark: run `robustflow bench structured/NAME --out {out}/NAME`")
    reports = []
    for folder in folders:
        build_report(folder)
        reports.append((folder.name, checkpoints.read_json(folder / "summary.json")))
    rows = [row for folder, summary in reports for row in headline_rows(folder, summary)]
    with house_style():
        plot = png(draw_properties(defects(reports)))
    files = {
        "table.md": to_markdown(rows).encode(),
        "table.csv": csv_text([_plain(row) for row in rows]).encode(),
        "plots/properties.png": plot,
        "report.html": to_html(reports, rows, plot).encode(),
    }
    pages.replace(out, files, ("properties",))
    return out / "report.html"


def headline_rows(folder: str, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The headlines of a system: the figure of the model, of the control, of others."""
    models = {model["name"]: model["figures"] for model in summary["models"]}
    chosen = _system(summary).headlines or ((summary["figures"][0], next(iter(models))),)
    return [
        {
            "system": folder,
            "figure": figure,
            "model": model,
            "structured": models[model].get(figure),
            "control": next((models[name].get(figure) for name in CONTROLS if name in models), None),
            "by others": [r for r in tables.references(summary, figure) if r["model"] in (None, model)],
        }
        for figure, model in chosen
        if model in models
    ]


def _system(summary: dict[str, Any]) -> System:
    return SYSTEMS[summary["system"]["name"]]


def defects(reports: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, str, dict[str, float], float | None]]:
    """(system, figure, model → mean defect with the structure, mean defect of the control; None: not finite)."""
    found = []
    for folder, summary in reports:
        if (chosen := _system(summary).defect) is None:
            continue
        figure, keepers = chosen
        means = {model["name"]: model["figures"].get(figure, {}).get("mean") for model in summary["models"]}
        kept = {name: means[name] for name in keepers if means.get(name) is not None}
        found.append((folder, figure, kept, next((means[name] for name in CONTROLS if name in means), None)))
    return found


def draw_properties(rows: list[tuple[str, str, dict[str, float], float | None]]) -> Figure:
    """A line a system: the structured models' defects and the control's, on a logarithmic axis."""
    figure = Figure(figsize=(WIDTH, 1.1 + 0.36 * max(1, len(rows))), layout="constrained")
    ax = figure.subplots()
    for place, (_, _, kept, control) in enumerate(rows):
        low = [max(value, FLOOR) for value in kept.values()]
        if low and control is not None:
            ax.plot([max(low), max(control, FLOOR)], [place, place], color="#cccccc", lw=1.2, zorder=1)
        ax.plot(low, [place] * len(low), "o", color=colour(0), label=None if place else "with the structure")
        if control is not None:
            ax.plot(max(control, FLOOR), place, "X", ms=7, color=colour(1), label=None if place else "control")
    ax.set_yticks(range(len(rows)), labels=[f"{name}: {figure_name}" for name, figure_name, _, _ in rows])
    ax.axvline(2.0**-52, color=INK, lw=0.7, ls=":")
    ax.annotate("2⁻⁵²", (2.0**-52, -0.75), ha="center", va="bottom", fontsize=8, annotation_clip=False)
    ax.set(xscale="log", xlabel="defect of the property")
    ax.set_ylim(len(rows) - 0.4, -0.9)
    ax.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _text(row: dict[str, Any]) -> list[str]:
    others = "; ".join(f"{tables.number(one['value'])} ({one['text'] or one['source']})" for one in row["by others"])
    told = (tables.spread(row["structured"]), tables.spread(row["control"]), others or "–")
    return [row["system"], row["figure"], row["model"], *told]


def to_markdown(rows: list[dict[str, Any]]) -> str:
    text = (
        "Mean ± standard deviation over the seeds, on the test examples, in float64. The control is a network without "
        "the structure and of the same size. Every figure, plot and source: NAME/table.md and NAME/report.html."
    )
    return f"# {TITLE}\n\n{text}\n\n{table(list(HEAD), [_text(row) for row in rows], left=3)}\n"


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    flat = {key: row[key] for key in ("system", "figure", "model")}
    for side in ("structured", "control"):
        spread = row[side] or {}
        flat |= {f"{side}_{key}": spread.get(key) for key in ("n", "mean", "deviation")}
    return flat | {"by_others": "; ".join(str(one["value"]) for one in row["by others"])}


def to_html(reports: list[tuple[str, dict[str, Any]]], rows: list[dict[str, Any]], plot: bytes) -> str:
    return pages.render(
        "overview.html.j2",
        summary={"title": TITLE, "name": None},
        head_row=HEAD,
        rows=[_text(row) for row in rows],
        systems=[(folder, summary["system"], summary["title"], len(summary["seeds"])) for folder, summary in reports],
        plot=pages.inline(CAPTION, plot),
        caption=CAPTION,
    )
