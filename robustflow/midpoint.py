"""The implicit midpoint rule: Newton's method, state by state, to round-off; differentiable at the solution."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robustflow.errors import UserError

Field = Callable[[Tensor], Tensor]
LARGEST = 1024  # unknowns of one state: the equations are solved densely
_NEWTON_STEPS = 50
_HALVINGS = 20


def implicit_midpoint(field: Field, x: Tensor, h: Tensor | float) -> Tensor:
    """x₁ = x + h F((x + x₁)/2) for every state of the batch: x₁ = 2z − x with the midpoint z = x + h/2 F(z).

    z is solved for without a graph. Then come two steps z ← z − M⁻¹(z − x − h/2 F(z)), M = I − h/2 F'(z) held fixed:
    they take z to round-off, and each gains one order of dependence on x, h and the weights, so that first and second
    derivatives are those of the solution (the implicit function theorem), whatever the iterations were. Not for use
    under `torch.vmap`.

    Raises:
        UserError: a state of more than 1,024 numbers, or equations that are not solved to round-off (where h is large
            and the field is not nonexpansive they may have no solution).

    >>> x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    >>> turned = implicit_midpoint(lambda z: z.flip(1) * torch.tensor([1.0, -1.0]), x, 0.5)
    >>> bool(torch.isclose(turned.norm(), x.norm(), rtol=1e-15))
    True
    """
    if x[0].numel() > LARGEST:
        raise UserError(f"implicit-midpoint solves for at most {LARGEST} unknowns, not {x[0].numel()}: use heun or rk4")
    with torch.no_grad():
        z = _solved(field, x.detach(), h.detach() if isinstance(h, Tensor) else h)
        matrix = _matrix(field, z, h)
    for _ in range(2):
        z = z - _solve(matrix, z - x - 0.5 * h * field(z))
    return 2 * z - x


def _matrix(field: Field, z: Tensor, h: Tensor | float) -> Tensor:
    """M = I − h/2 F'(z) of every state, (B, n, n)."""
    jacobian = torch.func.vmap(torch.func.jacrev(lambda state: field(state[None])[0]))(z)
    jacobian = jacobian.reshape(len(z), z[0].numel(), z[0].numel())
    return torch.eye(jacobian.shape[1], dtype=z.dtype, device=z.device) - 0.5 * h * jacobian


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    try:
        return torch.linalg.solve(matrix, right.flatten(1).unsqueeze(2)).view_as(right)
    except torch.linalg.LinAlgError:
        raise UserError("implicit-midpoint: the equations have no single solution: use a smaller step size") from None


def _solved(field: Field, x: Tensor, h: Tensor | float) -> Tensor:
    """The solution z of every state, up to eps^¾: Newton's method, in steps as long as they lower the residual.

    The matrix is kept as long as it takes a digit off the residual: it is what the work consists in.
    """

    def residual(z: Tensor) -> Tensor:
        return z - x - 0.5 * h * field(z)

    def size(r: Tensor) -> Tensor:
        return torch.linalg.vector_norm(r.flatten(1), dim=1)

    z, r, matrix = x, residual(x), None
    tolerance = torch.finfo(x.dtype).eps ** 0.75 * (size(x) + size(r))
    for _ in range(_NEWTON_STEPS):
        if bool((size(r) <= tolerance).all()):
            return z
        matrix = _matrix(field, z, h) if matrix is None else matrix
        update = _solve(matrix, r)
        length = torch.ones(len(x), *[1] * (x.ndim - 1), dtype=x.dtype, device=x.device)
        for _ in range(_HALVINGS):
            better = residual(z - length * update)
            good = size(better) <= torch.maximum(size(r), tolerance)
            if bool(good.all()):
                break
            length = torch.where(good.view_as(length), length, 0.5 * length)
        slow = bool((size(better) > 0.1 * torch.maximum(size(r), tolerance)).any())
        z, r, matrix = z - length * update, better, None if slow else matrix
    raise UserError(f"implicit-midpoint: a residual of {float(size(r).max()):.1g} is left: use a smaller step size")
