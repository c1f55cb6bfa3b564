"""Plots of `robustflow measure attacks`, each from the JSON of its part alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from robustflow.measurements.family import Record
from robustflow.style import GREY, INK, WIDTH, colour, panels, robust_accuracy_axes, short
from robustflow.tables import epsilon_label

SETS = {"strong": "s", "autoattack": "D", "check": "^"}  # those with few radii, by marker


def accuracy(part: Record) -> Figure:
    """A panel a model: what each set leaves, over ε; the dear ones at their radii, with intervals."""
    figure, axes = panels(len(part["models"]))
    for ax, model in zip(axes, part["models"], strict=True):
        proved = [100 * row["value"] for row in model["certified"]]
        at = [row["epsilon"] for row in model["certified"]]
        ax.fill_between(at, 0, proved, color=colour(2), alpha=0.25, lw=0, label=f"certified (n = {part['n']})")
        for place, (name, found) in enumerate(model["benchmark"].items()):
            values = [100 * row["value"] for row in found["accuracy"]]
            style: dict[str, Any] = (
                {"color": GREY, "ls": "--"} if name == "paper" else {"color": colour(place - 1), "ls": "-"}
            )
            at = [row["epsilon"] for row in found["accuracy"]]
            ax.plot(at, values, marker="o", ms=3, lw=1.3, label=f"{name} (n = {part['n']})", **style)
        for place, (name, marker) in enumerate(SETS.items()):
            if name in model["runs"]:
                _points(ax, model["runs"][name], marker, colour(place + 3 if place else 1), name, 0.012 * (place - 1))
        robust_accuracy_axes(ax, max(part["epsilons"]))
        ax.set_title(short(model["model"], 24))
    columns = 3 if len(axes) > 2 else 2
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns)
    figure.supylabel("accuracy under attack (%)", fontsize=9)
    return figure


def _points(ax: Axes, run: Record, marker: str, ink: str, name: str, shift: float) -> None:
    rows = run["accuracy"]
    value = np.array([100 * row["value"] for row in rows])
    reach = np.array([value - [100 * row["low"] for row in rows], [100 * row["high"] for row in rows] - value])
    ax.errorbar(
        [row["epsilon"] + shift for row in rows], value, np.maximum(reach, 0), fmt=marker, ms=4, lw=1, color=ink,
        mfc="white", clip_on=False, zorder=5, label=f"{name} (n = {run['n']})",
    )  # fmt: skip


def matrix(part: Record) -> Figure:
    """How many images of all models the row breaks and the column does not."""
    names = [run["name"] for run in part["runs"]]
    found = [
        np.array(
            [
                [
                    sum(model["broken_by_row_not_by_column"][place]["counts"][row][column] for model in part["models"])
                    for column in names
                ]
                for row in names
            ]
        )
        for place in range(len(part["compared_at"]))
    ]
    figure = Figure(figsize=(WIDTH, 1.6 + 0.36 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for ax, epsilon, counts in zip(axes, part["compared_at"], found, strict=True):
        most = max(counts.max(), 1)
        # A square root tells few from none, which matters more here than many from more.
        ax.imshow(np.sqrt(counts / most), cmap="Blues", vmin=0, vmax=1.15, aspect="auto")
        for row, column in np.ndindex(counts.shape):
            text = "" if row == column else f"{counts[row, column]}"
            ax.text(column, row, text, ha="center", va="center", fontsize=8,
                    color="white" if counts[row, column] > 0.4 * most else INK)  # fmt: skip
        ax.set_xticks(range(len(names)), labels=names, rotation=40, ha="right", rotation_mode="anchor")
        ax.set_yticks(range(len(names)), labels=names)
        ax.set_title(f"ε = {epsilon_label(epsilon)}")
        ax.grid(False)
        ax.tick_params(length=0)
        for spine in ax.spines.values():
            spine.set_visible(False)
    axes[0].set_ylabel("broken by …")
    figure.supxlabel("… and not by", fontsize=9)
    models = len(part["models"])
    together = f", {models} models together" if models > 1 else ""
    figure.suptitle(f"Images that the row breaks and the column does not{together}", x=0.01, ha="left")
    return figure


def cost(part: Record) -> Figure:
    """Forward passes and CPU time of an image: a bar over all models, a dot for each."""
    names = [run["name"] for run in part["runs"]]
    figure = Figure(figsize=(WIDTH, 1.2 + 0.36 * len(names)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    kinds = {"forward passes an image": _passes, "CPU milliseconds an image": _milliseconds}
    for ax, (title, measure) in zip(axes, kinds.items(), strict=True):
        for row, name in enumerate(names):
            runs = [model["runs"][name] for model in part["models"]]
            total = sum(measure(run) for run in runs) / sum(run["n"] for run in runs)
            each = [measure(run) / run["n"] for run in runs]
            ax.barh(row, total, color=colour(0), alpha=0.55, height=0.62)
            ax.plot(each, [row] * len(each), "o", ms=2.6, color=INK, alpha=0.6)
            ax.annotate(f"{total:,.0f}", (max(total, *each), row), xytext=(6, 0), textcoords="offset points",
                        va="center", fontsize=8)  # fmt: skip
        ax.set_xscale("log")
        ax.margins(x=0.14)
        ax.xaxis.set_major_formatter("{x:,g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xlabel(title)
    few = "few radii: " + ", ".join(run["name"] for run in part["runs"] if not run["every_epsilon"])
    labels = [run["name"] + ("" if run["every_epsilon"] else " *") for run in part["runs"]]
    axes[0].set_yticks(range(len(names)), labels=labels)
    axes[0].invert_yaxis()
    radii = ", ".join(epsilon_label(epsilon) for epsilon in part["compared_at"])
    about = f"All {len(part['epsilons'])} ε; * only ε = {radii}. Bar: all models together, dot: one model"
    figure.suptitle(about if few != "few radii: " else about.split(";")[0], x=0.01, ha="left", fontsize=9)
    return figure


def _passes(run: Record) -> float:
    return float(sum(run["forward_passes"].values()))


def _milliseconds(run: Record) -> float:
    return 1000 * float(run["cpu_seconds"])


def foolbox(part: Record) -> Figure:
    """Robust accuracy both ways, a panel a model; the titles say how many times less the sweep takes."""
    figure, axes = panels(len(part["models"]), height=2.7)
    for ax, model in zip(axes, part["models"], strict=True):
        styles: dict[str, dict[str, Any]] = {
            "plain": {"color": GREY, "ls": "--", "ms": 7, "mfc": "none", "zorder": 3, "label": "plain foolbox calls"},
            "sweep": {"color": colour(0), "ms": 3.4, "label": "one sweep"},
        }
        for way, style in styles.items():
            rows = model[way]["accuracy"]
            values = [100 * row["value"] for row in rows]
            ax.plot([row["epsilon"] for row in rows], values, marker="o", lw=1.4, clip_on=False, **style)
        robust_accuracy_axes(ax, max(part["epsilons"]))
        passes, seconds = model["times_fewer_passes"], model["times_fewer_seconds"]
        ax.set_title(f"{short(model['model'], 24)}: {passes:.1f}× fewer passes, {seconds:.1f}× less time", fontsize=8.5)
    axes[0].set_ylabel("accuracy under attack (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def workers(part: Record) -> Figure:
    """Wall seconds: a bar for the mean, a dot for each run."""
    rows = {"in-process": [part["serial_seconds"]]}
    rows |= {
        f"{number} worker" + ("" if number == "1" else "s"): values for number, values in part["wall_seconds"].items()
    }
    figure = Figure(figsize=(WIDTH * 0.7, 2.1), layout="constrained")
    ax = figure.subplots()
    for row, values in enumerate(rows.values()):
        mean = sum(values) / len(values)
        ax.barh(row, mean, color=colour(0) if row else GREY, alpha=0.55, height=0.6)
        ax.plot(values, [row] * len(values), "o", ms=3.5, color=INK)
        ax.annotate(f"{mean:.1f} s", (max(values), row), xytext=(7, 0), textcoords="offset points", va="center")
    ax.axvline(
        part["goal"] * sum(part["wall_seconds"]["1"]) / len(part["wall_seconds"]["1"]), color=INK, lw=0.9, ls="--"
    )
    ax.set_yticks(range(len(rows)), labels=list(rows))
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.set_xlabel(f"wall seconds, n = {part['n']} (dashed: {part['goal']:g} of one worker's)")
    ax.set_title(f"Two workers take {part['ratio']:.2f} of one worker's time")
    return figure
