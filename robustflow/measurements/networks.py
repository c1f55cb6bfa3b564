"""What a certificate costs beside the forward pass it needs, and what its sharper parts gain."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from robustflow import bench, data, norms
from robustflow.bounds import flat_children
from robustflow.certificates import Certificate, certify, float64_features
from robustflow.errors import UserError
from robustflow.fields import GradientField
from robustflow.measurements.digits import trained
from robustflow.networks import Classifier, create_model
from robustflow.operators import PatchConvolution
from robustflow.regimes import prescribed_contraction
from robustflow.steps import EulerStep

IMAGES, BATCH = 10_000, 250
SHORT, LONG = 250, 1_250  # images of the two runs whose difference is the cost of 1,000 images
PATCHES: dict[str, Any] = {"kernel": "patch", "lift": "patch", "dense": 256, "dense_layers": 2}


def _benchmark(folder: Path | None, directory: Path | None) -> Iterator[tuple[str, Classifier, data.Split]]:
    """The trained models of a benchmark directory that can be loaded, with its test split."""
    if folder is None:
        return
    experiment, _ = bench.read_directory(folder)
    images = bench.load_data(experiment, directory)
    for config in experiment.models:
        home = folder / "models" / config.name
        if (home / bench.CARD).is_file():
            model = bench.load_model(config, images, home)
            yield config.name, model, images.splits["test"].head(experiment.evaluate.images_of("test"))


# --------------------------------------------------------------------------------------------------------------- share
def share(folder: Path | None, directory: Path | None) -> dict[str, Any]:
    """CPU seconds of `certify` on 10,000 images on top of one plain float64 forward pass of the same batches.

    One network of patches in full; one of convolutions from two short runs, their fixed part and the part that grows.
    """
    rows = []
    loaded = {name: model for name, model, _ in _benchmark(folder, directory)} if folder is not None else {}
    torch.manual_seed(0)
    patches = loaded.get("sharp") or create_model("sharp", **PATCHES)
    name = "sharp, patches" + (" (trained)" if "sharp" in loaded else " (untrained)")
    forward, certifying = _timed(patches, IMAGES)
    rows.append(_share_row(name, IMAGES, False, forward, certifying))
    torch.manual_seed(0)
    convolutions = create_model("nonexpansive")
    short, long = _timed(convolutions, SHORT), _timed(convolutions, LONG)
    growth = (IMAGES - SHORT) / (LONG - SHORT)
    forward, certifying = (a + (b - a) * growth for a, b in zip(short, long, strict=True))
    row = _share_row("nonexpansive, convolutions (untrained)", IMAGES, True, forward, certifying)
    rows.append(row | {"measured": {str(SHORT): short, str(LONG): long}})
    return {"batch": BATCH, "goal": 0.1, "rows": rows}


def _share_row(name: str, images: int, extrapolated: bool, forward: float, certifying: float) -> dict[str, Any]:
    return {
        "network": name,
        "images": images,
        "extrapolated": extrapolated,
        "forward_cpu_seconds": forward,
        "certify_cpu_seconds": certifying,
        "share_on_top": certifying / forward - 1,
    }


def _timed(model: Classifier, count: int) -> tuple[float, float]:
    """CPU seconds of (one float64 forward pass, certifying) of ``count`` random images, norms not yet known."""
    exact = copy.deepcopy(model).double().eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, *model.input_shape, generator=generator)
    batches = images.split(BATCH)
    with torch.no_grad():
        labels = exact(batches[0].double()).argmax(1)  # warms up, too
    half = len(batches) // 2
    forward = _forward(exact, batches[:half])
    for cached in (norms.conv2d_norm, norms.linear_norm, norms.conv2d_smallest_singular_value):
        cached.cache_clear()  # type: ignore[attr-defined]
    started = time.process_time()
    certify(model.eval(), images, labels[:1].expand(count), batch_size=BATCH)
    certifying = time.process_time() - started
    # One half before, one half after: a drift of the machine meets both sides.
    return forward + _forward(exact, batches[half:]), certifying


@torch.no_grad()
def _forward(model: Classifier, batches: tuple[Tensor, ...]) -> float:
    started = time.process_time()
    for batch in tqdm(batches, desc="forward", unit="batch", disable=None):
        model(batch.double())
    return time.process_time() - started


# --------------------------------------------------------------------------------------------------------------- gains
def gains(folder: Path | None, directory: Path | None) -> dict[str, Any]:
    """Median gain in radius by the exact constant of contractive steps, and by pairs of the head's rows."""
    test = data.load("digits").splits["test"]
    subjects = []
    for regime in ("prescribed", "nonexpansive"):
        model, accuracy = trained(regime)
        subjects.append((f"digits: {regime} (accuracy {accuracy:.3f})", model, test))
    subjects += [(f"{folder.name if folder else ''}: {n}", m, s) for n, m, s in _benchmark(folder, directory)]
    rows = []
    for name, model, split in tqdm(subjects, desc="gains", unit="model", disable=None):
        images = split.images()
        certificate = certify(model, images, split.labels)
        right = certificate.radii > 0
        if not right.any() or not math.isfinite(certificate.lipschitz):
            continue
        radii = certificate.radii[right]
        published = certificate.lipschitz * _published_ratio(model)
        whole = _by_the_whole_head(model, images, split.labels, certificate)[right]
        rows.append(
            {
                "model": name,
                "images": int(right.sum()),
                "lipschitz": certificate.lipschitz,
                "lipschitz_by_published_constant": published,
                "median_radius": float(np.median(radii)),
                "median_radius_by_published_constant": float(np.median(radii * certificate.lipschitz / published)),
                "median_gain_of_exact_constant": published / certificate.lipschitz,
                "median_gain_of_pairwise_head": float(np.median(radii / whole)),
                "least_gain_of_pairwise_head": float(np.min(radii / whole)),
            }
        )
    if not rows:
        raise UserError("no image of any model has a certified radius: nothing to compare")
    return {"rows": rows}


def _published_ratio(model: Classifier) -> float:
    """Π √(1 − 2ah + h²) over Π max(1 − ah, h − 1), over the contractive steps where the published bound applies.

    It needs AᵀA = I and slopes a > 0; for other steps there is no published constant below 1, and both take ours.
    """
    ratio = 1.0
    for _, layer in flat_children(float64_features(model), "features"):
        if isinstance(layer, EulerStep) and isinstance(layer.field, GradientField):
            h, slope = -float(layer.step_size) * layer.field.sign, layer.field.slope
            if h > 0 and slope > 0 and isinstance(layer.field.operator, PatchConvolution):
                ours = max(1 - slope * h, h - 1)
                ratio *= prescribed_contraction(h, slope) / ours
    return ratio


def _by_the_whole_head(model: Classifier, images: Tensor, labels: Tensor, found: Certificate) -> np.ndarray:
    """margin/(√2·L·‖W‖), the usual bound, in float64; ‖W‖ is the norm of the whole head."""
    exact = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        logits = torch.cat([exact(batch.double()) for batch in images.split(BATCH)])
    own = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -math.inf).amax(1)
    return ((own - others) / (math.sqrt(2) * found.lipschitz * norms.linear_norm(model.head.weight))).numpy()


__all__ = ["gains", "share"]
