"""A gradient step on patches in one pass: what training runs in place of the formula it equals.

x + h s Aᵀσ(Ax + b) with A = W on disjoint patches of a shifted grid is, for the rows P of all patches,

    P ← P + (h s) σ(P Wᵀ + b) W

Written layer by layer, the image is copied to roll the grid, to collect the patches, to change the sign, to scale, to
add, to scatter and to roll back, and as often again in backward. Here rolling and collecting are one gather, the sum is
part of the matrix product, and backward keeps no more than P and σ(…).

Certificates, attacks and every evaluation use the formula itself (`robustflow.steps.EulerStep`), as does whatever takes
no gradients or is a transform of torch.func; the tests hold the two against each other, values and gradients. It can be
differentiated once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@lru_cache(maxsize=64)
def patch_order(height: int, width: int, patch: int, shift: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Numbers of the pixels, patch by patch, of the grid rolled back by ``shift``; and the way back.

    >>> patch_order(2, 4, 2, 0, torch.device("cpu"))[0].tolist()
    [0, 1, 4, 5, 2, 3, 6, 7]
    """
    pixels = torch.arange(height * width, device=device).view(height, width).roll((-shift, -shift), (0, 1))
    order = pixels.view(height // patch, patch, width // patch, patch).transpose(1, 2).reshape(-1)
    return order, torch.argsort(order)


class _PatchGradientStep(torch.autograd.Function):
    """P + (h s) σ(P Wᵀ + b) W on the rows of the patches; images in and out, (B, C, H, W)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, matrix: Tensor, bias: Tensor, size: Tensor, sign: int, slope: float, patch: int, shift: int
    ) -> Tensor:
        batch, channels, height, width = x.shape
        order, back = patch_order(height, width, patch, shift, x.device)
        rows = _gather(x, order).view(-1, patch * patch * channels)
        hidden = torch.addmm(bias.to(x.dtype), rows, matrix.to(x.dtype).T)
        hidden = F.relu_(hidden) if slope == 0 else F.leaky_relu_(hidden, slope)
        # h s times the matrix in its own precision: rounded before that, a small update of h would be lost.
        out = torch.addmm(rows, hidden, (matrix * (size * sign)).to(x.dtype))
        ctx.save_for_backward(rows, hidden, matrix, size)
        ctx.sign, ctx.slope, ctx.patch, ctx.shift, ctx.shape = sign, slope, patch, shift, x.shape
        return _image(out.view(batch, height * width, channels).index_select(1, back), height, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, hidden, matrix, size = ctx.saved_tensors
        batch, channels, height, width = ctx.shape
        order, back = patch_order(height, width, ctx.patch, ctx.shift, rows.device)
        above = _gather(gradients[0].to(rows.dtype), order).view_as(rows)
        # The factor h s goes with the small matrices: the gradients of rows and of σ(…) are never scaled by themselves.
        factor = size * ctx.sign
        lower = matrix.to(rows.dtype)
        inner = above @ lower.T
        by_size = None
        if ctx.needs_input_grad[3]:
            by_size = torch.einsum("no,no->", inner, hidden).to(size.dtype) * ctx.sign
        # σ keeps the sign of what goes in, so that its slope can be read off what came out.
        if ctx.slope == 0:
            inner = torch.ops.aten.threshold_backward(inner, hidden, 0)
        else:
            inner = torch.ops.aten.leaky_relu_backward(inner, hidden, ctx.slope, True)
        by_matrix = torch.addmm(hidden.T @ above, inner.T, rows).to(matrix.dtype) * factor
        by_bias = inner.sum(0).to(size.dtype) * factor
        below = torch.addmm(above, inner, (matrix * factor).to(rows.dtype))
        below = below.view(batch, height * width, channels).index_select(1, back)
        return _image(below, height, width), by_matrix, by_bias, by_size, None, None, None, None


def _gather(x: Tensor, order: Tensor) -> Tensor:
    """(B, C, H, W) → (B, H·W, C) in this order of the pixels; without a copy before it if x is channels-last."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1]).index_select(1, order)


def _image(rows: Tensor, height: int, width: int) -> Tensor:
    """(B, H·W, C) → (B, C, H, W), channels-last."""
    return rows.view(rows.shape[0], height, width, -1).permute(0, 3, 1, 2)


def patch_gradient_step(
    x: Tensor, matrix: Tensor, bias: Tensor, size: Tensor, *, sign: int, slope: float, patch: int, shift: int
) -> Tensor:
    """x + h·s·Aᵀσ(Ax + b), A the matrix on patch × patch patches, its columns ordered row, column, channel.

    Shape: x (B, C, H, W), matrix (O, p²·C), bias (O,), size () → (B, C, H, W), channels-last. Autocast is heeded.

    >>> x = torch.rand(2, 1, 4, 4)
    >>> step = patch_gradient_step(
    ...     x, torch.eye(4), torch.zeros(4), torch.tensor(2.0), sign=-1, slope=0.0, patch=2, shift=1
    ... )
    >>> torch.equal(step, -x)  # x − 2 ReLU(x) = −|x|
    True
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):
        return _PatchGradientStep.apply(x, matrix, bias, size, sign, slope, patch, shift)
