"""The FFT form of the finite elements against dense matrices, a quadrature of its own, and exact solutions."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from robustflow.structured.finite_elements import (
    fisher_solution,
    fisher_step,
    linear_solution,
    multiplier,
    reaction,
)

N, STEP, ALPHA = 8, 0.03, 0.01


def circulant(n: int, before: float, here: float, after: float) -> np.ndarray:
    """Entries i, i − 1; i, i; i, i + 1 of a periodic tridiagonal matrix."""
    return here * np.eye(n) + before * np.roll(np.eye(n), -1, axis=1) + after * np.roll(np.eye(n), 1, axis=1)


def assembled(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """M, K, C of bilinear elements, ∫φᵢφⱼ, ∫∇φᵢ·∇φⱼ, ∫φᵢ(∂₁ + ∂₂)φⱼ, from those of hat functions."""
    h = 1 / n
    m, k = circulant(n, h / 6, 4 * h / 6, h / 6), circulant(n, -1 / h, 2 / h, -1 / h)
    c = circulant(n, -0.5, 0.0, 0.5)
    return np.kron(m, m), np.kron(k, m) + np.kron(m, k), np.kron(c, m) + np.kron(m, c)


def fields(count: int, n: int = N) -> Tensor:
    return torch.rand(count, n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.3


@pytest.mark.parametrize("equation", ["heat", "advection"])
def test_linear_steps_solve_the_dense_systems(equation: str) -> None:
    mass, stiffness, transport = assembled(N)
    half = STEP / 2 * (ALPHA * stiffness if equation == "heat" else transport)
    u = fields(3)
    found = linear_solution(equation, u, STEP, 4, ALPHA)  # type: ignore[arg-type]
    flat = u.flatten(1).numpy().T
    for k in range(4):
        flat = np.linalg.solve(mass + half, (mass - half) @ flat)
        np.testing.assert_allclose(found[:, k].flatten(1).numpy().T, flat, rtol=0, atol=1e-14)


def integrated(after: np.ndarray, before: np.ndarray) -> np.ndarray:
    """∫[½(u₁ + u₀) − ⅓(u₁² + u₁u₀ + u₀²)]φᵢ, element by element with 4 × 4 Gauss points."""
    n, total = len(after), np.zeros_like(after)
    nodes, weights = np.polynomial.legendre.leggauss(4)
    for i in range(n):
        for j in range(n):
            corners = [(i, j), ((i + 1) % n, j), (i, (j + 1) % n), ((i + 1) % n, (j + 1) % n)]
            for s, a in zip((nodes + 1) / 2, weights / 2, strict=True):
                for t, b in zip((nodes + 1) / 2, weights / 2, strict=True):
                    shape = [(1 - s) * (1 - t), s * (1 - t), (1 - s) * t, s * t]
                    u, v = (
                        sum(w * state[corner] for w, corner in zip(shape, corners, strict=True))
                        for state in (after, before)
                    )
                    density = ((u + v) / 2 - (u * u + u * v + v * v) / 3) * a * b / n**2
                    for w, corner in zip(shape, corners, strict=True):
                        total[corner] += w * density
    return total


def test_the_reaction_is_the_integral_with_either_rule() -> None:
    after, before = fields(2)
    expected = integrated(after.numpy(), before.numpy())
    for points in (2, 3):
        np.testing.assert_allclose(reaction(after, before, points).numpy(), expected, rtol=0, atol=1e-17)
    steps = [fisher_step(before[None], STEP, ALPHA, points) for points in (2, 3)]  # type: ignore[arg-type]
    torch.testing.assert_close(*steps, rtol=0, atol=1e-13)


def test_a_step_of_fisher_solves_its_equation() -> None:
    mass, stiffness, _ = assembled(N)
    before = fields(1)[0]
    after = fisher_solution(before, STEP, 1, ALPHA)[0]
    u, v = after.numpy(), before.numpy()
    left = mass @ (u - v).ravel() / STEP + ALPHA / 2 * stiffness @ (u + v).ravel()
    np.testing.assert_allclose(left, integrated(u, v).ravel(), rtol=0, atol=1e-13)


def test_fisher_without_space_is_the_logistic_equation_to_order_two() -> None:
    start, time = 0.2, 1.0
    exact = 1 / (1 + (1 / start - 1) * math.exp(-time))
    errors = []
    for count in (8, 16, 32):
        states = fisher_solution(torch.full((1, 4, 4), start, dtype=torch.float64), time / count, count)
        assert float(states.std(dim=(-1, -2)).max()) < 1e-13
        errors.append(abs(float(states[0, -1, 0, 0]) - exact))
    assert -np.polyfit(np.log([8, 16, 32]), np.log(errors), 1)[0] == pytest.approx(2.0, abs=0.1)


def decayed(x: Tensor, y: Tensor, time: float) -> Tensor:
    factor = math.exp(-ALPHA * 4 * math.pi**2 * (1 + 4) * time)
    return factor * torch.sin(2 * math.pi * (x - 0.1)) * torch.cos(4 * math.pi * (y - 0.3))


def transported(x: Tensor, y: Tensor, time: float) -> Tensor:
    return 1 + torch.sin(2 * math.pi * (x - time - 0.1)) * torch.cos(4 * math.pi * (y - time - 0.3))


@pytest.mark.parametrize(("equation", "exact"), [("heat", decayed), ("advection", transported)])
def test_a_wave_decays_or_moves_with_order_two_at_least(
    equation: str, exact: Callable[[Tensor, Tensor, float], Tensor]
) -> None:
    sizes, errors = [32, 64, 128], []
    for n in sizes:
        x = torch.arange(n, dtype=torch.float64)[:, None] / n
        count = n // 8
        found = linear_solution(equation, exact(x, x.T, 0.0)[None], 0.2 / count, count, ALPHA)  # type: ignore[arg-type]
        errors.append(float((found[0, -1] - exact(x, x.T, 0.2)).abs().max()))
    assert errors[-1] < 1e-2
    assert -np.polyfit(np.log(sizes), np.log(errors), 1)[0] == pytest.approx(2.0, abs=0.15)


def test_advection_keeps_the_norm_and_heat_the_mean() -> None:
    torch.testing.assert_close(
        multiplier("advection", N, STEP).abs(), torch.ones(N, N // 2 + 1, dtype=torch.float64), rtol=0, atol=1e-15
    )
    u = fields(1)
    warm = linear_solution("heat", u, STEP, 5, ALPHA)[0]
    assert warm.mean(dim=(-1, -2)).tolist() == pytest.approx([float(u.mean())] * 5, abs=1e-15)


def test_a_fixed_point_that_does_not_converge_is_told() -> None:
    with pytest.raises(ArithmeticError, match="did not converge"):
        fisher_step(30 * fields(1), 1.0)
