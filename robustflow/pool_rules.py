"""Lipschitz rules of torch's pools: how many windows see a pixel, or a dense matrix a direction."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from robustflow import norms
from robustflow.errors import UserError
from robustflow.layer_rules import LayerBound, Shape, output_shape, register


def _two(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


@register(nn.MaxPool2d)
def _max_pool(module: nn.MaxPool2d, shape: Shape, name: str) -> list[LayerBound]:
    """√(largest number of windows that see one pixel), one factor a direction."""
    if module.return_indices:
        raise UserError(f"{name or 'the module'} (MaxPool2d) returns indices, which have no Lipschitz constant")
    made, windows = output_shape(module, shape), 1
    k, s, p, d = (_two(v) for v in (module.kernel_size, module.stride, module.padding, module.dilation))
    for axis in (-2, -1):
        seen = np.add.outer(np.arange(made[axis]) * s[axis] - p[axis], np.arange(k[axis]) * d[axis]).ravel()
        windows *= int(np.bincount(seen[(seen >= 0) & (seen < shape[axis])], minlength=1).max())
    return [LayerBound(name, "MaxPool2d", f"√(windows on a pixel) = √{windows}", norms.up(math.sqrt(windows)))]


def _average_axis(n: int, outputs: int, k: int, s: int, p: int, module: nn.AvgPool2d) -> Tensor:
    matrix = torch.zeros(outputs, n, dtype=torch.float64)
    for i in range(outputs):
        start, end = i * s - p, min(i * s - p + k, n + p)
        inside = slice(max(start, 0), min(end, n))
        count = end - start if module.count_include_pad else inside.stop - inside.start
        matrix[i, inside] = 1.0 if module.divisor_override else 1 / max(count, 1)
    return matrix


@register(nn.AvgPool2d)
def _average_pool(module: nn.AvgPool2d, shape: Shape, name: str) -> list[LayerBound]:
    made, bound = output_shape(module, shape), 1.0
    k, s, p = (_two(v) for v in (module.kernel_size, module.stride, module.padding))
    for axis in (-2, -1):
        bound *= norms.linear_norm(_average_axis(shape[axis], made[axis], k[axis], s[axis], p[axis], module))
    if module.divisor_override:
        bound /= abs(module.divisor_override)
    return [LayerBound(name, "AvgPool2d", "σ(P_h)·σ(P_w), dense", norms.up(bound))]


@register(nn.AdaptiveAvgPool2d)
def _adaptive_average_pool(module: nn.AdaptiveAvgPool2d, shape: Shape, name: str) -> list[LayerBound]:
    bound = 1.0
    for n, outputs in zip(shape[-2:], output_shape(module, shape)[-2:], strict=True):
        matrix = torch.zeros(outputs, n, dtype=torch.float64)
        for i in range(outputs):
            start, end = i * n // outputs, -(-(i + 1) * n // outputs)
            matrix[i, start:end] = 1 / (end - start)
        bound *= norms.linear_norm(matrix)
    return [LayerBound(name, "AdaptiveAvgPool2d", "σ(P_h)·σ(P_w), dense", norms.up(bound))]
