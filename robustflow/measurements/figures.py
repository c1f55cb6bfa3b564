"""Plots of `robustflow measure certificates`, each from the JSON of its part alone."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from robustflow.measurements.family import Record
from robustflow.style import DASHES, GREY, INK, WIDTH, colour


def _figure(columns: int, height: float, *, share_y: bool = True) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(1, columns, sharey=share_y, squeeze=False)
    return figure, list(axes.flat)


def tightness(part: Record) -> Figure:
    """A row a method: least, median and most of value over true norm; hollow where the value is no bound."""
    methods = list(part["is_bound"])
    figure, axes = _figure(len(part["summary"]), 3.4)
    for ax, (family, summary) in zip(axes, part["summary"].items(), strict=True):
        for row, method in enumerate(methods):
            spread, bound = summary[method], part["is_bound"][method]
            ink = colour(0) if bound else GREY
            ax.plot([spread["least"], spread["most"]], [row, row], color=ink, linewidth=1.5)
            ax.plot(spread["median"], row, "o", color=ink, markerfacecolor=ink if bound else "white")
            ax.annotate(
                f"{spread['median']:.4g}",
                (max(spread["most"], 1.0), row),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
                color=INK if bound else GREY,
            )
        kernels = next(iter(summary.values()))["kernels"]
        ax.set_title(f"{family}\n{kernels} kernels")
        ax.axvline(1, color=INK, linewidth=0.8)
        ax.set_xscale("log")
        ax.set_xticks([1, 2, 5, 10], labels=["1", "2", "5", "10"])
        ax.minorticks_off()
        ax.set_xlim(0.75, 30)
        ax.set_xlabel("value / true norm")
    axes[0].set_yticks(range(len(methods)), labels=methods)
    axes[0].invert_yaxis()
    figure.suptitle("Norm of a 3×3 zero-padded convolution: filled is a bound, hollow is none", x=0.01, ha="left")
    return figure


def cost(part: Record) -> Figure:
    """Multiples of one float64 convolution of 100 images, against channels and against image size."""
    figure, axes = _figure(2, 3.6)
    titles = {"channels": "channels (32×32 images)", "image size": "image height = width (32 channels)"}
    for ax, axis in zip(axes, titles, strict=True):
        rows = [row for row in part["rows"] if row["axis"] == axis]
        for place, method in enumerate(rows[0]["of_forward"]):
            ax.plot(
                [row["value"] for row in rows],
                [row["of_forward"][method] for row in rows],
                "o",
                linestyle=DASHES[place % 4],
                color=colour(place),
                markersize=3.5,
                label=method,
            )
        ax.axhline(1, color=INK, linewidth=0.8)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
        ticks = [row["value"] for row in rows]
        ax.set_xticks(ticks, labels=[str(tick) for tick in ticks])
        ax.set_xlabel(titles[axis])
    axes[0].set_ylabel("CPU time / one convolution of 100 images")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def share(part: Record) -> Figure:
    """What certifying adds to one float64 forward pass, in percent of it."""
    figure, (ax,) = _figure(1, 1.2 + 0.5 * len(part["rows"]))
    for row, entry in enumerate(part["rows"]):
        ax.barh(row, 100 * entry["share_on_top"], color=colour(0), height=0.55)
        note = f"{100 * entry['share_on_top']:.1f} %" + (" (extrapolated)" if entry["extrapolated"] else "")
        ax.annotate(note, (100 * max(entry["share_on_top"], 0), row), xytext=(5, 0), textcoords="offset points",
                    va="center")  # fmt: skip
    goal = 100 * part["goal"]
    ax.axvline(goal, color=INK, linewidth=0.9)
    ax.annotate("goal", (goal, 1), xycoords=("data", "axes fraction"), xytext=(3, -9), textcoords="offset points")
    ax.set_yticks(range(len(part["rows"])), labels=[entry["network"] for entry in part["rows"]])
    ax.set_xlim(0, max(1.4 * goal, *(130 * entry["share_on_top"] for entry in part["rows"])))
    ax.set_xlabel("certifying 10,000 images, % on top of one plain float64 forward pass (CPU time)")
    ax.invert_yaxis()
    return figure


def gains(part: Record) -> Figure:
    """The two gains of every model, as factors of the radius."""
    kinds = {
        "median_gain_of_exact_constant": "exact constant instead of √(1 − 2ah + h²)",
        "median_gain_of_pairwise_head": "pairs of rows instead of √2·‖W‖",
    }
    figure, axes = _figure(2, 1.2 + 0.36 * len(part["rows"]))
    for place, (ax, (key, title)) in enumerate(zip(axes, kinds.items(), strict=True)):
        for row, entry in enumerate(part["rows"]):
            ax.barh(row, entry[key], color=colour(place), height=0.6)
            ax.annotate(_factor(entry[key]), (entry[key], row), xytext=(4, 0), textcoords="offset points", va="center")
        ax.axvline(1, color=INK, linewidth=0.8)
        largest = max(entry[key] for entry in part["rows"])
        if largest > 10:  # weights that were not trained under the published inequality
            ax.set_xscale("log")
            ax.set_xlim(0.9, largest**1.25)
            ax.xaxis.set_major_formatter("{x:g}")
            ax.xaxis.set_minor_formatter(NullFormatter())
        else:
            ax.set_xlim(0, 1.2 * largest)
        ax.set_title(title)
        ax.set_xlabel("median gain in certified radius")
    axes[0].set_yticks(range(len(part["rows"])), labels=[entry["model"] for entry in part["rows"]])
    axes[0].invert_yaxis()
    return figure


def _factor(value: float) -> str:
    return f"{value:,.0f}×" if value >= 100 else f"{value:.3g}×"


def campaign(part: Record) -> Figure:
    """The closest observed/claimed of every regime, for networks and for their layers."""
    figure, (ax,) = _figure(1, 3.4)
    kinds = {
        "closest_random": ("random pairs, network", "o", "white"),
        "closest_searched": ("gradient search, network", "o", None),
        "closest_layer": ("gradient search, one layer", "D", None),
    }
    for place, (key, (label, marker, fill)) in enumerate(kinds.items()):
        values = [entry[key] for entry in part["regimes"].values()]
        rows = [row + 0.2 * (place - 1) for row in range(len(values))]
        ax.plot(values, rows, marker, color=colour(place), markerfacecolor=fill or colour(place), label=label)
    ax.axvline(1, color=INK, linewidth=0.9)
    ax.set_xlim(0, 1.05)
    names = [f"{regime} ({entry['networks']} networks)" for regime, entry in part["regimes"].items()]
    ax.set_yticks(range(len(names)), labels=names)
    ax.invert_yaxis()
    total = part["total"]
    ax.set_title(
        f"{total['random_pairs']:,} random and {total['searched_pairs']:,} searched pairs: "
        f"{total['violations']} violations"
    )
    ax.set_xlabel("closest observed expansion / claimed bound (beyond 1 the claim is refuted)")
    figure.legend(loc="outside lower center", ncols=3)
    return figure
