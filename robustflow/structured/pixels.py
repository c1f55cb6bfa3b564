"""Partial differential equations from pictures of their solutions: heat, linear advection, Fisher's equation.

Source: Celledoni, Jackaman, Murari, Owren, *Predictions based on pixel data: insights from PDEs and finite differences*
(2023). A periodic square of 100 × 100 pixels is a state; a network (`pixel_networks`) takes it a time δt further. Its
error has three parts: the spatial one of finite differences, O(δx²), the one of the method in time, O(δt^{r+1}), and
that of the learned right-hand side, at most δt·exp(Lip(F)δt)·sup‖F_θ − F‖. Solutions: `finite_elements`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from robustflow.config import Strict
from robustflow.steps import Flow
from robustflow.structured import finite_elements, pixel_plots
from robustflow.structured.dynamics import random
from robustflow.structured.pixel_networks import (
    ALPHA,
    SPACING,
    Differences,
    Equation,
    PixelNetwork,
    fit,
    hand_built,
    network,
    repeated,
    step_of,
)
from robustflow.structured.systems import Data, Drawing, Measured, Reference, Split, System, checked

HORIZON, REPORTED, SHOWN = 40, (1, 10, 20, 39), (0, 10, 20, 40)
GAIN, DRIFT = f"noise gain, {HORIZON} steps", f"norm drift, {HORIZON} steps"
NOISE = 0.01  # ± on every pixel of a start, for the noise gain
FITTED, EVERY = 32, 19  # initial data and steps between the states that a training begins at
LARGEST = 6e4  # below the largest float16


class PixelOptions(Strict):
    """``grid`` pixels of size δx = 0.01 a side: the torus has the side grid/100, a multiple of 0.2, and the data those
    of their wave numbers that are periodic on it. ``steps``: of a trajectory of the training."""

    grid: int = Field(100, ge=20, multiple_of=20)
    steps: int = Field(HORIZON, ge=1)


class Pixels(System):
    """An equation on the periodic square, started at ``offset`` + sin(2πk₁(x − s₁)) cos(2πk₂(y − s₂)).

    k₁, k₂ are whole numbers in ``waves``, s₁, s₂ uniform. The figures are means over test starts: ‖U − U*‖/‖U*‖ and
    max|U − U*| beside the finite elements U*; the noise gain ‖Ψ⁴⁰(U + η) − Ψ⁴⁰(U)‖/‖η‖, η uniform in ±0.01; and of one
    step, beside ‖U*‖, the parts of its error.

    >>> data = HEAT.data("test", 0, 3, {"grid": 20, "steps": 5})
    >>> data.inputs.shape, data.targets.shape
    (torch.Size([3, 1, 20, 20]), torch.Size([3, 40, 1, 20, 20]))
    """

    options = PixelOptions

    def __init__(
        self,
        equation: Equation,
        title: str,
        equations: str,
        *,
        step: float,
        waves: tuple[int, int],
        offset: float = 0.0,
        references: tuple[Reference, ...],
    ) -> None:
        self.name = self.equation = equation
        self.title, self.equations, self.step, self.waves, self.offset = title, equations, step, waves, offset
        self.references = references
        self.property = "the norm ‖U‖ (of the model norm-preserving)" if equation == "advection" else "nothing exactly"
        last = f"relative error, step {REPORTED[-1]}"
        self.headlines = ((last, "network"), (last, "noise"), (GAIN, "network"), (GAIN, "noise"))
        if equation == "advection":
            self.headlines += ((last, "norm-preserving"), (DRIFT, "norm-preserving"))
            self.defect = (DRIFT, ("norm-preserving", "norm-preserving-noise"))

    def data(self, split: Split, seed: int, size: int, options: Mapping[str, Any]) -> Data:
        chosen, numbers = self.options(**options), random(split, seed)
        n, side = chosen.grid, chosen.grid * SPACING
        low, high = math.ceil(self.waves[0] * side - 1e-9), math.floor(self.waves[1] * side + 1e-9)
        k, s = numbers.integers(low, high + 1, (size, 2, 1)), numbers.random((size, 2, 1))
        angle = 2 * np.pi * k * (np.arange(n) / n - s)
        start = torch.from_numpy(self.offset + np.sin(angle[:, 0])[:, :, None] * np.cos(angle[:, 1])[:, None, :])
        steps = HORIZON if split == "test" else chosen.steps
        return Data(start[:, None], self.solution(start, steps)[:, :, None])

    def solution(self, start: Tensor, steps: int) -> Tensor:
        """The states after 1, …, ``steps`` steps. Shape: (N, n, n) → (N, steps, n, n)."""
        side = start.shape[-1] * SPACING  # the torus of this side is the unit square with other units of length
        if self.equation == "fisher":
            return finite_elements.fisher_solution(start, self.step, steps, ALPHA / side**2)
        if self.equation == "heat":
            return finite_elements.linear_solution("heat", start, self.step, steps, ALPHA / side**2)
        return finite_elements.linear_solution("advection", start, self.step / side, steps)

    def build(self, network_options: Mapping[str, Any], data: Data) -> nn.Module:
        """A network in the units of the data, its outer layer fitted to them (`pixel_networks.fit`)."""
        options = checked(PixelNetwork, network_options, f"{self.name} network")
        known = torch.cat((data.inputs[:FITTED, None], data.targets[:FITTED]), dim=1)
        before, after = known[:, :-1:EVERY].flatten(0, 1), known[:, 1::EVERY].flatten(0, 1)
        rate = (after - before).square().mean().sqrt() / self.step
        model = network(options, self.step, float(rate / (before - self.offset).square().mean().sqrt()))
        fit(model, before, after, self.step, options.fit_noise)
        return model

    def prepared(self) -> dict[str, nn.Module]:
        """Finite differences in space with (nearly) no error in time, and as a network with three steps of Euler."""
        models: dict[str, nn.Module] = {"finite-differences": self.differences()}
        models["hand-built"] = repeated(hand_built(self.equation), "explicit-euler", self.step, 3)
        if self.equation == "advection":  # central differences are skew: their flow keeps the norm
            field = hand_built(self.equation, project=True)
            models["hand-built-norm"] = repeated(field, "norm-exact-heun", self.step, 3, keep="norm")
        return models

    def differences(self, method: str = "rk4", substeps: int = 10) -> Flow:
        return repeated(Differences(self.equation), method, self.step, substeps)

    @torch.no_grad()
    def measure(self, model: nn.Module, test: Data) -> Measured:
        true = test.targets
        predicted = states(model, test.inputs, HORIZON)
        error = predicted - true
        relative = (_norm(error) / _norm(true)).mean(0)
        largest = error.abs().amax((2, 3, 4)).mean(0)
        generator = torch.Generator().manual_seed(0)
        noise = NOISE * (2 * torch.rand(test.inputs.shape, generator=generator, dtype=torch.float64) - 1)
        apart = states(model, test.inputs + noise, HORIZON) - predicted
        gain = (_norm(apart) / _norm(noise)[:, None]).mean(0)
        drift = (_norm(predicted) / _norm(test.inputs)[:, None] - 1).abs().amax(0)
        figures = {f"relative error, step {k}": float(relative[k - 1]) for k in REPORTED}
        figures["max error, step 39"] = float(largest[38])
        figures[GAIN] = float(gain[-1])
        if self.equation == "advection":
            figures[DRIFT] = float(drift[-1])
        figures |= self.parts(model, test)
        series = {
            "relative error": relative.numpy(),
            "max error": largest.numpy(),
            "noise gain": gain.numpy(),
            "norm drift": drift.numpy(),
            "true": _small(torch.stack([test.inputs[0, 0], *true[0, [k - 1 for k in SHOWN[1:]], 0]])),
            "error": _small(error[0, [k - 1 for k in SHOWN[1:]], 0]),
        }
        return Measured(figures, series)

    def parts(self, model: nn.Module, test: Data) -> dict[str, float]:
        """The error of one step, split: U* − Ψ = (U* − Φ_FD) + (Φ_FD − Ψ_FD) + (Ψ_FD − Ψ), FD finite differences.

        A method for projected fields is split as Euler's or Heun's: that of its order.
        """
        step = step_of(model)
        if step is None:
            return {}
        assert isinstance(model, Flow)
        size, u, exact = _norm(test.inputs), test.inputs, test.targets[:, 0]
        similar = "explicit-euler" if step.method.order == 1 else "heun"
        method = step.method.name if step.method.needs == "any" else similar
        flow, one = self.differences()(u), self.differences(method, len(model))(u)
        rate = Differences(self.equation)(u)
        return {
            "F − finite differences, relative": float((_norm(step.field(u) - rate) / _norm(rate)).mean()),
            "one step: whole error": float((_norm(exact - model(u)) / size).mean()),
            "one step: of space": float((_norm(exact - flow) / size).mean()),
            "one step: of time": float((_norm(flow - one) / size).mean()),
            "one step: of F": float((_norm(one - model(u)) / size).mean()),
        }

    def draw(self, measured: Mapping[str, Sequence[Measured]]) -> list[Drawing]:
        drawings = [
            Drawing(
                "fields",
                pixel_plots.FIELDS_CAPTION,
                pixel_plots.draw_fields(measured, [self.step * k for k in SHOWN], self.offset),
            ),
            Drawing("errors", pixel_plots.ERRORS_CAPTION, pixel_plots.draw_errors(measured)),
            Drawing("noise", pixel_plots.NOISE_CAPTION, pixel_plots.draw_curves(measured, "noise gain")),
        ]
        if self.equation == "advection":
            drawings.append(Drawing("norm", pixel_plots.NORM_CAPTION, pixel_plots.draw_curves(measured, "norm drift")))
        return drawings


def states(model: nn.Module, start: Tensor, steps: int) -> Tensor:
    """Ψ(U), Ψ(Ψ(U)), …. Shape: (N, 1, n, n) → (N, steps, 1, n, n)."""
    found = [start]
    for _ in range(steps):
        found.append(model(found[-1]))
    return torch.stack(found[1:], dim=1)


def _norm(u: Tensor) -> Tensor:
    """‖U‖ of every picture. Shape: (..., 1, n, n) → (...)."""
    return u.flatten(-3).square().sum(-1).sqrt()


def _small(pictures: Tensor) -> np.ndarray:
    return np.nan_to_num(pictures.numpy(), nan=LARGEST).clip(-LARGEST, LARGEST).astype(np.float16)


_SOURCE = "measured on the published weights of Celledoni, Jackaman, Murari, Owren 2023"


def _references(errors: Mapping[str, Sequence[float]], gains: Mapping[str, float]) -> tuple[Reference, ...]:
    found = [
        Reference(f"relative error, step {step}", value, _SOURCE, model=model)
        for model, values in errors.items()
        for step, value in zip(REPORTED, values, strict=True)
    ]
    return (*found, *(Reference(GAIN, gain, _SOURCE, model=m) for m, gain in gains.items()))


_DIFFUSION = 0.24 * SPACING**2 / ALPHA
HEAT = Pixels(
    "heat",
    "Heat equation",
    "u_t = αΔu, α = 0.01",
    step=_DIFFUSION,
    waves=(5, 7),
    references=_references(
        {"network": (1.2e-4, 1.2e-3, 2.5e-3, 5.4e-3), "hand-built": (1.1e-3, 1.1e-2, 2.2e-2, 4.4e-2)},
        {"network": 0.54, "noise": 0.16},
    ),
)
ADVECTION = Pixels(
    "advection",
    "Linear advection",
    "u_t = −(u_x + u_y)",
    step=0.02,
    waves=(5, 8),
    offset=1.0,
    references=_references(
        {"network": (9.7e-4, 8.7e-3, 1.7e-2, 3.3e-2), "norm-preserving": (4.7e-4, 4.5e-3, 8.7e-3, 1.6e-2)},
        {"network": 24.6, "noise": 3.8},
    ),
)
FISHER = Pixels(
    "fisher",
    "Fisher's equation",
    "u_t = αΔu + u(1 − u), α = 0.01",
    step=_DIFFUSION,
    waves=(5, 8),
    references=_references({"network": (3.1e-4, 2.4e-3, 8.6e-3, 7.9e-2)}, {"network": 1.08, "noise": 0.06}),
)
SYSTEMS = (HEAT, ADVECTION, FISHER)
