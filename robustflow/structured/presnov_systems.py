"""Two problems for Presnov's decomposition: a function of one variable, and the map of time δt of a field in R⁴.

Source: Celledoni et al., arXiv 2210.02373, appendix. ẋ = sin³x + x³ is a gradient already, so a second field adds a
part that is tangent to the spheres.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustflow.methods import Property
from robustflow.steps import Flow, Step
from robustflow.structured import presnov, presnov_plots
from robustflow.structured.dynamics import random, reference
from robustflow.structured.presnov import Composition, NetworkOptions
from robustflow.structured.systems import Data, Drawing, Measured, Split, System, checked

DRIFT = f"norm drift, {presnov.DRIFT_STEPS} steps"


def target(x: Tensor) -> Tensor:
    """f(x) = |x| + sin x + x²."""
    return x.abs() + torch.sin(x) + x * x


class GradientPart(nn.Module):
    """sin³x + x³ in every coordinate: the gradient of Σᵢ cos³xᵢ/3 − cos xᵢ + xᵢ⁴/4.

    Shape: (B, 4) → (B, 4).
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x) ** 3 + x**3


class SpherePart(nn.Module):
    """S(x)x with the skew S₁₂ = 2 cos x₃, S₃₄ = 2 + sin x₁, S₁₄ = x₂: tangent to the spheres.

    Shape: (B, 4) → (B, 4).

    >>> x = torch.rand(5, 4)
    >>> bool(((x * SpherePart()(x)).sum(1).abs() < 1e-5).all())
    True
    """

    properties: frozenset[Property] = frozenset({"norm"})

    def forward(self, x: Tensor) -> Tensor:
        x1, x2, x3, x4 = x.unbind(1)
        s12, s34, s14 = 2 * torch.cos(x3), 2 + torch.sin(x1), x2
        return torch.stack((s12 * x2 + s14 * x4, -s12 * x1, s34 * x4, -s34 * x3 - s14 * x1), dim=1)


class MixedField(nn.Module):
    """`GradientPart` + `SpherePart`. Shape: (B, 4) → (B, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.gradient, self.sphere = GradientPart(), SpherePart()

    def forward(self, x: Tensor) -> Tensor:
        return self.gradient(x) + self.sphere(x)


def _properties(model: nn.Module, dim: int, figures: dict[str, float], series: dict[str, np.ndarray]) -> None:
    """Add what is measured of any composition: the defects of its parts, and its shape."""
    if not isinstance(model, Composition):
        return
    if (drift := presnov.norm_drift(model, dim)) is not None:
        figures[DRIFT] = float(drift.max())
        series["norm drift"] = drift
    if (defect := presnov.asymmetry(model, dim)) is not None:
        figures["Jacobian asymmetry"] = defect
    series["shape"] = np.array([model.width, model.layers, model.parts == "both"], dtype=np.int64)


class Regression(System):
    """y = |x| + sin x + x² at normally distributed x, without noise."""

    name = "regression"
    title = "Regression with gradient and sphere flows"
    equations = "f(x) = |x| + sin x + x²"
    property = "the symmetry of the gradient steps and the norm of the sphere steps"
    headlines = (("test MSE", "both"), (DRIFT, "both"))
    defect = (DRIFT, ("both", "sphere"))

    def data(self, split: Split, seed: int, size: int, options: Mapping[str, Any]) -> Data:
        x = torch.from_numpy(random(split, seed).standard_normal((size, 1)))
        return Data(x, target(x)[:, None])

    def build(self, network: Mapping[str, Any], data: Data) -> nn.Module:
        return presnov.regression(checked(NetworkOptions, network, f"{self.name} network"))

    def measure(self, model: nn.Module, test: Data) -> Measured:
        assert isinstance(model, Composition)
        with torch.no_grad():
            error = model(test.inputs) - test.targets[:, 0]
            inner = error[test.inputs.abs() <= 2]
            grid = torch.linspace(-3, 3, 241, dtype=torch.float64)[:, None]
            learned = model(grid)
        figures = {"test MSE": float(error.square().mean()), "max error, |x| ≤ 2": float(inner.abs().max())}
        series = {"x": grid[:, 0], "true": target(grid)[:, 0], "learned": learned[:, 0]}
        series |= {f"part {kind}": part[:, 0] for kind, part in presnov.contributions(model, grid).items()}
        arrays = {name: value.numpy() for name, value in series.items()}
        _properties(model, model.width, figures, arrays)
        return Measured(figures, arrays)

    def draw(self, measured: Mapping[str, Sequence[Measured]]) -> list[Drawing]:
        plots = presnov_plots
        return [
            Drawing("function", plots.FUNCTION_CAPTION, plots.draw_function(measured)),
            Drawing("parts", plots.PARTS_CAPTION, plots.draw_parts(measured)),
            Drawing("size", plots.SIZE_CAPTION, plots.draw_size(measured, "width")),
            Drawing("norm", plots.NORM_CAPTION, plots.draw_norm(measured)),
        ]


class FlowLearning(System):
    """The map x(0) ↦ x(δt), δt = 0.05, of a field in R⁴, from starts uniform in [−1, 1]⁴."""

    step, dim = 0.05, 4
    property = "the symmetry of the gradient steps and the norm of the sphere steps"
    headlines = (("relative error", "both"), (DRIFT, "both"))
    defect = (DRIFT, ("both", "sphere"))

    def __init__(self, name: str, title: str, equations: str, field: nn.Module) -> None:
        self.name, self.title, self.equations, self.field = name, title, equations, field

    def data(self, split: Split, seed: int, size: int, options: Mapping[str, Any]) -> Data:
        starts = torch.from_numpy(random(split, seed).uniform(-1, 1, (size, self.dim)))
        return Data(starts, reference(self.field, starts, [self.step]))

    def build(self, network: Mapping[str, Any], data: Data) -> nn.Module:
        return presnov.flow(checked(NetworkOptions, network, f"{self.name} network"), self.dim, self.step)

    def prepared(self) -> dict[str, nn.Module]:
        """Φ_{X_S} ∘ Φ_∇U of the true parts: what is left is the error of the splitting, O(δt²)."""
        if not isinstance(self.field, MixedField):
            return {}
        return {"true-parts": splitting(self.field, self.step)}

    def measure(self, model: nn.Module, test: Data) -> Measured:
        with torch.no_grad():
            error = model(test.inputs) - test.targets[:, 0]
            moved = test.targets[:, 0] - test.inputs
        figures = {
            "test MSE": float(error.square().mean()),
            "relative error": float(error.norm() / moved.norm()),
        }
        points = test.inputs[:200]
        true = presnov.decompose(lambda x: (self._substeps(x) - x) / self.step, points)
        found = presnov.decompose(lambda x: (model(x) - x) / self.step, points)
        scale = (true[0] + true[1]).norm()
        series: dict[str, np.ndarray] = {}
        for name, right, ours in zip(("gradient", "sphere"), true, found, strict=True):
            figures[f"relative error, {name} part"] = float((ours - right).norm() / scale)
            series[f"true {name}"] = right.flatten().numpy()
            series[f"learned {name}"] = ours.flatten().numpy()
        _properties(model, self.dim, figures, series)
        return Measured(figures, series)

    def _substeps(self, x: Tensor, count: int = 10) -> Tensor:
        """The map of time δt again, to about 1e-12, by RK4 steps that autograd can differentiate."""
        step = exact_step(self.field, "rk4", self.step / count)
        for _ in range(count):
            x = step(x)
        return x

    def draw(self, measured: Mapping[str, Sequence[Measured]]) -> list[Drawing]:
        plots = presnov_plots
        drawings = [
            Drawing("parts", plots.FOUND_CAPTION, plots.draw_found(measured)),
            Drawing("norm", plots.NORM_CAPTION, plots.draw_norm(measured)),
        ]
        if presnov_plots.sizes(measured):
            drawings.insert(1, Drawing("size", plots.SIZE_CAPTION, plots.draw_size(measured, "neurons a field")))
        return drawings


def exact_step(field: nn.Module, method: str, h: float) -> Step:
    """A step along a field without weights, its size in float64."""
    step = Step(field, method, h, learned=False).double()
    with torch.no_grad():
        step.step_size.fill_(h)
    return step


def splitting(field: MixedField, h: float) -> Flow:
    """Φ_{X_S} ∘ Φ_∇U with the true parts, each by one step of a method of order 4 or 2.

    >>> splitting(MixedField(), 0.05)(torch.rand(3, 4, dtype=torch.float64)).shape
    torch.Size([3, 4])
    """
    return Flow(exact_step(field.gradient, "rk4", h), exact_step(field.sphere, "norm-exact-heun", h))


REGRESSION = Regression()
FLOW_LEARNING = FlowLearning("flow-learning", "Learning the flow of a gradient", "ẋ = sin³x + x³ in R⁴", GradientPart())
FLOW_MIXED = FlowLearning(
    "flow-mixed",
    "Learning the flow of a gradient and a sphere part",
    "ẋ = sin³x + x³ + S(x)x in R⁴, S₁₂ = 2 cos x₃, S₃₄ = 2 + sin x₁, S₁₄ = x₂, S skew",
    MixedField(),
)
SYSTEMS = (REGRESSION, FLOW_LEARNING, FLOW_MIXED)
