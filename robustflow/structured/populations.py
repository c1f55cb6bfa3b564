"""Populations that move between compartments: x₁ + … + x_d stays what it was, in the equation and in the network.

Source: Celledoni et al., *Dynamical systems' based neural networks*, arXiv 2210.02373, section 5 (the SIR model of an
epidemic, as a map and along trajectories), and the example of the talk in dimension three.

A field F(x) = (A(x) − A(x)ᵀ)𝟏 (`MassField`) moves mass from one compartment to another, 𝟏ᵀF(x) = 0. Every Runge–Kutta
method keeps a linear invariant, and between layers of different width a `Resize` keeps it. Signs are not kept: a
compartment may become slightly negative, and the smallest entry is reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from robustflow.config import Strict
from robustflow.methods import Property
from robustflow.steps import Flow, Step
from robustflow.structured import population_plots
from robustflow.structured.dynamics import orbits, random, reference
from robustflow.structured.fields import FreeField, MassField
from robustflow.structured.systems import Data, Drawing, Measured, Reference, Split, System, checked

DRIFT_STEPS, STARTS, SHOWN = 1000, 16, 3
DRIFT = f"mass drift, {DRIFT_STEPS} steps"
ESCAPE = 1e6  # an orbit beyond it has blown up: it is stopped there


class Sir(nn.Module):
    """x' = −xy, y' = xy − y, z' = y: susceptible, infected, recovered, at the reproduction number 1.

    Shape: (B, 3) → (B, 3).

    >>> Sir()(torch.tensor([[0.5, 0.5, 0.0]])).tolist()
    [[-0.25, -0.25, 0.5]]
    """

    properties: frozenset[Property] = frozenset({"linear"})

    def forward(self, state: Tensor) -> Tensor:
        x, y, _ = state.unbind(1)
        infected = x * y
        return torch.stack((-infected, infected - y, y), dim=1)


class Talk(nn.Module):
    """The talk's example, S(y)𝟏 with S₁₂ = −y₃y₁², S₁₃ = y₂y₃, S₂₃ = −sin y₁ and S skew.

    Shape: (B, 3) → (B, 3).

    >>> Talk()(torch.tensor([[1.0, 2.0, 3.0]])).sum().abs().item() < 1e-6
    True
    """

    properties: frozenset[Property] = frozenset({"linear"})

    def forward(self, state: Tensor) -> Tensor:
        y1, y2, y3 = state.unbind(1)
        first, second, third = y3 * y1 * y1, y2 * y3, torch.sin(y1)
        return torch.stack((second - first, first - third, third - second), dim=1)


class Resize(nn.Module):
    """x ↦ (x, 0) to a larger dimension n; x ↦ (x₁, …, x_n) + (x_{n+1} + … + x_d)/n · 𝟏 to a smaller one.

    A linear map x ↦ Mx keeps 𝟏ᵀx if and only if every column of M adds up to 1: M = [I; 0] does, and so does
    M = [I | 𝟏𝟏ᵀ/n], which divides the mass of what is left out equally. The second undoes the first.

    Shape: (B, d) → (B, n).

    >>> up = Resize(5)(torch.tensor([[1.0, 2.0, 3.0]]))
    >>> up.tolist(), Resize(2)(up).tolist()
    ([[1.0, 2.0, 3.0, 0.0, 0.0]], [[2.5, 3.5]])
    """

    kept: frozenset[Property] = frozenset({"linear"})

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        extra = self.dim - x.shape[1]
        if extra >= 0:
            return nn.functional.pad(x, (0, extra))
        return x[:, : self.dim] + x[:, self.dim :].sum(1, keepdim=True) / self.dim

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class NetworkOptions(Strict):
    """A network of blocks: one of ``layers`` steps in every dimension of ``dims``, then back to three.

    kind "mass" has the structure, "free" is the control: the same layers with fields that are plain networks.
    """

    kind: Literal["mass", "free"] = "mass"
    dims: tuple[Annotated[int, Field(ge=3)], ...] = Field(min_length=1)
    layers: int = Field(3, ge=1)
    hidden: int = Field(50, ge=1)
    activation: str = "tanh"
    method: str = "explicit-euler"


def network(options: NetworkOptions, step: float) -> Flow:
    """3 → dims → 3, all steps of size δt/(number of steps): the network moves through the time δt.

    Raises:
        UserError: a method that does not keep the mass, or an unknown activation.

    >>> flow = network(NetworkOptions(dims=(3, 6), layers=2, hidden=8), step=1.0)
    >>> sum(isinstance(layer, Step) for layer in flow), flow(torch.rand(5, 3)).shape
    (4, torch.Size([5, 3]))
    """
    h = step / (options.layers * len(options.dims))
    kind = MassField if options.kind == "mass" else FreeField
    keep: Property | None = "linear" if options.kind == "mass" else None
    layers: list[nn.Module] = []
    for dim in options.dims:
        layers.append(Resize(dim))
        for _ in range(options.layers):
            field = kind(dim, options.hidden, activation=options.activation)
            layers.append(Step(field, options.method, h, learned=False, keep=keep))
    return Flow(*layers, Resize(3))


def mass_drift(model: nn.Module, starts: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """|𝟏ᵀx_k − 𝟏ᵀx₀| of each orbit x_k of a map, and the orbits. Shape: (N, 3) → (N, steps + 1), (N, steps + 1, 3)."""
    states = orbits(model, starts, steps, limit=ESCAPE)
    mass = states.sum(2)
    return (mass - mass[:, :1]).abs(), states


class Population(System):
    """A population of three compartments, learned as the map of time ``step`` along orbits of ``length`` steps.

    ``unroll``: over how many steps from its start the error of an orbit is reported; ``horizon``: until what time whole
    orbits are compared; ``positive``: whether the compartments hold shares of a population, x ≥ 0.
    """

    property = "the mass x₁ + x₂ + x₃"
    headlines = (("test MSE", "mass"), (DRIFT, "mass"))
    defect = (DRIFT, ("mass", "mass-rk4"))

    def __init__(
        self,
        name: str,
        title: str,
        equations: str,
        *,
        field: nn.Module,
        step: float,
        length: int,
        unroll: int,
        horizon: float,
        positive: bool = False,
        references: tuple[Reference, ...] = (),
    ) -> None:
        self.name, self.title, self.equations, self.field, self.step = name, title, equations, field, step
        self.length, self.unroll, self.horizon = length, unroll, horizon
        self.positive, self.references = positive, references

    def data(self, split: Split, seed: int, size: int, options: Mapping[str, Any]) -> Data:
        """Starts uniform in the cube, for an epidemic divided by their sum as in the source; solutions to 1e-12."""
        starts = torch.from_numpy(random(split, seed).random((size, 3)))
        if self.positive:
            starts = starts / starts.sum(1, keepdim=True)
        return Data(starts, reference(self.field, starts, self.step * np.arange(1, self.length + 1)))

    def build(self, network_options: Mapping[str, Any], data: Data) -> nn.Module:
        return network(checked(NetworkOptions, network_options, f"{self.name} network"), self.step)

    def prepared(self) -> dict[str, nn.Module]:
        """The equation itself, one step of a Runge–Kutta method for each δt: what a network competes with."""
        return {f"equation-{short}": self._exact(method) for short, method in _METHODS.items()}

    def _exact(self, method: str) -> nn.Module:
        step = Step(self.field, method, self.step, learned=False, keep="linear").double()
        with torch.no_grad():
            step.step_size.fill_(self.step)  # a field without weights leaves the step in float32
        return step

    @torch.no_grad()
    def measure(self, model: nn.Module, test: Data) -> Measured:
        x, squares = test.inputs, []
        for target in test.targets[:, : self.unroll].unbind(1):
            x = model(x)
            squares.append(float((x - target).square().mean()))
        figures = {"test MSE": float(np.mean(squares))}

        starts = test.inputs[:STARTS]
        steps = round(self.horizon / self.step)
        true = reference(self.field, starts, self.step * np.arange(1, steps + 1))
        true = torch.cat((starts[:, None], true), dim=1)
        predicted = orbits(model, starts, steps, limit=ESCAPE)
        figures[f"RMS error, t = {self.horizon:g}"] = float((predicted - true)[:, -1].square().mean().sqrt())

        series: dict[str, np.ndarray] = {}
        drift, states = mass_drift(model, starts, DRIFT_STEPS)
        figures[DRIFT] = float(drift.max())
        series["mass drift"] = drift.amax(0).numpy()
        if self.positive:
            figures[f"min x, {DRIFT_STEPS} steps"] = float(states.min())
        every = max(1, steps // 100)
        series["times"] = self.step * np.arange(0, steps + 1, every)
        series["true"] = true[:SHOWN, ::every].numpy()
        series["predicted"] = predicted[:SHOWN, ::every].numpy()
        return Measured(figures, series)

    def draw(self, measured: Mapping[str, Sequence[Measured]]) -> list[Drawing]:
        names = ("susceptible", "infected", "recovered") if self.positive else ("y₁", "y₂", "y₃")
        return [
            Drawing("mass", population_plots.MASS_CAPTION, population_plots.draw_mass(measured)),
            Drawing(
                "trajectories",
                population_plots.TRAJECTORY_CAPTION,
                population_plots.draw_trajectories(measured, names),
            ),
        ]


_METHODS = {"euler": "explicit-euler", "rk4": "rk4"}
_PUBLISHED = "published, Celledoni et al., arXiv 2210.02373, section 5"

SIR_MAP = Population(
    "sir-map",
    "SIR, the map of time 1",
    "x' = −xy, y' = xy − y, z' = y",
    field=Sir(),
    step=1.0,
    length=1,
    unroll=1,
    horizon=10.0,
    positive=True,
    references=(Reference("test MSE", 3.35e-6, _PUBLISHED, "100 test points", model="mass"),),
)
SIR_TRAJECTORY = Population(
    "sir-trajectory",
    "SIR, along trajectories",
    "x' = −xy, y' = xy − y, z' = y",
    field=Sir(),
    step=0.025,
    length=4,
    unroll=4,
    horizon=10.0,
    positive=True,
    references=(Reference("test MSE", 3.92e-6, _PUBLISHED, "four steps of 200 test points", model="mass"),),
)
TALK_MASS = Population(
    "talk-mass",
    "The talk's mass-preserving example",
    "ẏ = S(y)𝟏, S₁₂ = −y₃y₁², S₁₃ = y₂y₃, S₂₃ = −sin y₁, S skew",
    field=Talk(),
    step=0.1,
    length=50,  # the windows of the training lie anywhere on the orbits, which leave the cube of the starts
    unroll=4,
    horizon=5.0,
)
SYSTEMS = (SIR_MAP, SIR_TRAJECTORY, TALK_MASS)
