"""The plots of learned flow maps: a measure against time or depth, and points of orbits side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure

from robustflow.structured.systems import Measured
from robustflow.style import INK, WIDTH, colour, dash, short

# What is exactly 0 is drawn here, below the round-off of float64.
FLOOR = 1e-17


def curves(
    measured: Mapping[str, Sequence[Measured]],
    x: str,
    y: str,
    x_label: str,
    y_label: str,
    scale: Literal["log", "linear"],
) -> Figure:
    """A line a model, the median of its seeds, in a band from the least to the largest of them."""
    figure = Figure(figsize=(WIDTH, 4.0), layout="constrained")
    ax = figure.subplots()
    for place, (name, seeds) in enumerate(measured.items()):
        lines = np.maximum([one.series[y] for one in seeds], FLOOR)
        at, ink = seeds[0].series[x], colour(place)
        ax.plot(at, np.median(lines, axis=0), color=ink, ls=dash(place), lw=1.8, label=short(name))
        if len(lines) > 1:
            ax.fill_between(at, lines.min(axis=0), lines.max(axis=0), color=ink, alpha=0.18, lw=0)
    ax.set_yscale("log")
    ax.set_xscale(scale)
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    figure.legend(loc="outside lower center", ncols=min(4, len(measured)))
    return figure


def point_panels(
    reference: Mapping[str, np.ndarray], measured: Mapping[str, Sequence[Measured]], labels: tuple[str, str]
) -> Figure:
    """Points of orbits: a row for each name in ``reference``, the reference first, then a panel a model (first seed).

    The axes are the reference's, both of one scale unless that makes slivers: what a model throws out of them is
    counted in the corner. ``reference`` and the series of the same name have shape (n, 2).
    """
    models = {name: seeds[0] for name, seeds in measured.items()}
    columns = 1 + len(models)
    width = max(WIDTH, 2.0 * columns)
    shapes = [tall / wide for wide, tall in (np.ptp(exact, axis=0) for exact in reference.values())]
    shapes = [shape if 0.5 < shape < 1.5 else 1.0 for shape in shapes]
    heights = [(width / columns - 0.2) * shape + 0.4 for shape in shapes]
    figure = Figure(figsize=(width, sum(heights) + 0.3), layout="constrained")
    grid = figure.subplots(len(reference), columns, sharex="row", sharey="row", squeeze=False, height_ratios=heights)
    for row, shape, (name, exact) in zip(grid, shapes, reference.items(), strict=True):
        low, high = exact.min(axis=0), exact.max(axis=0)
        middle, half = (low + high) / 2, 0.6 * (high - low)
        shown = [exact, *(one.series[name] for one in models.values())]
        inks = [INK, *(colour(place) for place in range(len(models)))]
        for ax, points, ink in zip(row, shown, inks, strict=True):
            ax.set_box_aspect(shape)
            ax.scatter(*points.T, color=ink, s=1.2, lw=0)
            outside = int((np.abs(points - middle) > half).any(axis=1).sum())
            if outside:
                corner: dict[str, Any] = {"transform": ax.transAxes, "ha": "right", "fontsize": 7}
                corner["bbox"] = {"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 1.5}
                ax.text(0.98, 0.02, f"{outside} of {len(points)} points outside", **corner)
        ax.set_xlim(middle[0] - half[0], middle[0] + half[0])
        ax.set_ylim(middle[1] - half[1], middle[1] + half[1])
        row[0].set_ylabel(f"{name}\n{labels[1]}" if len(reference) > 1 else labels[1])
    for ax, name in zip(grid[0], ["reference", *models], strict=True):
        ax.set_title(short(name, 22))
    for ax in grid[-1]:
        ax.set_xlabel(labels[0])
    return figure
