"""The images of a report: image, adversarial and magnified difference, with labels and the norm of the change."""

from __future__ import annotations

import textwrap
from collections import Counter
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from robustflow.results import Evaluation, Verdicts
from robustflow.style import INK, short

PER_LINE = 3


def draw_examples(evaluation: Evaluation, about: str) -> Figure | None:
    """Three examples a model, first the images for which most models have an adversarial."""
    shown = [model for model in evaluation.models if model.examples is not None]
    if not shown:
        return None
    shared = Counter(index for model in shown for index in _indices(model))
    lines: list[tuple[Verdicts, list[int]]] = []
    for model in shown:
        indices = sorted(_indices(model), key=lambda index: (-shared[index], index))
        lines.append((model, [_indices(model).index(i) for i in indices[:PER_LINE]]))
    ratios = [1.35] + [1.0, 1.0, 1.0, 0.16] * PER_LINE
    ratios = ratios[:-1]
    width, cell, gap = 10.5, 10.5 * 0.985 / (sum(ratios) + 0.08 * len(ratios)), 0.36
    height = len(lines) * (cell + gap) + 0.45
    figure = Figure(figsize=(width, height))
    grid = figure.add_gridspec(
        len(lines), len(ratios), width_ratios=ratios, left=0.005, right=0.995, wspace=0.08,
        top=1 - 0.62 / height, bottom=0.04 / height, hspace=gap / cell,
    )  # fmt: skip
    for line, (model, places) in enumerate(lines):
        label = figure.add_subplot(grid[line, 0])
        label.axis("off")
        name = "\n".join(textwrap.wrap(short(model.name, 40), 14, break_long_words=True))
        label.text(0.0, 0.5, name, va="center", fontsize=9, weight="bold", color=INK)
        for column, place in enumerate(places):
            axes = [figure.add_subplot(grid[line, 1 + 4 * column + part]) for part in range(3)]
            _triple(axes, model, place, evaluation.card.class_names)
    caption = f"image, adversarial, difference δ (‖δ‖₂, × magnification; grey = no change)   –   {about}"
    figure.text(0.5, 1 - 0.08 / height, caption, ha="center", va="top", fontsize=9, color="#555555")
    return figure


def _indices(model: Verdicts) -> list[int]:
    assert model.examples is not None
    return [int(index) for index in model.examples["index"]]


def _triple(axes: list[Axes], model: Verdicts, place: int, names: list[str]) -> None:
    assert model.examples is not None
    example: dict[str, Any] = {key: tensor[place] for key, tensor in model.examples.items()}
    image, adversarial = example["images"] / 255.0, example["adversarials"].astype(float)
    difference = adversarial - image
    magnified = _magnification(difference)
    pictures = (image, adversarial, 0.5 + magnified * difference)
    titles = (
        _class(names, example["label"]),
        f"→ {_class(names, example['adversarial_prediction'])}",
        f"{example['norm']:.2g}, ×{magnified:g}",
    )
    for ax, picture, title in zip(axes, pictures, titles, strict=True):
        pixels = np.clip(np.moveaxis(picture, 0, -1), 0, 1)
        ax.imshow(pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3], cmap="gray", vmin=0, vmax=1)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
        ax.set_title(title, fontsize=7.2, weight="normal", loc="center", pad=3)


def _magnification(difference: np.ndarray) -> float:
    """The largest factor of two digits that keeps the difference inside the grey scale around its middle."""
    largest = float(np.abs(difference).max())
    if largest == 0:
        return 1.0
    factor = 0.5 / largest
    digit = 10.0 ** (np.floor(np.log10(factor)) - 1)
    return max(float(np.floor(factor / digit) * digit), 0.5)


def _class(names: list[str], label: int) -> str:
    return short(names[label], 13) if 0 <= label < len(names) else str(label)
