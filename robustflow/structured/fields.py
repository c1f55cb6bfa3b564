"""Parametrised vector fields, each with a property that its flow keeps whatever the weights are.

All are ``nn.Module``s F: (B, d) → (B, d) (`StencilField`: images), in any precision, and say in ``properties`` what
their exact flow keeps; `robustflow.methods` says which methods keep it, `robustflow.steps.Step` makes a layer of both.
Sources: Celledoni et al., arXiv 2210.02373, sections 2–4; Celledoni et al., *Predictions based on pixel data* (2023).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from robustflow.errors import UserError
from robustflow.methods import Property
from robustflow.structured.activations import activation_of

NOTHING: frozenset[Property] = frozenset()


def _uniform(rows: int, columns: int) -> nn.Parameter:
    """A matrix as `nn.Linear` starts one: uniform in ±1/√columns."""
    return nn.Parameter((2 * torch.rand(rows, columns) - 1) / math.sqrt(columns))


class GradientFlowField(nn.Module):
    """F(x) = s·Aᵀ diag(a) σ(Ax + b): the gradient of U(x) = aᵀΣ(Ax + b), Σ' = σ, up (s = 1) or down (s = −1).

    ``bounded`` holds a in [0, 1] and ‖A‖ ≤ 1 (`constrain_`). Then U is convex, F has the Lipschitz constant
    ``lipschitz`` = max σ', and descending is nonexpansive. Otherwise A and a are free, F is a gradient, no more, and
    a starts with both signs, b anywhere: where U has to curve up here and down there, a = 𝟏 is far from any solution.

    Shape: (B, dim) → (B, dim).

    >>> field = GradientFlowField(3, 10, activation="tanh", sign=-1)
    >>> field(torch.rand(5, 3)).shape, field.properties, field.lipschitz
    (torch.Size([5, 3]), frozenset({'nonexpansive'}), 1.0)
    """

    def __init__(
        self, dim: int, hidden: int, *, activation: str = "relu", sign: int = -1, bounded: bool = True
    ) -> None:
        super().__init__()
        if sign not in (-1, 1):
            raise UserError(f"a gradient field has sign -1 (contractive) or +1 (expansive), not {sign}")
        self.activation, self.sign, self.bounded = activation, sign, bounded
        self._sigma = activation_of(activation)
        self.properties: frozenset[Property] = frozenset({"nonexpansive"}) if bounded and sign < 0 else NOTHING
        self.lipschitz = self._sigma.slope if bounded else math.inf
        self.matrix = _uniform(hidden, dim)
        self.bias = nn.Parameter(torch.zeros(hidden) if bounded else 2 * torch.rand(hidden) - 1)
        self.weights = nn.Parameter(torch.ones(hidden) if bounded else torch.randn(hidden) / math.sqrt(hidden))
        self.constrain_()

    def forward(self, x: Tensor) -> Tensor:
        inner = self._sigma.function(x @ self.matrix.T + self.bias)
        return self.sign * (self.weights * inner) @ self.matrix

    def potential(self, x: Tensor) -> Tensor:
        """U(x), (B,): F = s∇U."""
        return self._sigma.integral(x @ self.matrix.T + self.bias) @ self.weights

    @torch.no_grad()
    def constrain_(self, *, exact: bool = False) -> None:
        if self.bounded and not self.matrix.is_meta:
            self.weights.clamp_(0.0, 1.0)
            self.matrix.div_(torch.linalg.matrix_norm(self.matrix, 2).clamp_min(1.0))


class SphereField(nn.Module):
    """F(x) = S(x)x with S = u wᵀ − w uᵀ, u = Uσ(Ax + b), w = Wσ(Ax + b): xᵀF(x) = 0, the flow stays on its sphere.

    Every continuous field with xᵀF(x) = 0 is of this form away from 0 (u = F/‖x‖², w = x): rank two is no restriction.

    Shape: (B, dim) → (B, dim).

    >>> field, x = SphereField(4, 10), torch.rand(5, 4)
    >>> bool(((x * field(x)).sum(1).abs() < 1e-5).all()), field.properties
    (True, frozenset({'norm'}))
    """

    properties: frozenset[Property] = frozenset({"norm"})

    def __init__(self, dim: int, hidden: int, *, activation: str = "tanh") -> None:
        super().__init__()
        self.activation, self._sigma = activation, activation_of(activation)
        self.inner = nn.Linear(dim, hidden)
        self.outer = nn.Linear(hidden, 2 * dim, bias=False)

    def skew(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(u, w) of S(x) = u wᵀ − w uᵀ."""
        u, w = self.outer(self._sigma.function(self.inner(x))).chunk(2, dim=1)
        return u, w

    def forward(self, x: Tensor) -> Tensor:
        u, w = self.skew(x)
        return u * (w * x).sum(1, keepdim=True) - w * (u * x).sum(1, keepdim=True)


class MassField(nn.Module):
    """F(x) = (A(x) − A(x)ᵀ)𝟏, vec A(x) = Vσ(Wx + w): what leaves one compartment enters another, 𝟏ᵀF(x) = 0.

    Shape: (B, dim) → (B, dim).

    >>> field = MassField(3, 20)
    >>> bool((field(torch.rand(5, 3)).sum(1).abs() < 1e-5).all()), field.properties
    (True, frozenset({'linear'}))
    """

    properties: frozenset[Property] = frozenset({"linear"})

    def __init__(self, dim: int, hidden: int, *, activation: str = "tanh") -> None:
        super().__init__()
        self.dim, self.activation, self._sigma = dim, activation, activation_of(activation)
        self.inner = nn.Linear(dim, hidden)
        self.outer = nn.Linear(hidden, dim * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        flows = self.outer(self._sigma.function(self.inner(x))).view(-1, self.dim, self.dim)
        return (flows - flows.transpose(1, 2)).sum(2)


class HamiltonianField(nn.Module):
    """q̇ = ∂H/∂p, ṗ = −∂H/∂q of the state (q, p) with H(q, p) = aᵀΣ(Kq + b) + αᵀΣ(Mp + β), Σ' = σ.

    H is a sum of a function of q and one of p: q̇ = `drift`(p) = Mᵀdiag(α)σ(Mp + β), ṗ = `kick`(q) =
    −Kᵀdiag(a)σ(Kq + b). The flow is symplectic, keeps volume, and keeps H.

    Shape: (B, dim) → (B, dim), dim even, q first.

    >>> field = HamiltonianField(4, 10)
    >>> field(torch.rand(5, 4)).shape, field.energy(torch.rand(5, 4)).shape
    (torch.Size([5, 4]), torch.Size([5]))
    """

    properties: frozenset[Property] = frozenset({"symplectic", "volume"})

    def __init__(self, dim: int, hidden: int, *, activation: str = "tanh") -> None:
        super().__init__()
        if dim % 2:
            raise UserError(f"a Hamiltonian system has as many momenta as positions: dim must be even, not {dim}")
        self.activation, self._sigma = activation, activation_of(activation)
        self.sizes = (dim // 2, dim // 2)
        self.matrix_q, self.matrix_p = _uniform(hidden, dim // 2), _uniform(hidden, dim // 2)
        self.bias_q, self.bias_p = (nn.Parameter(2 * torch.rand(hidden) - 1) for _ in range(2))
        self.weights_q, self.weights_p = (nn.Parameter(torch.randn(hidden) / math.sqrt(hidden)) for _ in range(2))

    def drift(self, p: Tensor) -> Tensor:
        """q̇ = ∂H/∂p."""
        return (self.weights_p * self._sigma.function(p @ self.matrix_p.T + self.bias_p)) @ self.matrix_p

    def kick(self, q: Tensor) -> Tensor:
        """ṗ = −∂H/∂q."""
        return -(self.weights_q * self._sigma.function(q @ self.matrix_q.T + self.bias_q)) @ self.matrix_q

    def forward(self, x: Tensor) -> Tensor:
        q, p = x.split(self.sizes, dim=1)
        return torch.cat((self.drift(p), self.kick(q)), dim=1)

    def energy(self, x: Tensor) -> Tensor:
        """H(q, p), (B,)."""
        q, p = x.split(self.sizes, dim=1)
        potential = self._sigma.integral(q @ self.matrix_q.T + self.bias_q) @ self.weights_q
        return potential + self._sigma.integral(p @ self.matrix_p.T + self.bias_p) @ self.weights_p


class ShearField(nn.Module):
    """ẋ = σ(Av + a), v̇ = σ(Bx + b): neither part drives itself, so the divergence is 0 and the flow keeps volume.

    The dimensions of x (``first``, by default half of all, rounded up) and v may differ. In the plane, volume is area:
    there the flow is symplectic, too.

    Shape: (B, dim) → (B, dim), x first.

    >>> field = ShearField(5, first=2)
    >>> field(torch.rand(4, 5)).shape, field.properties
    (torch.Size([4, 5]), frozenset({'volume'}))
    """

    def __init__(self, dim: int, *, first: int | None = None, activation: str = "tanh") -> None:
        super().__init__()
        first = (dim + 1) // 2 if first is None else first
        if not 0 < first < dim:
            raise UserError(f"a shear needs two parts: dim at least 2 and 0 < first < dim, not {first} of {dim}")
        self.activation, self._sigma = activation, activation_of(activation)
        self.sizes = (first, dim - first)
        self.properties: frozenset[Property] = frozenset({"volume", "symplectic"} if dim == 2 else {"volume"})
        self.first, self.second = nn.Linear(dim - first, first), nn.Linear(first, dim - first)

    def drift(self, v: Tensor) -> Tensor:
        """ẋ = σ(Av + a)."""
        return self._sigma.function(self.first(v))

    def kick(self, x: Tensor) -> Tensor:
        """v̇ = σ(Bx + b)."""
        return self._sigma.function(self.second(x))

    def forward(self, x: Tensor) -> Tensor:
        x, v = x.split(self.sizes, dim=1)
        return torch.cat((self.drift(v), self.kick(x)), dim=1)


class StencilField(nn.Module):
    """F(U) = B ∗ σ_p(A ∗ U + a) (+ c), σ_p(x) = max(0, x)^p, circular convolutions: a learned finite difference.

    ``project`` takes the part along U away, F − U⟨U, F⟩/⟨U, U⟩: then the flow keeps ‖U‖. ``outer_bias`` is c.

    Shape: (B, channels, H, W) → (B, channels, H, W).

    >>> field = StencilField(1, 2)
    >>> field(torch.rand(3, 1, 8, 8)).shape, sum(p.numel() for p in field.parameters())
    (torch.Size([3, 1, 8, 8]), 102)
    """

    def __init__(
        self,
        channels: int = 1,
        hidden: int = 2,
        *,
        kernel_size: int = 5,
        power: int = 1,
        project: bool = False,
        outer_bias: bool = False,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise UserError(f"a stencil has an odd kernel size, not {kernel_size}")
        if power not in (1, 2):
            raise UserError(f"the power of a stencil's activation is 1 or 2, not {power}")
        self.power, self.project = power, project
        self.properties: frozenset[Property] = frozenset({"norm"}) if project else NOTHING
        padding = kernel_size // 2
        self.inner = nn.Conv2d(channels, hidden, kernel_size, padding=padding, padding_mode="circular")
        self.outer = nn.Conv2d(
            hidden, channels, kernel_size, padding=padding, padding_mode="circular", bias=outer_bias
        )

    def _free(self, u: Tensor) -> Tensor:
        return self.outer(torch.relu(self.inner(u)) ** self.power)

    def skew(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(G(U)/‖U‖², U) of S = g Uᵀ − U gᵀ: the projected field is S U."""
        return self._free(u) / _square(u), u

    def forward(self, u: Tensor) -> Tensor:
        free = self._free(u)
        return free - u * (_dot(u, free) / _square(u)) if self.project else free


def _dot(u: Tensor, v: Tensor) -> Tensor:
    """⟨U, V⟩ of every image."""
    return (u * v).flatten(1).sum(1).view(-1, 1, 1, 1)


def _square(u: Tensor) -> Tensor:
    """‖U‖² of every image, to divide by."""
    return _dot(u, u).clamp_min(torch.finfo(u.dtype).tiny)


class FreeField(nn.Module):
    """F(x) = Bσ(Ax + a) + b, a network without structure: the control. Its flow keeps nothing.

    Shape: (B, dim) → (B, dim).

    >>> FreeField(3, 10)(torch.rand(5, 3)).shape
    torch.Size([5, 3])
    """

    properties: frozenset[Property] = NOTHING

    def __init__(self, dim: int, hidden: int, *, activation: str = "tanh") -> None:
        super().__init__()
        self.activation, self._sigma = activation, activation_of(activation)
        self.inner, self.outer = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self._sigma.function(self.inner(x)))
