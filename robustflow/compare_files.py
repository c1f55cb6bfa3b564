"""The files of a comparison: compare.csv, compare.json and compare.png."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from robustflow import checkpoints
from robustflow.compare import Comparison, Rows
from robustflow.style import (
    EPSILON,
    GREY,
    INK,
    WIDTH,
    colour,
    house_style,
    png,
    robust_accuracy_axes,
    short,
    survival,
)

LINES = {"certified": "-", "attacked": (0, (4, 1.5))}
MEANING = {"certified": "certified (proved)", "attacked": "attacked (no adversarial found)"}


def save(comparison: Comparison, out: Path) -> None:
    """Write compare.csv (the table), compare.json (with the images that the two disagree on) and compare.png."""
    checkpoints.write_text(out / "compare.csv", comparison.table.to_csv(index=False, lineterminator="\n"))
    checkpoints.write_json(out / "compare.json", json.loads(json.dumps(comparison.as_dict(), default=float)))
    with house_style():
        picture = png(draw(comparison))
    with checkpoints.replacing(out / "compare.png") as partial:
        partial.write_bytes(picture)


def draw(comparison: Comparison) -> Figure:
    """Left the curves of both, right A − B with its paired 95 % interval at every ε."""
    shown = [quantity for quantity in LINES if (comparison.table["quantity"] == quantity).any()]
    figure = Figure(figsize=(WIDTH, 4.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    grid = comparison.table["epsilon"]
    limit = float(grid.max()) or 1.0
    for place, side in enumerate((comparison.a, comparison.b)):
        for quantity in shown:
            line = {"color": colour(place), "ls": LINES[quantity], "lw": 1.7}
            left.step(*survival(_distances(side, quantity, comparison), limit), where="post", **line)
    robust_accuracy_axes(left, limit)
    left.set_title("Both")
    left.set_ylabel("robust accuracy (%)")
    _differences(right, comparison, shown, limit)
    for ax in (left, right):
        ax.set_xlabel(EPSILON)
    names = [short(name, 40) for name in comparison.names]
    handles = [Line2D([], [], color=colour(place), lw=3, label=name) for place, name in enumerate(names)]
    handles += [Line2D([], [], color=INK, ls=LINES[quantity], label=MEANING[quantity]) for quantity in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    about = f"{comparison.a.dataset}, {comparison.a.split}, the same {len(comparison.a.rows)} images"
    figure.suptitle(f"{about}; bars: paired 95 % intervals", fontsize=9, color="#555555")
    return figure


def _distances(side: Rows, quantity: str, comparison: Comparison) -> np.ndarray:
    if quantity == "certified":
        return np.where(side.correct, side.rows["certified_radius"].to_numpy(), 0.0)
    sets = [name for name in comparison.a.norms if name in comparison.b.norms]
    return np.where(side.correct, np.minimum.reduce([side.norms[name] for name in sets]), 0.0)


def _differences(ax: Axes, comparison: Comparison, shown: list[str], limit: float) -> None:
    table, names = comparison.table, [short(name, 24) for name in comparison.names]
    clean = table[table["quantity"] == "clean"]
    for place, quantity in enumerate(["clean", *shown]):
        rows = clean if quantity == "clean" else table[table["quantity"] == quantity]
        value, low, high = (100 * rows[key].to_numpy(dtype=float) for key in ("difference", "low", "high"))
        # Side by side, not on top of each other.
        at = rows["epsilon"].to_numpy(dtype=float) + limit * 0.008 * (place - len(shown) / 2)
        style = {"color": INK, "fmt": "D", "ls": ""} if quantity == "clean" else {
            "color": INK, "fmt": "o", "ls": LINES[quantity], "mfc": INK if quantity == "certified" else "white",
        }  # fmt: skip
        reach = np.maximum([value - low, high - value], 0)
        ax.errorbar(at, value, reach, ms=4, lw=1.2, elinewidth=1, clip_on=False, zorder=4, **style)
    ax.axhline(0, color=GREY, lw=1)
    reach = float(np.abs(100 * table[["low", "high"]].to_numpy()).max()) * 1.15 + 0.5
    ax.set_xlim(-0.025 * limit, 1.025 * limit)
    ax.set_ylim(-reach, reach)
    ax.set_title("A − B, percentage points (diamond: clean)")
    for place, (name, y, va) in enumerate(zip(names, (0.98, 0.02), ("top", "bottom"), strict=True)):
        ax.text(0.98, y, f"{name} better", transform=ax.transAxes, ha="right", va=va, fontsize=8, color=colour(place))


__all__ = ["draw", "save"]
