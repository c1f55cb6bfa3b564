"""One-step methods as data: x₁ = Ψ_h(x) ≈ the flow of ẋ = F(x) after time h, the order, and what Ψ keeps of the flow.

A field declares in ``properties`` what its exact flow keeps; a method declares what it keeps of that; `kept` is what
the two have in common, and a network made of such steps has the property by construction. Sources: Hairer, Lubich and
Wanner, *Geometric Numerical Integration*, II.1, IV.2, VI.3–4; Celledoni et al., arXiv 2210.02373.

| property | what is kept |
|---|---|
| linear | the field's linear first integrals: cᵀx, such as the total mass |
| norm | ‖x‖ |
| symplectic | the form Ω = [[0, I], [−I, 0]] of the state (q, p): JᵀΩJ = Ω |
| volume | det J = 1 |
| nonexpansive | ‖Ψ(x) − Ψ(y)‖ ≤ ‖x − y‖, for step sizes 0 ≤ h ≤ `largest_step` |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from robustflow import midpoint
from robustflow.errors import UserError

Property = Literal["linear", "norm", "symplectic", "volume", "nonexpansive"]
PROPERTIES: tuple[Property, ...] = get_args(Property)
Needs = Literal["any", "split", "norm", "skew"]
# A field is any callable (B, …) → (B, …); what else a method takes of it is in `_NEEDS`.
Field = Any
StepSize = Tensor | float

_ADJECTIVES = {
    "linear": "mass-preserving",
    "norm": "norm-preserving",
    "symplectic": "symplectic",
    "volume": "volume-preserving",
    "nonexpansive": "nonexpansive",
}
_NEEDS = {
    "split": "a field that is split into ẋ = f(v), v̇ = g(x) (`sizes`, `drift`, `kick`)",
    "norm": "a field that keeps the norm",
    "skew": "a field F(x) = S(x)x with a skew S (`skew`)",
}


@dataclass(frozen=True)
class Method:
    """A one-step method: x₁ = advance(field, x, h).

    ``keeps`` are the properties that it keeps of every field that has them, ``needs`` the kind of field it is defined
    for. ``contraction`` is what h·L may be at most for a gradient field −∇U, U convex, ∇U L-Lipschitz, if the step is
    not to expand.
    """

    name: str
    order: int
    keeps: frozenset[Property]
    advance: Callable[[Field, Tensor, StepSize], Tensor]
    formula: str
    needs: Needs = "any"
    contraction: float = 0.0


def explicit_euler(field: Field, x: Tensor, h: StepSize) -> Tensor:
    """x + h F(x)."""
    return x + h * field(x)


def heun(field: Field, x: Tensor, h: StepSize) -> Tensor:
    """x + h/2 (k₁ + k₂), k₁ = F(x), k₂ = F(x + h k₁)."""
    k1 = field(x)
    return x + 0.5 * h * (k1 + field(x + h * k1))


def rk4(field: Field, x: Tensor, h: StepSize) -> Tensor:
    """The classical method of Kutta: x + h/6 (k₁ + 2k₂ + 2k₃ + k₄)."""
    k1 = field(x)
    k2 = field(x + 0.5 * h * k1)
    k3 = field(x + 0.5 * h * k2)
    k4 = field(x + h * k3)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def symplectic_euler(field: Field, x: Tensor, h: StepSize) -> Tensor:
    """Two shears: x₁ = x + h f(v), v₁ = v + h g(x₁)."""
    x, v = x.split(field.sizes, dim=1)
    x = x + h * field.drift(v)
    return torch.cat((x, v + h * field.kick(x)), dim=1)


def stoermer_verlet(field: Field, x: Tensor, h: StepSize) -> Tensor:
    """Three shears: x½ = x + h/2 f(v), v₁ = v + h g(x½), x₁ = x½ + h/2 f(v₁)."""
    x, v = x.split(field.sizes, dim=1)
    x = x + 0.5 * h * field.drift(v)
    v = v + h * field.kick(x)
    return torch.cat((x + 0.5 * h * field.drift(v), v), dim=1)


def _norm(x: Tensor) -> Tensor:
    # Not vector_norm: on 10,000 numbers its rounding drifts by 1e-14 over 120 steps, that of a sum by 1e-15.
    # At 0 the clamp gives the square root a derivative.
    square = x.flatten(1).square().sum(1).clamp_min(torch.finfo(x.dtype).tiny)
    return square.sqrt().view(-1, *[1] * (x.ndim - 1))


def norm_exact_euler(field: Field, x: Tensor, h: StepSize) -> Tensor:
    """Euler's step, rescaled to the norm that came in. The factor is 1 + O(h²) where the flow keeps the norm."""
    after = explicit_euler(field, x, h)
    return after * (_norm(x) / _norm(after).clamp_min(torch.finfo(x.dtype).tiny))


def norm_exact_heun(field: Field, x: Tensor, h: StepSize) -> Tensor:
    """Heun's step, rescaled to the norm that came in. The factor is 1 + O(h³) where the flow keeps the norm."""
    after = heun(field, x, h)
    return after * (_norm(x) / _norm(after).clamp_min(torch.finfo(x.dtype).tiny))


def cayley(field: Field, x: Tensor, h: StepSize) -> Tensor:
    """(I − hS/2)⁻¹(I + hS/2) x with S = u wᵀ − w uᵀ taken at x + h/2 F(x): orthogonal, because S is skew.

    With y = x + hS/2 y the step is 2y − x, and y follows from two unknowns a state, wᵀy and uᵀy. The determinant of
    their equations is 1 + h²/4 (‖u‖²‖w‖² − (uᵀw)²) ≥ 1.
    """
    u, w = (part.flatten(1) for part in field.skew(x + 0.5 * h * field(x)))
    flat, half = x.flatten(1), 0.5 * h

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(1, keepdim=True)

    uu, uw, ww, ux, wx = dot(u, u), dot(u, w), dot(w, w), dot(u, flat), dot(w, flat)
    determinant = 1 + half * half * (uu * ww - uw * uw)
    wy = ((1 + half * uw) * wx - half * ww * ux) / determinant
    uy = (half * uu * wx + (1 - half * uw) * ux) / determinant
    return x + (2 * half * (u * wy - w * uy)).view_as(x)


def _keeps(*properties: Property) -> frozenset[Property]:
    return frozenset(properties)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "explicit-euler", 1, _keeps("linear", "nonexpansive"), explicit_euler, "x₁ = x + h F(x)", contraction=2.0
        ),
        Method(
            "heun", 2, _keeps("linear", "nonexpansive"), heun, "x₁ = x + h/2 (F(x) + F(x + h F(x)))", contraction=2.0
        ),
        Method(
            "rk4", 4, _keeps("linear", "nonexpansive"), rk4, "x₁ = x + h/6 (k₁ + 2k₂ + 2k₃ + k₄)", contraction=2.0
        ),
        Method(
            "symplectic-euler", 1, _keeps("linear", "symplectic", "volume"), symplectic_euler,
            "x₁ = x + h f(v), v₁ = v + h g(x₁)", needs="split",
        ),
        Method(
            "stoermer-verlet", 2, _keeps("linear", "symplectic", "volume"), stoermer_verlet,
            "x½ = x + h/2 f(v), v₁ = v + h g(x½), x₁ = x½ + h/2 f(v₁)", needs="split",
        ),
        Method(
            "implicit-midpoint", 2, _keeps("linear", "norm", "symplectic", "nonexpansive"), midpoint.implicit_midpoint,
            "x₁ = x + h F((x + x₁)/2)", contraction=math.inf,
        ),
        Method(
            "norm-exact-euler", 1, _keeps("norm"), norm_exact_euler, "Euler's step, rescaled to ‖x₁‖ = ‖x‖",
            needs="norm",
        ),
        Method(
            "norm-exact-heun", 2, _keeps("norm"), norm_exact_heun, "Heun's step, rescaled to ‖x₁‖ = ‖x‖", needs="norm"
        ),
        Method(
            "cayley", 2, _keeps("norm"), cayley, "x₁ = (I − hS/2)⁻¹(I + hS/2) x, S = S(x + h/2 F(x))", needs="skew"
        ),
    )
}  # fmt: skip


def method_of(method: str | Method) -> Method:
    """The method of this name.

    >>> method_of("rk4").order
    4
    """
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}: one of {', '.join(METHODS)}")
    return METHODS[method]


def properties_of(field: Field) -> frozenset[Property]:
    """What the exact flow of a field keeps: nothing, where the field does not say."""
    return frozenset(getattr(field, "properties", ()))


def fits(field: Field, method: str | Method) -> bool:
    """Whether the method is defined for the field."""
    needs = method_of(method).needs
    if needs == "split":
        return _is_split(field)
    # A field may have the method `skew` and yet keep no norm (a projection that is switched off).
    return needs == "any" or ("norm" in properties_of(field) and (needs == "norm" or hasattr(field, "skew")))


def _is_split(field: Field) -> bool:
    return hasattr(field, "drift") and hasattr(field, "kick")


def largest_step(field: Field, method: str | Method) -> float:
    """The largest h with which the method does not expand the flow of a nonexpansive field; 0 if there is none.

    With ⟨F(x) − F(y), x − y⟩ ≤ −‖F(x) − F(y)‖²/L, which a convex potential with an L-Lipschitz gradient has, a
    Runge–Kutta method (A, b) is nonexpansive where BA + AᵀB − bbᵀ + 2/(hL)·B ⪰ 0, B = diag(b) (Dahlquist and Jeltsch
    1979). For explicit Euler, Heun and RK4 this is h·L ≤ 2, for the implicit midpoint every h ≥ 0. L is the
    field's ``lipschitz``.
    """
    contraction = method_of(method).contraction
    if "nonexpansive" not in properties_of(field):
        return 0.0
    # A field that does not know its L may have any: then only a method without a limit will do.
    return contraction if math.isinf(contraction) else contraction / getattr(field, "lipschitz", math.inf)


def kept(field: Field, method: str | Method) -> frozenset[Property]:
    """What one step of the method keeps of the field's flow ("nonexpansive": with 0 ≤ h ≤ `largest_step`).

    Raises:
        UserError: the method is not defined for the field.

    >>> from robustflow.structured.fields import HamiltonianField
    >>> field = HamiltonianField(2, 8)
    >>> sorted(kept(field, "explicit-euler")), sorted(kept(field, "stoermer-verlet"))
    ([], ['symplectic', 'volume'])
    """
    method, properties = method_of(method), properties_of(field)
    if not fits(field, method):
        raise UserError(f"{method.name} needs {_NEEDS[method.needs]}, which a {type(field).__name__} is not")
    found = set(properties & method.keeps)
    if "nonexpansive" in found and largest_step(field, method) == 0:
        found.discard("nonexpansive")
    # Here det J₁ = det(I + hJ/2)/det(I − hJ/2), J at the midpoint. It is 1 where J is similar to −J: for Hamiltonian
    # matrices, and for two shears J = [[0, P], [Q, 0]]; but not for every J of trace 0.
    if method.name == "implicit-midpoint" and "volume" in properties:
        found |= {"volume"} if "symplectic" in properties or _is_split(field) else set()
    return frozenset(found)


def require_kept(field: Field, method: str | Method, keep: str) -> None:
    """Raise UserError, naming the methods that would do, unless the pair keeps the property ``keep``."""
    method = method_of(method)
    if keep not in PROPERTIES:
        raise UserError(f"unknown property {keep!r}: one of {', '.join(PROPERTIES)}")
    if keep in kept(field, method):
        return
    pair = f"a {type(field).__name__} with {method.name} is not {_ADJECTIVES[keep]}"
    good = [name for name in METHODS if fits(field, name) and keep in kept(field, name)]
    if not good:
        raise UserError(f"{pair}, and with no other method: choose a field that has the property")
    raise UserError(f"{pair}: use {', '.join(good[:-1]) + ' or ' + good[-1] if len(good) > 1 else good[0]}")
