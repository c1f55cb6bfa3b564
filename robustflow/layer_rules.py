"""What one layer may stretch: a registry of rules, and the rules of torch's own layers.

A module without a rule raises, naming itself: the default is never 1. `robustflow.step_rules` adds this project's
layers, `robustflow.bounds` composes them; use `register` to add your own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import singledispatch
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from robustflow import norms
from robustflow.baking import require_settled
from robustflow.errors import UserError
from robustflow.spectra import axes_of, pair

Shape = tuple[int, ...]
PLAIN_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class LayerBound:
    """‖layer(x) − layer(y)‖₂ ≤ bound·‖x − y‖₂ for all x, y, and the formula that says so."""

    layer: str
    kind: str
    formula: str
    bound: float
    parts: tuple[LayerBound, ...] = field(default=())


Rule = Callable[[Any, Shape, str], list[LayerBound]]


@singledispatch
def _rules(module: nn.Module, shape: Shape, name: str) -> list[LayerBound]:
    raise UserError(
        f"{name or 'the module'} is a {type(module).__name__}, for which there is no Lipschitz rule: replace it, or "
        f"register one with robustflow.bounds.register({type(module).__name__})"
    )


def register(kind: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Add the rule of a module type: a function (module, input shape without batch, dotted name) → list of LayerBound.

    A subclass inherits the rule only as long as it does not define a ``forward`` of its own. Without a rounding rule as
    well (`robustflow.rounding.register_rounding`) every certificate states what it assumes of the layer in float64.

    >>> class Halve(nn.Module):
    ...     def forward(self, x): return x / 2
    >>> @register(Halve)
    ... def _(module, shape, name): return [LayerBound(name, "Halve", "1/2", 0.5)]
    >>> layer_bounds(Halve(), (3,), "0")[0].bound
    0.5
    """
    return _rules.register(kind)


def layer_bounds(module: nn.Module, shape: Shape, name: str = "") -> list[LayerBound]:
    """Lipschitz bounds, one a layer, whose product bounds the module on inputs of ``shape`` (without the batch).

    Raises:
        UserError: no rule, a ``forward`` that the rule does not know, hooks, dropout, batch normalisation or a
            parametrised weight in training mode, weights that are NaN, infinite or in half precision.

    >>> [(b.kind, round(b.bound, 3)) for b in layer_bounds(nn.Sigmoid(), (3,), "act")]
    [('Sigmoid', 0.25)]
    """
    where = f"{name or 'the module'} ({type(module).__name__})"
    known = next((base for base in type(module).__mro__ if base in _rules.registry), object)
    if known is not object:
        require_code_of(module, known, where)
    require_settled(module, name)
    tensors = [*module.named_parameters(prefix=name), *module.named_buffers(prefix=name)]
    for path, tensor in tensors:
        if not tensor.is_floating_point():
            continue
        if tensor.dtype not in PLAIN_DTYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{path} is {kind}: cast the model first (module.float()), then that is what is certified")
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{path} holds NaN or infinite entries: train or load the model again")
    bounds = _rules(module, shape, name)
    for bound in bounds:
        if not bound.bound >= 0:
            raise UserError(f"the rule of {where} returned {bound.bound}, which is no Lipschitz bound")
    return bounds


@torch.no_grad()
def output_shape(module: nn.Module, shape: Shape, name: str = "") -> Shape:
    """The shape that the module makes of ``shape``, found by running it on zeros."""
    like = next((t for t in module.parameters() if t.is_floating_point()), torch.zeros(()))
    try:
        return tuple(module(torch.zeros(1, *shape, dtype=like.dtype, device=like.device)).shape[1:])
    except (RuntimeError, ValueError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{name or 'the module'} ({type(module).__name__}) does not take {shape}: {reason}") from None


# Methods that a forward pass, or the rules' reading of a module's parts, may go through: a subclass that replaces one
# of them is another function, or not the one that is read.
_CODE = (
    *("forward", "__call__", "_call_impl", "_conv_forward", "adjoint", "_kernel", "_matrix"),
    *("__iter__", "__len__", "__getitem__", "__delitem__", "__getattr__", "__getattribute__"),
)


def runs_code_of(module: nn.Module, *kinds: type) -> bool:
    """Whether the module computes what one of the classes ``kinds`` does, and not something of its own."""
    own = any(method in vars(module) for method in _CODE)
    return not own and any(
        all(getattr(type(module), method, None) is getattr(kind, method, None) for method in _CODE)
        for kind in kinds
        if isinstance(module, kind)
    )


def require_code_of(module: nn.Module, kind: type, where: str) -> None:
    """Raise UserError unless the module runs the code of ``kind`` and nothing is hooked into it."""
    if not runs_code_of(module, kind):
        raise UserError(
            f"{where} overrides what {kind.__name__} computes, whose Lipschitz rule may not hold for it: register one "
            f"with robustflow.bounds.register({type(module).__name__})"
        )
    if module._forward_hooks or module._forward_pre_hooks:
        raise UserError(f"{where} has forward hooks, which may change what it computes: remove them before certifying")


def refuse_inplace(module: nn.Module, name: str, reader: str) -> None:
    """Raise UserError where a part of the module may write over its input, which the ``reader`` reads afterwards."""
    for path, part in module.named_modules(prefix=name):
        if getattr(part, "inplace", False):
            raise UserError(
                f"{path} ({type(part).__name__}) writes over its input, which {reader} reads, too: use inplace=False"
            )


# ------------------------------------------------------------ linear maps, with a diagonal folded in on either side
@singledispatch
def scaled_norm(module: nn.Module, shape: Shape, before: Tensor | None, after: Tensor | None) -> tuple[str, float]:
    """(formula, bound) of ‖diag(after)·K·diag(before)‖; ``before`` has the input's shape, ``after`` is per channel."""
    raise UserError(f"{type(module).__name__} is not a linear map")


def channel_scale(before: Tensor) -> Tensor:
    """One factor a channel: the largest, where it varies in space (T ≤ 1 in K·diag(max)·T can only shrink)."""
    return before.flatten(1).amax(1) if before.ndim > 1 else before


def scale_kernel(weight: Tensor, before: Tensor | None, after: Tensor | None, groups: int) -> Tensor:
    """A kernel (out, in/groups, …) with its input channels multiplied by ``before`` and its outputs by ``after``."""
    weight = weight.detach().to("cpu", torch.float64)
    if before is not None:
        rows = channel_scale(before).cpu().view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1)
        weight = weight * rows.reshape(weight.shape[0], weight.shape[1], *(1,) * (weight.ndim - 2))
    if after is not None:
        weight = weight * after.cpu().view(-1, *(1,) * (weight.ndim - 1))
    return weight


@scaled_norm.register
def _(module: nn.Conv2d, shape: Shape, before: Tensor | None, after: Tensor | None) -> tuple[str, float]:
    if module.padding_mode != "zeros":
        # What torch pads by then is kept from construction.
        size, stride, dilation = (pair(value) for value in (shape[1:], module.stride, module.dilation))
        padding = module.padding if isinstance(module.padding, str) else pair(module.padding)
        rows, columns = axes_of(module.weight, size, stride, padding, dilation)
        sides = [columns.before, columns.after, rows.before, rows.after]
        if list(module._reversed_padding_repeated_twice) != sides:
            raise UserError("a Conv2d does not pad as its padding says: build it again instead of changing its padding")
    bound = norms.conv2d_norm(
        scale_kernel(module.weight, before, after, module.groups),
        tuple(shape[1:]),
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
        padding_mode=module.padding_mode,
    )
    return "max σ(F(ω)) on the " + ("padded torus" if module.padding_mode == "zeros" else "torus"), bound


@scaled_norm.register
def _(module: nn.ConvTranspose2d, shape: Shape, before: Tensor | None, after: Tensor | None) -> tuple[str, float]:
    # The weight is that of the convolution it transposes, which goes from the output back to the input.
    bound = norms.conv2d_norm(
        scale_kernel(module.weight, after, None if before is None else channel_scale(before), module.groups),
        output_shape(module, shape)[1:],
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
    )
    return "max σ(F(ω)) of the transposed convolution", bound


@scaled_norm.register
def _(module: nn.Linear, shape: Shape, before: Tensor | None, after: Tensor | None) -> tuple[str, float]:
    weight = module.weight.detach().to("cpu", torch.float64)
    if before is not None:
        weight = weight * (before.cpu() if before.ndim == 1 else before.reshape(-1, before.shape[-1]).amax(0).cpu())
    if after is not None:
        weight = weight * after.cpu().view(-1, 1)
    return "σ(W), dense SVD", norms.linear_norm(weight)


def _linear(module: nn.Module, shape: Shape, name: str) -> list[LayerBound]:
    formula, bound = scaled_norm(module, shape, None, None)
    return [LayerBound(name, type(module).__name__, formula, bound)]


for _linear_kind in (nn.Conv2d, nn.ConvTranspose2d, nn.Linear):
    register(_linear_kind)(_linear)


# ------------------------------------------------------------------------------------------------ elementwise functions
def _gelu_slope(module: nn.GELU) -> float:
    if module.approximate != "none":
        raise UserError("GELU with approximate='tanh' has no Lipschitz rule: use approximate='none'")
    return 1.128905  # at x = √2: Φ(√2) + √2 φ(√2) = 1.1289042…


ELEMENTWISE: dict[type[nn.Module], tuple[str, Callable[..., float]]] = {
    nn.ReLU: ("slopes in [0, 1]", lambda m: 1.0),
    nn.ReLU6: ("slopes in [0, 1]", lambda m: 1.0),
    nn.Hardtanh: ("slopes in [0, 1]", lambda m: 1.0),
    nn.LeakyReLU: ("max(1, |a|)", lambda m: max(1.0, abs(m.negative_slope))),
    nn.PReLU: ("max(1, |a|)", lambda m: max(1.0, float(m.weight.detach().abs().max()))),
    nn.Tanh: ("tanh′ ≤ 1", lambda m: 1.0),
    nn.Sigmoid: ("sigmoid′ ≤ 1/4", lambda m: 0.25),
    nn.Softplus: ("softplus′ ≤ 1", lambda m: 1.0),
    nn.ELU: ("max(1, |α|)", lambda m: max(1.0, abs(m.alpha))),
    nn.GELU: ("Φ(√2) + √2φ(√2)", _gelu_slope),
    nn.SiLU: ("sup SiLU′ < 1.09984", lambda m: 1.09984),
}


def _elementwise(module: nn.Module, shape: Shape, name: str) -> list[LayerBound]:
    for key, value in vars(module).items():
        # max(1, |nan|) would be 1.
        if isinstance(value, (Real, Tensor)) and not bool(torch.as_tensor(value).isfinite().all()):
            where = f"{name or 'the module'} ({type(module).__name__})"
            raise UserError(f"{where} has {key} = {value}, which gives no Lipschitz bound: use a finite number")
    formula, slope = next(ELEMENTWISE[base] for base in type(module).__mro__ if base in ELEMENTWISE)
    return [LayerBound(name, type(module).__name__, formula, slope(module))]


for _elementwise_kind in ELEMENTWISE:
    register(_elementwise_kind)(_elementwise)


# -------------------------------------------------------------------------------- permutations, copies and restrictions
REARRANGING = (nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout2d, nn.PixelShuffle, nn.PixelUnshuffle)


def _rearranging(module: nn.Module, shape: Shape, name: str) -> list[LayerBound]:
    if isinstance(module, (nn.Dropout, nn.Dropout2d)) and module.training and module.p > 0:
        raise UserError(f"{name or 'the module'} ({type(module).__name__}) is in training mode: call .eval() first")
    if isinstance(module, nn.Flatten) and module.start_dim == 0:
        raise UserError(f"{name or 'the module'} (Flatten) mixes the images of a batch: use start_dim=1")
    return [LayerBound(name, type(module).__name__, "a rearrangement: 1", 1.0)]


for _rearranging_kind in (*REARRANGING, nn.ZeroPad2d):
    register(_rearranging_kind)(_rearranging)
