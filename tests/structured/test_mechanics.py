"""Mechanics: the flows against their closed forms, the defects against planted maps, Jacobians by differences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import ellipj, ellipk
from torch import Tensor, nn

from robustflow.errors import UserError
from robustflow.structured import dynamics, mechanics
from robustflow.structured.mechanics import (
    DEEP,
    DEFECT,
    ENERGY,
    SYSTEMS,
    Mechanics,
    henon_heiles,
    oscillator,
    pendulum,
    section_starts,
    symplectic_defect,
)

LOST = "orbits lost (%)"


@pytest.fixture(autouse=True)
def _float64() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Turn(nn.Module):
    """The flow of the harmonic oscillator, and a fault: it grows by ``factor``."""

    def __init__(self, t: float, factor: float = 1.0) -> None:
        super().__init__()
        self.matrix = factor * torch.tensor([[math.cos(t), math.sin(t)], [-math.sin(t), math.cos(t)]])

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T


def test_the_flow_of_the_oscillator_is_a_rotation() -> None:
    data = oscillator.data("train", 2, 30, {})
    torch.testing.assert_close(data.targets[:, 0], Turn(oscillator.step)(data.inputs), rtol=0, atol=1e-11)


def test_the_flow_of_the_pendulum_is_an_elliptic_function() -> None:
    """From rest at the angle a: sin(q/2) = k sn(t + K, k) with k = sin(a/2)."""
    angles, times = (0.5, 1.5, 2.8), np.array([0.3, 1.0, 7.0])
    starts = torch.tensor([(angle, 0.0) for angle in angles])
    found = dynamics.reference(pendulum.field, starts, times)
    for angle, orbit in zip(angles, found[:, :, 0].numpy(), strict=True):
        m = math.sin(angle / 2) ** 2
        expected = 2 * np.arcsin(math.sin(angle / 2) * ellipj(times + ellipk(m), m)[0])
        np.testing.assert_allclose(orbit, expected, atol=1e-9)


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_fields_are_those_of_their_energies(system: Mechanics) -> None:
    data = system.data("validation", 1, 1000, {})
    x = data.inputs.clone().requires_grad_()
    of_q, of_p = torch.autograd.grad(system.field.energy(x).sum(), x)[0].chunk(2, dim=1)
    torch.testing.assert_close(system.field(x).detach(), torch.cat((of_p, -of_q), dim=1))
    before, after = system.field.energy(data.inputs), system.field.energy(data.targets[:, 0])
    torch.testing.assert_close(after, before, rtol=0, atol=1e-11)
    assert bool((before <= system.level).all())
    assert float(before.max()) > 0.7 * system.level
    assert bool(system.field.near(data.inputs).all())
    assert bool(system.field.near(data.targets[:, 0]).all())
    assert bool((data.inputs.abs() < 0.999 * torch.tensor(np.repeat(system.field.reach, system.field.sizes))).all())


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_examples_depend_on_the_seed_but_for_the_test(system: Mechanics) -> None:
    splits: list[Any] = ["train", "validation", "test"]
    starts = [system.data(split, seed, 6, {}).inputs for split in splits for seed in (0, 1)]
    same = {(i, j) for i, a in enumerate(starts) for j, b in enumerate(starts) if i < j and torch.equal(a, b)}
    assert same == {(4, 5)}
    assert torch.equal(starts[1], system.data("train", 1, 6, {}).inputs)


def test_saddles_of_henon_heiles() -> None:
    saddles = torch.tensor([[0.0, 1.0], [3**0.5 / 2, -0.5], [-(3**0.5) / 2, -0.5]])
    torch.testing.assert_close(henon_heiles.field.kick(saddles), torch.zeros(3, 2), rtol=0, atol=1e-15)
    torch.testing.assert_close(henon_heiles.field.potential(saddles), torch.full((3,), 1 / 6))
    beyond = torch.cat((1.01 * saddles, torch.zeros(3, 2)), dim=1)
    assert not bool(henon_heiles.field.near(beyond).any())
    assert bool(henon_heiles.field.near(0.9 * beyond).all())
    for energy, starts in zip((1 / 12, 1 / 8), henon_heiles.portrait.values(), strict=True):
        torch.testing.assert_close(henon_heiles.field.energy(starts), torch.full((len(starts),), energy))
        assert bool((starts[:, 0] == 0).all())
        assert bool((starts[:, 2] > 0).all())
    assert section_starts(1 / 12, (0.1,), (0.2,))[0, [1, 3]].tolist() == [0.1, 0.2]


def test_the_defect_of_planted_maps() -> None:
    """diag(a, 1): JᵀΩJ = aΩ, and aⁿΩ after n of them; a shear or a rotation has none."""
    stretch = torch.diag(torch.tensor([1.5, 1.0])).expand(1, 4, 2, 2)
    torch.testing.assert_close(symplectic_defect(stretch), 1.5 ** torch.arange(1, 5) - 1.0)
    shear = torch.tensor([[1.0, 3.0], [0.0, 1.0]]).expand(1, 4, 2, 2)
    assert float(symplectic_defect(shear).max()) == 0
    # In four dimensions volume is not enough: diag(2, ½, 1, 1) has determinant 1.
    four = torch.diag(torch.tensor([2.0, 0.5, 1.0, 1.0])).expand(1, 1, 4, 4)
    assert float(symplectic_defect(four)[0]) == pytest.approx(1.0)
    exchange = torch.cat((four, torch.eye(4).expand(1, 1, 4, 4)))
    assert float(symplectic_defect(exchange)[0]) == pytest.approx(1.0), "the largest of all points"


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
@pytest.mark.parametrize("method", ["symplectic-euler", "stoermer-verlet", "implicit-midpoint"])
def test_a_network_is_symplectic_with_any_weights(system: Mechanics, method: str) -> None:
    data = system.data("train", 0, 4, {})
    model = system.build({"layers": 3, "hidden": 6, "method": method}, data)
    assert "symplectic" in model.kept  # type: ignore[operator]
    steps = 10
    found = dynamics.along(model, data.inputs, steps)
    assert float(symplectic_defect(found).max()) <= 1e-12
    assert not torch.allclose(model(data.inputs), data.inputs, atol=1e-2)
    # The product of the Jacobians along an orbit is that of the iterated map, here by central differences.
    product = torch.eye(data.inputs.shape[1])
    for factor in found[0]:
        product = factor @ product

    def iterated(x: Tensor) -> Tensor:
        return dynamics.orbits(model, x, steps)[:, -1]

    columns = [
        (iterated(data.inputs[:1] + 1e-5 * e) - iterated(data.inputs[:1] - 1e-5 * e))[0] / 2e-5
        for e in torch.eye(data.inputs.shape[1])
    ]
    torch.testing.assert_close(product, torch.stack(columns, dim=1), rtol=1e-6, atol=1e-6)

    control = system.build(
        {"field": "free", "method": "explicit-euler", "layers": 3, "hidden": 6, "keep": "nothing"}, data
    )
    assert float(symplectic_defect(dynamics.along(control, data.inputs, 1))[0]) > 1e-3


def test_a_pair_that_is_not_symplectic_is_refused() -> None:
    data = oscillator.data("train", 0, 2, {})
    with pytest.raises(UserError, match="a HamiltonianField with explicit-euler is not symplectic: use"):
        oscillator.build({"method": "explicit-euler"}, data)
    with pytest.raises(UserError, match=r"a FreeField with explicit-euler is not symplectic, and with no other"):
        oscillator.build({"field": "free", "method": "explicit-euler"}, data)
    with pytest.raises(UserError, match=r"^oscillator network: unknown key 'width'"):
        oscillator.build({"width": 3}, data)
    built = oscillator.build({"method": "explicit-euler", "keep": "nothing"}, data)
    assert "symplectic" not in built.kept  # type: ignore[operator]


def test_the_figures_of_the_exact_flow_and_of_planted_faults() -> None:
    test = oscillator.data("test", 0, 40, {})
    exact = oscillator.measure(Turn(oscillator.step), test)
    assert exact.figures["test MSE"] < 1e-22
    assert exact.figures[DEFECT] < 1e-15
    assert exact.figures[DEEP] < 1e-14
    assert exact.figures[ENERGY] < 1e-12
    assert exact.figures[LOST] == 0
    radii = np.hypot(*exact.series["orbits"].T)
    np.testing.assert_allclose(np.unique(radii.round(5)), [0.4, 0.8, 1.2], atol=1e-6)

    factor = 1 + 1e-4
    growing = oscillator.measure(Turn(oscillator.step, factor), test)
    assert growing.figures[DEFECT] == pytest.approx(factor**2 - 1)
    assert growing.figures[DEEP] == pytest.approx(factor**20 - 1)
    assert growing.figures["test MSE"] == pytest.approx(1e-8 * float(test.inputs.square().mean()), rel=1e-3)
    energies = 0.5 * test.inputs[: mechanics.ORBITS].square().sum(1) * (factor**4000 - 1)
    assert growing.figures[ENERGY] == pytest.approx(float(energies.median()), rel=1e-9)
    at = int(np.argmax(growing.series["time"] >= 500))
    middle = 0.5 * test.inputs[: mechanics.ORBITS].square().sum(1) * (factor ** (4 * growing.series["time"][at]) - 1)
    assert growing.series["energy error"][at] == pytest.approx(float(middle.median()), rel=1e-9)
    lost = oscillator.measure(Turn(oscillator.step, 1.01), test)
    assert lost.figures[LOST] == 100


def test_prepared_models_are_steps_along_the_exact_field() -> None:
    models = pendulum.prepared()
    test = pendulum.data("test", 0, 30, {})
    verlet, euler = (
        dynamics.one_step_error(models[f"exact-{name}"], test.inputs, test.targets) for name in ("verlet", "euler")
    )
    assert verlet < 1e-6 < 1e-4 < euler
    by_hand = test.inputs
    for _ in range(5):
        by_hand = by_hand + 0.1 * torch.stack((by_hand[:, 1], -by_hand[:, 0].sin()), dim=1)
    torch.testing.assert_close(models["exact-euler"](test.inputs).detach(), by_hand)


def test_the_section_of_a_known_torus() -> None:
    """q₁ = sin t rises through 0 at t = 2πk, where (q₂, p₂) = (cos √2t, −√2 sin √2t)."""
    t, w = np.arange(0, 60, 0.25), math.sqrt(2)
    states = np.stack((np.sin(t - 0.1), np.cos(w * t), np.cos(t - 0.1), -w * np.sin(w * t)), axis=1)
    found = henon_heiles.points(torch.from_numpy(states)[None])
    times = 0.1 + 2 * np.pi * np.arange(10)
    np.testing.assert_allclose(found, np.stack((np.cos(w * times), -w * np.sin(w * times)), axis=1), atol=1e-4)


def test_orbits_stop_at_their_limit_and_only_those() -> None:
    states = dynamics.orbits(lambda x: 2 * x, torch.tensor([[1.0], [-1e-9]]), 6, limit=10)
    assert states[0].flatten().tolist() == [1, 2, 4, 8, 8, 8, 8]
    assert states[1, -1] == pytest.approx(-64e-9)
    assert dynamics.escaped(states).tolist() == [True, False]
