"""Volumes: determinants by differences, divergences by hand, inverses by SciPy, planted maps that swell."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import fsolve
from torch import Tensor, nn

from robustflow.errors import UserError
from robustflow.steps import Flow, Step
from robustflow.structured import dynamics, volumes
from robustflow.structured.volumes import (
    ABCField,
    TorusFreeField,
    TorusShearField,
    Turned,
    inverse,
    round_trip,
    section,
    volume,
    wrapped,
)


@pytest.fixture(autouse=True)
def _float64() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def differences(model: nn.Module, x: Tensor) -> Tensor:
    """The Jacobian at one point, by central differences."""
    with torch.no_grad():
        columns = [(model((x + 1e-6 * e)[None]) - model((x - 1e-6 * e)[None]))[0] / 2e-6 for e in torch.eye(len(x))]
    return torch.stack(columns, dim=1)


def examples(dimension: int, split: Any = "train", seed: int = 0, size: int = 5) -> Any:
    return volume.data(split, seed, size, {"dimension": dimension})


def built(dimension: int, **network: Any) -> nn.Module:
    return volume.build(network, examples(dimension))


CONTROL = {"field": "free", "method": "explicit-euler", "keep": "nothing"}


def test_the_field_of_arnold_beltrami_and_childress() -> None:
    a, b, c = 1.0, math.sqrt(2 / 3), math.sqrt(1 / 3)

    def right(_: float, state: np.ndarray) -> list[float]:
        x, y, z = state
        return [
            a * math.sin(z) + c * math.cos(y),
            b * math.sin(x) + a * math.cos(z),
            c * math.sin(y) + b * math.cos(x),
        ]

    data = examples(3)
    for x, y in zip(data.inputs, data.targets[:, 0], strict=True):
        np.testing.assert_allclose(ABCField(3)(x[None])[0].numpy(), right(0.0, x.numpy()), atol=1e-14)
        solved = solve_ivp(right, (0, volume.step), x.numpy(), method="LSODA", rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(solved.y[:, -1], y.numpy(), atol=1e-8)


@pytest.mark.parametrize("dimension", [3, 4, 5, 8])
def test_the_field_has_no_divergence_and_a_period(dimension: int) -> None:
    field, x = ABCField(dimension), examples(dimension).inputs
    matrices = dynamics.jacobians(field, x)
    assert float(matrices.diagonal(dim1=1, dim2=2).abs().max()) < 1e-15
    assert float(matrices.abs().sum((1, 2)).min()) > 0.5
    turns = torch.randint(-3, 4, x.shape)
    torch.testing.assert_close(field(x + 2 * torch.pi * turns), field(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("hidden", [0, 7])
@pytest.mark.parametrize("dimension", [3, 4, 5, 7])
def test_thirty_layers_keep_the_volume_in_any_dimension(dimension: int, hidden: int) -> None:
    model, x = built(dimension, layers=30, hidden=hidden), examples(dimension).inputs
    assert "volume" in model.kept  # type: ignore[operator]
    matrices = dynamics.jacobians(model, x)
    assert float((torch.linalg.det(matrices) - 1).abs().max()) <= 1e-13
    assert float((matrices - torch.eye(dimension)).abs().amax((1, 2)).min()) > 1e-2, "it does something"
    torch.testing.assert_close(differences(model, x[0]), matrices[0], rtol=0, atol=1e-7)
    turns = torch.randint(-3, 4, x.shape)
    torch.testing.assert_close(model(x + 2 * torch.pi * turns) - 2 * torch.pi * turns, model(x), rtol=0, atol=1e-12)
    assert round_trip(model, x) < 1e-13


def test_the_control_keeps_no_volume() -> None:
    for dimension in (3, 5):
        model, x = built(dimension, layers=4, hidden=7, **CONTROL), examples(dimension).inputs
        assert "volume" not in model.kept  # type: ignore[operator]
        defect = abs(float(torch.linalg.det(differences(model, x[0]))) - 1)
        assert defect > 1e-3
        figures = volume.measure(model, examples(dimension, "test")).figures
        assert figures["|det J − 1|"] > 1e-3


def test_every_coordinate_depends_on_every_other() -> None:
    """Without the turns between the layers, two shears are all there is."""
    for dimension in (3, 5):
        model = built(dimension, layers=2 * dimension, hidden=5)
        matrix = dynamics.jacobians(model, examples(dimension).inputs[:1])[0]
        assert float(matrix.abs().min()) > 0
    layer = Step(TorusShearField(3, 4), "symplectic-euler", 0.3)
    x = torch.randn(6, 3)
    expected = layer(x[:, [2, 0, 1]])[:, [1, 2, 0]]
    assert torch.equal(Turned(layer, 1)(x), expected)


def test_the_inverse_is_the_root_that_scipy_finds() -> None:
    for network in ({"layers": 5, "hidden": 6}, {"layers": 5, "hidden": 6, **CONTROL}):
        model = built(3, **network).requires_grad_(False)
        y = torch.tensor([[0.3, -2.0, 1.0]])

        def residual(x: np.ndarray, model: nn.Module = model, y: Tensor = y) -> np.ndarray:
            return (model(torch.from_numpy(x)[None]) - y)[0].numpy()

        root = fsolve(residual, y[0].numpy(), xtol=1e-13)
        np.testing.assert_allclose(inverse(model, y)[0].numpy(), root, atol=1e-10)


class Linear(nn.Module):
    """ẋ = Mx."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T


def test_the_inverse_of_a_linear_step_is_the_inverse_matrix() -> None:
    matrix = 0.1 * torch.randn(4, 4)
    step, y = Step(Linear(matrix), "explicit-euler", 1.0, learned=False).double(), torch.randn(5, 4)
    expected = torch.linalg.solve(torch.eye(4) + matrix, y.T).T
    torch.testing.assert_close(inverse(Flow(step), y), expected, rtol=0, atol=1e-10)
    assert round_trip(Flow(step), y) < 1e-10
    # A step with a fold has no inverse, and the round trip says so.
    fold = Step(TorusFreeField(3, 4), "explicit-euler", 50.0).double()
    assert round_trip(fold, torch.randn(50, 3)) > 1e-3


def test_the_figures_of_a_planted_map() -> None:
    """x ↦ (1 + c)x swells by (1 + c)^d a step."""
    c, d = 1e-4, 5
    model = Flow(Step(Linear(c * torch.eye(d)), "explicit-euler", 1.0, learned=False)).double()
    test = examples(d, "test", size=40)
    measured = volume.measure(model.requires_grad_(False), test)
    assert measured.figures["|det J − 1|"] == pytest.approx((1 + c) ** d - 1)
    assert measured.figures["|det J − 1|, 1000 steps"] == pytest.approx((1 + c) ** (1000 * d) - 1)
    error = (test.targets[:, 0] - (1 + c) * test.inputs).square().mean()
    assert measured.figures["test MSE"] == pytest.approx(float(error))
    grown = (1 + c) ** (d * measured.series["step"]) - 1
    np.testing.assert_allclose(measured.series["volume defect"], grown, rtol=1e-9)
    assert "section" not in measured.series


def test_the_section_of_a_known_torus() -> None:
    """z = t rises through 0 modulo 2π where t = 2πk; z = −t never does, nor does π count."""
    t = np.arange(0.3, 50, 0.1)
    rising = torch.from_numpy(np.stack((np.sin(t) + 2 * t, np.cos(3 * t), t), axis=1))[None]
    found = section(rising)
    assert found.shape == (7, 2)
    times = 2 * np.pi * np.arange(1, 8)
    expected = np.stack((wrapped(torch.from_numpy(2 * times)).numpy(), np.ones(7)), axis=1)
    np.testing.assert_allclose(np.sin(found[:, 0]), np.sin(expected[:, 0]), atol=1e-4)
    np.testing.assert_allclose(found[:, 1], expected[:, 1], atol=1e-4)
    assert len(section(rising * torch.tensor([1.0, 1.0, -1.0]))) == 0
    x = torch.tensor([-math.pi, 3.5, 7.0, -10.0])
    torch.testing.assert_close(wrapped(x).sin(), x.sin())
    assert bool(((wrapped(x) >= -math.pi) & (wrapped(x) < math.pi)).all())


def test_examples_depend_on_the_seed_but_for_the_test() -> None:
    starts = [examples(3, split, seed).inputs for split in ("train", "validation", "test") for seed in (0, 1)]
    same = {(i, j) for i, a in enumerate(starts) for j, b in enumerate(starts) if i < j and torch.equal(a, b)}
    assert same == {(4, 5)}
    assert torch.equal(starts[1], examples(3, "train", 1).inputs)
    many = examples(3, size=2000).inputs
    assert float(many.abs().max()) <= math.pi
    assert float(many.mean().abs()) < 0.1
    assert float(many.square().mean()) == pytest.approx(math.pi**2 / 3, rel=0.05)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (
            {"method": "explicit-euler"},
            "a TorusShearField with explicit-euler is not volume-preserving: use symplectic",
        ),
        ({"field": "free"}, "symplectic-euler needs a field that is split"),
        ({"width": 3}, "^volume network: unknown key 'width'"),
    ],
)
def test_what_cannot_keep_the_volume_is_refused(network: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        built(3, **network)
    assert volumes.VolumeOptions().dimension == 3
