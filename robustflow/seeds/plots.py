"""The plots of a directory of seeds: who certifies how much, how sure that is, and the curves with their spread."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from robustflow.results import Verdicts
from robustflow.seeds.reading import SeedEvaluation, Seeds
from robustflow.seeds.tables import uncertified
from robustflow.style import (
    EPSILON,
    GREY,
    INK,
    WIDTH,
    colour,
    dash,
    house_style,
    png,
    robust_accuracy_axes,
    short,
    survival,
)
from robustflow.tables import epsilon_label

KINDS = ("certified", "curves", "differences")


@dataclass(frozen=True)
class SeedPlot:
    file: str
    evaluation: str
    kind: str
    alt: str
    png: bytes


def draw_seeds(seeds: Seeds, summary: dict[str, Any]) -> list[SeedPlot]:
    """All plots; those of certificates are left out where no model has one."""
    places = {model["name"]: place for place, model in enumerate(summary["models"])}
    plots = []
    with house_style():
        for evaluation, figures in zip(seeds.evaluations, summary["evaluations"], strict=True):
            card = evaluation.card
            about = f"{card.dataset}, {card.split}, n = {card.n}; seeds {', '.join(map(str, summary['seeds']))}"
            drawn = {
                "certified": (draw_certified(figures, places, about), "Certified accuracy of every model at each ε"),
                "curves": (
                    draw_curves(evaluation, figures, places, about),
                    f"Certified{' and attacked' if evaluation.is_attacked else ''} accuracy against ε, mean and range"
                    " over seeds",
                ),
                "differences": (
                    draw_differences(figures, places, about),
                    "Differences of certified accuracy with their intervals at each ε",
                ),
            }
            plots += [
                SeedPlot(f"{kind}-{evaluation.folder}.png", evaluation.folder, kind, f"{alt} ({about})", png(figure))
                for kind, (figure, alt) in drawn.items()
                if figure is not None
            ]
    return plots


def draw_certified(figures: dict[str, Any], places: dict[str, int], about: str) -> Figure | None:
    """A panel an ε, its models from the best down: mean, every seed, and the two intervals of the mean."""
    rows = [row for row in figures["models"] if row["certifies"]]
    shown = [i for i, epsilon in enumerate(figures["epsilons"]) if epsilon > 0]
    if not rows or not shown:
        return None
    figure, axes = _ranked(len(shown), len(rows))
    for ax, i in zip(axes, shown, strict=True):
        ranked = sorted(rows, key=lambda row: -row["certified"][i]["mean"])
        for y, row in enumerate(ranked):
            point, ink = row["certified"][i], colour(places[row["name"]])
            ax.hlines(y, 100 * point["wide_low"], 100 * point["wide_high"], color=ink, lw=1.2)
            if point["interval"] == "t":
                ax.hlines(y, 100 * point["low"], 100 * point["high"], color=ink, lw=5, alpha=0.35)
                ax.plot([100 * v for v in point["values"]], [y] * len(point["values"]), "|", color=ink, ms=7, mew=1.1)
            ax.plot(100 * point["mean"], y, "o", color=ink, ms=5, mfc=ink if point["interval"] == "t" else "white")
        _label(ax, [row["name"] for row in ranked], f"ε = {epsilon_label(figures['epsilons'][i])} (%)")
        ax.set_xlim(left=min(0.0, ax.get_xlim()[0]) if ax.get_xlim()[0] < 5 else None)
    handles = [
        Line2D([], [], color=INK, marker="o", ls="", ms=5, label="mean over seeds"),
        Line2D([], [], color=INK, marker="|", ls="", ms=7, label="one seed"),
        Line2D([], [], color=INK, lw=5, alpha=0.35, label="95 %: other trainings, these images"),
        Line2D([], [], color=INK, lw=1.2, label="95 %: other trainings, other images"),
    ]
    if any(row["clean"]["interval"] != "t" for row in rows):
        label = "one seed only (Wilson: other images)"
        handles.append(Line2D([], [], color=INK, marker="o", mfc="white", lw=1.2, ms=5, label=label))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles) if len(handles) < 5 else 3)
    figure.suptitle(f"{about}\ncertified accuracy", fontsize=9, color="#555555")
    return figure


def draw_differences(figures: dict[str, Any], places: dict[str, int], about: str) -> Figure | None:
    """A panel an ε: certified accuracy minus that of the best model, with its interval for other seeds and images."""
    shown = [i for i, epsilon in enumerate(figures["epsilons"]) if epsilon > 0]
    if not figures["differences"] or not shown:
        return None
    group = figures["differences"][0]
    figure, axes = _ranked(len(shown), len(group["others"]))
    for ax, i in zip(axes, shown, strict=True):
        ranked = sorted(group["others"], key=lambda row: -row["certified"][i]["difference"])
        for y, row in enumerate(ranked):
            point, ink = row["certified"][i], colour(places[row["name"]])
            ax.hlines(y, 100 * point["low"], 100 * point["high"], color=ink, lw=1.6)
            filled = point["over"] == "seeds and images"
            ax.plot(100 * point["difference"], y, "o", color=ink, ms=5, mfc=ink if filled else "white")
        ax.axvline(0, color=GREY, lw=1)
        _label(ax, [row["name"] for row in ranked], f"ε = {epsilon_label(figures['epsilons'][i])} (points)")
    what = f"certified accuracy minus that of {short(group['against'])}; bars: 95 %, other trainings and other images"
    if any(row["clean"]["over"] == "images" for row in group["others"]):
        what += "; hollow: one seed, other images only"
    figure.suptitle(f"{about}\n{what}", fontsize=9, color="#555555")
    return figure


def _ranked(panels: int, rows: int) -> tuple[Figure, list[Axes]]:
    columns = min(3, panels)
    lines = math.ceil(panels / columns)
    height = 0.75 + 0.24 * max(rows, 2)
    figure = Figure(figsize=(WIDTH if columns > 1 else 6.0, lines * height + 0.75), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for empty in axes[panels:]:
        empty.remove()
    return figure, axes[:panels]


def _label(ax: Axes, names: list[str], title: str) -> None:
    ax.set_yticks(range(len(names)), [short(name, 20) for name in names], fontsize=8)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    ax.set_title(title)


def draw_curves(
    evaluation: SeedEvaluation, figures: dict[str, Any], places: dict[str, int], about: str
) -> Figure | None:
    """All models in two panels, certified and attacked: the mean over seeds, in a band from lowest to highest.

    Without attacks in one panel, those with a certificate.
    """
    attacked, limit = evaluation.is_attacked, evaluation.card.epsilons[-1] or 1.0
    rows = [row for row in figures["models"] if attacked or not uncertified(row)]
    if not rows:
        return None
    count, titles = len(rows), ["Certified: proved", "Attacked: no adversarial found"][: 1 + attacked]
    figure = Figure(figsize=(WIDTH if attacked else 7.0, 4.1 + 0.22 * ((count + 3) // 4)), layout="constrained")
    axes = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    for row in rows:
        each, place = list(evaluation.models[row["name"]].values()), places[row["name"]]
        if not uncertified(row):
            _curve(axes[0], each, lambda model: model.radii, limit, place, "" if attacked else short(row["name"]))
        if attacked:
            _curve(axes[1], each, lambda model: model.norms(), limit, place, short(row["name"]))
    for ax, title in zip(axes, titles, strict=True):
        robust_accuracy_axes(ax, limit)
        ax.set_title(title)
        ax.set_xlabel(EPSILON)
    axes[0].set_ylabel("robust accuracy (%)")
    figure.suptitle(f"{about}; line: mean over seeds, band: lowest to highest seed", fontsize=9, color="#555555")
    figure.legend(loc="outside lower center", ncols=min(4, count))
    return figure


def _curve(
    ax: Axes,
    each: list[Verdicts],
    distances: Callable[[Verdicts], np.ndarray],
    limit: float,
    place: int,
    name: str = "",
) -> None:
    curves = [survival(distances(model), limit) for model in each]
    x = np.unique(np.concatenate([at for at, _ in curves]))
    y = np.stack([values[np.searchsorted(at, x, side="right") - 1] for at, values in curves])
    if len(each) > 1:
        ax.fill_between(x, y.min(0), y.max(0), step="post", color=colour(place), alpha=0.25, lw=0)
    style: dict[str, Any] = {"color": colour(place), "ls": dash(place), "lw": 1.5}
    ax.step(x, y.mean(0), where="post", label=name or None, **style)
