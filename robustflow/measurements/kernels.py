"""How tight, and how dear, are the ways to bound one convolution's norm."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor
from tqdm.auto import tqdm

from robustflow import norms
from robustflow.bounds import flat_children
from robustflow.measurements.digits import trained
from robustflow.operators import Convolution
from robustflow.spectra import largest_norm, symbols

# Channels, image, seeds.
GAUSSIAN = ((4, 8, 3), (8, 8, 3), (16, 8, 3), (32, 8, 1), (8, 16, 1), (16, 32, 2), (64, 32, 1))
DENSE = 2048  # inputs up to which a dense SVD is made; beyond, Lanczos until it has converged
LARGE = 32
CHANNELS, SIZES = (8, 16, 32, 64, 128), (8, 16, 32, 64)
REPEATS = 3


def dense_norm(weight: Tensor, size: int) -> float:
    """The true norm of a zero-padded convolution: a dense float64 SVD of its matrix."""
    _, inside, k, _ = weight.shape
    basis = torch.eye(inside * size * size, dtype=torch.float64).view(-1, inside, size, size)
    matrix = F.conv2d(basis, weight.double(), padding=k // 2).flatten(1)
    return float(torch.linalg.svdvals(matrix)[0])


def lanczos_norm(weight: Tensor, size: int) -> float:
    """The same for large images: a Krylov method, converged to 1e-10; like all iterations it comes from below."""
    weight = weight.double()
    pad, shape = weight.shape[-1] // 2, (1, weight.shape[1], size, size)

    def gram(x: np.ndarray) -> np.ndarray:
        y = F.conv2d(torch.from_numpy(x).reshape(shape), weight, padding=pad)
        return F.conv_transpose2d(y, weight, padding=pad).flatten().numpy()

    inputs = math.prod(shape)
    start = torch.randn(inputs, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    operator = LinearOperator((inputs, inputs), matvec=gram, dtype=np.float64)
    return math.sqrt(float(eigsh(operator, k=1, tol=1e-10, v0=start, ncv=40, return_eigenvectors=False)[0]))


def aol_rows(weight: Tensor, size: int) -> float:
    """√max_i Σ_j,t |(Kᵀ ∗ K)_ij[t]|: almost-orthogonal layers' row sums, Prach and Lampert, arXiv 2208.03160."""
    weight = weight.double()
    k = weight.shape[-1]
    gram = F.conv2d(weight.transpose(0, 1), weight.transpose(0, 1), padding=k - 1)
    return math.sqrt(float(gram.abs().sum((1, 2, 3)).max()))


def reshapes(weight: Tensor, size: int) -> float:
    """k·the smallest norm of the kernel reshaped in four ways: Singla and Feizi, arXiv 1911.10258."""
    out, inside, k, _ = weight.shape
    shapes = (
        weight.permute(0, 2, 1, 3).reshape(out * k, inside * k),
        weight.permute(0, 3, 1, 2).reshape(out * k, inside * k),
        weight.reshape(out, inside * k * k),
        weight.permute(0, 2, 3, 1).reshape(out * k * k, inside),
    )
    return k * min(norms.linear_norm(shape.contiguous()) for shape in shapes)


def _without_padding(weight: Tensor, size: int) -> float:
    return largest_norm(symbols(weight.double(), (size, size)))


Method = Callable[[Tensor, int], float]
METHODS: dict[str, tuple[Method, bool]] = {
    "embedding (ours)": (lambda w, n: norms.conv2d_norm(w, n, padding=w.shape[-1] // 2), True),
    "any size, grid 64 (ours)": (lambda w, n: norms.conv2d_norm_any_size(w), True),
    "AOL row sums": (aol_rows, True),
    "four reshapes": (reshapes, True),
    "k · Frobenius": (lambda w, n: w.shape[-1] * float(w.double().norm()), True),
    "FFT at the image size": (_without_padding, False),
    "power iteration, 10": (lambda w, n: _power(w, n, 10), False),
    "power iteration, 100": (lambda w, n: _power(w, n, 100), False),
}


def _power(weight: Tensor, size: int, iterations: int) -> float:
    return norms.power_iteration_norm_estimate(weight, size, padding=weight.shape[-1] // 2, iterations=iterations)


def _kernels() -> list[tuple[str, str, Tensor, int]]:
    """(family, name, kernel, image size)."""
    cases = []
    for channels, size, seeds in GAUSSIAN:
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(seed)
            kernel = torch.randn(channels, channels, 3, 3, generator=generator)
            family = f"Gaussian, {f'{LARGE}×{LARGE}' if size == LARGE else '8×8, 16×16'}"
            cases.append((family, f"{channels} channels, {size}×{size}, seed {seed}", kernel, size))
    for regime in ("unconstrained", "nonexpansive"):
        model, _ = trained(regime)
        x = torch.zeros(1, *model.input_shape)
        for path, layer in flat_children(model.features, "features"):
            size = x.shape[-1]
            with torch.no_grad():
                x = layer(x)
            for name, module in layer.named_modules(prefix=path):
                if not isinstance(module, Convolution):
                    continue
                for family, n in (("trained, 4×4, 8×8", size), (f"trained, {LARGE}×{LARGE}", LARGE)):
                    cases.append((family, f"{regime} {name}, {n}×{n}", module.weight.detach(), n))
    return cases


def tightness() -> dict[str, Any]:
    """Every method over the true norm, on Gaussian kernels and on kernels of networks trained on digits.

    The trained kernels are measured on the images they were trained on, and on 32×32 as they would act there.
    """
    rows: list[dict[str, Any]] = []
    for family, name, kernel, size in tqdm(_kernels(), desc="tightness", unit="kernel", disable=None):
        dense = kernel.shape[1] * size * size <= DENSE
        truth = dense_norm(kernel, size) if dense else lanczos_norm(kernel, size)
        ratios = {method: function(kernel, size) / truth for method, (function, _) in METHODS.items()}
        refuted = [method for method, (_, bound) in METHODS.items() if bound and ratios[method] < 1 - 1e-12]
        row = {"family": family, "kernel": name, "norm": truth, "norm_by": "dense SVD" if dense else "Lanczos"}
        rows.append(row | {"ratio": ratios, "refuted": refuted})
    families = sorted({row["family"] for row in rows})
    summary = {
        family: {
            method: _spread([row["ratio"][method] for row in rows if row["family"] == family]) for method in METHODS
        }
        for family in families
    }
    bounds = {method: bound for method, (_, bound) in METHODS.items()}
    border = torch.tensor([[[[0.0, 0, 0], [-1, 2, -1], [0, 0, 0]]]])
    ratios = {name: METHODS[name][0](border, 3) / dense_norm(border, 3) for name in METHODS}
    return {"is_bound": bounds, "second_difference_on_three_pixels": ratios, "summary": summary, "rows": rows}


def _spread(values: list[float]) -> dict[str, float]:
    return {"least": min(values), "median": statistics.median(values), "most": max(values), "kernels": len(values)}


def cost() -> dict[str, Any]:
    """Seconds of every method, and as multiples of one float64 convolution of 100 images with the same kernel."""
    rows = []
    cases = [("channels", c, c, 32) for c in CHANNELS] + [("image size", n, 32, n) for n in SIZES]
    for axis, value, channels, size in tqdm(cases, desc="cost", unit="case", disable=None):
        kernel = torch.randn(channels, channels, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        images = torch.rand(10, channels, size, size, dtype=torch.float64)
        with torch.no_grad():
            forward = 10 * _seconds(lambda: F.conv2d(images, kernel, padding=1))  # noqa: B023 - used at once
        seconds = {name: _seconds(partial(method, kernel, size)) for name, (method, _) in METHODS.items()}
        row = {"axis": axis, "value": value, "channels": channels, "image": size, "forward_100_images": forward}
        rows.append(row | {"seconds": seconds, "of_forward": {k: v / forward for k, v in seconds.items()}})
    return {"repeats": REPEATS, "rows": rows}


def _seconds(work: Callable[[], Any]) -> float:
    """The least of a few times: what others do on the machine only adds."""
    times = []
    for _ in range(REPEATS):
        for cached in (norms.conv2d_norm, norms.conv2d_norm_any_size, norms.linear_norm):
            cached.cache_clear()  # type: ignore[attr-defined]
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)
