"""The plots of `presnov_systems`: a learned function and its parts, parts against the true ones, error against size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from robustflow.structured.systems import Measured
from robustflow.style import GREY, INK, WIDTH, colour, short

FUNCTION_CAPTION = (
    "The function (grey) and the networks: gradient and sphere steps, either part alone, and the control. Above: the "
    "first seed; below: the absolute error, the geometric mean over seeds. The tick marks are 90 % of the training "
    "points, |x| < 1.64."
)
PARTS_CAPTION = (
    "The network is a sum: what its linear layers, its gradient steps and its sphere steps add to the output, first "
    "seed. The coloured lines add up to the black one exactly; each depends on all the layers before it."
)
FOUND_CAPTION = (
    "Presnov's decomposition of the learned displacement (Ψ(x) − x)/δt beside that of the true one at 200 test points, "
    "all four coordinates, first seed. Above: the gradient part; below: the part tangent to the spheres. A network "
    "without one of the parts cannot have both."
)
SIZE_CAPTION = (
    "Test error against width (two pairs of steps) and against depth (the base width): every seed a point, lines: "
    "geometric mean ± deviation over seeds."
)
NORM_CAPTION = (
    "Drift of the norm when the sphere steps alone are applied again and again (of the control: all its steps): the "
    "largest of 16 starts. Lines: geometric mean over seeds."
)
PARTS = ("linear", "gradient", "sphere", "free")
_SWEEP = ("-width-", "-depth-")  # models of the size plot, by their names: left out of the others
FLOOR = 1e-17


def _compared(measured: Mapping[str, Sequence[Measured]]) -> dict[str, tuple[int, Sequence[Measured]]]:
    """Models but those of the sweep over sizes, each with the place of its colour."""
    named = [name for name in measured if not any(mark in name for mark in _SWEEP)]
    return {name: (place, measured[name]) for place, name in enumerate(named)}


def _geometric(values: Sequence[np.ndarray]) -> np.ndarray:
    return np.exp(np.log(np.maximum(values, FLOOR)).mean(0))


def draw_function(measured: Mapping[str, Sequence[Measured]]) -> Figure:
    figure = Figure(figsize=(WIDTH, 5.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for name, (place, runs) in _compared(measured).items():
        x, true = runs[0].series["x"], runs[0].series["true"]
        if place == 0:
            above.plot(x, true, color=GREY, lw=4, alpha=0.45, label="|x| + sin x + x²")
        above.plot(x, runs[0].series["learned"], color=colour(place), lw=1.0, label=short(name))
        errors = [np.abs(run.series["learned"] - run.series["true"]) for run in runs]
        below.plot(x, _geometric(errors), color=colour(place), lw=1.0)
    for edge in (-1.64, 1.64):
        below.axvline(edge, color=GREY, lw=0.8, ls=":")
    below.set(yscale="log", xlabel="x", ylabel="|error|")
    above.set_ylabel("f(x)")
    above.legend(loc="upper center")
    return figure


def draw_parts(measured: Mapping[str, Sequence[Measured]]) -> Figure:
    compared = _compared(measured)
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    panels = figure.subplots(1, len(compared), sharey=True, squeeze=False)[0]
    for ax, (name, (_, runs)) in zip(panels, compared.items(), strict=True):
        series = runs[0].series
        ax.plot(series["x"], series["learned"], color=INK, lw=1.4, label="output")
        for place, part in enumerate(PARTS):
            if f"part {part}" in series:
                ax.plot(series["x"], series[f"part {part}"], color=colour(place), lw=1.1, label=part)
        ax.set(title=short(name), xlabel="x")
        ax.legend(loc="upper center", fontsize=7.5)
    panels[0].set_ylabel("contribution")
    return figure


def draw_found(measured: Mapping[str, Sequence[Measured]]) -> Figure:
    compared = _compared(measured)
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    grid = figure.subplots(2, len(compared), sharex="row", sharey="row", squeeze=False)
    for column, (name, (place, runs)) in zip(grid.T, compared.items(), strict=True):
        for ax, part in zip(column, ("gradient", "sphere"), strict=True):
            true, found = runs[0].series[f"true {part}"], runs[0].series[f"learned {part}"]
            reach = 1.05 * max(np.abs(true).max(), 0.5)
            ax.plot([-reach, reach], [-reach, reach], color=GREY, lw=0.8)
            ax.plot(true, found, ".", color=colour(place), ms=2.0, alpha=0.6)
            ax.set(xlim=(-reach, reach), ylim=(-reach, reach), title=f"{short(name, 16)}: {part}")
        column[-1].set_xlabel("true")
    for ax in grid[:, 0]:
        ax.set_ylabel("learned")
    return figure


def sizes(measured: Mapping[str, Sequence[Measured]]) -> list[tuple[int, int, list[float]]]:
    """(width, layers, test errors over seeds) of the networks with both parts, empty without a sweep over sizes."""
    if not any(mark in name for name in measured for mark in _SWEEP):
        return []
    found = []
    for runs in measured.values():
        if "shape" in runs[0].series and runs[0].series["shape"][2]:
            width, layers, _ = (int(number) for number in runs[0].series["shape"])
            found.append((width, layers, [run.figures["test MSE"] for run in runs]))
    return sorted(found)


def draw_size(measured: Mapping[str, Sequence[Measured]], width_label: str) -> Figure:
    found = sizes(measured)
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    # The base is the size that both sweeps share: the commonest width, the commonest depth.
    widths, depths = [width for width, _, _ in found], [layers for _, layers, _ in found]
    base_width, base_depth = (max(set(values), key=values.count) if values else 0 for values in (widths, depths))
    _scatter(left, [(width, errors) for width, layers, errors in found if layers == base_depth])
    _scatter(right, [(layers, errors) for width, layers, errors in found if width == base_width])
    left.set(xlabel=width_label, ylabel="test MSE", title=f"width, {base_depth} pairs of steps a block")
    right.set(xlabel="pairs of steps a block", title=f"depth, {width_label} {base_width}")
    return figure


def _scatter(ax: Axes, points: Sequence[tuple[int, list[float]]]) -> None:
    if not points:
        return
    places = [place for place, _ in points]
    logs = [np.log(errors) for _, errors in points]
    middle = np.exp([values.mean() for values in logs])
    spread = np.exp([values.std(ddof=1) if len(values) > 1 else 0.0 for values in logs])
    bars = np.stack((middle - middle / spread, middle * spread - middle))
    ax.errorbar(places, middle, yerr=bars, color=colour(0), lw=1.2, capsize=3)
    for place, errors in points:
        ax.plot([place] * len(errors), errors, ".", color=colour(1), ms=4, alpha=0.7)
    ax.set(xscale="log", yscale="log", xticks=places, xticklabels=[str(place) for place in places])
    ax.xaxis.set_minor_locator(NullLocator())


def draw_norm(measured: Mapping[str, Sequence[Measured]]) -> Figure:
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    ax = figure.subplots()
    for name, (place, runs) in _compared(measured).items():
        if "norm drift" in runs[0].series:
            curve = _geometric([run.series["norm drift"] for run in runs])
            ax.plot(np.arange(1, len(curve)), curve[1:], color=colour(place), lw=1.3, label=short(name))
    ax.set(yscale="log", xlabel="applications of the sphere steps", ylabel="norm drift")
    ax.legend(loc="center right")
    return figure
