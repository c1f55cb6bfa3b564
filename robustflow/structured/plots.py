"""The plots of a system's report: its own, and the training curves that all have."""

from __future__ import annotations

import re
from dataclasses import dataclass

from matplotlib.figure import Figure

from robustflow.structured.summary import Results
from robustflow.style import WIDTH, colour, dash, house_style, png, short


@dataclass(frozen=True)
class Plot:
    file: str
    caption: str
    png: bytes


def draw(results: Results) -> list[Plot]:
    """The system's drawings, in its order, then training.png."""
    measured = {model.name: model.measured for model in results.models}
    with house_style():
        drawn = results.bench.system.draw(measured)
        plots = [Plot(f"{file}.png", caption, png(figure)) for file, caption, figure in drawn]
        names = [plot.file for plot in plots]
        assert len(set(names)) == len(names), "a file a plot"
        assert all(re.fullmatch(r"[a-z0-9][a-z0-9-]*\.png", name) for name in names), names
        if any(model.logs for model in results.models):
            caption = "Training and validation error of every seed (thin: one training), from train.jsonl."
            plots.append(Plot("training.png", caption, png(draw_training(results))))
    return plots


def draw_training(results: Results) -> Figure:
    """Mean squared error in training and on validation examples against the epoch, a line a training."""
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, column, title in zip(
        axes,
        ("loss", "validation_loss"),
        ("training loss (of the steps unrolled then)", "validation loss (of the longest unrolling)"),
        strict=True,
    ):
        for place, model in enumerate(results.models):
            for number, log in enumerate(model.logs):
                label = short(model.name) if number == 0 else None
                style = {"color": colour(place), "ls": dash(place), "lw": 0.9, "alpha": 0.8}
                ax.plot(log["epoch"], log[column], label=label, marker="o" if len(log) < 3 else "", **style)
        ax.set_yscale("log")
        ax.set_title(title)
        ax.set_xlabel("epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=min(4, len(handles[1])))
    return figure
