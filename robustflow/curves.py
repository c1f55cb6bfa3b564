"""Robust accuracy against ε: what is proved, what no attack broke, and what a weaker attack would have claimed."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from robustflow.results import Evaluation, Verdicts
from robustflow.style import EPSILON, GREY, INK, WIDTH, colour, dash, panels, robust_accuracy_axes, short, survival
from robustflow.tables import bound, epsilon_label, uncertified

Steps = tuple[np.ndarray, np.ndarray]


def _limit(evaluation: Evaluation) -> float:
    return evaluation.epsilons[-1] or 1.0


def _markers(ax: Any, points: list[dict[str, Any]], **style: Any) -> None:
    """The grid's rates with their 95 % intervals."""
    value = np.array([100 * p["value"] for p in points])
    reach = [value - [100 * p["low"] for p in points], [100 * p["high"] for p in points] - value]
    ax.errorbar(
        [p["epsilon"] for p in points],
        value,
        np.maximum(reach, 0),
        fmt="o",
        ms=3.2,
        lw=1,
        clip_on=False,
        zorder=4,
        **style,
    )


def _known(evaluation: Evaluation, figures: dict[str, Any]) -> list[tuple[Verdicts, dict[str, Any]]]:
    """The models that have a curve, with their figures: without attacks those with a certificate."""
    both = zip(evaluation.models, figures["models"], strict=True)
    return [(model, row) for model, row in both if evaluation.is_attacked or not uncertified(row)]


def draw_overview(evaluation: Evaluation, figures: dict[str, Any], places: dict[str, int], about: str) -> Figure | None:
    """All models in two panels: what is proved, and what no attack broke; in one where nothing was attacked."""
    limit, known = _limit(evaluation), _known(evaluation, figures)
    if not known:
        return None
    count, titles = len(known), ["Certified: proved", "Attacked: no adversarial found"][: 1 + evaluation.is_attacked]
    figure = Figure(figsize=(WIDTH if len(titles) > 1 else 7.0, 4.1 + 0.22 * ((count + 3) // 4)), layout="constrained")
    axes = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    for model, row in known:
        place = places[model.name]
        line = {"color": colour(place), "ls": dash(place), "lw": 1.8}
        if not uncertified(row):
            axes[0].step(*survival(model.radii, limit), where="post", **line)
        if evaluation.is_attacked:
            axes[1].step(*survival(model.norms(), limit), where="post", **line)
        axes[-1].lines[-1].set_label(short(model.name))
    for ax, title in zip(axes, titles, strict=True):
        robust_accuracy_axes(ax, limit)
        ax.set_title(title)
        ax.set_xlabel(EPSILON)
    axes[0].set_ylabel("robust accuracy (%)")
    figure.suptitle(about, fontsize=9, color="#555555")
    figure.legend(loc="outside lower center", ncols=min(4, count))
    return figure


def draw_curves(evaluation: Evaluation, figures: dict[str, Any], places: dict[str, int], about: str) -> Figure | None:
    """A panel a model: proved below the certified curve, broken above the attacked one, undecided between them."""
    limit, known = _limit(evaluation), _known(evaluation, figures)
    if not known:
        return None
    figure, axes = panels(len(known))
    for ax, (model, row) in zip(axes, known, strict=True):
        ink, certified = colour(places[model.name]), survival(model.radii, limit)
        if evaluation.is_attacked:
            _bracket(ax, certified, survival(model.norms(), limit), ink)
            _markers(ax, row["attacked"], color=ink, mfc="white")
        else:
            ax.fill_between(*certified, step="post", color=ink, alpha=0.38, lw=0)
        if not uncertified(row):
            ax.step(*certified, where="post", color=ink, lw=1.6)
            _markers(ax, row["certified"], color=ink)
        robust_accuracy_axes(ax, limit)
        ax.set_title(short(model.name, 24))
        facts = "no certificate" if uncertified(row) else f"L ≤ {bound(row['lipschitz_bound'])}"
        ax.text(0.98, 0.97, facts, transform=ax.transAxes, ha="right", va="top", fontsize=8, color=INK)
        if row["alarm_count"]:
            word = "alarm" if row["alarm_count"] == 1 else "alarms"
            text = f"{row['alarm_count']} {word}"
            ax.text(
                0.98,
                0.87,
                text,
                transform=ax.transAxes,
                ha="right",
                va="top",
                fontsize=8,
                color="#c00000",
                weight="bold",
            )
    handles = [
        Line2D(
            [], [], color=INK, ls=(0, (4, 1.5)), marker="o", mfc="white", ms=4, label="attacked (no adversarial found)"
        ),
        Patch(color=GREY, alpha=0.25, lw=0, label="undecided"),
        Line2D([], [], color=INK, marker="o", ms=4, label="certified (proved)"),
    ][0 if evaluation.is_attacked else 2 :]
    figure.legend(handles=handles, loc="outside lower center", ncols=1 if len(axes) == 1 else 3)
    figure.supylabel("robust accuracy (%)", fontsize=9)
    figure.suptitle(f"{about}; bars: 95 % Wilson intervals", fontsize=9, color="#555555")
    return figure


def _bracket(ax: Any, certified: Steps, attacked: Steps, ink: str) -> None:
    """What is proved, what is left undecided, and the upper edge of that."""
    x = np.union1d(certified[0], attacked[0])
    low, high = (y[np.searchsorted(at, x, side="right") - 1] for at, y in (certified, attacked))
    ax.fill_between(x, 0, low, step="post", color=ink, alpha=0.38, lw=0)
    ax.fill_between(x, low, np.maximum(low, high), step="post", color=ink, alpha=0.13, lw=0)
    ax.step(*attacked, where="post", color=ink, lw=1.3, ls=(0, (4, 1.5)))


def draw_sets(evaluation: Evaluation, figures: dict[str, Any], places: dict[str, int], about: str) -> Figure | None:
    """Each attack set alone: how far the weaker one leaves accuracy above the truth."""
    sets = evaluation.card.attack_sets
    if len(sets) < 2:
        return None
    limit = _limit(evaluation)
    figure, axes = panels(len(evaluation.models))
    for ax, model, row in zip(axes, evaluation.models, figures["models"], strict=True):
        ink = colour(places[model.name])
        for place, name in enumerate(sets):
            ax.step(
                *survival(model.norms(name), limit),
                where="post",
                color=GREY if place == 0 else ink,
                ls=_set_dash(place),
                lw=1.6,
            )
            _markers(
                ax, row["attacked_by_set"][name], color=GREY if place == 0 else ink, mfc="white" if place else GREY
            )
        ax.fill_between(*survival(model.radii, limit), step="post", color=ink, alpha=0.15, lw=0)
        robust_accuracy_axes(ax, limit)
        ax.set_title(short(model.name, 24))
        gap, epsilon = _largest_gap(row, sets[0])
        text = f"{gap:.1f} points at ε = {epsilon_label(epsilon)}" if gap > 0 else "no gap"
        ax.text(0.98, 0.97, text, transform=ax.transAxes, ha="right", va="top", fontsize=8, color=INK)
    handles: list[Any] = [
        Line2D(
            [],
            [],
            color=GREY if i == 0 else INK,
            ls=_set_dash(i),
            marker="o",
            ms=4,
            mfc="white" if i else GREY,
            label=f"{name} alone",
        )
        for i, name in enumerate(sets)
    ]
    handles.append(Patch(color=GREY, alpha=0.3, lw=0, label="certified"))
    figure.legend(handles=handles, loc="outside lower center", ncols=1 if len(axes) == 1 else 4)
    figure.supylabel("accuracy under attack (%)", fontsize=9)
    figure.suptitle(
        f"{about}; number: largest gap between {sets[0]} and all sets together", fontsize=9, color="#555555"
    )
    return figure


def _set_dash(place: int) -> Any:
    return "-" if place == 0 else ["--", "-.", ":"][(place - 1) % 3]


def _largest_gap(row: dict[str, Any], name: str) -> tuple[float, float]:
    gaps = [
        (100 * (a["k"] - b["k"]) / a["n"], -a["epsilon"])
        for a, b in zip(row["attacked_by_set"][name], row["attacked"], strict=True)
    ]
    gap, epsilon = max(gaps)
    return gap, -epsilon
