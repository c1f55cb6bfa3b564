"""Reference solutions of periodic PDEs: Q1 finite elements in space, the implicit midpoint rule in time.

On a periodic square grid every matrix of the method is circulant, so a time step is a product in Fourier space: no
mesh, no assembly, no linear solver. With the 1-D symbols, h the grid spacing and θ = 2πj/n,

    m(θ) = h(2 + cos θ)/3,    k(θ) = 2(1 − cos θ)/h,    c(θ) = i sin θ,

the mass, stiffness and transport matrices of the bilinear elements are M = m⊗m, K = k⊗m + m⊗k, C = c⊗m + m⊗c.

    heat       u_t = αΔu            Û₁ = (M − ½δtαK)/(M + ½δtαK) Û₀
    advection  u_t = −(u_x + u_y)   Û₁ = (M − ½δtC)/(M + ½δtC) Û₀
    Fisher     u_t = αΔu + u(1−u)   M(U₁ − U₀)/δt + ½αK(U₁ + U₀) = R(U₁, U₀), R below

Source: Celledoni, Jackaman, Murari, Owren, "Predictions based on pixel data", 2023. Fields are (..., n, n) in float64.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

FIXED_POINT_TOLERANCE = 1e-13
FIXED_POINT_ITERATIONS = 100


class Symbols(NamedTuple):
    """Fourier symbols of M, K and C on the half spectrum of `torch.fft.rfft2`, each (n, n//2 + 1)."""

    mass: Tensor
    stiffness: Tensor
    transport: Tensor


def symbols(n: int) -> Symbols:
    """The symbols of the periodic unit square with n × n bilinear elements.

    >>> mass, stiffness, _ = symbols(10)
    >>> round(100 * float(mass[0, 0]), 12), float(stiffness[0, 0])  # area of an element; constants have no gradient
    (1.0, 0.0)
    """
    h = 1 / n
    rows = 2 * math.pi * torch.arange(n, dtype=torch.float64)[:, None] / n
    columns = rows[: n // 2 + 1].T

    def m(angle: Tensor) -> Tensor:
        return h * (2 + angle.cos()) / 3

    def k(angle: Tensor) -> Tensor:
        return 2 * (1 - angle.cos()) / h

    def c(angle: Tensor) -> Tensor:
        return 1j * torch.sin(angle)

    return Symbols(
        mass=m(rows) * m(columns),
        stiffness=k(rows) * m(columns) + m(rows) * k(columns),
        transport=c(rows) * m(columns) + m(rows) * c(columns),
    )


def multiplier(equation: Literal["heat", "advection"], n: int, step: float, alpha: float = 0.01) -> Tensor:
    """One implicit midpoint step in Fourier space: (M − ½δtA)/(M + ½δtA), A = αK (heat) or C (advection).

    Shape: (n, n//2 + 1), complex. That of advection has modulus 1: the step keeps the norm.
    """
    mass, stiffness, transport = symbols(n)
    half = step / 2 * (alpha * stiffness if equation == "heat" else transport)
    return ((mass - half) / (mass + half)).to(torch.complex128)


def apply_symbol(symbol: Tensor, u: Tensor) -> Tensor:
    """The periodic convolution with this Fourier symbol. Shape: (..., n, n) → (..., n, n)."""
    return torch.fft.irfft2(symbol * torch.fft.rfft2(u), s=u.shape[-2:])


def linear_solution(
    equation: Literal["heat", "advection"], start: Tensor, step: float, steps: int, alpha: float = 0.01
) -> Tensor:
    """The states after 1, …, ``steps`` time steps. Shape: (..., n, n) → (..., steps, n, n)."""
    factor = multiplier(equation, start.shape[-1], step, alpha)
    spectrum, states = torch.fft.rfft2(start), []
    for _ in range(steps):
        spectrum = factor * spectrum
        states.append(torch.fft.irfft2(spectrum, s=start.shape[-2:]))
    return torch.stack(states, -3)


def gauss(points: int) -> tuple[list[float], list[float]]:
    """Nodes and weights of Gauss's rule with 2 or 3 points on [0, 1]: exact for polynomials of degree 3 or 5."""
    if points == 2:
        return [0.5 - math.sqrt(1 / 12), 0.5 + math.sqrt(1 / 12)], [0.5, 0.5]
    reach = math.sqrt(0.15)
    return [0.5 - reach, 0.5, 0.5 + reach], [5 / 18, 8 / 18, 5 / 18]


def reaction(after: Tensor, before: Tensor, points: Literal[2, 3] = 2) -> Tensor:
    """R_i = ∫ [½(u₁ + u₀) − ⅓(u₁² + u₁u₀ + u₀²)] φ_i: the mean of u(1 − u) along the segment from u₀ to u₁, tested.

    The source takes 3 × 3 Gauss points an element. The integrand has degree 3 in each variable, so that 2 × 2 integrate
    it exactly as well, at less than half the cost.

    Shape: (..., n, n), twice → (..., n, n).

    >>> one = torch.ones(6, 6, dtype=torch.float64)
    >>> float(36 * reaction(one / 2, one / 2).mean())  # ½(1 − ½), times the area of an element
    0.25
    """
    h = 1 / after.shape[-1]
    nodes, weights = gauss(points)
    values = torch.stack([after, before])
    total = torch.zeros_like(after)
    for s, weight in zip(nodes, weights, strict=True):  # Gauss points in the rows' direction, then in the columns'
        row = torch.lerp(values, values.roll(-1, -2), s)
        beside = row.roll(-1, -1)
        force = torch.zeros_like(after)
        for t, ratio in zip(nodes, weights, strict=True):
            u, v = torch.lerp(row, beside, t)
            density = (0.5 * (u + v) - (u * u + u * v + v * v) / 3) * (h * h * weight * ratio)
            force += (1 - t) * density + (t * density).roll(1, -1)
        total += (1 - s) * force + (s * force).roll(1, -2)
    return total


def fisher_step(before: Tensor, step: float, alpha: float = 0.01, points: Literal[2, 3] = 2) -> Tensor:
    """U₁ of M(U₁ − U₀)/δt + ½αK(U₁ + U₀) = R(U₁, U₀), by the fixed point U₁ ← P⁻¹(P'U₀ + R(U₁, U₀)).

    P = M/δt + ½αK and P' = M/δt − ½αK. The iteration contracts by about δt/2, so a handful of rounds reach round-off.

    Shape: (..., n, n) → (..., n, n). Raises ArithmeticError where it does not converge: δt or u is too large.
    """
    mass, stiffness, _ = symbols(before.shape[-1])
    left, right = mass / step + alpha / 2 * stiffness, mass / step - alpha / 2 * stiffness
    linear = apply_symbol(right / left, before)
    after = linear
    for _ in range(FIXED_POINT_ITERATIONS):
        previous, after = after, linear + apply_symbol(1 / left, reaction(after, before, points))
        change = float((after - previous).abs().max())
        if change <= FIXED_POINT_TOLERANCE * max(1.0, float(after.abs().max())):
            return after
    raise ArithmeticError(f"the fixed point of a Fisher step did not converge: last change {change:.1e} at δt = {step}")


def fisher_solution(start: Tensor, step: float, steps: int, alpha: float = 0.01) -> Tensor:
    """The states after 1, …, ``steps`` time steps. Shape: (..., n, n) → (..., steps, n, n)."""
    flat, states = start.reshape(-1, *start.shape[-2:]), []
    for state in flat:  # one field at a time stays in the processor's cache
        states.append([state := fisher_step(state, step, alpha) for _ in range(steps)])
    return torch.stack([torch.stack(one) for one in states]).view(*start.shape[:-2], steps, *start.shape[-2:])
