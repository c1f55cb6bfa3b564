"""The plots of `pixels`: pictures over time, true and predicted, with their errors, and curves over 40 steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from robustflow.structured.systems import Measured
from robustflow.style import WIDTH, colour, dash, short

FIELDS_CAPTION = (
    "A test start and what becomes of it: the finite elements, the first model's prediction and its error, then the "
    "error of every other model (first seed). Each column has the scale of its true picture; errors have their largest "
    "size in the corner, and their own scale."
)
ERRORS_CAPTION = (
    "Relative error ‖U − U*‖/‖U*‖ and largest error over the picture, means over test starts, against the number of "
    "steps δt; trainings unroll at most five. Lines: the geometric mean over seeds; bands: their range. What has blown "
    "up leaves the panel."
)
NOISE_CAPTION = (
    "What becomes of a perturbation of the start by ±0.01: its size after n steps over its size at the start, mean "
    "over test starts. Lines: the geometric mean over seeds; bands: their range."
)
NORM_CAPTION = (
    "Drift of the norm, |‖U‖/‖U₀‖ − 1|, the largest of the test starts, against the number of steps. The equation "
    "keeps the norm; the norm-preserving networks do so to the round-off of float64. Lines: the geometric mean "
    "over seeds."
)
LABELS = {
    "relative error": "relative error",
    "max error": "largest error",
    "noise gain": "noise gain",
    "norm drift": "drift of the norm",
}
FLOOR, CEILING = 1e-17, 1e30


def _curves(ax: Axes, measured: Mapping[str, Sequence[Measured]], key: str) -> None:
    tops = []
    for place, (name, runs) in enumerate(measured.items()):
        lines = np.nan_to_num([run.series[key] for run in runs], nan=CEILING, posinf=CEILING)
        lines = lines.clip(FLOOR, CEILING)
        steps = np.arange(1, lines.shape[1] + 1)
        middle = np.exp(np.log(lines).mean(0))
        ax.plot(steps, middle, color=colour(place), ls=dash(place), lw=1.5, label=short(name))
        if len(lines) > 1:
            ax.fill_between(steps, lines.min(0), lines.max(0), color=colour(place), alpha=0.18, lw=0)
        tops.append(middle.max())
    ax.set(yscale="log", xlabel="steps δt", ylabel=LABELS[key])
    if max(tops) > 1e3:  # what blew up must not flatten the others
        ax.set_ylim(top=30 * max(1.0, *(top for top in tops if top <= 1e3)))


def _legend(figure: Figure, ax: Axes) -> None:
    handles = ax.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=min(5, len(handles[1])))


def draw_curves(measured: Mapping[str, Sequence[Measured]], key: str) -> Figure:
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    ax = figure.subplots()
    _curves(ax, measured, key)
    _legend(figure, ax)
    return figure


def draw_errors(measured: Mapping[str, Sequence[Measured]]) -> Figure:
    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    _curves(left, measured, "relative error")
    _curves(right, measured, "max error")
    _legend(figure, left)
    return figure


def draw_fields(measured: Mapping[str, Sequence[Measured]], times: Sequence[float], offset: float) -> Figure:
    """Rows: true, predicted by the first model, then the errors of all; a column a time."""
    names = list(measured)
    first = measured[names[0]][0].series
    true, wrong = first["true"].astype(float), first["error"].astype(float)
    figure = Figure(figsize=(WIDTH * 0.85, 1.95 * (2 + len(names)) + 0.3), layout="constrained")
    grid = figure.subplots(2 + len(names), len(times), squeeze=False)
    for ax in grid.flat:
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        for spine in ax.spines.values():
            spine.set_visible(False)
    for column, time in enumerate(times):
        reach = max(float(np.abs(true[column] - offset).max()), 1e-12)
        scale = {"cmap": "RdBu_r", "vmin": offset - reach, "vmax": offset + reach, "interpolation": "nearest"}
        grid[0, column].imshow(true[column], **scale)
        grid[0, column].set_title(f"t = {time:.4g}, amplitude {reach:.2g}")
        shown = true[column] + wrong[column - 1] if column else true[column]
        grid[1, column].imshow(shown, **scale)
        for row, name in enumerate(names, start=2):
            ax = grid[row, column]
            if column == 0:
                continue
            error = measured[name][0].series["error"][column - 1].astype(float)
            largest = max(float(np.abs(error).max()), 1e-12)
            ax.imshow(error, cmap="PuOr_r", vmin=-largest, vmax=largest, interpolation="nearest")
            blown = largest >= 5e4
            ax.set_title("blown up" if blown else f"max |error| {largest:.1e}", fontweight="normal", fontsize=8)
    for row, label in enumerate(["true", short(names[0], 18), *(f"error of\n{short(name, 18)}" for name in names)]):
        grid[row, 0].set_ylabel(label)
    for ax in grid[2:, 0]:  # at the start there is no error: the column holds the names
        ax.set_facecolor("none")
    return figure
