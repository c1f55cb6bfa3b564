"""The look that all plots share: colours, axes, panels, and PNG bytes that are the same on every rebuild."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogFormatterMathtext, NullFormatter

# Okabe and Ito's colour-blind-safe palette, its yellow darkened to be seen on white.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#B8860B", "#555555", "#882255"]
DASHES = ["-", "--", "-.", ":"]
INK, GREY = "#222222", "#8a8a8a"
WIDTH = 10.0  # inches
EPSILON = "ε (L2, pixels in [0, 1])"

_SETTINGS: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "text.parse_math": False,  # a model may be called a$b$c
}


@contextmanager
def house_style() -> Iterator[None]:
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        # A model name may hold characters that the font lacks: a box in a plot, not an error.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def png(figure: Figure) -> bytes:
    """The figure as PNG without the metadata (library version) that would change its bytes."""
    _plain_powers(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def power(value: float) -> str:
    """A tick of a logarithmic axis.

    >>> power(1e-12), power(100), power(1), power(0.2)
    ('10⁻¹²', '100', '1', '0.2')
    """
    if 1e-2 <= value <= 1e3:
        return f"{value:g}"
    mantissa, exponent = f"{value:.0e}".split("e")
    digits = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return ("" if mantissa == "1" else f"{mantissa}·") + f"10{digits}"


def _plain_powers(figure: Figure) -> None:
    """Name the ticks of logarithmic axes by `power`: the house style does not parse matplotlib's own names.

    Of the ticks between the powers of ten, 2 and 5 have names, on an axis that shows less than two powers.
    """
    for ax in figure.axes:
        for axis, (low, high) in ((ax.xaxis, sorted(ax.get_xlim())), (ax.yaxis, sorted(ax.get_ylim()))):
            if isinstance(axis.get_major_formatter(), LogFormatterMathtext):
                axis.set_major_formatter(FuncFormatter(lambda value, _: power(value)))
            if isinstance(axis.get_minor_formatter(), LogFormatterMathtext):
                axis.set_minor_formatter(FuncFormatter(_between) if high < 100 * low else NullFormatter())


def _between(value: float, _: int | None = None) -> str:
    return power(value) if f"{value:.0e}"[0] in "25" else ""


def colour(place: int) -> str:
    return PALETTE[place % len(PALETTE)]


def dash(place: int) -> str:
    return DASHES[place // len(PALETTE) % len(DASHES)]


def short(name: str, limit: int = 28) -> str:
    """
    >>> short("resnet-modern-with-a-very-long-name", 16)
    'resnet-mod…-name'
    """
    # matplotlib leaves labels that begin with an underscore out of its legends.
    name = f" {name}" if name.startswith("_") else name
    head = (limit - 1) * 2 // 3
    return name if len(name) <= limit else f"{name[:head]}…{name[head + 1 - limit :]}"


def panels(count: int, height: float = 2.35, bottom: float = 0.75) -> tuple[Figure, list[Axes]]:
    """Small multiples with shared axes: one row up to four panels, then two or more; the rest of the grid is empty."""
    columns = count if count <= 4 else 3 if count <= 6 else 4
    rows = math.ceil(count / columns)
    width = WIDTH if columns > 2 else 4.2 * columns
    figure = Figure(figsize=(width, height * rows + bottom + (0.5 if columns < 3 else 0)), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    axes = list(grid.flat)
    for empty in axes[count:]:
        empty.remove()
    for ax in axes[max(0, count - columns) : count]:
        ax.tick_params(labelbottom=True)
        ax.set_xlabel(EPSILON)
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)
    engine.set(wspace=0.05)  # the last tick of a panel must not touch the first of the next
    return figure, axes[:count]


def robust_accuracy_axes(ax: Axes, epsilon_max: float) -> None:
    ax.set_xlim(0, epsilon_max)
    ax.set_ylim(0, 100)
    ax.set_yticks(range(0, 101, 20))


def survival(values: np.ndarray, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """Percent of images whose value is above x, as the exact step function of x in [0, limit].

    >>> x, y = survival(np.array([0.0, 0.2, 0.2, 3.0]), 1.0)
    >>> x.tolist(), y.tolist()
    ([0.0, 0.2, 1.0], [75.0, 25.0, 25.0])
    """
    x = np.unique(np.concatenate([[0.0, limit], values[(values > 0) & (values < limit)]]))
    above = 1.0 - np.searchsorted(np.sort(values), x, side="right") / len(values)
    return x, 100 * above
