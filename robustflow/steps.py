"""One-step methods that turn a vector field into a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustflow.fields import GradientField, TwoKernelField

Field = GradientField | TwoKernelField


class EulerStep(nn.Module):
    """x + h F(x), explicit Euler with a step size that the network learns within an interval.

    With a contractive `GradientField` this is x − h_C Aᵀσ(Ax + b), with an expansive one x + h_E Wᵀσ(Wx + v); a
    negative h exchanges the two. ``interval`` is kept by `constrain_`; ``None`` leaves h as it is, and
    ``learned=False`` fixes it.

    Shape: that of the field.

    >>> from robustflow.operators import PatchConvolution
    >>> step = EulerStep(GradientField(PatchConvolution(1, 4, patch=2)), step_size=2.0, interval=(0.0, 2.0))
    >>> step(torch.rand(2, 1, 4, 4)).shape
    torch.Size([2, 1, 4, 4])
    """

    def __init__(
        self,
        field: Field,
        step_size: float,
        *,
        interval: tuple[float, float] | None = None,
        learned: bool = True,
    ) -> None:
        super().__init__()
        self.field, self.interval = field, interval
        self.step_size = nn.Parameter(torch.tensor(float(step_size)), requires_grad=learned)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.step_size * self.field(x)

    @torch.no_grad()
    def constrain_(self, *, exact: bool = False) -> None:
        if self.interval is not None:
            self.step_size.clamp_(*self.interval)


class AveragedStep(nn.Module):
    """(x + F(x))/2: the "naive" way to a residual block that is 1-Lipschitz if F is. It halves what it does not use.

    Shape: that of the field.
    """

    def __init__(self, field: Field) -> None:
        super().__init__()
        self.field = field

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (x + self.field(x))
