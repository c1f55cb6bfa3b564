"""Presnov's decomposition of fields whose parts are known, and networks whose parts are planted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustflow.errors import UserError
from robustflow.steps import Step
from robustflow.structured import presnov
from robustflow.structured.dynamics import jacobians, reference
from robustflow.structured.fields import FreeField, GradientFlowField, SphereField
from robustflow.structured.presnov import Composition, NetworkOptions, asymmetry, contributions, decompose, norm_drift
from robustflow.structured.presnov_systems import (
    FLOW_LEARNING,
    FLOW_MIXED,
    REGRESSION,
    SYSTEMS,
    GradientPart,
    MixedField,
    SpherePart,
    splitting,
)
from robustflow.structured.systems import System

DRIFT = f"norm drift, {presnov.DRIFT_STEPS} steps"


@pytest.fixture(autouse=True)
def _float64() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


X = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_the_parts_of_a_field_are_found_again() -> None:
    gradient, sphere = decompose(MixedField(), X)
    torch.testing.assert_close(gradient, GradientPart()(X), rtol=0, atol=1e-11)
    torch.testing.assert_close(sphere, SpherePart()(X), rtol=0, atol=1e-11)
    # A linear field: the symmetric and the skew part of its matrix.
    m = torch.randn(4, 4)
    gradient, sphere = decompose(lambda x: x @ m.T, X)
    torch.testing.assert_close(gradient, X @ (m + m.T) / 2)
    torch.testing.assert_close(sphere, X @ (m - m.T).T / 2)
    # One that is neither: U of (x₂², 0) is x₁x₂²/3.
    gradient, sphere = decompose(lambda x: torch.stack((x[:, 1] ** 2, 0 * x[:, 0]), dim=1), X[:, :2])
    x, y = X[:, 0], X[:, 1]
    torch.testing.assert_close(gradient, torch.stack((y * y / 3, 2 * x * y / 3), dim=1))
    torch.testing.assert_close((sphere * X[:, :2]).sum(1), torch.zeros(9), rtol=0, atol=1e-14)


def test_the_fields_have_the_parts_that_they_say() -> None:
    x = X.clone().requires_grad_()
    energy = (x.cos() ** 3 / 3 - x.cos() + x**4 / 4).sum()
    torch.testing.assert_close(GradientPart()(X), torch.autograd.grad(energy, x)[0])
    matrices = jacobians(GradientPart(), X)
    assert torch.equal(matrices, matrices.mT)
    for x in X:
        s = torch.zeros(4, 4)
        s[0, 1], s[2, 3], s[0, 3] = 2 * x[2].cos(), 2 + x[0].sin(), x[1]
        torch.testing.assert_close(SpherePart()(x[None])[0], (s - s.T) @ x)
    bent = jacobians(SpherePart(), X)
    assert float((bent - bent.mT).abs().amax((1, 2)).min()) > 0.5
    data = REGRESSION.data("train", 0, 50, {})
    v = data.inputs.numpy()
    np.testing.assert_allclose(data.targets[:, 0].numpy(), np.abs(v) + np.sin(v) + v**2)


def composition(parts: Any = "both", **options: Any) -> Composition:
    return presnov.flow(NetworkOptions(parts=parts, hidden=6, **options), 4, 0.5)


def test_a_gradient_step_is_symmetric_and_a_sphere_step_keeps_the_norm() -> None:
    model = composition()
    assert (asymmetry(model, 4) or 0) < 1e-15
    drift = norm_drift(model, 4)
    assert drift is not None
    assert float(drift.max()) < 1e-13
    assert asymmetry(composition("sphere"), 4) is None
    assert norm_drift(composition("gradient"), 4) is None
    control = composition("free")
    assert (asymmetry(control, 4) or 0) > 1e-2
    control_drift = norm_drift(control, 4)
    assert control_drift is not None
    assert float(control_drift[1:].min()) > 1e-2
    for method in ("norm-exact-heun", "cayley", "implicit-midpoint"):
        steps = composition("sphere", sphere_method=method).steps(SphereField)
        with torch.no_grad():
            torch.testing.assert_close(steps(X).norm(dim=1), X.norm(dim=1), rtol=1e-14, atol=0)
            assert float((steps(X) - X).abs().max()) > 1e-2


class Bent(GradientFlowField):
    """Its gradient, plus a rotation of the first two coordinates."""

    def forward(self, x: Tensor) -> Tensor:
        turned = torch.zeros_like(x)
        turned[:, 0], turned[:, 1] = x[:, 1], -x[:, 0]
        return super().forward(x) + turned


def test_planted_defects_are_measured() -> None:
    options, h = NetworkOptions(hidden=3), 0.25
    bent = Bent(2, 3, activation="tanh", sign=1, bounded=False)
    with torch.no_grad():
        bent.weights.zero_()  # J = [[1, h], [−h, 1]], ‖J − Jᵀ‖ = 2√2 h, ‖J‖ = √(2 + 2h²)
    model = Composition(Step(bent, "explicit-euler", h, learned=False), options=options, width=2)
    assert asymmetry(model, 2) == pytest.approx(2 * math.sqrt(2) * h / math.sqrt(2 + 2 * h * h))

    class Turning(SphereField):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack((x[:, 1], -x[:, 0]), dim=1)

    euler = Step(Turning(2, 3), "explicit-euler", 0.01, learned=False)  # the norm grows by √(1 + h²) a step
    drift = norm_drift(Composition(euler, options=options, width=2), 2)
    assert drift is not None
    np.testing.assert_allclose(drift, (1 + 1e-4) ** (np.arange(1001) / 2) - 1, atol=1e-9)


def test_contributions_add_up_and_are_those_of_their_layers() -> None:
    x = torch.randn(7, 1)
    for parts in ("both", "gradient", "sphere", "free"):
        model = presnov.regression(NetworkOptions(parts=parts, width=5, blocks=2, layers=2, hidden=4))
        found = contributions(model, x)
        assert set(found) == {"linear"} | ({"gradient", "sphere"} if parts == "both" else {parts})
        torch.testing.assert_close(sum(found.values()), model(x).detach())
        assert all(float(part.abs().max()) > 1e-6 for part in found.values())
    # By hand: R → R² → R with one step of each kind.
    model = presnov.regression(NetworkOptions(width=2, blocks=1, layers=1, hidden=3))
    first, gradient, sphere, last = model
    with torch.no_grad():
        a = first(x)
        b = gradient(a)
        c = sphere(b)
        found = contributions(model, x)
        torch.testing.assert_close(found["linear"], last(a))
        torch.testing.assert_close(found["gradient"], (b - a) @ last.weight.T)
        torch.testing.assert_close(found["sphere"], (c - b) @ last.weight.T)


def test_sizes_of_the_networks() -> None:
    def count(model: nn.Module) -> int:
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    # A block: 12 weights a neuron of a gradient step, 31 of a sphere step, two step sizes; three linear layers and one.
    linear = 20 + 2 * 110 + 11
    assert count(presnov.regression(NetworkOptions(width=10, blocks=3, layers=2, hidden=16))) == linear + 6 * (
        43 * 16 + 2
    )
    for layers in (1, 3):
        model = composition(layers=layers)
        kinds = [type(step.field) for step in model]
        assert kinds == [GradientFlowField, SphereField] * layers
        assert sum(float(step.step_size) for step in model) == pytest.approx(2 * 0.5)
        assert [type(step.field) for step in composition("free", layers=layers)] == [FreeField] * (2 * layers)


def test_splitting_the_flow_has_a_local_error_of_order_two() -> None:
    field, steps = MixedField(), [0.04, 0.02, 0.01, 0.005]
    starts = 0.5 * X
    errors = [float((splitting(field, h)(starts) - reference(field, starts, [h])[:, 0]).norm().detach()) for h in steps]
    assert abs(np.polyfit(np.log(steps), np.log(errors), 1)[0] - 2) < 0.15
    assert set(FLOW_MIXED.prepared()) == {"true-parts"}
    assert not FLOW_LEARNING.prepared()


class Displaced(nn.Module):
    """x + δt·(c₁∇U + c₂X_S) with the parts of the map of time δt."""

    def __init__(self, gradient: float, sphere: float) -> None:
        super().__init__()
        self.gradient, self.sphere = gradient, sphere

    def forward(self, x: Tensor) -> Tensor:
        h = FLOW_MIXED.step
        with torch.enable_grad():
            x = x if x.requires_grad else x.clone().requires_grad_()
            along = torch.autograd.grad(
                presnov.potential(lambda y: (FLOW_MIXED._substeps(y) - y) / h, x).sum(), x, create_graph=True
            )[0]
            whole = (FLOW_MIXED._substeps(x) - x) / h
            return x + h * (self.gradient * along + self.sphere * (whole - along))


def test_the_error_of_either_part_is_told_apart() -> None:
    test = FLOW_MIXED.data("test", 0, 12, {})
    points = test.inputs
    true = decompose(lambda x: (FLOW_MIXED._substeps(x) - x) / FLOW_MIXED.step, points)
    scale = float((true[0] + true[1]).norm())
    for gradient, sphere in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.0)):
        figures = FLOW_MIXED.measure(Displaced(gradient, sphere), test).figures
        for name, share, part in (("gradient", gradient, true[0]), ("sphere", sphere, true[1])):
            expected = abs(1 - share) * float(part.norm()) / scale
            assert figures[f"relative error, {name} part"] == pytest.approx(expected, abs=1e-6)
    assert "Jacobian asymmetry" not in figures
    moved = test.targets[:, 0] - points
    error = FLOW_MIXED.step * true[1]
    assert figures["relative error"] == pytest.approx(float(error.norm() / moved.norm()), rel=1e-4)
    assert figures["test MSE"] == pytest.approx(float(error.square().mean()), rel=1e-4)


def test_the_figures_of_a_planted_regression() -> None:
    """A network that is 0 misses f by f itself."""
    model = presnov.regression(NetworkOptions(width=3, blocks=1, layers=1, hidden=2)).requires_grad_(False)
    model[-1].weight.zero_()
    model[-1].bias.zero_()
    test = REGRESSION.data("test", 0, 300, {})
    measured = REGRESSION.measure(model, test)
    assert measured.figures["test MSE"] == pytest.approx(float(test.targets.square().mean()))
    inner = test.targets[:, 0][test.inputs.abs() <= 2]
    assert measured.figures["max error, |x| ≤ 2"] == pytest.approx(float(inner.abs().max()))
    assert measured.series["learned"].any() == 0
    assert measured.series["shape"].tolist() == [3, 1, 1]


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_examples_depend_on_the_seed_but_for_the_test(system: System) -> None:
    splits: list[Any] = ["train", "validation", "test"]
    starts = [system.data(split, seed, 6, {}).inputs for split in splits for seed in (0, 1)]
    same = {(i, j) for i, a in enumerate(starts) for j, b in enumerate(starts) if i < j and torch.equal(a, b)}
    assert same == {(4, 5)}
    assert torch.equal(starts[1], system.data("train", 1, 6, {}).inputs)


def test_targets_are_solutions() -> None:
    data = FLOW_LEARNING.data("test", 0, 6, {})
    x = data.inputs
    for _ in range(500):  # explicit Euler, extrapolated once below
        x = x + FLOW_LEARNING.step / 500 * GradientPart()(x)
    y = data.inputs
    for _ in range(1000):
        y = y + FLOW_LEARNING.step / 1000 * GradientPart()(y)
    torch.testing.assert_close(2 * y - x, data.targets[:, 0], rtol=0, atol=1e-8)


def test_a_sphere_step_that_leaves_the_sphere_is_refused() -> None:
    with pytest.raises(UserError, match=r"^flow-mixed network: sphere_method: input should be 'norm-exact-heun'"):
        FLOW_MIXED.build({"sphere_method": "heun"}, FLOW_MIXED.data("train", 0, 2, {}))
