"""The falsification campaign: millions of random pairs, thousands of searched ones, over every kind of network."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from robustflow import checkpoints
from robustflow.bounds import lipschitz_of
from robustflow.certificates import float64_features
from robustflow.falsifier import falsify, falsify_network
from robustflow.networks import RESNET, Classifier, create_model
from robustflow.regimes import REGIMES
from robustflow.rounding import forward_with_error
from robustflow.steps import EulerStep

SHAPE = (1, 8, 8)
# Random points come in constellations, a centre and points around it: 8 evaluations make 28 pairs.
CONSTELLATIONS, MEMBERS = 512, 8
CHUNK = CONSTELLATIONS * MEMBERS * (MEMBERS - 1) // 2
# Chunks of random pairs by the width of a network: most go where they are cheap.
RANDOM_CHUNKS = {2: 16, 4: 12, 8: 6}
DEPTHS = (2, 4)
SEARCHED, LAYER_SEARCHED, ITERATIONS = 150, 24, 25


def cases() -> Iterator[dict[str, Any]]:
    """Every regime, with three widths, two depths and, where the regime leaves the choice, two kinds of kernel."""
    for regime in (*REGIMES, RESNET):
        free = regime == RESNET or not REGIMES[regime].constrained
        for kernel, width, layers in itertools.product(("convolution", "patch"), RANDOM_CHUNKS, DEPTHS):
            if free and kernel == "patch":
                continue
            if regime == RESNET and layers != DEPTHS[0]:
                continue
            yield {"regime": regime, "kernel": kernel, "channels": [width, 2 * width], "layers": layers}


def build(case: dict[str, Any], seed: int) -> Classifier:
    """A network of random weights, biases and admissible step sizes: a regime's constants must hold for all of them."""
    torch.manual_seed(seed)
    options = {key: value for key, value in case.items() if key != "regime"}
    if case["kernel"] == "patch":
        options["lift"] = "patch"
    model = create_model(case["regime"], input_shape=SHAPE, classes=4, mean=[0.5], std=[0.25], **options)
    with torch.no_grad():
        for module in model.modules():
            bias = getattr(module, "bias", None)
            if isinstance(bias, Tensor):
                bias.normal_(std=0.3)
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_var is not None
                module.running_var.uniform_(0.5, 2.0)
            if isinstance(module, EulerStep) and module.step_size.requires_grad:
                module.step_size.mul_(0.5 + torch.rand(()))
    model.constrain_(exact=True)
    return model.eval()


def campaign(partial: Path) -> dict[str, Any]:
    """Run all cases; what is done is kept in ``partial``, so that an interrupted run goes on from there."""
    settings = {
        "image": list(SHAPE),
        "random_pairs_by_width": {str(width): chunks * CHUNK for width, chunks in RANDOM_CHUNKS.items()},
        "searched_pairs_a_network": SEARCHED,
        "searched_pairs_a_layer": LAYER_SEARCHED,
        "iterations": ITERATIONS,
    }
    done = checkpoints.read_json(partial) if partial.exists() else {}
    rows: list[dict[str, Any]] = done["rows"] if done.get("settings") == settings else []
    todo = list(enumerate(cases()))
    for seed, case in tqdm(todo[len(rows) :], desc="campaign", initial=len(rows), total=len(todo), unit="network",
                           disable=None):  # fmt: skip
        chunks = RANDOM_CHUNKS[case["channels"][0]]
        rows.append(case | {"seed": seed} | _attempt(build(case, seed), seed, chunks))
        checkpoints.write_json(partial, {"settings": settings, "rows": rows})
    regimes = {
        regime: {
            "networks": len(mine),
            "random_pairs": sum(row["random_pairs"] for row in mine),
            "searched_pairs": sum(row["searched_pairs"] for row in mine),
            "violations": sum(row["violations"] for row in mine),
        }
        | {f"closest_{kind}": max(row[kind] for row in mine) for kind in ("random", "searched", "layer")}
        for regime in dict.fromkeys(row["regime"] for row in rows)
        if (mine := [row for row in rows if row["regime"] == regime])
    }
    total = {key: sum(entry[key] for entry in regimes.values()) for key in
             ("networks", "random_pairs", "searched_pairs", "violations")}  # fmt: skip
    partial.unlink(missing_ok=True)
    return {"settings": settings, "total": total, "regimes": regimes, "rows": rows}


def _attempt(model: Classifier, seed: int, chunks: int) -> dict[str, Any]:
    features = float64_features(model)
    claimed = lipschitz_of(features, SHAPE)
    generator = torch.Generator().manual_seed(seed)
    closest, violations = 0.0, 0
    for chunk in range(chunks):
        ratio, violated = _random_pairs(features, claimed, generator, wide=chunk % 2 == 1)
        closest, violations = max(closest, ratio), violations + violated
    points = torch.rand(16, *SHAPE, generator=generator)
    whole = falsify(features, points, claimed=claimed, pairs=SEARCHED, iterations=ITERATIONS, seed=seed)
    layers = falsify_network(model, points, pairs=LAYER_SEARCHED, iterations=ITERATIONS, seed=seed)[1:]
    return {
        "claimed": claimed,
        "random_pairs": chunks * CHUNK,
        "searched_pairs": SEARCHED + LAYER_SEARCHED * (1 + len(layers)),
        "violations": violations + sum(found.violated for found in (whole, *layers)),
        "random": closest,
        "searched": whole.ratio,
        "layer": max(found.ratio for found in layers),
    }


@torch.no_grad()
def _random_pairs(module: nn.Module, claimed: float, generator: torch.Generator, wide: bool) -> tuple[float, int]:
    """(closest ratio, violations) of one chunk: images, or points far outside [0, 1]; distances from 1e-4 to 10."""
    shape = (CONSTELLATIONS, MEMBERS, *SHAPE)
    centre = torch.rand(CONSTELLATIONS, 1, *SHAPE, generator=generator, dtype=torch.float64)
    centre = (centre - 0.5) * 6 if wide else centre
    direction = torch.randn(shape, generator=generator, dtype=torch.float64)
    length = 10 ** (5 * torch.rand(shape[:2], generator=generator, dtype=torch.float64) - 4)
    length[:, 0] = 0  # the centre itself
    x = centre + direction * (length / direction.flatten(2).norm(dim=2)).view(*shape[:2], 1, 1, 1)
    out = module(x.flatten(0, 1)).view(*shape[:2], -1)
    first, second = torch.triu_indices(MEMBERS, MEMBERS, offset=1)
    distance = (x[:, first] - x[:, second]).flatten(2).norm(dim=2)
    change = (out[:, first] - out[:, second]).norm(dim=2)
    ratio = change / distance / claimed
    above = ratio > 1
    if not above.any():
        return float(ratio.max()), 0
    # Only then does it matter what float64 may have made up.
    rows, pairs = above.nonzero(as_tuple=True)
    zero = torch.zeros(len(rows), dtype=torch.float64)
    doubt = sum(forward_with_error(module, x[rows, ends[pairs]], zero)[1] for ends in (first, second))
    violated = change[above] * (1 - 1e-12) - doubt > claimed * distance[above]
    return float(ratio.max()), int(violated.sum())
