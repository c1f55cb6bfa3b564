"""What a learned flow map is measured with: reference solutions, long orbits, Jacobians, Poincaré sections."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.integrate import solve_ivp
from scipy.interpolate import PPoly, make_interp_spline
from torch import Tensor, nn

Map = Callable[[Tensor], Tensor]


@torch.no_grad()
def reference(field: Map, starts: Tensor, times: Sequence[float] | np.ndarray) -> Tensor:
    """The solutions of ẋ = F(x) at the given times, by the Runge–Kutta method of order 8 of Dormand and Prince.

    All orbits are one equation to SciPy's ``solve_ivp`` (DOP853, relative tolerance 1e-12), so they share its steps.

    Shape: ``starts`` (N, d), ``times`` (K,) increasing and positive → (N, K, d) in float64.

    >>> turn = reference(lambda x: torch.stack((x[:, 1], -x[:, 0]), dim=1), torch.tensor([[1.0, 0.0]]), [torch.pi])
    >>> bool(torch.allclose(turn, torch.tensor([[[-1.0, 0.0]]], dtype=torch.float64), atol=1e-10))
    True
    """
    shape, at = starts.shape, np.asarray(times, dtype=float)

    def slope(_: float, flat: np.ndarray) -> np.ndarray:
        return field(torch.from_numpy(flat).view(shape)).numpy().ravel()

    start = starts.double().numpy().ravel()
    solved = solve_ivp(slope, (0.0, at[-1]), start, method="DOP853", rtol=1e-12, atol=1e-13, t_eval=at)
    assert solved.success, solved.message
    return torch.from_numpy(solved.y.T.reshape(len(at), *shape)).transpose(0, 1).contiguous()


@torch.no_grad()
def orbits(model: Map, starts: Tensor, steps: int, limit: float = np.inf) -> Tensor:
    """The iterates x, N(x), N(N(x)), … of a map; one that leaves max|xᵢ| ≤ ``limit`` stays where it was last.

    Shape: (N, d) → (N, steps + 1, d).

    >>> orbits(lambda x: 2 * x, torch.ones(1, 1), 5, limit=10).flatten().tolist()
    [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    """
    states = [starts]
    inside = torch.ones(len(starts), 1, dtype=torch.bool)
    for _ in range(steps):
        after = model(states[-1])
        inside = inside & (after.abs().amax(1, keepdim=True) <= limit)  # NaN is not inside
        states.append(torch.where(inside, after, states[-1]))
    return torch.stack(states, dim=1)


def escaped(states: Tensor) -> Tensor:
    """Which of `orbits` were stopped at its limit. Shape: (N, K, d) → (N,) of bool."""
    return (states[:, -1] == states[:, -2]).all(1)


def jacobians(model: Map, x: Tensor) -> Tensor:
    """J_ij = ∂N_i/∂x_j at each point. Shape: (N, d) → (N, d, d).

    >>> jacobians(lambda x: x**2, torch.tensor([[1.0, 3.0]])).tolist()
    [[[2.0, 0.0], [0.0, 6.0]]]
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = model(x)
        rows = [torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0] for i in range(y.shape[1])]
    return torch.stack(rows, dim=1)


def along(model: Map, starts: Tensor, steps: int) -> Tensor:
    """The Jacobian of N at each of the first points of the orbits: their products are those of N∘…∘N.

    Shape: (N, d) → (N, steps, d, d).
    """
    states = orbits(model, starts, steps - 1)
    return jacobians(model, states.flatten(0, 1)).unflatten(0, states.shape[:2])


def crossings(states: np.ndarray, event: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Where a sampled orbit passes from event < 0 to event > 0, between the samples by splines of degree 5.

    Shape: ``states`` (K, d), ``event`` (K, d) → (K,); the crossings are (n, d).

    >>> angle = np.linspace(0, 20, 101)
    >>> circle = np.stack((np.cos(angle), np.sin(angle)), axis=1)
    >>> np.allclose(crossings(circle, lambda x: x[:, 1])[1:], [[1, 0], [1, 0], [1, 0]], atol=1e-6)
    True
    """
    clock = np.arange(len(states), dtype=float)
    signal = PPoly.from_spline(make_interp_spline(clock, event(states), k=5))
    times = signal.roots(extrapolate=False)
    times = times[np.isfinite(times)]  # an orbit that stands still is a root everywhere: NaN
    rising = times[signal.derivative()(times) > 0]
    return make_interp_spline(clock, states, k=5)(rising)


def random(split: str, seed: int) -> np.random.Generator:
    """The random numbers of a split. The test split knows of no seed: it is the same for all."""
    place = ("train", "validation", "test").index(split)
    return np.random.default_rng([place, 0 if split == "test" else seed])


def one_step_error(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """The mean squared error of one application of a model. Shape: (N, d), (N, K ≥ 1, d)."""
    with torch.no_grad():
        return float((model(inputs) - targets[:, 0]).square().mean())
