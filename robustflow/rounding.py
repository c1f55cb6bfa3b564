"""How far a float64 forward pass can be from the real-arithmetic network with the same weights: ‖ẑ − z‖ ≤ E.

Through a layer with constant L, E ← L·E + (what its own rounding adds, at most). For a map with m-term sums,
|fl(Kx) − Kx| ≤ γ_m |K||x| with γ_m = mu/(1 − mu), u = 2⁻⁵³ (Higham, Accuracy and Stability of Numerical Algorithms,
section 3.5), in any order of summation; hence γ_m(‖|K|‖‖x‖ + ‖b‖√positions) in norm. Every rule is affine in ‖x‖ and
‖layer(x)‖ (`Rounding`), so its norms are taken once a call and an image costs one length a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from robustflow import norms
from robustflow.baselines import Residual
from robustflow.bounds import flat_children, lipschitz_of
from robustflow.fields import GradientField
from robustflow.layer_rules import ELEMENTWISE, REARRANGING, Shape, output_shape, runs_code_of
from robustflow.networks import Normalize
from robustflow.operators import Convolution, PatchConvolution
from robustflow.steps import AveragedStep, EulerStep

UNIT = norms.UNIT
# Assumed of layers that were registered with a Lipschitz rule but without a rounding rule: a relative error of their
# output and of what they could have made of their input. Millions of times float64's roundoff, but nothing is proved,
# and the certificate says so.
FALLBACK = 1e-9


@dataclass(frozen=True)
class Rounding:
    """A layer's own rounding is at most ``size``·‖x‖ + ``out``·‖layer(x)‖ + ``fixed``, for all x of one shape."""

    size: float = 0.0
    out: float = 0.0
    fixed: float = 0.0
    assumed: bool = False


RoundingRule = Callable[[Any, Shape, float], Rounding]


def register_rounding(kind: type[nn.Module]) -> Callable[[RoundingRule], RoundingRule]:
    """Add the rounding rule of a module type: (module, input shape without batch, Lipschitz constant) → `Rounding`.

    >>> class Halve(nn.Module):
    ...     def forward(self, x): return x / 2  # exact, but for numbers below 1e-307
    >>> @register_rounding(Halve)
    ... def _(module, shape, constant): return Rounding(fixed=1e-300)
    """
    return _rounding.register(kind)


@dataclass
class Plan:
    """What was found out about the layers of one frozen network, to be used again for its next batch."""

    known: dict[tuple[int, Shape], tuple[str, float, Rounding]] = field(default_factory=dict)

    def rule(self, module: nn.Module, shape: Shape) -> tuple[float, Rounding]:
        """(Lipschitz constant, rounding) of a layer."""
        key = (id(module), shape)
        if key not in self.known:
            constant = lipschitz_of(module, shape)
            self.known[key] = (type(module).__name__, constant, rounding_of(module, shape, constant))
        return self.known[key][1:]

    def assumed(self) -> list[str]:
        """The kinds of layers whose rounding is assumed to be below `FALLBACK`, not proved."""
        return sorted({kind for kind, _, rounding in self.known.values() if rounding.assumed})


def gamma(m: int) -> float:
    """γ_m = mu/(1 − mu), rounded up."""
    return m * UNIT / (1 - m * UNIT) * (1 + 1e-9)


def lengths(x: Tensor) -> Tensor:
    """An upper bound of ‖x_i‖₂ for every image i."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1) * (1 + 1e-9)


@torch.no_grad()
def forward_with_error(module: nn.Module, x: Tensor, error: Tensor, plan: Plan | None = None) -> tuple[Tensor, Tensor]:
    """(module(x), E): E bounds ‖module(x) in float64 − module(x₀) in real arithmetic‖₂ wherever ‖x − x₀‖₂ ≤ error.

    x: (B, …) float64; error: (B,). Layers without a rounding rule are assumed to have a relative error of `FALLBACK`.
    ``plan`` keeps norms from batch to batch; it belongs to one module with one set of weights.

    >>> y, e = forward_with_error(nn.ReLU(), torch.ones(2, 3, dtype=torch.float64), torch.zeros(2))
    >>> e.tolist()
    [0.0, 0.0]
    """
    out, error, _ = _forward(module, x, error, None, Plan() if plan is None else plan)
    return out, error


def _forward(
    module: nn.Module, x: Tensor, error: Tensor, size: Tensor | None, plan: Plan
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same with ``size``, the lengths of x, where a layer before has measured them."""
    if runs_code_of(module, nn.Sequential):
        for _, layer in flat_children(module, ""):  # type: ignore[arg-type]
            x, error, size = _forward(layer, x, error, size, plan)
        return x, error, size
    if runs_code_of(module, Residual):
        left, left_error, _ = _forward(module.shortcut, x, error, size, plan)  # type: ignore[arg-type]
        right, right_error, _ = _forward(module.body, x, error, size, plan)  # type: ignore[arg-type]
        out = left + right
        made = lengths(out)
        return out, (left_error + right_error + 2 * UNIT * made) * (1 + 1e-9), made
    constant, rounding = plan.rule(module, tuple(x.shape[1:]))
    local: Tensor | float = rounding.fixed
    if rounding.size:  # before the layer runs, which may be in place
        local = local + rounding.size * (lengths(x) if size is None else size)
    out = module(x)
    length = lengths(out) if rounding.out else size if runs_code_of(module, nn.Flatten) else None
    if rounding.out and length is not None:
        local = local + rounding.out * length
    return out, (constant * error + local) * (1 + 1e-9), length


def rounding_of(module: nn.Module, shape: Shape, constant: float) -> Rounding:
    known = next(base for base in type(module).__mro__ if base in _rounding.registry)  # object, at the latest
    kept = known is object or runs_code_of(module, known)
    return (_rounding if kept else _rounding.dispatch(object))(module, shape, constant)


@singledispatch
def _rounding(module: nn.Module, shape: Shape, constant: float) -> Rounding:
    return Rounding(size=FALLBACK * constant, out=FALLBACK, assumed=True)


def _exact(module: nn.Module, shape: Shape, constant: float) -> Rounding:
    return Rounding()


for _exact_kind in (*REARRANGING, nn.ZeroPad2d, nn.MaxPool2d, nn.ReLU):
    register_rounding(_exact_kind)(_exact)


def _smooth(module: nn.Module, shape: Shape, constant: float) -> Rounding:
    # The library's elementwise functions are good to a few units in the last place of their largest intermediate.
    entries = math.sqrt(math.prod(shape))
    extra = 16 * UNIT * abs(getattr(module, "alpha", 1.0)) * entries
    if isinstance(module, nn.Softplus):
        # Above its threshold torch returns x instead of log(1 + e^{βx})/β.
        extra += entries * math.log1p(math.exp(-module.threshold)) / abs(module.beta)
    return Rounding(16 * UNIT, 16 * UNIT, extra)


for _smooth_kind in ELEMENTWISE:
    if _smooth_kind is not nn.ReLU:
        register_rounding(_smooth_kind)(_smooth)


@register_rounding(Normalize)
def _(module: Normalize, shape: Shape, constant: float) -> Rounding:
    return Rounding(out=4 * UNIT)


@register_rounding(nn.BatchNorm1d)
@register_rounding(nn.BatchNorm2d)
def _(module: nn.BatchNorm1d | nn.BatchNorm2d, shape: Shape, constant: float) -> Rounding:
    assert module.running_mean is not None
    assert module.running_var is not None
    gain = (1 if module.weight is None else module.weight.abs()) / (module.running_var + module.eps).sqrt()
    shift = (gain * module.running_mean).abs() + (0 if module.bias is None else module.bias.abs())
    return Rounding(16 * UNIT * constant, 16 * UNIT, 16 * UNIT * _per_position(shift, math.prod(shape[1:])))


@register_rounding(nn.AvgPool2d)
@register_rounding(nn.AdaptiveAvgPool2d)
def _(module: nn.Module, shape: Shape, constant: float) -> Rounding:
    # All weights are positive: |P| = P.
    return Rounding(gamma(shape[-1] * shape[-2] + 4) * constant)


# --------------------------------------------------------------------------------------------------------- linear maps
def _per_position(bias: Tensor | None, positions: int) -> float:
    """‖b‖√positions: the length of a bias repeated over an image."""
    return 0.0 if bias is None else float(torch.linalg.vector_norm(bias.detach())) * math.sqrt(positions) * (1 + 1e-9)


def _linear_error(terms: int, absolute: float, size: float, bias: float) -> float:
    return gamma(terms + 2) * (absolute * size + bias)


def _linear(terms: int, absolute: float, bias: float) -> Rounding:
    return Rounding(size=_linear_error(terms, absolute, 1.0, 0.0), fixed=_linear_error(terms, absolute, 0.0, bias))


@register_rounding(nn.Linear)
def _(module: nn.Linear, shape: Shape, constant: float) -> Rounding:
    bias = _per_position(module.bias, math.prod(shape[:-1]))
    return _linear(module.in_features, norms.linear_norm(module.weight.abs()), bias)


@register_rounding(nn.Conv2d)
def _(module: nn.Conv2d, shape: Shape, constant: float) -> Rounding:
    if module.padding_mode == "zeros":
        absolute = norms.absolute_norm(module.weight, module.groups)
    else:
        absolute = norms.conv2d_norm(
            module.weight.abs(),
            tuple(shape[1:]),
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            groups=module.groups,
            padding_mode=module.padding_mode,
        )
    positions = math.prod(output_shape(module, shape)[1:])
    return _linear(module.weight[0].numel(), absolute, _per_position(module.bias, positions))


@register_rounding(nn.ConvTranspose2d)
def _(module: nn.ConvTranspose2d, shape: Shape, constant: float) -> Rounding:
    terms = module.weight.numel() // module.weight.shape[1]
    positions = math.prod(output_shape(module, shape)[1:])
    return _linear(terms, norms.absolute_norm(module.weight, module.groups), _per_position(module.bias, positions))


Operator = Convolution | PatchConvolution


def _taps(operator: Operator) -> int:
    return operator.weight.numel() // (operator.in_channels * operator.out_channels)


def _absolute(operator: Operator) -> float:
    if isinstance(operator, PatchConvolution):
        return norms.linear_norm(operator.weight.abs())
    return norms.absolute_norm(operator.weight)


@register_rounding(Convolution)
@register_rounding(PatchConvolution)
def _(module: Operator, shape: Shape, constant: float) -> Rounding:
    return _linear(module.in_channels * _taps(module), _absolute(module), 0.0)


# --------------------------------------------------------------------------------------------------------------- steps
def _inner_error(inner: Operator, hidden: float, size: float, bias: float) -> float:
    """The rounding of σ(Ax + b), from ‖x‖, ‖b‖√positions and a bound of ‖Ax + b‖ (``hidden``)."""
    error = _linear_error(inner.in_channels * _taps(inner) + 1, _absolute(inner), size, bias)
    return error + 2 * UNIT * (hidden + error)


def _field_error(field: nn.Module, shape: Shape, size: float, bias: float) -> tuple[float, float]:
    """(bound of the rounding of v = F(x), bound of ‖v‖) for the two kinds of field; both linear in (size, bias)."""
    inner, outer = _operators(field)
    hidden = lipschitz_of(inner, shape) * size + bias
    error = _inner_error(inner, hidden, size, bias)
    hidden = hidden + error
    back = lipschitz_of(outer, shape)
    error = back * error + _linear_error(outer.out_channels * _taps(outer), _absolute(outer), hidden, 0.0)
    return error, back * hidden + error


def _operators(field: nn.Module) -> tuple[Operator, Operator]:
    """(A, B) of B σ(Ax + b)."""
    inner = field.operator if isinstance(field, GradientField) else field.inner
    outer = field.operator if isinstance(field, GradientField) else field.outer
    assert isinstance(inner, (Convolution, PatchConvolution))
    assert isinstance(outer, (Convolution, PatchConvolution))
    return inner, outer


def _step(field: nn.Module, shape: Shape, h: float) -> Rounding:
    """x + h·F(x), or (x + F(x))/2 with h = ½: halving is exact."""
    inner, _ = _operators(field)
    assert isinstance(field.bias, Tensor)
    bias = _per_position(field.bias, math.prod(output_shape(inner, shape)[1:]))
    parts = []
    for size, shift in ((1.0, 0.0), (0.0, bias)):
        error, speed = _field_error(field, shape, size, shift)
        parts.append(h * error + 4 * UNIT * (size + h * speed))
    return Rounding(size=parts[0], fixed=parts[1])


@register_rounding(EulerStep)
def _(module: EulerStep, shape: Shape, constant: float) -> Rounding:
    return _step(module.field, shape, abs(float(module.step_size.detach())))


@register_rounding(AveragedStep)
def _(module: AveragedStep, shape: Shape, constant: float) -> Rounding:
    return _step(module.field, shape, 0.5)


__all__ = ["Plan", "Rounding", "forward_with_error", "gamma", "lengths", "register_rounding", "rounding_of"]
