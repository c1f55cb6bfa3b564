from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread

from robustflow.curves import draw_curves, draw_sets
from robustflow.gallery import _magnification
from robustflow.plots import Plot, draw
from robustflow.results import read_benchmark
from robustflow.style import PALETTE, colour, dash, house_style, png, survival
from robustflow.summary import summarize


def plots_of(out: Path) -> list[Plot]:
    benchmark = read_benchmark(out)
    return draw(benchmark, summarize(benchmark))


def test_lines_pass_through_the_rates_of_the_grid(hand_benchmark: Path) -> None:
    evaluation = read_benchmark(hand_benchmark).evaluations[0]
    model = evaluation.models[0]
    for values, rate in ((model.radii, model.certified), (model.norms(), model.attacked)):
        x, y = survival(values, 1.0)
        for epsilon in evaluation.epsilons:
            drawn = y[np.searchsorted(x, epsilon, side="right") - 1]
            assert drawn == pytest.approx(100 * float(rate(epsilon).mean()))


def test_markers_and_intervals_are_the_summary_s(hand_benchmark: Path) -> None:
    benchmark = read_benchmark(hand_benchmark)
    figures = summarize(benchmark)["evaluations"][0]
    with house_style():
        figure = draw_curves(benchmark.evaluations[0], figures, {"hand": 0, "plain": 1}, "about")
    points = figures["models"][0]["certified"]
    _attacked, certified = figure.axes[0].containers
    assert [list(xy) for xy in certified[0].get_xydata()] == [[p["epsilon"], 100 * p["value"]] for p in points]
    bars = [segment[:, 1].tolist() for segment in certified[2][0].get_segments()]
    assert np.allclose(bars, [[100 * p["low"], 100 * p["high"]] for p in points])
    assert len(figure.axes[1].containers) == 1  # a model without certificate shows its attacked curve only


def test_no_text_of_a_figure_lies_on_another(make_benchmark: Callable[..., Path], tmp_path: Path) -> None:
    names = ["unconstrained", "a-model-with-a-very-long-name-indeed", "c", "d", "e"]
    benchmark = read_benchmark(make_benchmark(tmp_path / "out", names=names, n=60))
    figures = summarize(benchmark)["evaluations"][0]
    places = {name: place for place, name in enumerate(names)}
    with house_style():
        for drawing in (draw_curves, draw_sets):
            figure = drawing(benchmark.evaluations[0], figures, places, "about")
            assert isinstance(figure, Figure)
            figure.draw_without_rendering()
            renderer = FigureCanvasAgg(figure).get_renderer()
            texts = [text for ax in figure.axes for text in (ax.title, ax._left_title, ax.xaxis.label, *ax.texts)]
            texts += figure.texts + [text for legend in figure.legends for text in legend.get_texts()]
            boxes = [text.get_window_extent(renderer) for text in texts if text.get_text()]
            clashes = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
            assert len(boxes) > 15
            assert clashes == []


def test_png_holds_pixels_and_no_metadata(hand_benchmark: Path) -> None:
    for plot in plots_of(hand_benchmark):
        assert imread(io.BytesIO(plot.png)).shape[1] > 600
        assert not any(chunk in plot.png for chunk in (b"tEXt", b"iTXt", b"tIME"))


def test_names_that_matplotlib_or_the_font_could_trip_over(make_benchmark: Callable[..., Path], tmp_path: Path) -> None:
    out = make_benchmark(tmp_path / "out", names=["a$b$c$", "_hidden", "^{frac{", "模型"], n=30)
    assert len(plots_of(out)) == 7


def test_colour_images(make_benchmark: Callable[..., Path], tmp_path: Path) -> None:
    out = make_benchmark(tmp_path / "out", n=30, shape=(3, 8, 8))
    assert "examples" in {plot.kind for plot in plots_of(out)}


def test_sixteen_models_are_told_apart() -> None:
    assert len({(colour(i), dash(i)) for i in range(16)}) == 16
    assert len(set(PALETTE)) == len(PALETTE)


@pytest.mark.parametrize(("largest", "factor"), [(0.25, 2.0), (0.01, 50.0), (0.0123, 40.0), (1.0, 0.5), (0.0, 1.0)])
def test_magnified_difference_fills_the_grey_scale_and_stays_inside(largest: float, factor: float) -> None:
    assert _magnification(np.array([0.0, -largest])) == pytest.approx(factor)


@pytest.mark.parametrize(
    ("low", "high", "names"), [(1e-15, 1e2, {"10⁻¹⁰", "0.01", "1"}), (2e-5, 6e-4, {"2·10⁻⁵", "10⁻⁴"})]
)
def test_ticks_of_logarithmic_axes_are_written_out(low: float, high: float, names: set[str]) -> None:
    """The house style parses no mathtext, which matplotlib's own names of powers are."""
    with house_style():
        figure = Figure(figsize=(4, 3))
        ax = figure.subplots()
        ax.set(yscale="log", ylim=(low, high), xlim=(0, 1))
        png(figure)
        shown = {label.get_text() for which in ("major", "minor") for label in ax.yaxis.get_ticklabels(which=which)}
        plain = {label.get_text() for label in ax.xaxis.get_ticklabels()}
    assert names <= shown
    assert not any("$" in name for name in shown)
    assert "0.2" in plain
