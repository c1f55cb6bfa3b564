"""Populations: the equations against SciPy and a first integral, the networks against what their mass must be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from robustflow.errors import UserError
from robustflow.steps import Step
from robustflow.structured import populations
from robustflow.structured.populations import (
    SIR_MAP,
    SIR_TRAJECTORY,
    SYSTEMS,
    TALK_MASS,
    NetworkOptions,
    Population,
    Resize,
    mass_drift,
    network,
)

MASS = f"mass drift, {populations.DRIFT_STEPS} steps"


@pytest.fixture(autouse=True)
def _float64() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def epidemic(_: float, state: np.ndarray) -> list[float]:
    x, y, _ = state
    return [-x * y, x * y - y, y]


def talk(_: float, y: np.ndarray) -> np.ndarray:
    s = np.zeros((3, 3))
    s[0, 1], s[0, 2], s[1, 2] = -y[2] * y[0] ** 2, y[1] * y[2], -np.sin(y[0])
    return (s - s.T) @ np.ones(3)


@pytest.mark.parametrize(
    ("system", "right"),
    [(SIR_MAP, epidemic), (SIR_TRAJECTORY, epidemic), (TALK_MASS, talk)],
    ids=["map", "trajectory", "talk"],
)
def test_the_examples_are_solutions_of_the_equations(system: Population, right: Any) -> None:
    data = system.data("train", 3, 4, {})
    times = system.step * np.arange(1, system.length + 1)
    for start, targets in zip(data.inputs, data.targets, strict=True):
        solved = solve_ivp(right, (0, times[-1]), start.numpy(), method="LSODA", rtol=1e-11, atol=1e-12, t_eval=times)
        assert np.abs(solved.y.T - targets.numpy()).max() < 1e-8


def test_an_epidemic_follows_its_first_integral() -> None:
    """dy/dx = −1 + 1/x, hence x + y − ln x stays: the final-size relation."""
    data = SIR_MAP.data("test", 0, 50, {})
    before, after = data.inputs, data.targets[:, 0]
    relation = [state[:, 0] + state[:, 1] - state[:, 0].log() for state in (before, after)]
    torch.testing.assert_close(relation[1], relation[0], rtol=0, atol=1e-10)
    assert bool((after[:, 0] < before[:, 0]).all())


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_examples_depend_on_the_seed_but_for_the_test(system: Population) -> None:
    starts = {
        (split, seed): system.data(split, seed, 6, {}).inputs for split in ("train", "validation") for seed in (0, 1)
    }
    starts["test", 0] = system.data("test", 0, 6, {}).inputs
    values = list(starts.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
    assert torch.equal(starts["test", 0], system.data("test", 1, 6, {}).inputs)
    assert torch.equal(starts["train", 1], system.data("train", 1, 6, {}).inputs)
    assert all(bool(((x >= 0) & (x <= 1)).all()) for x in values)
    shares = all(torch.allclose(x.sum(1), torch.ones(6)) for x in values)
    assert shares == system.positive


@pytest.mark.parametrize("before", [3, 5, 8])
@pytest.mark.parametrize("after", [3, 4, 8])
def test_resizing_keeps_the_mass(before: int, after: int) -> None:
    columns = Resize(after)(torch.eye(before))  # a row of this is a column of the matrix
    torch.testing.assert_close(columns.sum(1), torch.ones(before), rtol=0, atol=1e-15)
    x = torch.randn(4, before)
    if after >= before:
        assert torch.equal(Resize(before)(Resize(after)(x)), x)
    assert torch.linalg.matrix_rank(columns) == min(before, after)


@pytest.mark.parametrize("method", ["explicit-euler", "heun", "rk4"])
def test_a_network_keeps_the_mass_with_any_weights(method: str) -> None:
    options = NetworkOptions(dims=(5, 4), layers=2, hidden=8, method=method)
    model = network(options, 0.5)
    assert "linear" in model.kept
    x = torch.rand(7, 3)
    torch.testing.assert_close(model(x).sum(1), x.sum(1), rtol=0, atol=1e-14)
    with torch.no_grad():
        drift, states = mass_drift(model, x, 1000)
    assert drift.shape == (7, 1001)
    assert states.shape == (7, 1001, 3)
    assert not torch.allclose(states[:, 1], states[:, 0], atol=1e-3)
    assert float((drift / states.abs().sum(2).cummax(1).values).max()) <= 1e-12
    control = network(options.model_copy(update={"kind": "free"}), 0.5)
    assert "linear" not in control.kept
    with torch.no_grad():
        assert float(mass_drift(control, x, 1)[0].max()) > 1e-3


def test_the_network_moves_through_one_time_step() -> None:
    """With the field y ↦ (−1, 0, 1) in every layer, the first compartment loses δt."""

    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            flow = torch.zeros_like(x)
            flow[:, 0], flow[:, 2] = -1.0, 1.0
            return flow

    model = network(NetworkOptions(dims=(3, 6), layers=3, hidden=4), 0.7)
    for layer in model:
        if isinstance(layer, Step):
            layer.field = Constant()
    x = torch.rand(5, 3)
    torch.testing.assert_close(model(x) - x, torch.tensor([-0.7, 0.0, 0.7]).expand(5, 3))


@pytest.mark.parametrize("method", ["norm-exact-heun", "stoermer-verlet", "cayley"])
def test_a_method_that_is_not_for_it_is_refused(method: str) -> None:
    with pytest.raises(UserError, match=f"{method} needs a field"):
        SIR_MAP.build({"dims": [3], "method": method}, SIR_MAP.data("train", 0, 2, {}))
    with pytest.raises(UserError, match=r"^sir-map network: unknown key 'depth'"):
        SIR_MAP.build({"dims": [3], "depth": 2}, SIR_MAP.data("train", 0, 2, {}))
    with pytest.raises(UserError, match=r"dims\.0: .*greater than or equal to 3"):
        SIR_MAP.build({"dims": [2]}, SIR_MAP.data("train", 0, 2, {}))


class Exact(nn.Module):
    """The solution after δt, by 20 steps of RK4, and a fault: it moves by ``shift`` and grows by ``factor``."""

    def __init__(self, system: Population, shift: float = 0.0, factor: float = 1.0) -> None:
        super().__init__()
        self.step = Step(system.field, "rk4", system.step / 20, learned=False).double()
        self.step.step_size.fill_(system.step / 20)
        self.shift, self.factor = torch.tensor([shift, 0.0, -shift]), factor

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(20):
            x = self.step(x)
        return self.factor * (x + self.shift)


def test_the_figures_of_the_exact_flow_and_of_planted_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(populations, "DRIFT_STEPS", 20)
    monkeypatch.setattr(populations, "DRIFT", "mass drift, 20 steps")
    test = SIR_MAP.data("test", 0, 20, {})
    exact = SIR_MAP.measure(Exact(SIR_MAP).requires_grad_(False), test)
    assert exact.figures["test MSE"] < 1e-14
    assert exact.figures["RMS error, t = 10"] < 1e-6
    assert exact.figures["mass drift, 20 steps"] < 1e-13
    assert exact.figures["min x, 20 steps"] >= 0
    np.testing.assert_allclose(exact.series["predicted"], exact.series["true"], atol=1e-6)
    assert exact.series["times"].tolist() == list(range(11))

    moved = SIR_MAP.measure(Exact(SIR_MAP, shift=0.03).requires_grad_(False), test)
    assert moved.figures["test MSE"] == pytest.approx(2 * 0.03**2 / 3)
    assert moved.figures["mass drift, 20 steps"] < 1e-13
    negative = SIR_MAP.measure(Exact(SIR_MAP, shift=-0.2).requires_grad_(False), test)
    assert negative.figures["min x, 20 steps"] < -0.1

    leaking = SIR_MAP.measure(Exact(SIR_MAP, factor=0.9).requires_grad_(False), test)
    assert leaking.figures["mass drift, 20 steps"] == pytest.approx(1 - 0.9**20)
    np.testing.assert_allclose(leaking.series["mass drift"], 1 - 0.9 ** np.arange(21), atol=1e-13)

    # Along a trajectory the error is the mean over its four steps.
    test = SIR_TRAJECTORY.data("test", 0, 5, {})
    moved = SIR_TRAJECTORY.measure(Exact(SIR_TRAJECTORY, factor=1 + 1e-6).requires_grad_(False), test)
    linear = [float((1e-6 * k * target).square().mean()) for k, target in enumerate(test.targets.unbind(1), 1)]
    assert moved.figures["test MSE"] == pytest.approx(np.mean(linear), rel=0.2)


def test_an_orbit_that_blows_up_is_stopped() -> None:
    model = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(10 * torch.eye(3))
        _, states = mass_drift(model, torch.ones(1, 3), 1000)
    assert bool(torch.isfinite(states).all())
    assert 1e5 < float(states.max()) <= populations.ESCAPE


def test_the_equation_itself_by_euler_and_by_rk4() -> None:
    prepared = TALK_MASS.prepared()
    x = torch.tensor([[0.3, 0.5, 0.7]])
    slope = torch.from_numpy(talk(0.0, x[0].numpy()))
    torch.testing.assert_close(prepared["equation-euler"](x)[0], x[0] + 0.1 * slope, rtol=0, atol=1e-15)
    exact = TALK_MASS.data("test", 0, 5, {})
    errors = {
        name: float((model(exact.inputs) - exact.targets[:, 0]).abs().max().detach())
        for name, model in prepared.items()
    }
    assert errors["equation-rk4"] < 1e-5 < errors["equation-euler"]
