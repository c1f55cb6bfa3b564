"""Volume-preserving networks: learn the flow map of a divergence-free field with det J = 1, in any dimension.

A layer is a step of symplectic Euler with a field that is split into two shears, ẋ = f(v), v̇ = g(x):
x₁ = x + h f(v), v₁ = v + h g(x₁). Each shear has a triangular Jacobian with ones on its diagonal. The source's shears
are f(v) = σ(Av + a), g(x) = σ(Bx + b); those with a hidden layer learn more. Between layers the coordinates go round,
or the same ones would never act on each other. The fields here live on a torus, so the networks get cosines and sines.
Source: the talk behind arXiv 2210.02373.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from robustflow.config import Strict
from robustflow.methods import Property
from robustflow.steps import Flow, Step
from robustflow.structured import dynamics, orbit_plots
from robustflow.structured.systems import Data, Drawing, Measured, Split, System, checked

STEPS, POINTS = 1000, 32  # over how many steps, from how many test points, determinants are followed
FAR = f"|det J − 1|, {STEPS} steps"
TIME, ORBITS = 1000.0, 24  # how long, and how many, orbits are followed for the section
ROUNDS = 50  # of the fixed-point iteration that inverts a step without a formula for its inverse


class ABCField(nn.Module):
    """ẋᵢ = aᵢ sin xᵢ₋₁ + aᵢ₋₁ cos xᵢ₊₁, indices modulo d: divergence-free, for no component depends on itself.

    In three dimensions this is the flow of Arnold, Beltrami and Childress, here with A² = 1, B² = 2/3, C² = 1/3:
    ẋ = A sin z + C cos y, ẏ = B sin x + A cos z, ż = C sin y + B cos x, chaotic between islands of tori. Source: Dombre
    et al., *Chaotic streamlines in the ABC flows*, Journal of Fluid Mechanics 167 (1986). In d dimensions
    aᵢ² = 1 − (i − 1)/d.

    Shape: (B, d) → (B, d), periodic with 2π in every coordinate.

    >>> ABCField(3)(torch.zeros(1, 3, dtype=torch.float64)).square().tolist()
    [[0.333..., 1.0, 0.666...]]
    """

    properties: frozenset[Property] = frozenset({"volume"})

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.amplitudes = (1 - torch.arange(dim, dtype=torch.float64) / dim).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        a = self.amplitudes
        return a * x.roll(1, dims=1).sin() + a.roll(1) * x.roll(-1, dims=1).cos()


def embedded(x: Tensor) -> Tensor:
    """(cos x, sin x): what a function of x with period 2π is a function of. Shape: (B, d) → (B, 2d)."""
    return torch.cat((x.cos(), x.sin()), dim=1)


def network(inputs: int, hidden: int, outputs: int) -> nn.Module:
    """σ(Ax + a), or Cσ(Ax + a) + c with a hidden layer; σ = tanh."""
    if hidden == 0:
        return nn.Sequential(nn.Linear(inputs, outputs), nn.Tanh())
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


class TorusShearField(nn.Module):
    """ẋ = f(cos v, sin v), v̇ = g(cos x, sin x), f and g a `network`: two shears of the torus.

    Neither part drives itself, so the divergence is 0. A step x₁ = x + h f, v₁ = v + h g maps the torus onto itself,
    one to one. ``hidden = 0`` is the source's shear (`ShearField`) of the embedded coordinates.

    Shape: (B, dim) → (B, dim); x are the first dim // 2 coordinates.

    >>> sorted(Step(TorusShearField(5, 8), "symplectic-euler", 0.1, keep="volume").kept)
    ['volume']
    """

    properties: frozenset[Property] = frozenset({"volume"})

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        first, second = self.sizes = (dim // 2, dim - dim // 2)
        self.first, self.second = network(2 * second, hidden, first), network(2 * first, hidden, second)

    def drift(self, v: Tensor) -> Tensor:
        return self.first(embedded(v))

    def kick(self, x: Tensor) -> Tensor:
        return self.second(embedded(x))

    def forward(self, x: Tensor) -> Tensor:
        x, v = x.split(self.sizes, dim=1)
        return torch.cat((self.drift(v), self.kick(x)), dim=1)


class TorusFreeField(nn.Module):
    """F(x) = Cσ(A(cos x, sin x) + a) + c: any field of the torus, the control. Shape: (B, dim) → (B, dim)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.body = network(2 * dim, hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(embedded(x))


class Turned(Flow):
    """A layer between two permutations: the coordinates go round by ``places``, through the layer, and back.

    Shape: that of the layer, (B, d) → (B, d).

    >>> layer = Turned(Step(TorusShearField(3, 0), "symplectic-euler", 0.1), 1)
    >>> sorted(layer.kept)
    ['volume']
    """

    def __init__(self, layer: Step, places: int) -> None:
        super().__init__(layer)
        self.places = places

    @property
    def kept(self) -> frozenset[Property]:
        # A permutation keeps volume, norm and distance, but mixes positions with momenta, and first integrals.
        return super().kept & {"volume", "norm", "nonexpansive"}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.roll(self.places, dims=1)).roll(-self.places, dims=1)


class VolumeOptions(Strict):
    """The dimension of the state."""

    dimension: int = Field(3, ge=3)


class VolumeNetwork(Strict):
    """``layers`` steps of ``method``; ``hidden = 0`` is the source's shear. ``keep``: refuse a pair that cannot."""

    field: Literal["shear", "free"] = "shear"
    method: str = "symplectic-euler"
    layers: int = Field(6, ge=1)
    hidden: int = Field(32, ge=0)
    keep: Literal["volume", "nothing"] = "volume"


class Volume(System):
    """The flow map over δt of the ABC flow and its relatives in d dimensions, from starts spread evenly over the torus.

    The figures: mean squared error of one step on the test set; |det J − 1| of one step, and of a thousand along
    orbits (the determinant of a composition is the product), largest of 32 test points; largest |N⁻¹(N(x)) − x|, N⁻¹ by
    undoing the shears one after the other, or by fixed points where there are none.

    >>> volume.data("test", 0, 7, {"dimension": 5}).targets.shape
    torch.Size([7, 1, 5])
    """

    name, title = "volume", "Volume-preserving flow"
    equations = "ẋᵢ = aᵢ sin xᵢ₋₁ + aᵢ₋₁ cos xᵢ₊₁ (d = 3: the ABC flow)"
    property = "volume, det J = 1"
    headlines = (("test MSE", "volume"), (FAR, "volume"))
    defect = (FAR, ("volume",))
    step = 0.5
    options = VolumeOptions

    def data(self, split: Split, seed: int, size: int, options: Mapping[str, Any]) -> Data:
        dimension = self.options(**options).dimension
        inputs = torch.from_numpy(dynamics.random(split, seed).uniform(-np.pi, np.pi, (size, dimension)))
        return Data(inputs, dynamics.reference(ABCField(dimension), inputs, [self.step]))

    def build(self, network: Mapping[str, Any], data: Data) -> nn.Module:
        options = checked(VolumeNetwork, network, f"{self.name} network")
        keep = None if options.keep == "nothing" else options.keep
        d = data.inputs.shape[1]

        def field() -> nn.Module:
            return (TorusShearField if options.field == "shear" else TorusFreeField)(d, options.hidden)

        h = self.step / options.layers
        steps = [Step(field(), options.method, h, keep=keep) for _ in range(options.layers)]
        return Flow(*(Turned(step, place % d) for place, step in enumerate(steps)))

    def measure(self, model: nn.Module, test: Data) -> Measured:
        determinants = torch.linalg.det(dynamics.along(model, test.inputs[:POINTS], STEPS)).cumprod(1)
        defect = (determinants - 1).abs().amax(0).numpy()
        figures = {
            "test MSE": dynamics.one_step_error(model, test.inputs, test.targets),
            "|det J − 1|": float(defect[0]),
            FAR: float(defect[-1]),
            "inverse round trip": round_trip(model, test.inputs),
        }
        shown = np.unique(np.geomspace(1, STEPS, 120).round().astype(int))
        series = {"step": shown, "volume defect": defect[shown - 1]}
        if test.inputs.shape[1] == 3:
            series["section"] = section(dynamics.orbits(model, section_starts(), round(TIME / self.step)))
        return Measured(figures, series)

    def draw(self, measured: Mapping[str, Sequence[Measured]]) -> list[Drawing]:
        drawings = [
            Drawing(
                "volume-determinant",
                f"Change of volume along orbits after n steps, largest of {POINTS} orbits; band: the seeds",
                orbit_plots.curves(measured, "step", "volume defect", "steps n", "|det J − 1|", "log"),
            )
        ]
        if all("section" in seeds[0].series for seeds in measured.values()):
            starts, times = section_starts(), self.step * np.arange(1, round(TIME / self.step) + 1)
            exact = torch.cat((starts[:, None], dynamics.reference(ABCField(3), starts, times)), dim=1)
            drawings.append(
                Drawing(
                    "volume-section",
                    f"Section z = 0 of {ORBITS} orbits of the ABC flow to T = {TIME:g}: reference, first seeds",
                    orbit_plots.point_panels({"section": section(exact)}, measured, ("x", "y")),
                )
            )
        return drawings


def section_starts() -> Tensor:
    """The starts of the section's orbits: uniform on the torus, the same for all models."""
    return torch.from_numpy(np.random.default_rng(0).uniform(-np.pi, np.pi, (ORBITS, 3)))


def wrapped(x: Tensor) -> Tensor:
    """x modulo 2π, in [−π, π)."""
    return torch.remainder(x + torch.pi, 2 * torch.pi) - torch.pi


def section(states: Tensor) -> np.ndarray:
    """(x, y) where orbits rise through z = 0 modulo 2π. Shape: (N, K, 3) → (n, 2)."""
    # sin z rises at these, and where orbits fall through z = π, which are left out.
    found = np.concatenate([dynamics.crossings(orbit, lambda x: np.sin(x[:, 2])) for orbit in states.numpy()])
    return wrapped(torch.from_numpy(found[np.cos(found[:, 2]) > 0, :2])).float().numpy()


@torch.no_grad()
def inverse(model: nn.Module, y: Tensor) -> Tensor:
    """The x with N(x) = y. Steps of two shears are undone one shear after the other; any other Ψ is inverted by
    the fixed-point iteration x ← y − (Ψ(x) − x), which converges where Ψ − I contracts.

    Shape: (B, d) → (B, d).

    >>> layer, x = Step(TorusShearField(3, 0), "symplectic-euler", 0.5), torch.rand(4, 3)
    >>> bool(torch.allclose(inverse(layer, layer(x)), x, atol=1e-6))
    True
    """
    if isinstance(model, Turned):
        return inverse(model[0], y.roll(model.places, dims=1)).roll(-model.places, dims=1)
    if isinstance(model, Flow):
        for layer in reversed(model):
            y = inverse(layer, y)
        return y
    assert isinstance(model, Step)
    if model.method.name == "symplectic-euler":
        field: Any = model.field
        h = model.step_size
        x, v = y.split(field.sizes, dim=1)
        v = v - h * field.kick(x)
        return torch.cat((x - h * field.drift(v), v), dim=1)
    x = y
    for _ in range(ROUNDS):
        x = y - (model(x) - x)
    return x


def round_trip(model: nn.Module, x: Tensor) -> float:
    """max |N⁻¹(N(x)) − x|."""
    with torch.no_grad():
        return float((inverse(model, model(x)) - x).abs().max())


volume = Volume()
SYSTEMS = (volume,)
