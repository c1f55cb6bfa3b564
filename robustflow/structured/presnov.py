"""Any field is a gradient plus a field that is tangent to the spheres, and a network is made of flows of both.

Source: Presnov (2002), as used in Celledoni et al., *Dynamical systems' based neural networks*, arXiv 2210.02373,
section 3 and appendix. With

    U(x) = ∫₀¹ xᵀf(tx) dt,   X_S = f − ∇U   follows   f = ∇U + X_S,   xᵀX_S(x) = 0,

because U(sx) = ∫₀ˢ xᵀf(rx) dr gives xᵀ∇U(x) = xᵀf(x). The parts are unique, and Φ_f = Φ_∇U ∘ Φ_{X_S} + O(δt²).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from robustflow.config import Strict
from robustflow.steps import Step
from robustflow.structured.dynamics import jacobians, orbits
from robustflow.structured.fields import FreeField, GradientFlowField, SphereField

Map = Callable[[Tensor], Tensor]
Parts = Literal["both", "gradient", "sphere", "free"]
DRIFT_STEPS, ESCAPE = 1000, 1e6
FLAT_METHOD = "explicit-euler"  # x + h∇U(x) has the symmetric Jacobian I + h∇²U; methods with more stages do not


def potential(field: Map, x: Tensor, nodes: int = 32) -> Tensor:
    """U(x) = ∫₀¹ xᵀf(tx) dt by the Gauss–Legendre rule with ``nodes`` nodes. Shape: (B, d) → (B,).

    >>> potential(lambda x: x**3, torch.tensor([[1.0, 2.0]])).tolist()  # (x₁⁴ + x₂⁴)/4
    [4.25]
    """
    places, weights = np.polynomial.legendre.leggauss(nodes)
    t = torch.as_tensor((places + 1) / 2, dtype=x.dtype, device=x.device).view(-1, 1, 1)
    w = torch.as_tensor(weights / 2, dtype=x.dtype, device=x.device)
    along = field((t * x).flatten(0, 1)).view(nodes, *x.shape)
    return w @ (along * x).sum(2)


def decompose(field: Map, x: Tensor, nodes: int = 32) -> tuple[Tensor, Tensor]:
    """Presnov's parts (∇U, X_S) of a field at points x, ∇U by differentiating `potential`.

    Shape: (B, d) → (B, d), (B, d).

    >>> gradient, sphere = decompose(lambda x: x + torch.stack((-x[:, 1], x[:, 0]), 1), torch.tensor([[1.0, 2.0]]))
    >>> [[round(number, 5) for number in part[0].tolist()] for part in (gradient, sphere)]
    [[1.0, 2.0], [-2.0, 1.0]]
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        gradient = torch.autograd.grad(potential(field, x, nodes).sum(), x)[0]
    return gradient, field(x).detach() - gradient


class NetworkOptions(Strict):
    """Which steps a network is made of: ``layers`` pairs (gradient, sphere) a block.

    parts: "gradient" and "sphere" leave the other step of each pair out; "free" puts two plain networks in their
    places (the control). width: the dimension a regression lifts to (a flow stays in its own).
    """

    parts: Parts = "both"
    width: int = Field(10, ge=2)
    blocks: int = Field(1, ge=1)
    layers: int = Field(2, ge=1)
    hidden: int = Field(16, ge=1)
    activation: str = "tanh"
    sphere_method: Literal["norm-exact-heun", "cayley", "implicit-midpoint"] = "norm-exact-heun"


def pair(options: NetworkOptions, dim: int, h: float, learned: bool) -> list[Step]:
    """One gradient and one sphere step, or what ``parts`` makes of them."""
    if options.parts == "free":
        fields = [FreeField(dim, options.hidden, activation=options.activation) for _ in range(2)]
        return [Step(field, FLAT_METHOD, h, learned=learned) for field in fields]
    steps = []
    if options.parts != "sphere":
        gradient = GradientFlowField(dim, options.hidden, activation=options.activation, sign=1, bounded=False)
        steps.append(Step(gradient, FLAT_METHOD, h, learned=learned))
    if options.parts != "gradient":
        sphere = SphereField(dim, options.hidden, activation=options.activation)
        steps.append(Step(sphere, options.sphere_method, h, learned=learned, keep="norm"))
    return steps


class Composition(nn.Sequential):
    """Steps, with linear layers between blocks where there are any.

    ``width`` and ``layers`` are what the plots put the error against. Shape: (B, in) → (B, out).
    """

    def __init__(self, *modules: nn.Module, options: NetworkOptions, width: int) -> None:
        super().__init__(*modules)
        self.parts, self.width, self.layers = options.parts, width, options.layers

    def steps(self, kind: type[nn.Module]) -> nn.Sequential:
        """The steps along fields of a kind; of the control, where the kinds are not told apart, all."""
        kinds = (kind, FreeField)
        return nn.Sequential(*(step for step in self if isinstance(step, Step) and isinstance(step.field, kinds)))


def flow(options: NetworkOptions, dim: int, step: float) -> Composition:
    """R^d → R^d: pairs of steps of size δt/layers; one pair is the splitting Φ_{X_S} ∘ Φ_∇U of the learned field.

    >>> flow(NetworkOptions(layers=2), dim=4, step=0.05)(torch.rand(7, 4)).shape
    torch.Size([7, 4])
    """
    count = options.layers * options.blocks
    pairs = [module for _ in range(count) for module in pair(options, dim, step / count, learned=False)]
    return Composition(*pairs, options=options, width=options.hidden)


def regression(options: NetworkOptions, step: float = 0.2) -> Composition:
    """R → R^w → … → R^w → R: linear, pairs of steps of learned sizes, linear, …, linear.

    >>> regression(NetworkOptions(width=10, blocks=3, layers=2, hidden=16))(torch.rand(7, 1)).shape
    torch.Size([7, 1])
    """
    modules: list[nn.Module] = []
    for block in range(options.blocks):
        modules.append(nn.Linear(options.width if block else 1, options.width))
        for _ in range(options.layers):
            modules += pair(options, options.width, step, learned=True)
    return Composition(*modules, nn.Linear(options.width, 1), options=options, width=options.width)


@torch.no_grad()
def contributions(model: Composition, x: Tensor) -> dict[str, Tensor]:
    """What the linear layers and each kind of step add to the output: they sum up to it exactly.

    A step adds δ = Ψ(x) − x to what passes, and a linear layer maps a sum of parts to the sum of their images (its bias
    belongs to the part "linear"). So each part can be carried along by itself; each depends on all the layers before.

    Shape: (B, in) → {"linear", "gradient", "sphere", "free": (B, out)}, only what there is.
    """
    parts = {"linear": x}
    for layer in model:
        if isinstance(layer, nn.Linear):
            parts = {
                name: part @ layer.weight.T + (layer.bias if name == "linear" else 0.0) for name, part in parts.items()
            }
            x = layer(x)
        else:
            assert isinstance(layer, Step)
            after = layer(x)
            kind = _KINDS[type(layer.field)]
            parts[kind] = parts.get(kind, torch.zeros_like(x)) + (after - x)
            x = after
    return parts


_KINDS: dict[type[nn.Module], str] = {GradientFlowField: "gradient", SphereField: "sphere", FreeField: "free"}


@torch.no_grad()
def norm_drift(model: Composition, dim: int) -> np.ndarray | None:
    """max |‖x_k‖/‖x₀‖ − 1| over 16 starts when the sphere steps alone are applied again and again, k = 0, …, 1000.

    None for a network without sphere steps. For the control it is that of all its steps.
    """
    steps = model.steps(SphereField)
    if not len(steps):
        return None
    starts = torch.randn(16, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norms = torch.linalg.vector_norm(orbits(steps, starts, DRIFT_STEPS, limit=ESCAPE), dim=2)
    return (norms / norms[:, :1] - 1).abs().amax(0).numpy()


def asymmetry(model: Composition, dim: int) -> float | None:
    """max ‖J − Jᵀ‖/‖J‖ of the Jacobians of the gradient steps (Frobenius norms), None where there are none."""
    steps = model.steps(GradientFlowField)
    if not len(steps):
        return None
    points = torch.randn(64, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    matrices = torch.cat([jacobians(step, points) for step in steps])
    defect = torch.linalg.matrix_norm(matrices - matrices.mT) / torch.linalg.matrix_norm(matrices)
    return float(defect.max())
