"""A field and a one-step method are a layer, and layers are a network: what the pair keeps, the network has."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from robustflow.errors import UserError
from robustflow.fields import GradientField, TwoKernelField
from robustflow.fused_steps import patch_gradient_step
from robustflow.methods import (
    PROPERTIES,
    Method,
    Property,
    explicit_euler,
    kept,
    largest_step,
    method_of,
    require_kept,
)
from robustflow.operators import PatchConvolution

Field = GradientField | TwoKernelField


class Step(nn.Module):
    """Ψ_h(x): one step of size h of a method along a field's flow. h is learned within ``interval``, or fixed.

    ``keep`` names a property that the step must have (`robustflow.methods`): a pair of field and method that does not
    keep it is refused. A "nonexpansive" step also holds h in [0, `largest_step`]. `constrain_` brings h back after an
    update. A network of several steps is a `Flow`.

    Shape: that of the field.

    Raises:
        UserError: an unknown method, one that is not defined for the field, or a pair that does not keep ``keep``.

    >>> from robustflow.structured.fields import HamiltonianField
    >>> step = Step(HamiltonianField(4, 8), "stoermer-verlet", 0.1, keep="symplectic")
    >>> step(torch.rand(2, 4)).shape, sorted(step.kept)
    (torch.Size([2, 4]), ['symplectic', 'volume'])
    >>> Step(HamiltonianField(4, 8), "heun", 0.1, keep="volume")
    Traceback (most recent call last):
    robustflow.errors.UserError: a HamiltonianField with heun is not volume-preserving: use symplectic-euler, \
stoermer-verlet or implicit-midpoint
    """

    field: nn.Module

    def __init__(
        self,
        field: nn.Module,
        method: str | Method,
        step_size: float,
        *,
        interval: tuple[float, float] | None = None,
        learned: bool = True,
        keep: Property | None = None,
    ) -> None:
        super().__init__()
        self.field, self.method, self.interval = field, method_of(method), interval
        if keep is not None:
            require_kept(field, self.method, keep)
        else:
            kept(field, self.method)  # refuses a method that is not defined for the field
        if keep == "nonexpansive":
            self.interval = _meet(interval, (0.0, largest_step(field, self.method)))
            _require_within(step_size, self.interval)
        # In the field's own precision: a fixed step δt of a float64 network is δt, not the nearest float32.
        like = next((p for p in field.parameters() if p.is_floating_point()), None)
        size = torch.tensor(float(step_size), dtype=None if like is None else like.dtype)
        self.step_size = nn.Parameter(size, requires_grad=learned)

    def forward(self, x: Tensor) -> Tensor:
        return self.method.advance(self.field, x, self.step_size)

    @property
    def kept(self) -> frozenset[Property]:
        """What the step keeps, now and after any `constrain_`."""
        found = kept(self.field, self.method)
        low, high = self.interval if self.interval is not None else (-math.inf, math.inf)
        if not self.step_size.requires_grad:
            low = high = float(self.step_size.detach())
        return found if low >= 0 and high <= largest_step(self.field, self.method) else found - {"nonexpansive"}

    @torch.no_grad()
    def constrain_(self, *, exact: bool = False) -> None:
        if self.interval is not None:
            self.step_size.clamp_(*self.interval)

    def extra_repr(self) -> str:
        return f"method={self.method.name}"


def _meet(first: tuple[float, float] | None, second: tuple[float, float]) -> tuple[float, float]:
    return second if first is None else (max(first[0], second[0]), min(first[1], second[1]))


def _require_within(step_size: float, interval: tuple[float, float]) -> None:
    if not interval[0] <= step_size <= interval[1]:
        low, high = interval
        raise UserError(f"a nonexpansive step of this field has a size in [{low:g}, {high:g}], not {step_size:g}")


class Flow(nn.Sequential):
    """Layers one after another; it keeps what each of them keeps.

    Shape: that of the first layer, to that of the last.

    >>> from robustflow.structured.fields import ShearField
    >>> flow = Flow(*(Step(ShearField(3), "symplectic-euler", 0.1, keep="volume") for _ in range(4)))
    >>> flow(torch.rand(5, 3)).shape, sorted(flow.kept)
    (torch.Size([5, 3]), ['volume'])
    """

    @property
    def kept(self) -> frozenset[Property]:
        """The properties that all layers say they have in ``kept``; a layer that does not say keeps nothing."""
        found = frozenset(PROPERTIES)
        for layer in self:
            found &= getattr(layer, "kept", frozenset())
        return found

    @torch.no_grad()
    def constrain_(self, *, exact: bool = False) -> None:
        """Bring every weight and step size back to its constraint, wherever it is in the network."""
        for module in self.modules():
            constrain = getattr(module, "constrain_", None)
            if constrain is not None and not isinstance(module, Flow):
                constrain(exact=exact)


class EulerStep(Step):
    """x + h F(x), explicit Euler: the `Step` that the image classifiers are made of, and that has a Lipschitz rule.

    With a contractive `GradientField` this is x − h_C Aᵀσ(Ax + b), with an expansive one x + h_E Wᵀσ(Wx + v); a
    negative h exchanges the two. ``interval`` is kept by `constrain_`; ``None`` leaves h as it is, and
    ``learned=False`` fixes it.

    Shape: that of the field.

    >>> from robustflow.operators import PatchConvolution
    >>> step = EulerStep(GradientField(PatchConvolution(1, 4, patch=2)), step_size=2.0, interval=(0.0, 2.0))
    >>> step(torch.rand(2, 1, 4, 4)).shape
    torch.Size([2, 1, 4, 4])
    """

    field: Field

    def __init__(
        self,
        field: Field,
        step_size: float,
        *,
        interval: tuple[float, float] | None = None,
        learned: bool = True,
        keep: Property | None = None,
    ) -> None:
        super().__init__(field, "explicit-euler", step_size, interval=interval, learned=learned, keep=keep)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
            field = self.field
            if type(field) is GradientField and type(field.operator) is PatchConvolution:  # and no subclass
                return self._on_patches(x, field, field.operator)
        # Not through `method`, an attribute: the Lipschitz rule of this class is about this formula.
        return explicit_euler(self.field, x, self.step_size)

    def _on_patches(self, x: Tensor, field: GradientField, operator: PatchConvolution) -> Tensor:
        """The same formula in one pass: for training alone."""
        return patch_gradient_step(
            x,
            operator.matrix(),
            field.bias,
            self.step_size,
            sign=field.sign,
            slope=field.slope,
            patch=operator.patch,
            shift=operator.shift,
        )


class AveragedStep(nn.Module):
    """(x + F(x))/2: the "naive" way to a residual block that is 1-Lipschitz if F is. It halves what it does not use.

    Shape: that of the field.
    """

    def __init__(self, field: Field) -> None:
        super().__init__()
        self.field = field

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (x + self.field(x))
