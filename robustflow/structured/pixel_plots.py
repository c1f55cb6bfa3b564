"""The plots of `pixels`: pictures over time, true and predicted, with their errors, and curves over 40 steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from robustflow.structured.systems import Measured
from robustflow.style import WIDTH, colour, dash, short

FIELDS_CAPTION = (
    "A test start and what becomes of it: the finite elements, the first model's prediction, then the errors of all "
    "models (first seed). A row has the scale of its true picture, at the left; every error its own, below it."
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
BLOWN_UP = 5e4  # errors are stored with 16 bits, up to 6e4


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
    """A row a time; columns: true, predicted by the first model, then the errors of all."""
    names = list(measured)
    first = measured[names[0]][0].series
    true, wrong = first["true"].astype(float), first["error"].astype(float)
    heads = ["true", f"predicted:\n{short(names[0], 15)}", *(f"error:\n{_folded(name)}" for name in names)]
    size = WIDTH / max(7, len(heads))
    figure = Figure(figsize=(size * len(heads) + 0.4, (size + 0.22) * len(times) + 0.4), layout="constrained")
    grid = figure.subplots(len(times), len(heads), squeeze=False)
    for ax in grid.flat:
        ax.set(xticks=[], yticks=[])
        ax.set_box_aspect(1)
        ax.grid(False)
        for spine in ax.spines.values():
            spine.set_visible(False)
    for row, time in enumerate(times):
        reach = max(float(np.abs(true[row] - offset).max()), 1e-12)
        scale = {"cmap": "RdBu_r", "vmin": offset - reach, "vmax": offset + reach, "interpolation": "nearest"}
        around = f"{offset:g} ± {reach:.2g}" if offset else f"± {reach:.2g}"
        grid[row, 0].set_ylabel(f"t = {time:.3g}\n{around}", fontsize=8)
        grid[row, 0].imshow(true[row], **scale)
        if row == 0:  # there is nothing to predict yet
            continue
        grid[row, 1].imshow(true[row] + wrong[row - 1], **scale)
        for ax, name in zip(grid[row, 2:], names, strict=True):
            error = measured[name][0].series["error"][row - 1].astype(float)
            largest = max(float(np.abs(error).max()), 1e-12)
            ax.imshow(error, cmap="PuOr_r", vmin=-largest, vmax=largest, interpolation="nearest")
            ax.set_xlabel("blown up" if largest >= BLOWN_UP else f"± {largest:.1e}", fontsize=7, labelpad=2)
    for ax, head in zip(grid[0], heads, strict=True):
        ax.set_title(head, fontsize=7.5, loc="center")
    return figure


def _folded(name: str) -> str:
    """A long name in two lines.

    >>> _folded("norm-preserving-noise"), _folded("network")
    ('norm-preserving\\n-noise', 'network')
    """
    name = short(name, 28)
    cut = name.rfind("-", 5, 16) if len(name) > 13 else -1
    return name if cut < 0 else f"{name[:cut]}\n{name[cut:]}"
