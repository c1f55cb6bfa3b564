"""The composition account: what every layer of a network may stretch, multiplied in the open.

`layer_rules` and `step_rules` say what one layer may do; here they are composed: channel-wise affine maps fold into the
linear map next to them, two steps with the same kernel are taken together, the branches of a residual add.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from robustflow import norms, pool_rules  # noqa: F401 - registers the pools' rules
from robustflow.baselines import Residual
from robustflow.layer_rules import (
    ELEMENTWISE,
    REARRANGING,
    LayerBound,
    Shape,
    layer_bounds,
    output_shape,
    refuse_inplace,
    register,
    runs_code_of,
    scaled_norm,
)
from robustflow.networks import Classifier, Normalize
from robustflow.operators import Convolution, PatchConvolution
from robustflow.step_rules import affine_scale, shared_kernel_pair

Named = tuple[str, nn.Module]
LINEAR = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, Convolution, PatchConvolution)
AFFINE = (Normalize, nn.BatchNorm1d, nn.BatchNorm2d)


# --------------------------------------------------------------------------------------------------------- composition
def flat_children(module: nn.Sequential, name: str) -> Iterator[Named]:
    """The layers of nested Sequentials in order, with dotted names."""
    # Not named_children(), which leaves out a module that was seen before: one layer used twice acts twice.
    for key, child in module._modules.items():
        assert child is not None
        path = f"{name}.{key}" if name else key
        if runs_code_of(child, nn.Sequential) and not (child._forward_hooks or child._forward_pre_hooks):
            yield from flat_children(child, path)  # type: ignore[arg-type]
        else:
            yield path, child


def _joined(layers: list[Named], formula: str, bound: float) -> LayerBound:
    kinds = " · ".join(type(module).__name__ for _, module in reversed(layers))
    return LayerBound(" + ".join(name for name, _ in layers), kinds, formula, bound)


@register(nn.Sequential)
def _sequential(module: nn.Sequential, shape: Shape, name: str) -> list[LayerBound]:
    """Layer by layer, with channel-wise affine maps folded: ‖diag(γ)·K·diag(1/std)‖ is below the product of norms.

    A diagonal that waits for its linear map passes elementwise activations (their D commutes with it) and, rearranged,
    rearrangements.
    """
    layers = list(flat_children(module, name))
    bounds: list[LayerBound] = []
    waiting: list[Named] = []
    scale: Tensor | None = None
    i = 0
    while i < len(layers):
        path, layer = layers[i]
        checked = layer_bounds(layer, shape, path)  # every layer has to pass on its own, folded or not
        # A subclass with code of its own has a rule of its own, and is not folded.
        own = affine_scale(layer) if runs_code_of(layer, *AFFINE) else None
        last = i
        if own is not None:
            own = own.view(-1, *(1,) * (len(shape) - 1)).expand(shape)
            scale = own if scale is None else scale * own
            waiting.append((path, layer))
        elif runs_code_of(layer, *LINEAR):
            following = layers[i + 1][1] if i + 1 < len(layers) else None
            after = None
            if (
                following is not None
                and runs_code_of(following, *AFFINE)
                and (not isinstance(layer, nn.Linear) or len(shape) == 1)  # else its channels are not the linear map's
            ):
                last = i + 1
                layer_bounds(following, output_shape(layer, shape, path), layers[last][0])
                after = affine_scale(following)
            if scale is None and after is None:
                bounds += checked
            else:
                formula, bound = scaled_norm(layer, shape, scale, after)
                bounds.append(_joined([*waiting, *layers[i : last + 1]], f"folded into one map: {formula}", bound))
            waiting, scale = [], None
        elif scale is not None and runs_code_of(layer, *REARRANGING):
            scale = layer(scale[None])[0]
        elif scale is not None and runs_code_of(layer, *ELEMENTWISE):
            bounds += checked
        else:
            if scale is not None:
                bounds.append(_joined(waiting, "largest |scale|", norms.up(float(scale.max()))))
                waiting, scale = [], None
            pair = shared_kernel_pair(layer, layers[i + 1][1], shape) if i + 1 < len(layers) else None
            separate = checked[0].bound * lipschitz_of(layers[i + 1][1], shape, layers[i + 1][0]) if pair else 0.0
            if pair and separate > 1:
                last = i + 1
                bounds.append(_joined(layers[i : i + 2], pair, 1.0))
            else:
                bounds += checked
        for path, layer in layers[i : last + 1]:
            shape = output_shape(layer, shape, path)
        i = last + 1
    if scale is not None:
        bounds.append(_joined(waiting, "largest |scale|", norms.up(float(scale.max()))))
    return bounds


def lipschitz_of(module: nn.Module, shape: Shape, name: str = "") -> float:
    """The product of the module's layer bounds."""
    return _product(layer_bounds(module, shape, name))


def _product(bounds: list[LayerBound]) -> float:
    total = 1.0
    for bound in bounds:
        # Exactly 1 stays 1; `up` keeps 0·∞ from being NaN and an underflow from being 0.
        if bound.bound != 1:
            total = norms.up(total, bound.bound)
    return total


@register(Residual)
def _residual(module: Residual, shape: Shape, name: str) -> list[LayerBound]:
    at = f"{name}." if name else ""
    for key in ("shortcut", "body"):
        refuse_inplace(getattr(module, key), at + key, "the other branch")
    branches = [layer_bounds(getattr(module, key), shape, at + key) for key in ("shortcut", "body")]
    lips = [_product(bounds) for bounds in branches]
    parts = tuple(bound for bounds in branches for bound in bounds)
    formula = f"L(shortcut) + L(body) = {lips[0]:.6g} + {lips[1]:.6g}"
    return [LayerBound(name, "Residual", formula, norms.up(lips[0] + lips[1]), parts)]


@register(Classifier)
def _classifier(module: Classifier, shape: Shape, name: str) -> list[LayerBound]:
    at = f"{name}." if name else ""
    bounds = layer_bounds(module.features, shape, f"{at}features")
    if module.mirror and not module.training:
        refuse_inplace(module.features, f"{at}features", "the mirror average")
        bounds.append(LayerBound(f"{at}mirror", "average", "mean over two isometric views", 1.0))
    return bounds + layer_bounds(module.head, output_shape(module.features, shape), f"{at}head")


@dataclass(frozen=True)
class Account:
    """Every layer with its bound, and their product: an upper bound of the module's Lipschitz constant."""

    layers: tuple[LayerBound, ...]

    @property
    def products(self) -> list[float]:
        """The running product after every layer."""
        return [_product(list(self.layers[: i + 1])) for i in range(len(self.layers))]

    @property
    def lipschitz(self) -> float:
        return _product(list(self.layers))

    def explain(self, reached: Mapping[str, float] | None = None) -> str:
        """A table to read: layer, kind, bound, running product, formula; the branches of a residual indented below.

        With ``reached``, lower estimates of the true constants by layer ("" is the whole), also what the bounds lose.
        """
        extra = [] if reached is None else ["reached", "tightness"]
        rows = [["layer", "kind", "bound", "product", *extra, "formula"]]
        for layer, product in zip(self.layers, self.products, strict=True):
            found = [] if reached is None else _tightness(reached.get(layer.layer), layer.bound)
            rows.append([layer.layer, layer.kind, f"{layer.bound:.9g}", f"{product:.9g}", *found, layer.formula])
            rows += [
                [f"  {part.layer}", part.kind, f"{part.bound:.9g}", "", *("" for _ in extra), part.formula]
                for part in layer.parts
            ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]
        total = f"Lipschitz bound: {self.lipschitz:.9g}"
        if reached is not None and "" in reached:
            estimate, share = _tightness(reached[""], self.lipschitz)
            total += f"; pairs of points that reach {estimate} were found ({share} of the bound)"
        return "\n".join([*lines, total])

    def rows(self) -> list[dict[str, str | float]]:
        """The same as records: layer, kind, formula, bound, product."""
        return [
            {"layer": b.layer, "kind": b.kind, "formula": b.formula, "bound": b.bound, "product": p}
            for b, p in zip(self.layers, self.products, strict=True)
        ]


def _tightness(reached: float | None, bound: float) -> list[str]:
    """(lower estimate, its share of the bound) as text."""
    if reached is None:
        return ["", ""]
    return [f"{reached:.6g}", f"{100 * reached / bound:.3g} %" if 0 < bound < math.inf else ""]


def account(module: nn.Module, input_shape: Shape, name: str = "") -> Account:
    """The Lipschitz account of a module on inputs of ``input_shape`` (without the batch), in L2.

    L = Π of the layers' bounds; residuals add their branches. Nothing is remembered between calls but norms by the
    weights' content, so a changed weight is always seen.

    Raises:
        UserError: as `layer_bounds`; the message names the layer.

    >>> import torch
    >>> net = nn.Sequential(Normalize([0.5], [0.25]), nn.Flatten(), nn.Linear(4, 2), nn.ReLU())
    >>> with torch.no_grad(): _ = net[2].weight.copy_(torch.tensor([[3.0, 0, 0, 0], [0, 4, 0, 0]]))
    >>> round(account(net, (1, 2, 2)).lipschitz, 6)
    16.0
    """
    return Account(tuple(layer_bounds(module, tuple(input_shape), name)))


__all__ = ["Account", "LayerBound", "account", "layer_bounds", "register"]
