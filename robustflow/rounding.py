"""How far a float64 forward pass can be from the real-arithmetic network with the same weights: ‖ẑ − z‖ ≤ E.

Through a layer with constant L, E ← L·E + (what its own rounding adds, at most). For a map with m-term sums,
|fl(Kx) − Kx| ≤ γ_m |K||x| with γ_m = mu/(1 − mu), u = 2⁻⁵³ (Higham, Accuracy and Stability of Numerical Algorithms,
section 3.5), in any order of summation; hence γ_m(‖|K|‖‖x‖ + ‖b‖√positions) in norm. All are one number an image.
"""

from __future__ import annotations

import math
from functools import singledispatch

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
# Assumed of layers that were registered with a Lipschitz rule but whose rounding is unknown: a relative error of their
# output and of what they could have made of their input. Millions of times float64's roundoff.
FALLBACK = 1e-9


def gamma(m: int) -> float:
    """γ_m = mu/(1 − mu), rounded up."""
    return m * UNIT / (1 - m * UNIT) * (1 + 1e-9)


def lengths(x: Tensor) -> Tensor:
    """An upper bound of ‖x_i‖₂ for every image i."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1) * (1 + 1e-9)


@torch.no_grad()
def forward_with_error(module: nn.Module, x: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """(module(x), E): E bounds ‖module(x) in float64 − module(x₀) in real arithmetic‖₂ wherever ‖x − x₀‖₂ ≤ error.

    x: (B, …) float64; error: (B,). Layers without a rounding rule are assumed to have a relative error of `FALLBACK`.

    >>> y, e = forward_with_error(nn.ReLU(), torch.ones(2, 3, dtype=torch.float64), torch.zeros(2))
    >>> e.tolist()
    [0.0, 0.0]
    """
    if runs_code_of(module, nn.Sequential):
        for _, layer in flat_children(module, ""):  # type: ignore[arg-type]
            x, error = forward_with_error(layer, x, error)
        return x, error
    if runs_code_of(module, Residual):
        left, left_error = forward_with_error(module.shortcut, x, error)  # type: ignore[arg-type]
        right, right_error = forward_with_error(module.body, x, error)  # type: ignore[arg-type]
        out = left + right
        return out, (left_error + right_error + 2 * UNIT * lengths(out)) * (1 + 1e-9)
    shape = tuple(x.shape[1:])
    out = module(x)
    constant = lipschitz_of(module, shape)
    local = _local(module, shape, lengths(x), lengths(out), constant)
    return out, (constant * error + local) * (1 + 1e-9)


def _local(module: nn.Module, shape: Shape, size: Tensor, out: Tensor, constant: float) -> Tensor:
    """What the layer's own rounding adds to the error, from ‖x‖ (``size``) and ‖module(x)‖ (``out``)."""
    known = next((base for base in type(module).__mro__ if base in _rounding.registry), object)
    if known is not object and runs_code_of(module, known):
        return _rounding(module, shape, size, out, constant)
    return FALLBACK * (out + constant * size)


@singledispatch
def _rounding(module: nn.Module, shape: Shape, size: Tensor, out: Tensor, constant: float) -> Tensor:
    raise NotImplementedError


def _exact(module: nn.Module, shape: Shape, size: Tensor, out: Tensor, constant: float) -> Tensor:
    return torch.zeros_like(size)


for _exact_kind in (*REARRANGING, nn.ZeroPad2d, nn.MaxPool2d, nn.ReLU):
    _rounding.register(_exact_kind)(_exact)


def _smooth(module: nn.Module, shape: Shape, size: Tensor, out: Tensor, constant: float) -> Tensor:
    # The library's elementwise functions are good to a few units in the last place of their largest intermediate.
    entries = math.sqrt(math.prod(shape))
    extra = 16 * UNIT * abs(getattr(module, "alpha", 1.0)) * entries
    if isinstance(module, nn.Softplus):
        # Above its threshold torch returns x instead of log(1 + e^{βx})/β.
        extra += entries * math.log1p(math.exp(-module.threshold)) / abs(module.beta)
    return 16 * UNIT * (size + out) + extra


for _smooth_kind in ELEMENTWISE:
    if _smooth_kind is not nn.ReLU:
        _rounding.register(_smooth_kind)(_smooth)


@_rounding.register
def _(module: Normalize, shape: Shape, size: Tensor, out: Tensor, constant: float) -> Tensor:
    return 4 * UNIT * out


@_rounding.register(nn.BatchNorm1d)
@_rounding.register(nn.BatchNorm2d)
def _(module: nn.BatchNorm1d | nn.BatchNorm2d, shape: Shape, size: Tensor, out: Tensor, constant: float) -> Tensor:
    assert module.running_mean is not None
    assert module.running_var is not None
    gain = (1 if module.weight is None else module.weight.abs()) / (module.running_var + module.eps).sqrt()
    shift = (gain * module.running_mean).abs() + (0 if module.bias is None else module.bias.abs())
    return 16 * UNIT * (constant * size + _per_position(shift, math.prod(shape[1:])) + out)


@_rounding.register(nn.AvgPool2d)
@_rounding.register(nn.AdaptiveAvgPool2d)
def _(module: nn.Module, shape: Shape, size: Tensor, out: Tensor, constant: float) -> Tensor:
    # All weights are positive: |P| = P.
    return gamma(shape[-1] * shape[-2] + 4) * constant * size


# --------------------------------------------------------------------------------------------------------- linear maps
def _per_position(bias: Tensor | None, positions: int) -> float:
    """‖b‖√positions: the length of a bias repeated over an image."""
    return 0.0 if bias is None else float(torch.linalg.vector_norm(bias.detach())) * math.sqrt(positions) * (1 + 1e-9)


def _linear_error(terms: int, absolute: float, size: Tensor, bias: float) -> Tensor:
    return gamma(terms + 2) * (absolute * size + bias)


@_rounding.register
def _(module: nn.Linear, shape: Shape, size: Tensor, out: Tensor, constant: float) -> Tensor:
    bias = _per_position(module.bias, math.prod(shape[:-1]))
    return _linear_error(module.in_features, norms.linear_norm(module.weight.abs()), size, bias)


@_rounding.register
def _(module: nn.Conv2d, shape: Shape, size: Tensor, out: Tensor, constant: float) -> Tensor:
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
    return _linear_error(module.weight[0].numel(), absolute, size, _per_position(module.bias, positions))


@_rounding.register
def _(module: nn.ConvTranspose2d, shape: Shape, size: Tensor, out: Tensor, constant: float) -> Tensor:
    terms = module.weight.numel() // module.weight.shape[1]
    positions = math.prod(output_shape(module, shape)[1:])
    bias = _per_position(module.bias, positions)
    return _linear_error(terms, norms.absolute_norm(module.weight, module.groups), size, bias)


Operator = Convolution | PatchConvolution


def _taps(operator: Operator) -> int:
    return operator.weight.numel() // (operator.in_channels * operator.out_channels)


def _absolute(operator: Operator) -> float:
    if isinstance(operator, PatchConvolution):
        return norms.linear_norm(operator.weight.abs())
    return norms.absolute_norm(operator.weight)


@_rounding.register(Convolution)
@_rounding.register(PatchConvolution)
def _(module: Operator, shape: Shape, size: Tensor, out: Tensor, constant: float) -> Tensor:
    return _linear_error(module.in_channels * _taps(module), _absolute(module), size, 0.0)


# --------------------------------------------------------------------------------------------------------------- steps
def _field_error(field: nn.Module, shape: Shape, size: Tensor) -> tuple[Tensor, Tensor]:
    """(bound of the rounding of v = F(x), bound of ‖v‖) for the two kinds of field, from ‖x‖."""
    inner = field.operator if isinstance(field, GradientField) else field.inner
    outer = field.operator if isinstance(field, GradientField) else field.outer
    assert isinstance(inner, (Convolution, PatchConvolution))
    assert isinstance(outer, (Convolution, PatchConvolution))
    bias = _per_position(field.bias, math.prod(output_shape(inner, shape)[1:]))  # type: ignore[arg-type]
    hidden = lipschitz_of(inner, shape) * size + bias
    error = _linear_error(inner.in_channels * _taps(inner) + 1, _absolute(inner), size, bias)
    error = error + 2 * UNIT * (hidden + error)  # the activation
    hidden = hidden + error
    back = lipschitz_of(outer, shape)
    error = back * error + _linear_error(outer.out_channels * _taps(outer), _absolute(outer), hidden, 0.0)
    return error, back * hidden + error


@_rounding.register
def _(module: EulerStep, shape: Shape, size: Tensor, out: Tensor, constant: float) -> Tensor:
    error, speed = _field_error(module.field, shape, size)
    h = abs(float(module.step_size.detach()))
    return h * error + 4 * UNIT * (size + h * speed)


@_rounding.register
def _(module: AveragedStep, shape: Shape, size: Tensor, out: Tensor, constant: float) -> Tensor:
    error, speed = _field_error(module.field, shape, size)
    return error / 2 + 4 * UNIT * (size + speed)


__all__ = ["forward_with_error", "gamma", "lengths"]
