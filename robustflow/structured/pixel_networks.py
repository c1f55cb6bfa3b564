"""Networks that step a picture in time: learned stencils, and the finite differences that they can be exactly.

Source: Celledoni, Jackaman, Murari, Owren, *Predictions based on pixel data: insights from PDEs and finite differences*
(2023). A network steps U ← Ψ(U), k substeps of a method for U̇ = F_θ(U) = B ∗ σ_p(A ∗ U + a), σ_p(x) = max(0, x)^p, all
with the same weights. With x = σ₁(x) − σ₁(−x), x² = σ₂(x) + σ₂(−x) and 2ab = (a + b)² − a² − b², every linear and every
quadratic finite difference is such an F_θ: `hand_built` writes three of them down.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from robustflow.config import Strict
from robustflow.methods import Property
from robustflow.steps import Flow, Step
from robustflow.structured.fields import StencilField

Equation = Literal["heat", "advection", "fisher"]
SPACING, ALPHA = 0.01, 0.01  # δx of all grids, α of the diffusion
KERNEL, BLOCK = 5, 2


class PixelField(StencilField):
    """s · (B ∗ σ_p(A ∗ U + a) (+ c)): a `StencilField` in the units of its data, s stored with the weights.

    On a grid of even size it computes with blocks of 2 × 2 pixels as channels, where a 5 × 5 stencil is a 3 × 3 one:
    the same sums, two to three times faster than processors do them with one or two channels.

    Shape: (B, 1, H, W) → (B, 1, H, W).

    >>> field, u = PixelField(2, scale=30.0), torch.rand(3, 1, 8, 8)
    >>> plain = 30 * field.outer(torch.relu(field.inner(u)))
    >>> bool(torch.allclose(field(u), plain, atol=1e-4))
    True
    """

    scale: Tensor

    def __init__(
        self, hidden: int, *, power: int = 1, scale: float = 1.0, project: bool = False, outer_bias: bool = False
    ) -> None:
        super().__init__(1, hidden, kernel_size=KERNEL, power=power, project=project, outer_bias=outer_bias)
        self.register_buffer("scale", torch.tensor(float(scale)))

    def _free(self, u: Tensor) -> Tensor:
        if u.shape[-1] % BLOCK or u.shape[-2] % BLOCK:
            return self.scale * super()._free(u)
        hidden = _circular(F.pixel_unshuffle(u, BLOCK), self.inner)
        return self.scale * F.pixel_shuffle(_circular(torch.relu(hidden) ** self.power, self.outer), BLOCK)

    def convolved(self, u: Tensor) -> Tensor:
        """A ∗ U + a. Shape: (B, 1, H, W), H and W even → (B, hidden, H, W)."""
        return F.pixel_shuffle(_circular(F.pixel_unshuffle(u, BLOCK), self.inner), BLOCK)


def _circular(blocks: Tensor, stencil: nn.Conv2d) -> Tensor:
    """The circular convolution of a picture cut into blocks. Shape: (B, C·4, H/2, W/2) → (B, C'·4, H/2, W/2)."""
    bias = None if stencil.bias is None else stencil.bias.repeat_interleave(BLOCK * BLOCK)
    return F.conv2d(F.pad(blocks, (1, 1, 1, 1), mode="circular"), _blocked(stencil.weight), bias)


def _taps() -> Tensor:
    """Which tap of a 5 × 5 stencil takes pixel (i, j) of block (I, J) to pixel (p, q) of the block in the middle.

    Shape: (I, J, i, j, p, q) with numbers 5·row + column; 25 where there is none.
    """
    pixel = torch.arange(BLOCK)
    tap = BLOCK * (torch.arange(3)[:, None, None] - 1) + pixel[:, None] - pixel + KERNEL // 2
    row, column = tap[:, None, :, None, :, None], tap[None, :, None, :, None, :]
    inside = (row >= 0) & (row < KERNEL) & (column >= 0) & (column < KERNEL)
    return torch.where(inside, KERNEL * row + column, KERNEL * KERNEL)


_TAPS = _taps()


def _blocked(weight: Tensor) -> Tensor:
    """The 3 × 3 stencil between blocks that is a 5 × 5 one between pixels. Shape: (O, C, 5, 5) → (O·4, C·4, 3, 3)."""
    outputs, inputs = weight.shape[:2]
    padded = torch.cat((weight.flatten(2), weight.new_zeros(outputs, inputs, 1)), dim=2)
    taps = padded[:, :, _TAPS.to(weight.device)]  # (O, C, I, J, i, j, p, q)
    return taps.permute(0, 6, 7, 1, 4, 5, 2, 3).reshape(outputs * BLOCK**2, inputs * BLOCK**2, 3, 3)


class PixelNetwork(Strict):
    """kind "stencil": ``substeps`` steps of ``method`` with one `PixelField`; "direct", the control: no equation,
    the next picture is B ∗ σ_p(A ∗ U + a) + c of the last.

    ``norm``: F is projected so that it keeps the norm, and a method that does not is refused. ``fit_noise``: the noise
    of the fit that the outer layer begins at, beside the size of the data (`fit`).
    """

    kind: Literal["stencil", "direct"] = "stencil"
    hidden: int = Field(2, ge=1)
    power: Literal[1, 2] = 1
    outer_bias: bool = False
    norm: bool = False
    method: str = "explicit-euler"
    substeps: int = Field(3, ge=1)
    fit_noise: float = Field(1e-3, gt=0)


def network(options: PixelNetwork, step: float, scale: float = 1.0) -> Flow:
    """The model of time ``step``; ``scale`` is the size of ∂u/∂t beside that of u.

    Raises:
        UserError: a method that is not there, or does not keep the norm where it should.

    >>> flow = network(PixelNetwork(), step=0.0024, scale=30.0)
    >>> len(flow), sum(p.numel() for p in flow[0].field.parameters()), flow(torch.rand(3, 1, 8, 8)).shape
    (3, 102, torch.Size([3, 1, 8, 8]))
    """
    if options.kind == "direct":
        return Flow(PixelField(options.hidden, power=options.power, outer_bias=True))
    field = PixelField(
        options.hidden, power=options.power, scale=scale, project=options.norm, outer_bias=options.outer_bias
    )
    return repeated(field, options.method, step, options.substeps, keep="norm" if options.norm else None)


def repeated(field: nn.Module, method: str, step: float, substeps: int, keep: Property | None = None) -> Flow:
    """Substeps of size ``step``/``substeps``, all of them one and the same layer."""
    layer = Step(field, method, step / substeps, learned=False, keep=keep)
    if not list(field.parameters()):  # such a field would leave the step in float32
        layer.step_size.data = torch.tensor(step / substeps, dtype=torch.float64)
    return Flow(*(layer for _ in range(substeps)))


class Differences(nn.Module):
    """The right-hand side by finite differences of order two, added up pixel by pixel without any network.

    heat αΔ₅U, Δ₅ the five-point Laplacian; advection −(D₁ + D₂)U, central differences; Fisher αΔ₅U + U(1 − U).

    Shape: (..., H, W) → (..., H, W).

    >>> Differences("fisher")(torch.full((1, 1, 6, 6), 0.25))[0, 0, 0, 0]
    tensor(0.1875)
    """

    def __init__(self, equation: Equation) -> None:
        super().__init__()
        self.equation = equation

    def forward(self, u: Tensor) -> Tensor:
        before, after = (u.roll(1, -1), u.roll(1, -2)), (u.roll(-1, -1), u.roll(-1, -2))
        if self.equation == "advection":
            return (before[0] + before[1] - after[0] - after[1]) / (2 * SPACING)
        spread = ALPHA / SPACING**2 * (before[0] + before[1] + after[0] + after[1] - 4 * u)
        return spread + u * (1 - u) if self.equation == "fisher" else spread


def hand_built(equation: Equation, *, project: bool = False) -> PixelField:
    """`Differences` as a network, exactly: U = σ₁(U) − σ₁(−U) for the linear equations, and for Fisher's
    U² = σ₂(U) + σ₂(−U), U = ¼((U + 1)² − (U − 1)²) with the squares written so: channels ±(U + 1), ±(U − 1), ±U.

    >>> u = torch.rand(1, 1, 8, 8)
    >>> all(torch.allclose(hand_built(e)(u), Differences(e)(u), atol=1e-3) for e in ("heat", "advection", "fisher"))
    True
    """
    one, linear = torch.zeros(KERNEL, KERNEL), torch.zeros(KERNEL, KERNEL)
    one[2, 2] = 1
    if equation == "advection":
        linear[2, 1] = linear[1, 2] = 1 / (2 * SPACING)
        linear[2, 3] = linear[3, 2] = -1 / (2 * SPACING)
    else:
        linear[2, 1] = linear[1, 2] = linear[2, 3] = linear[3, 2] = ALPHA / SPACING**2
        linear[2, 2] = -4 * ALPHA / SPACING**2
    signs = torch.tensor([1.0, -1.0] * (3 if equation == "fisher" else 1))
    if equation == "fisher":
        shifts, quarter = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0, 0.0]), (linear + one) / 4
        outer = [quarter, quarter, -quarter, -quarter, -one, -one]
    else:
        shifts, outer = torch.zeros(2), [linear, -linear]
    field = PixelField(len(signs), power=2 if equation == "fisher" else 1, project=project)
    with torch.no_grad():
        assert field.inner.bias is not None
        field.inner.weight.copy_(signs[:, None, None, None] * one)
        field.inner.bias.copy_(signs * shifts)
        field.outer.weight.copy_(torch.stack(outer)[None])
    return field


def step_of(model: nn.Module) -> Step | None:
    """The step that a model repeats, None of one that is no method for an equation."""
    first = model[0] if isinstance(model, Flow) else None
    return first if isinstance(first, Step) else None


DRAWS, FEW, ROUNDS, STRIDE, NOISE_OF_A, REACH = 8, 8, 12, 3, 0.1, 1.2


@torch.no_grad()
def fit(model: Flow, before: Tensor, after: Tensor, step: float, noise: float) -> None:
    """Where a training begins: B (and c) of least squares for Ψ(U + η) ≈ U₁, A near the identity.

    A is the identity with a little noise, and a so large that every channel is positive on the data: F begins as a
    polynomial of degree p, for which the fit is a linear problem (random features). Of eight A drawn the one is taken
    whose fit to every eighth field is the best. Ψ is not linear in B, so the residual U₁ − Ψ is fitted several times,
    by B ∗ σ_p(A ∗ V + a) at the state V before the last substep; for linear equations, whose solution operators
    commute, this is Newton's method. η is uniform noise of ``noise`` times the size of U: without it the fit says
    nothing of what the data do not hold, and rough perturbations grow. Fields are weighed by 1/‖U‖, as relative errors
    are.

    Shape: ``before``, ``after`` (M, 1, n, n), ``step`` apart.
    """
    dtype, last = next(model.parameters()).dtype, model[-1]
    field, span = (last.field, step) if isinstance(last, Step) else (last, 1.0)
    assert isinstance(field, PixelField)
    model.double()
    size = before.square().mean((1, 2, 3), keepdim=True).sqrt()
    start = before + noise * size * (2 * torch.rand_like(before) - 1)
    least, best = torch.inf, field.state_dict()
    for _ in range(DRAWS):
        _activate(field, before[::FEW])
        error = _fitted(model, field, start[::FEW], after[::FEW], size[::FEW], span)
        if error < least:
            least, best = error, {name: weight.clone() for name, weight in field.state_dict().items()}
    field.load_state_dict(best)
    _fitted(model, field, start, after, size, span)
    model.to(dtype)


def _fitted(model: Flow, field: PixelField, start: Tensor, after: Tensor, size: Tensor, span: float) -> float:
    """Fit B and c, from what they are; returns the mean square of what is left."""
    # Newton's method for Euler's; others have another derivative, and are damped.
    damping = 0.7 if isinstance(model[-1], Step) and model[-1].method.order > 1 else 1.0
    least, best = torch.inf, field.outer.state_dict()
    for _ in range(ROUNDS):
        v = start
        for substep in list(model)[:-1]:
            v = substep(v)
        residual = (after - model[-1](v)) / size
        error = float(residual.square().mean())
        if not error < least:
            break
        stalls, least = error > 0.9 * least, error
        best = {name: weight.clone() for name, weight in field.outer.state_dict().items()}
        if stalls:
            break
        change = damping * _least_squares(field, v, size, residual / span)
        field.outer.weight += change[: field.outer.weight.numel()].view_as(field.outer.weight)
        if field.outer.bias is not None:
            field.outer.bias += change[-1]
    field.outer.load_state_dict(best)
    return least


def _activate(field: PixelField, u: Tensor) -> None:
    inner, centre = field.inner, KERNEL // 2
    assert inner.bias is not None
    inner.weight.normal_(std=NOISE_OF_A)
    inner.weight[:, :, centre, centre] += 1
    inner.bias.zero_()
    inner.bias.copy_(REACH * field.convolved(u).abs().amax((0, 2, 3)))
    for parameter in field.outer.parameters():
        parameter.zero_()


def _least_squares(field: PixelField, v: Tensor, size: Tensor, wanted: Tensor) -> Tensor:
    """The change of (B, c) that changes F(V)/size by ``wanted`` at every third pixel of each third row."""
    hidden = torch.relu(field.convolved(v)) ** field.power
    patches = F.unfold(F.pad(hidden / size, (2, 2, 2, 2), mode="circular"), KERNEL, stride=STRIDE)
    rows = field.scale * patches.mT  # (M, pixels, 25 · hidden)
    if field.outer.bias is not None:
        rows = torch.cat((rows, (field.scale / size[:, 0]).expand(-1, rows.shape[1], 1)), dim=2)
    if field.project:
        u = v[..., ::STRIDE, ::STRIDE].flatten(1)[..., None]
        rows = rows - u * (u.mT @ rows) / (u.mT @ u)
    flat, y = rows.flatten(0, 1), wanted[..., ::STRIDE, ::STRIDE].reshape(-1)
    gram = flat.T @ flat
    ridge = 1e-10 * gram.diagonal().mean() * torch.eye(len(gram))
    return torch.linalg.solve(gram + ridge.to(gram), flat.T @ y)
