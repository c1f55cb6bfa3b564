"""Symplectic networks: learn the flow map (q, p)(t) → (q, p)(t + δt) of a Hamiltonian system with JᵀΩJ = Ω kept.

A layer is a step of a symplectic method with the field of H_θ(q, p) = aᵀΣ̂(Kq + b) + a'ᵀΣ̂(K'p + b'), that is two
shears: q += h K'ᵀdiag(a')σ(K'p + b'), then p −= h Kᵀdiag(a)σ(Kq + b). A composition of symplectic maps is symplectic
whatever the weights are, and a symplectic map close to an energy-preserving flow keeps the energy near its level for
very long times (Hairer, Lubich and Wanner, *Geometric Numerical Integration*, IX.8). An unconstrained network of the
same accuracy per step gains or loses energy at every step. Sources: the talk behind arXiv 2210.02373; Jin et al.,
*SympNets*, Neural Networks 132 (2020).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from robustflow.config import Strict
from robustflow.steps import Flow, Step
from robustflow.structured import dynamics, orbit_plots
from robustflow.structured.fields import FreeField, HamiltonianField
from robustflow.structured.systems import Data, Drawing, Measured, Split, System, checked

DEFECT, DEEP, ENERGY = "‖JᵀΩJ − Ω‖", "‖JᵀΩJ − Ω‖, 10 steps", "energy error, T = 1000"
TIME = 1000.0  # how long orbits are followed
ORBITS, POINTS, DEPTH = 16, 32, 10  # orbits for the energy, points for the Jacobians, steps they are multiplied over
LIMIT = 10.0  # an orbit is lost once a coordinate is beyond; those of the equations stay below 2.5


class Potential(nn.Module):
    """ẋ = (p, −∇V(q)): the field of H(q, p) = ½‖p‖² + V(q) with V(0) = 0 at its minimum, split into two shears.

    ``reach`` bounds |qᵢ| and |pᵢ| at the energies of interest: the box in which starts are looked for.

    Shape: (B, 2m) → (B, 2m), a state is (q, p).
    """

    properties = frozenset({"symplectic", "volume"})
    reach: tuple[float, float]

    def __init__(self, degrees: int) -> None:
        super().__init__()
        self.sizes = (degrees, degrees)

    def potential(self, q: Tensor) -> Tensor:
        raise NotImplementedError

    def drift(self, p: Tensor) -> Tensor:
        return p

    def kick(self, q: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        q, p = x.split(self.sizes, dim=1)
        return torch.cat((self.drift(p), self.kick(q)), dim=1)

    def energy(self, x: Tensor) -> Tensor:
        """H. Shape: (…, 2m) → (…)."""
        q, p = x.split(self.sizes, dim=-1)
        return 0.5 * p.square().sum(-1) + self.potential(q)

    def near(self, x: Tensor) -> Tensor:
        """Whether x lies on the side of the saddles where the orbits of low energy stay. Shape: (N, 2m) → (N,)."""
        return torch.ones(len(x), dtype=torch.bool)


class Spring(Potential):
    """V = q²/2, whose flow is the rotation by the angle −t.

    >>> Spring(1)(torch.tensor([[1.0, 2.0]])).tolist()
    [[2.0, -1.0]]
    """

    reach = (1.5, 1.5)

    def potential(self, q: Tensor) -> Tensor:
        return 0.5 * q.square().sum(-1)

    def kick(self, q: Tensor) -> Tensor:
        return -q


class Gravity(Potential):
    """V = 1 − cos q; the pendulum swings below the energy 2 and turns over above it.

    >>> Gravity(1).energy(torch.tensor([0.0, 2.0])).item()
    2.0
    """

    reach = (2.2, 1.8)

    def potential(self, q: Tensor) -> Tensor:
        return (1 - q.cos()).sum(-1)

    def kick(self, q: Tensor) -> Tensor:
        return -q.sin()


class HenonHeiles(Potential):
    """V = (q₁² + q₂²)/2 + q₁²q₂ − q₂³/3: bounded orbits below the energy 1/6 of its three saddles, chaos towards it.

    Source: Hénon and Heiles, Astronomical Journal 69 (1964).

    >>> HenonHeiles(2).energy(torch.tensor([0.0, 1.0, 0.0, 0.0])).item()  # a saddle
    0.1666...
    """

    reach = (1.0, 0.6)

    def potential(self, q: Tensor) -> Tensor:
        x, y = q.unbind(-1)
        return 0.5 * (x * x + y * y) + x * x * y - y**3 / 3

    def kick(self, q: Tensor) -> Tensor:
        x, y = q.unbind(-1)
        return torch.stack((-x - 2 * x * y, -y - x * x + y * y), dim=-1)

    def near(self, x: Tensor) -> Tensor:
        # At energy 1/6 the region is the triangle between the saddles (0, 1), (±√3/2, −½).
        return (x[:, 1] >= -0.5) & (x[:, 1] + 3**0.5 * x[:, 0].abs() <= 1)


class MechanicsNetwork(Strict):
    """``layers`` steps of ``method`` with fields of ``hidden`` units. ``keep``: refuse a pair that cannot keep it."""

    field: Literal["hamiltonian", "free"] = "hamiltonian"
    method: str = "symplectic-euler"
    layers: int = Field(8, ge=1)
    hidden: int = Field(32, ge=1)
    keep: Literal["symplectic", "nothing"] = "symplectic"


class Mechanics(System):
    """A Hamiltonian system whose time-δt map is learned from starts spread evenly over {H ≤ ``level``}.

    The figures: mean squared error of one step on the test set; spectral norm of JᵀΩJ − Ω, largest of 32 test points,
    of one step and of ten; |H(x_t) − H(x_0)|, largest over t ≤ 1000, median of 16 orbits from test points; the share of
    these orbits that were lost (a coordinate beyond 10), which stay where they left.

    >>> oscillator.data("test", 0, 5, {}).targets.shape
    torch.Size([5, 1, 2])
    """

    property = "the symplectic form, JᵀΩJ = Ω"
    headlines = (("test MSE", "symplectic"), (DEEP, "symplectic"), (ENERGY, "symplectic"))
    defect = (DEEP, ("symplectic",))
    step = 0.5

    def __init__(
        self, name: str, title: str, equations: str, field: Potential, level: float, portrait: Mapping[str, Tensor]
    ) -> None:
        self.name, self.title, self.equations = name, title, equations
        self.field, self.level, self.portrait = field, level, portrait

    def data(self, split: Split, seed: int, size: int, options: Mapping[str, Any]) -> Data:
        numbers, box = dynamics.random(split, seed), np.repeat(self.field.reach, self.field.sizes)
        found = torch.empty(0, len(box), dtype=torch.float64)
        while len(found) < size:
            x = torch.from_numpy(numbers.uniform(-box, box, (4 * size, len(box))))
            found = torch.cat((found, x[(self.field.energy(x) <= self.level) & self.field.near(x)]))
        inputs = found[:size]
        return Data(inputs, dynamics.reference(self.field, inputs, [self.step]))

    def build(self, network: Mapping[str, Any], data: Data) -> nn.Module:
        options = checked(MechanicsNetwork, network, f"{self.name} network")
        kind = HamiltonianField if options.field == "hamiltonian" else FreeField
        keep = None if options.keep == "nothing" else options.keep
        d, h = data.inputs.shape[1], self.step / options.layers
        return Flow(*(Step(kind(d, options.hidden), options.method, h, keep=keep) for _ in range(options.layers)))

    def prepared(self) -> dict[str, nn.Module]:
        """The exact field with five steps of a method for one of ours: what the method alone does."""
        methods = {"exact-verlet": "stoermer-verlet", "exact-euler": "explicit-euler"}
        return {
            name: Flow(*(Step(self.field, method, self.step / 5, learned=False) for _ in range(5)))
            for name, method in methods.items()
        }

    def measure(self, model: nn.Module, test: Data) -> Measured:
        defect = symplectic_defect(dynamics.along(model, test.inputs[:POINTS], DEPTH))
        steps = round(TIME / self.step)
        states = dynamics.orbits(model, test.inputs[:ORBITS], steps, LIMIT)
        energy = self.field.energy(states)
        error = (energy - energy[:, :1]).abs()
        figures = {
            "test MSE": dynamics.one_step_error(model, test.inputs, test.targets),
            DEFECT: float(defect[0]),
            DEEP: float(defect[-1]),
            ENERGY: float(error.amax(1).median()),
            "orbits lost (%)": 100 * float(dynamics.escaped(states).double().mean()),
        }
        shown = np.unique(np.geomspace(1, steps, 300).round().astype(int))
        series = {
            "time": shown * self.step,
            "energy error": error.median(0).values.numpy()[shown],
            "step": np.arange(1, DEPTH + 1),
            "symplectic defect": defect.numpy(),
        }
        for name, starts in self.portrait.items():
            series[name] = self.points(dynamics.orbits(model, starts, steps, LIMIT))
        return Measured(figures, series)

    def points(self, states: Tensor) -> np.ndarray:
        """What the portrait shows of orbits (N, K, 2m): every fifth state (q, p), or the section of Hénon–Heiles."""
        if self.field.sizes[0] == 1:
            return states[:, ::5].flatten(0, 1).float().numpy()
        # q₁ = 0 with p₁ > 0; the plane is (q₂, p₂).
        found = [dynamics.crossings(orbit, lambda x: x[:, 0]) for orbit in states.numpy()]
        return np.concatenate(found)[:, [1, 3]].astype(np.float32)

    def draw(self, measured: Mapping[str, Sequence[Measured]]) -> list[Drawing]:
        times = self.step * np.arange(1, round(TIME / self.step) + 1)
        exact = {
            name: self.points(torch.cat((starts[:, None], dynamics.reference(self.field, starts, times)), dim=1))
            for name, starts in self.portrait.items()
        }
        return [
            Drawing(
                f"{self.name}-energy",
                f"{self.title}: energy error of orbits against time, median of {ORBITS}; band: the seeds",
                orbit_plots.curves(measured, "time", "energy error", "time t", "|H(x(t)) − H(x(0))|", "log"),
            ),
            Drawing(
                f"{self.name}-{'portrait' if self.field.sizes[0] == 1 else 'section'}",
                f"{self.title}: orbits to T = {TIME:g}, the reference and each model's first seed",
                orbit_plots.point_panels(exact, measured, ("q", "p") if self.field.sizes[0] == 1 else ("q₂", "p₂")),
            ),
            Drawing(
                f"{self.name}-defect",
                f"{self.title}: distance from a symplectic map after n steps",
                orbit_plots.curves(measured, "step", "symplectic defect", "steps n", "‖JᵀΩJ − Ω‖₂", "linear"),
            ),
        ]


def symplectic_defect(jacobians: Tensor) -> Tensor:
    """max ‖JᵀΩJ − Ω‖₂ over points, J the product of the first 1, 2, … Jacobians. Shape: (N, K, 2m, 2m) → (K,).

    >>> symplectic_defect(torch.diag(torch.tensor([2.0, 0.5])).expand(1, 3, 2, 2)).tolist()
    [0.0, 0.0, 0.0]
    """
    m = jacobians.shape[-1] // 2
    eye, zero = torch.eye(m, dtype=jacobians.dtype), torch.zeros(m, m, dtype=jacobians.dtype)
    omega = torch.cat((torch.cat((zero, eye), 1), torch.cat((-eye, zero), 1)))
    products = list(itertools.accumulate(jacobians.unbind(1), lambda before, after: after @ before))
    defect = torch.stack([j.mT @ omega @ j - omega for j in products])
    return torch.linalg.matrix_norm(defect, ord=2).amax(1)


def section_starts(energy: float, q2: Sequence[float], p2: Sequence[float]) -> Tensor:
    """States of Hénon–Heiles with this energy on the section q₁ = 0, p₁ > 0."""
    q, p = torch.tensor(q2, dtype=torch.float64), torch.tensor(p2, dtype=torch.float64)
    zero = torch.zeros_like(q)
    p1 = (2 * energy - p * p - q * q + 2 * q**3 / 3).sqrt()
    return torch.stack((zero, q, p1, p), dim=1)


def _standing(angles: Sequence[float]) -> Tensor:
    return torch.tensor([(q, 0.0) for q in angles], dtype=torch.float64)


oscillator = Mechanics(
    "oscillator", "Harmonic oscillator", "q̇ = p, ṗ = −q", Spring(1), 1.0, {"orbits": _standing((0.4, 0.8, 1.2))}
)
pendulum = Mechanics(
    "pendulum", "Pendulum", "q̇ = p, ṗ = −sin q", Gravity(1), 1.5, {"orbits": _standing((0.5, 1.0, 1.5, 2.0))}
)
henon_heiles = Mechanics(
    "henon-heiles",
    "Hénon–Heiles",
    "q̇ = p, ṗ = −∇V(q), V = (q₁² + q₂²)/2 + q₁²q₂ − q₂³/3",
    HenonHeiles(2),
    1 / 6,
    {
        "section, E = 1/12": section_starts(
            1 / 12, (-0.25, -0.15, -0.05, 0.05, 0.15, 0.25, 0.35, 0.42, 0.0, 0.0), (0.0,) * 8 + (0.15, 0.3)
        ),
        "section, E = 1/8": section_starts(
            1 / 8, (-0.3, -0.2, -0.1, 0.05, 0.15, 0.25, 0.35, 0.45, 0.0, 0.0), (0.0,) * 8 + (0.2, 0.35)
        ),
    },
)
SYSTEMS = (oscillator, henon_heiles, pendulum)
