"""Rigorous spectral norms of linear maps: upper bounds for certificates, lower bounds of σ_min for steps.

Everything is computed in float64 from materialised weights and moved outwards by `INFLATION`, more than rounding can do
to it. Functions whose name ends in ``_estimate`` are no bounds and must never reach a certificate.

The bound of a zero-padded convolution is the norm of the circular convolution on a torus that the image fits into with
its padding: extend the image by zeros; no tap that wraps around meets the image, and two outputs never coincide, so the
convolution is a restriction of the circular one, whose norm is the largest singular value of its symbol over the
frequencies of the torus (`robustflow.spectra`). With a torus as small as the image this is false: [−1, 2, −1] on three
pixels has norm 2 + √2, its symbol at size three only reaches 3.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from robustflow.errors import UserError
from robustflow.spectra import (
    INFLATION,
    UNIT,
    Padding,
    Pair,
    axes_of,
    grouped,
    inflation,
    largest_norm,
    materialised,
    normalised,
    pair,
    symbols,
    up,
)


def _content_cache(function: Callable[..., float]) -> Callable[..., float]:
    """Remember results by the weight's bytes and every argument: a changed weight can never find an old bound."""
    memory: dict[tuple[Any, ...], float] = {}

    @functools.wraps(function)
    def wrapper(weight: Tensor, *args: Any, **options: Any) -> float:
        weight = materialised(weight)
        digest = hashlib.sha256(weight.numpy().tobytes()).digest()
        key = (digest, tuple(weight.shape), repr(args), repr(sorted(options.items())))
        if key not in memory:
            if len(memory) >= 4096:
                memory.clear()
            memory[key] = function(weight, *args, **options)
        return memory[key]

    wrapper.cache_clear = memory.clear  # type: ignore[attr-defined]
    return wrapper


# ---------------------------------------------------------------------------------------------------------- matrices
def singular_value_bounds(matrix: Tensor) -> tuple[float, float]:
    """(lower, upper): ``lower`` ‖x‖ ≤ ‖Mx‖ ≤ ``upper`` ‖x‖ for every x, from a dense float64 SVD.

    ``lower`` bounds the smallest singular value on the whole domain: it is 0 for a matrix with fewer rows than columns.

    >>> lower, upper = singular_value_bounds(torch.diag(torch.tensor([3.0, 4.0])))
    >>> round(lower, 6), round(upper, 6)
    (3.0, 4.0)
    """
    matrix, scale = normalised(materialised(matrix))
    values = torch.linalg.svdvals(matrix)
    margin = inflation(max(matrix.shape), min(matrix.shape))
    upper = up(float(values[0]) * (1 + margin), scale)
    lower = float(values[-1]) - margin * float(values[0]) if matrix.shape[0] >= matrix.shape[1] else 0.0
    return max(0.0, math.nextafter(lower * scale, 0.0)) if lower > 0 else 0.0, upper


@_content_cache
def linear_norm(weight: Tensor) -> float:
    """An upper bound of the spectral norm of a matrix, tight to a billionth (dense float64 SVD).

    >>> round(linear_norm(torch.tensor([[3.0, 4.0]])), 6)
    5.0
    """
    return singular_value_bounds(weight)[1]


# ------------------------------------------------------------------------------------------------------ convolutions
@_content_cache
def conv2d_norm(
    weight: Tensor,
    image_size: Pair,
    *,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> float:
    """An upper bound of the spectral norm of ``torch.nn.functional.conv2d`` on images of ``image_size``.

    ‖K‖ ≤ max_ω σ₁(F(ω)) on a torus of n + p pixels or a few more (zero padding; for stride s the s² aliased blocks side
    by side, over s), σ₁ at n itself for circular padding that keeps the size, where it is exact. Other paddings: the
    norm of the padding map times that of the convolution on the padded image. Groups: their maximum, as they act on
    different channels. A transposed convolution has the norm of the convolution it transposes: give its *output* size.

    Args:
        weight: (out, in/groups, k_h, k_w), any floating dtype; converted to float64.
        image_size: (height, width) or one number.
        padding: as in torch, or ((top, bottom), (left, right)).
        padding_mode: "zeros", "circular", "reflect" or "replicate".

    Raises:
        UserError: weights that are not finite, or a kernel that does not fit the image.

    >>> round(conv2d_norm(torch.tensor([[[[-1.0, 2.0, -1.0]]]]), (1, 3), padding=(0, 1)), 3)  # true norm 3.414
    4.0
    """
    if weight.ndim != 4:
        raise UserError(f"the weight of a convolution has four dimensions, this one {weight.ndim}")
    if padding_mode not in ("zeros", "circular", "reflect", "replicate"):
        raise UserError(f"padding_mode {padding_mode!r} has no norm bound; use zeros, circular, reflect or replicate")
    axes = axes_of(weight, image_size, stride, padding, dilation)
    weight, scale = normalised(weight)
    sizes: list[tuple[tuple[int, int], float]] = [((axes[0].torus, axes[1].torus), 1.0)]
    if padding_mode != "zeros":
        repeats = math.sqrt(math.prod(axis.copies(padding_mode) for axis in axes))
        sizes = [((axes[0].padded().torus, axes[1].padded().torus), repeats)]
        if padding_mode == "circular" and all(axis.n % axis.stride == 0 for axis in axes):
            # On its own torus; where the padding makes more outputs than the torus has, some are computed twice.
            rounds = math.prod(math.ceil(axis.outputs * axis.stride / axis.n) for axis in axes)
            sizes.append(((axes[0].n, axes[1].n), math.sqrt(rounds)))
    bound = min(
        factor * max(largest_norm(symbols(part, torus, stride, dilation)) for part in grouped(weight, groups))
        for torus, factor in sizes
    )
    strides = pair(stride)
    margin = inflation(weight.shape[1] * strides[0] * strides[1], weight.shape[0] // groups)
    return up(bound * (1 + margin), scale)


@_content_cache
def conv2d_norm_any_size(
    weight: Tensor, *, stride: Pair = 1, dilation: Pair = 1, groups: int = 1, grid: int = 64
) -> float:
    """An upper bound of a convolution's norm for every image size, zero-padded or circular of constant size.

    sup_ω σ₁(F(ω)) ≤ max_grid σ₁(F(ω)) / (cos(πd_h/N) cos(πd_w/N)), d = (k − 1)/2: a function of exponential type d
    that reaches its supremum M is at least M cos(dt) at distance t ≤ π/2d (Duffin and Schaeffer 1938), and a grid of N
    points leaves none further than π/N. Without stride a dilation only rescales ω.

    >>> round(conv2d_norm_any_size(torch.tensor([[[[-1.0, 2.0, -1.0]]]])), 2)
    4.0
    """
    strides, dilations = pair(stride), pair(dilation) if pair(stride) != (1, 1) else (1, 1)
    torus, slack = [], 1.0
    for k, s, d in zip(weight.shape[2:], strides, dilations, strict=True):
        degree = d * (k - 1) / 2
        torus.append(s * math.ceil(max(grid, 4 * degree + 1) / s))
        slack *= math.cos(math.pi * degree / torus[-1])
    weight, scale = normalised(weight)
    parts = grouped(weight, groups)
    bound = max(largest_norm(symbols(part, (torus[0], torus[1]), stride, dilations)) for part in parts) / slack
    return up(bound * (1 + inflation(weight.shape[1] * strides[0] * strides[1], weight.shape[0])), scale)


@_content_cache
def conv2d_smallest_singular_value(weight: Tensor, image_size: Pair, *, padding_mode: str = "zeros") -> float:
    """A lower bound of σ_min of a size-preserving convolution (odd kernel, stride 1) on its whole domain; 0 if unknown.

    Circular padding: min_ω σ_min(F(ω)). Zero padding, 3 × 3, at least two pixels in each direction: on the torus of
    n + 2 pixels ‖Cx‖² = ‖Ax‖² + ‖what lands outside the image‖², and outside land only the kernel's border rows and
    columns applied to the image's border rows and columns, so
    σ_min(A)² ≥ min_ω σ_min(F)² − max(‖K_top‖, ‖K_bottom‖)² − max(‖K_left‖, ‖K_right‖)². With a single pixel in one
    direction both borders act on the same row and the maximum would have to be a sum; then, and for other kernels, 0.

    >>> identity = torch.zeros(1, 1, 3, 3); identity[0, 0, 1, 1] = 2
    >>> round(conv2d_smallest_singular_value(identity, 8), 6)
    2.0
    """
    height, width = pair(image_size)
    if weight.shape[0] < weight.shape[1]:
        return 0.0
    weight, scale = normalised(weight)
    lost = 0.0
    torus = (height, width)
    if padding_mode != "circular":
        if padding_mode != "zeros" or tuple(weight.shape[2:]) != (3, 3) or min(height, width) < 2:
            return 0.0
        torus = (height + 2, width + 2)
        rows = [largest_norm(symbols(weight[:, :, i : i + 1], (1, torus[1]))) for i in (0, 2)]
        columns = [largest_norm(symbols(weight[:, :, :, i : i + 1], (torus[0], 1))) for i in (0, 2)]
        lost = max(rows) ** 2 + max(columns) ** 2
    margin = inflation(max(weight.shape[:2]), weight.shape[1])
    least = math.inf
    for batch in symbols(weight, torus):
        values = torch.linalg.svdvals(batch)
        least = min(float((values[:, -1] - margin * values[:, 0]).min()), least)  # in this order NaN stays
        if not (least > 0 and least**2 > lost * (1 + margin)):
            return 0.0
    return math.sqrt(least**2 - lost * (1 + margin)) * (1 - INFLATION) * scale


def absolute_norm(weight: Tensor, groups: int = 1) -> float:
    """An upper bound of ‖|K|‖, the same map with absolute weights: ‖Σ_t |K[t]|‖₂. Rounding errors grow with it."""
    weight = materialised(weight).abs()
    return max(linear_norm(part.flatten(2).sum(2)) for part in grouped(weight, groups))


# ------------------------------------------------------------------------------------------- estimates, no certificates
def power_iteration_norm_estimate(
    weight: Tensor, image_size: Pair, *, padding: Pair = 0, stride: Pair = 1, iterations: int = 100, seed: int = 0
) -> float:
    """A *lower* estimate of a zero-padded convolution's norm, for tightness reports. Never a certificate.

    >>> power_iteration_norm_estimate(torch.ones(1, 1, 1, 1), 4)
    1.0
    """
    weight, scale = normalised(materialised(weight))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, weight.shape[1], *pair(image_size), generator=generator, dtype=torch.float64)
    estimate = 0.0
    for _ in range(iterations):
        x = (x / torch.linalg.vector_norm(x).clamp_min(1e-300)).requires_grad_()
        with torch.enable_grad():
            y = F.conv2d(x, weight, stride=stride, padding=padding)
            (back,) = torch.autograd.grad(y, x, y.detach())
        estimate, x = float(torch.linalg.vector_norm(y.detach())), back
    return estimate * scale


__all__ = [
    "INFLATION",
    "UNIT",
    "absolute_norm",
    "conv2d_norm",
    "conv2d_norm_any_size",
    "conv2d_smallest_singular_value",
    "inflation",
    "linear_norm",
    "power_iteration_norm_estimate",
    "singular_value_bounds",
    "up",
]
