"""The plots of a report, drawn from the per-image rows: name of the file → PNG bytes, the same on every rebuild."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from robustflow.curves import draw_curves, draw_overview, draw_sets
from robustflow.gallery import draw_examples
from robustflow.results import Benchmark, Evaluation
from robustflow.statistics import Rate
from robustflow.style import INK, WIDTH, colour, dash, house_style, png, short
from robustflow.tables import epsilon_label, uncertified


@dataclass(frozen=True)
class Plot:
    file: str
    evaluation: str | None
    kind: str
    alt: str
    png: bytes


def draw(benchmark: Benchmark, summary: dict[str, Any]) -> list[Plot]:
    """All plots; those that need what is not there (attacks, a second set, examples, two epochs) are left out."""
    places = {card.name: place for place, card in enumerate(benchmark.cards)}
    plots = []
    with house_style():
        for evaluation, figures in zip(benchmark.evaluations, summary["evaluations"], strict=True):
            about = f"{evaluation.card.dataset}, {evaluation.card.split}, n = {evaluation.card.n}"
            both = "certified and attacked" if evaluation.is_attacked else "certified"
            drawn = {
                "overview": (
                    draw_overview(evaluation, figures, places, about),
                    f"All models: {both} accuracy against ε",
                ),
                "curves": (
                    draw_curves(evaluation, figures, places, about),
                    f"{both.capitalize()} accuracy against ε, a panel a model",
                ),
                "area": (
                    draw_areas(figures, places, about),
                    f"Area under the {both} curves",
                ),
                "examples": (
                    draw_examples(evaluation, about),
                    "Image, adversarial and magnified difference for each model",
                ),
                "radii": (draw_radii(evaluation, places, about), "Distribution of the certified radii"),
                "sets": (draw_sets(evaluation, figures, places, about), "Accuracy under each attack set"),
            }
            plots += [
                Plot(f"{kind}-{evaluation.folder}.png", evaluation.folder, kind, f"{alt} ({about})", png(figure))
                for kind, (figure, alt) in drawn.items()
                if figure is not None
            ]
        if (figure := draw_training(benchmark, places)) is not None:
            plots.append(
                Plot("training.png", None, "training", "Training loss and accuracy against the epoch", png(figure))
            )
    return plots


def draw_areas(figures: dict[str, Any], places: dict[str, int], about: str) -> Figure | None:
    """The paper's area under the robust-accuracy curve: certified inside attacked, a tick for each weaker set."""
    sets = figures["attack_sets"]
    rows = [row for row in figures["models"] if sets or not uncertified(row)]
    if figures["area_over"] is None or not rows:
        return None
    figure = Figure(figsize=(WIDTH, 1.5 + 0.42 * len(rows)), layout="constrained")
    ax = figure.subplots()
    weak = [row["area"]["attacked_by_set"][sets[0]] if sets else row["area"]["certified"] for row in rows]
    widest = max(weak)
    heads = ["certified", *(["attacked"] if sets else []), *([f"{short(sets[0], 9)} alone"] if len(sets) > 1 else [])]
    columns = [1.17 + 0.19 * place for place in range(len(heads))]
    cell: dict[str, Any] = {"ha": "right", "va": "center", "fontsize": 8.5, "color": INK}
    for place, text in zip(columns, heads, strict=True):
        ax.text(widest * place, -0.72, text, **cell)
    for y, row in enumerate(rows):
        ink, areas = colour(places[row["name"]]), row["area"]
        if sets:
            ax.barh(y, areas["attacked"], height=0.72, color=ink, alpha=0.25, lw=0)
        ax.barh(y, areas["certified"], height=0.38, color=ink, lw=0)
        if len(sets) > 1:
            ax.vlines(weak[y], y - 0.36, y + 0.36, color=ink, lw=1.4)
        numbers = [None if uncertified(row) else areas["certified"], areas["attacked"], weak[y]]
        for place, value in zip(columns, numbers, strict=False):
            ax.text(widest * place, y, "–" if value is None else f"{value:.3f}", **cell)
    ax.set_yticks(range(len(rows)), [short(row["name"]) for row in rows], fontsize=9)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlim(0, widest * (columns[-1] + 0.01) or 1)
    ax.set_xticks([tick for tick in ax.get_xticks() if tick <= 1.02 * widest])
    ax.grid(axis="y", visible=False)
    low, high = figures["area_over"]
    ax.set_xlabel(f"area under accuracy (0 to 1) against ε from {epsilon_label(low)} to {epsilon_label(high)}")
    ticks = f"  |  line: attacked by {sets[0]} alone" if len(sets) > 1 else ""
    outer = f"inner bar: certified  |  outer bar: attacked{ticks}"
    ax.set_title(outer if sets else "area under the certified curve", weight="normal")
    figure.suptitle(about, fontsize=9, color="#555555")
    return figure


def draw_radii(evaluation: Evaluation, places: dict[str, int], about: str) -> Figure:
    """A ridge a model: histogram of the certified radii of the images it classifies correctly, with their median."""
    models = evaluation.models
    proved = {m.name: m.radii[m.correct & (m.radii > 0) & np.isfinite(m.radii)] for m in models}
    top = max((float(np.quantile(values, 0.995)) for values in proved.values() if values.size), default=1.0)
    edges = np.linspace(0, top, 61)
    figure = Figure(figsize=(WIDTH, 1.1 + 0.68 * len(models)), layout="constrained")
    ax = figure.subplots()
    for y, model in enumerate(models):
        values, ink = proved[model.name], colour(places[model.name])
        ax.axhline(y, color="#cccccc", lw=0.8)
        correct = int(model.correct.sum())
        if values.size:
            counts, _ = np.histogram(np.minimum(values, top), bins=edges)
            ax.stairs(y - 0.8 * counts / counts.max(), edges, baseline=y, fill=True, color=ink, alpha=0.45, lw=0)
            middle = float(np.median(values))
            ax.plot([middle, middle], [y, y - 0.84], color=ink, lw=1.8)
            text = f"median {middle:.3g} of {values.size} certified / {correct} correct"
        else:
            text = f"no certified radius above 0 ({correct} correct)"
        paper = {"facecolor": "white", "alpha": 0.75, "lw": 0, "pad": 1.5}
        place: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "ha": "right", "va": "center"}
        ax.text(0.995, y - 0.42, text, fontsize=8, color=INK, bbox=paper, **place)
    ax.set_yticks([y - 0.3 for y in range(len(models))], [short(m.name) for m in models], fontsize=9)
    ax.set_ylim(len(models) - 0.9, -1.0)
    ax.set_xlim(0, top * 1.02)
    ax.grid(axis="y", visible=False)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel(
        "certified radius (L2, pixels in [0, 1]); each ridge scaled to its own peak; last bin: the largest 0.5 %"
    )
    figure.suptitle(about, fontsize=9, color="#555555")
    return figure


def _draw_validation(ax: Axes, log: pd.DataFrame, line: dict[str, Any]) -> None:
    """A line over the epochs that saw as many images as most did; the others, on their own, with 95 % intervals."""
    values = log[["epoch", "validation_accuracy", "validation_n"]].dropna().astype(float)
    if values.empty:
        return
    usual = values["validation_n"] == values["validation_n"].mode()[0]
    ax.plot(values["epoch"][usual], 100 * values["validation_accuracy"][usual], **line)
    for epoch, accuracy, n in values[~usual].itertuples(index=False):
        rate = Rate(round(accuracy * n), int(n))
        ax.plot([epoch] * 2, [100 * rate.low, 100 * rate.high], color=line["color"], lw=1)
        ax.plot([epoch], [100 * accuracy], "D", color=line["color"], ms=4)


def draw_training(benchmark: Benchmark, places: dict[str, int]) -> Figure | None:
    """Loss, training and validation accuracy against the epoch; None where no training has two of them to join."""
    if all(len(log) < 2 for log in benchmark.logs.values()):
        return None
    count = len(benchmark.logs)
    figure = Figure(figsize=(WIDTH, 3.2 + 0.22 * ((count + 3) // 4)), layout="constrained")
    axes = figure.subplots(1, 3)
    for name, log in benchmark.logs.items():
        line = {
            "color": colour(places[name]),
            "ls": dash(places[name]),
            "lw": 1.6,
            "marker": "o" if len(log) < 20 else "",
            "ms": 2.5,
        }
        for ax, column, factor in zip(axes[:2], ("loss", "train_accuracy"), (1, 100), strict=True):
            values = log[["epoch", column]].dropna().astype(float)
            ax.plot(values["epoch"], factor * values[column], label=short(name), **line)
        _draw_validation(axes[2], log, line)
    sizes = sorted({int(n) for log in benchmark.logs.values() for n in log["validation_n"].dropna()})
    # The last epoch is validated on all images, the others often on a part of them: another quantity, another mark.
    titles = {1: "validation accuracy (%), n = {}", 2: "validation (%), n = {}, ◆ {}"}
    held_out = titles.get(len(sizes), "validation accuracy (%)").format(*(f"{size:,}" for size in sizes))
    for ax, title in zip(axes, ("training loss", "training accuracy (%)", held_out), strict=True):
        ax.set_title(title)
        ax.set_xlabel("epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[2].sharey(axes[1])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(4, count))
    return figure
