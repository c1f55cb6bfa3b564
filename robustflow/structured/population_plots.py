"""The plots of `populations`: mass over time, and trajectories beside the true ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from robustflow.structured.systems import Measured
from robustflow.style import GREY, WIDTH, colour, dash, short

MASS_CAPTION = (
    "Drift of the mass, |𝟏ᵀx − 𝟏ᵀx₀|, the largest of 16 orbits, against the number of times that the network was "
    "applied. Lines: the geometric mean over seeds; bands: their range. What has the structure stays at the round-off "
    "of float64, whatever the Runge–Kutta method."
)
TRAJECTORY_CAPTION = (
    "Three test orbits, rolled out from their starts far beyond the steps of the training. Grey: the reference "
    "solution; coloured: the networks of all seeds."
)
FLOOR = 1e-17  # below the round-off of a mass of 1: a drift of exactly 0 has no logarithm


def draw_mass(measured: Mapping[str, Sequence[Measured]]) -> Figure:
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    ax = figure.subplots()
    for place, (name, runs) in enumerate(measured.items()):
        curves = np.maximum([run.series["mass drift"] for run in runs], FLOOR)[:, 1:]
        steps = np.arange(1, curves.shape[1] + 1)
        ax.plot(steps, np.exp(np.log(curves).mean(0)), color=colour(place), ls=dash(place), lw=1.3, label=short(name))
        ax.fill_between(steps, curves.min(0), curves.max(0), color=colour(place), alpha=0.18, lw=0)
    ax.set(yscale="log", xlabel="applications of the network", ylabel="mass drift")
    figure.legend(loc="outside lower center", ncols=min(5, len(measured)))
    return figure


def draw_trajectories(measured: Mapping[str, Sequence[Measured]], compartments: Sequence[str]) -> Figure:
    """A row a trained model, a column a start."""
    trained = {name: runs for name, runs in measured.items() if not name.startswith("equation-")} or measured
    shown = len(next(iter(trained.values()))[0].series["true"])
    figure = Figure(figsize=(WIDTH, 0.6 + 2.1 * len(trained)), layout="constrained")
    grid = figure.subplots(len(trained), shown, sharex=True, sharey=True, squeeze=False)
    for row, (name, runs) in zip(grid, trained.items(), strict=True):
        for column, ax in enumerate(row):
            times, true = runs[0].series["times"], runs[0].series["true"][column]
            for part, compartment in enumerate(compartments):
                ax.plot(times, true[:, part], color=GREY, lw=3.0, alpha=0.45)
                for run in runs:
                    label = compartment if run is runs[0] else None
                    ax.plot(times, run.series["predicted"][column][:, part], color=colour(part), lw=0.9, label=label)
            ax.set_title(f"{short(name)}, start {column + 1}")
            ax.set_ylim(*_limits([run.series["true"] for run in runs]))
        row[0].set_ylabel("share of the mass" if compartments[0] == "susceptible" else "y")
    for ax in grid[-1]:
        ax.set_xlabel("t")
    handles = grid[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(compartments))
    return figure


def _limits(true: Sequence[np.ndarray]) -> tuple[float, float]:
    """The range of the true orbits with a margin: a control that leaves it goes off the panel."""
    low, high = min(part.min() for part in true), max(part.max() for part in true)
    margin = 0.12 * (high - low)
    return low - margin, high + margin
