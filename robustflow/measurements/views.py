"""What averaging over more views of an image gains: its mirror image, and both shifted by a pixel.

A view must not expand: a mirror image is isometric; a shift that fills in the mean colour drops pixels and adds none,
so that its norm is 1. The average over such views keeps the Lipschitz constant of the features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from robustflow import bench
from robustflow.bounds import account
from robustflow.certificates import float64_features
from robustflow.errors import UserError
from robustflow.measurements.family import Record, Request, markdown_table, percent
from robustflow.networks import Classifier, Normalize
from robustflow.regimes import REGIMES
from robustflow.statistics import Rate
from robustflow.style import WIDTH, colour

IMAGES, BATCH = 1000, 250
EPSILONS = (0.0, 36 / 255, 72 / 255, 108 / 255)
SHIFTS = ((0, 1), (0, -1), (1, 0), (-1, 0))
VIEWS = {"the image": (((0, 0),), False), "and its mirror image": (((0, 0),), True)} | {
    "both, and both shifted by a pixel": (((0, 0), *SHIFTS), True)
}


def shifted(images: Tensor, rows: int, columns: int, fill: Tensor) -> Tensor:
    """Images moved down by ``rows`` and right by ``columns`` of −1, 0, 1; what comes in has the colour ``fill``.

    Shape: images (B, C, H, W), fill (C,) → (B, C, H, W).

    >>> shifted(torch.arange(4.0).view(1, 1, 2, 2), 0, 1, torch.tensor([9.0])).tolist()
    [[[[9.0, 0.0], [9.0, 2.0]]]]
    """
    height, width = images.shape[2:]
    fill = fill.view(-1, 1, 1)
    padded = F.pad(images - fill, (1, 1, 1, 1))
    return padded[:, :, 1 - rows : 1 - rows + height, 1 - columns : 1 - columns + width] + fill


@torch.inference_mode()
def radii(
    model: Classifier, images: Tensor, labels: Tensor, shifts: tuple[tuple[int, int], ...], mirror: bool
) -> Tensor:
    """Radii of the classifier that averages its features over these views; 0 where it is wrong, rounding left out.

    Shape: images (B, C, H, W) float64, labels (B,) → (B,).
    """
    features = float64_features(model)
    lipschitz = account(model.features, model.input_shape).lipschitz
    normalize = model.features[0]
    assert isinstance(normalize, Normalize)
    fill = normalize.mean.double()
    views = [shifted(images, *shift, fill) for shift in shifts]
    views += [view.flip(-1) for view in views] if mirror else []
    mean = torch.stack([torch.cat([features(part) for part in view.split(BATCH)]) for view in views]).mean(0)
    rows = model.head.weight.double()
    logits = mean @ rows.T + model.head.bias.double()
    margins = logits.gather(1, labels[:, None]) - logits
    quotients = margins / (lipschitz * torch.cdist(rows, rows)[labels].clamp_min(1e-12))
    quotients.scatter_(1, labels[:, None], torch.inf)
    return quotients.amin(1).clamp_min(0) * (logits.argmax(1) == labels)


def views(request: Request) -> Record:
    """Of every constrained model of a benchmark directory with weights, on its first validation images."""
    assert request.benchmark is not None
    experiment, _ = bench.read_directory(request.benchmark)
    images = bench.load_data(experiment, request.data)
    validation = images.splits["validation"].head(IMAGES)
    rows = []
    for config in experiment.models:
        folder = request.benchmark / "models" / config.name
        certified = config.regime in REGIMES and REGIMES[config.regime].constrained
        if not certified or not (folder / bench.WEIGHTS).is_file():
            continue
        model = bench.load_model(config, images, folder)
        for name, (shifts, mirror) in VIEWS.items():
            found = radii(model, validation.images().double(), validation.labels, shifts, mirror)
            rates = [Rate(int((found > epsilon).sum()), len(validation)) for epsilon in EPSILONS]
            rows.append(
                {
                    "model": config.name,
                    "views": name,
                    "count": len(shifts) * (1 + mirror),
                    "n": len(validation),
                    "epsilons": list(EPSILONS),
                    "certified": [[rate.value, rate.low, rate.high] for rate in rates],
                }
            )
    if not rows:
        raise UserError(f"{request.benchmark} has no constrained model with weights")
    return {"dataset": experiment.dataset, "rows": rows}


def section(part: Record) -> str:
    rows = [
        [row["model"], row["views"], f"{row['count']}", *(percent(rate) for rate in row["certified"])]
        for row in part["rows"]
    ]
    text = (
        f"Features averaged over views that do not expand, of the first {part['rows'][0]['n']} validation images; "
        "clean and certified accuracy in percent with 95 % Wilson intervals.\n\n"
    )
    return text + markdown_table(["model", "views", "", "clean", "36/255", "72/255", "108/255"], rows)


def draw(part: Record) -> Figure:
    """Certified accuracy against the radius, a line a set of views."""
    figure = Figure(figsize=(WIDTH * 0.6, 3.2), layout="constrained")
    ax = figure.subplots()
    for place, row in enumerate(part["rows"]):
        values = [[100 * value for value in rate] for rate in row["certified"]]
        middle, low, high = zip(*values, strict=True)
        ax.plot(row["epsilons"], middle, marker="o", color=colour(place), label=f"{row['model']}: {row['views']}")
        ax.fill_between(row["epsilons"], low, high, color=colour(place), alpha=0.12, linewidth=0)
    ax.set(xlabel="ε (L2, pixels in [0, 1])", ylabel="certified, percent", ylim=(0, 100))
    ax.legend()
    return figure
