"""Vector fields F(x) whose flows, discretised by `robustflow.steps`, are the layers of a network."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustflow.methods import Property
from robustflow.operators import Convolution, PatchConvolution

Operator = Convolution | PatchConvolution


def leaky_relu(x: Tensor, slope: float) -> Tensor:
    """max(x, slope·x): the activation of every field, with slopes in [slope, 1]."""
    return F.relu(x) if slope == 0 else F.leaky_relu(x, slope)


def check_slope(slope: float) -> None:
    if not 0 <= slope < 1:
        raise ValueError(f"the slope of a leaky ReLU must lie in [0, 1), not {slope}")


class GradientField(nn.Module):
    """F(x) = s·Aᵀσ(Ax + b), σ a leaky ReLU of slope a: the gradient field of a convex potential, up or down.

    ``sign = -1`` is the negative gradient: its flow brings points closer ("contractive"). ``sign = +1`` is the
    gradient: its flow drives them apart ("expansive"). Source: Celledoni et al., arXiv 2210.02373, section 3.

    Shape: (B, C, H, W) → (B, C, H, W).

    >>> field = GradientField(PatchConvolution(1, 4, patch=2), slope=0.5, sign=-1)
    >>> field(torch.rand(2, 1, 4, 4)).shape, field.properties
    (torch.Size([2, 1, 4, 4]), frozenset({'nonexpansive'}))
    """

    def __init__(self, operator: Operator, *, slope: float = 0.0, sign: int = -1) -> None:
        super().__init__()
        check_slope(slope)
        if sign not in (-1, 1):
            raise ValueError(f"a gradient field has sign -1 (contractive) or +1 (expansive), not {sign}")
        self.operator, self.slope, self.sign = operator, slope, sign
        self.bias = nn.Parameter(torch.zeros(operator.out_channels))

    @property
    def properties(self) -> frozenset[Property]:
        """What the exact flow keeps. To descend a convex potential is nonexpansive, whatever the norm of A."""
        return frozenset({"nonexpansive"} if self.sign < 0 else ())

    @property
    def lipschitz(self) -> float:
        """A Lipschitz constant of F that A's constraint holds: ‖A‖² = 1, or infinite for a free kernel."""
        held = isinstance(self.operator, PatchConvolution) or self.operator.image_size is not None
        return 1.0 if held else math.inf

    def forward(self, x: Tensor) -> Tensor:
        gradient = self.operator.adjoint(leaky_relu(self.operator(x, self.bias), self.slope))
        return gradient if self.sign > 0 else -gradient


class TwoKernelField(nn.Module):
    """F(x) = B σ(Ax + a): the field of an ordinary residual block; no property comes with it.

    ``outer`` is B, stored as the operator whose `adjoint` is applied, so that shapes match those of `GradientField`:
    B = (outer)ᵀ.

    Shape: (B, C, H, W) → (B, C, H, W).
    """

    properties: frozenset[Property] = frozenset()

    def __init__(self, inner: Operator, outer: Operator, *, slope: float = 0.0) -> None:
        super().__init__()
        check_slope(slope)
        self.inner, self.outer, self.slope = inner, outer, slope
        self.bias = nn.Parameter(torch.zeros(inner.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.outer.adjoint(leaky_relu(self.inner(x, self.bias), self.slope))
