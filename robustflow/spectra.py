"""The symbol of a convolution, matrix by matrix, and the largest norm among them: the engine of `robustflow.norms`.

On a torus of N pixels a convolution is diagonal in blocks: one matrix F(ω) = Σ_t K[t] e^{−i⟨ω,t⟩} for every frequency.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustflow.errors import UserError

INFLATION = 1e-9
UNIT = 2.0**-53  # the unit roundoff of float64
Pair = int | tuple[int, int]
Padding = Pair | tuple[tuple[int, int], tuple[int, int]] | str


def inflation(terms: int = 1, rank: int = 1) -> float:
    """A relative margin that covers a Gram matrix of sums over ``terms``, its eigenvalues and a Cholesky test."""
    return INFLATION + 8 * UNIT * terms * rank


def materialised(weight: Tensor) -> Tensor:
    weight = weight.detach().to("cpu", torch.float64).contiguous()
    if weight.numel() == 0:
        raise UserError(f"a weight of shape {tuple(weight.shape)} has no entries, so there is no norm to bound")
    if not bool(torch.isfinite(weight).all()):
        raise UserError("a weight holds NaN or infinite entries: there is no bound to compute; train or load it again")
    return weight


def normalised(weight: Tensor) -> tuple[Tensor, float]:
    """The weight over a power of two (exact), so that squares neither overflow nor vanish at entries like 1e±200."""
    largest = float(weight.abs().max())
    scale = 2.0 ** (math.frexp(largest)[1] - 1) if largest > 0 else 1.0
    return weight / scale, scale


def up(value: float, factor: float = 1.0) -> float:
    """The next float64 above value·factor: a product of positive bounds that underflows must not become 0.

    What is not a number bounds nothing: infinite.
    """
    if math.isnan(value) or math.isnan(factor):
        return math.inf
    return math.nextafter(value * factor, math.inf) if value > 0 and factor > 0 else 0.0


@dataclass(frozen=True)
class Axis:
    """One direction of a convolution: n pixels, k taps (reaching over ``reach`` pixels), padding before and after."""

    n: int
    k: int
    stride: int
    dilation: int
    before: int
    after: int

    @property
    def reach(self) -> int:
        return self.dilation * (self.k - 1) + 1

    @property
    def outputs(self) -> int:
        return (self.n + self.before + self.after - self.reach) // self.stride + 1

    @property
    def torus(self) -> int:
        """The smallest torus where nothing that wraps meets the image: n + p, or more if outputs see padding only."""
        needed = max(self.n + max(self.before, self.after), self.n + self.before + self.after - self.reach + 1)
        return self.stride * math.ceil(needed / self.stride)

    def copies(self, mode: str) -> int:
        """How often the padding repeats one pixel at most; the norm of the padding map is the square root."""
        numpy_mode: Any = {"circular": "wrap", "reflect": "reflect", "replicate": "edge"}[mode]
        return int(np.bincount(np.pad(np.arange(self.n), (self.before, self.after), mode=numpy_mode)).max())

    def padded(self) -> Axis:
        return Axis(self.n + self.before + self.after, self.k, self.stride, self.dilation, 0, 0)


def axes_of(weight: Tensor, image_size: Pair, stride: Pair, padding: Padding, dilation: Pair) -> tuple[Axis, Axis]:
    sizes, strides, dilations = pair(image_size), pair(stride), pair(dilation)
    axes = []
    for i, k in enumerate(weight.shape[2:]):
        if padding == "same":
            total = dilations[i] * (k - 1)
            sides = (total // 2, total - total // 2)
        elif padding == "valid":
            sides = (0, 0)
        else:
            one = pair(padding)[i]
            sides = one if isinstance(one, tuple) else (one, one)
        axis = Axis(sizes[i], k, strides[i], dilations[i], *sides)
        if axis.outputs < 1 or axis.n < 1 or min(sides) < 0:
            raise UserError(
                f"a kernel that reaches over {axis.reach} pixels does not fit {axis.n} pixels padded by {sides}"
            )
        axes.append(axis)
    return axes[0], axes[1]


def pair(value: Any) -> tuple[Any, Any]:
    return (value[0], value[1]) if isinstance(value, (tuple, list, torch.Size)) else (value, value)


def symbols(weight: Tensor, torus: tuple[int, int], stride: Pair = 1, dilation: Pair = 1) -> Iterator[Tensor]:
    """The matrices whose norms make up that of the circular convolution, a batch for each row of frequencies.

    For stride s these are (s_h s_w)^{−1/2}·[F(ω₀ + 2πj/s)]_j, the blocks side by side. Kernels longer than the torus
    are aliased by the phases themselves. A real kernel has F(−ω) = conj F(ω), so half the frequencies are enough.
    """
    weight = weight.to(torch.complex128)
    strides, dilations = pair(stride), pair(dilation)
    phases = []
    for size, k, d in zip(torus, weight.shape[2:], dilations, strict=True):
        steps = torch.outer(torch.arange(size), d * torch.arange(k)) % size
        phases.append(torch.exp(-2j * math.pi * steps.to(torch.float64) / size))
    rows, columns = torus[0] // strides[0], torus[1] // strides[1]
    for row in range(rows // 2 + 1):
        blocks = []
        for j in range(strides[0]):
            line = torch.einsum("oihw,h->oiw", weight, phases[0][row + j * rows])
            symbol = torch.einsum("oiw,nw->noi", line, phases[1])
            blocks += [symbol[i * columns : (i + 1) * columns] for i in range(strides[1])]
        batch = torch.cat(blocks, dim=2) / math.sqrt(strides[0] * strides[1])
        # Row 0 (and the middle one) holds its own mirror images.
        yield batch[: columns // 2 + 1] if row == 0 or 2 * row == rows else batch


def largest_norm(batches: Iterator[Tensor]) -> float:
    """max ‖M‖₂ over all matrices: eigenvalues where the maximum may lie, a Cholesky proof of "not here" elsewhere.

    S² I − M*M positive definite proves ‖M‖ < S (the factorisation's own rounding is covered by `inflation`). Infinite
    where an entry is not finite.
    """
    best = 0.0
    for batch in batches:
        gram = batch @ batch.mH if batch.shape[1] <= batch.shape[2] else batch.mH @ batch
        identity = torch.eye(gram.shape[-1], dtype=gram.dtype)
        # trace ≥ largest eigenvalue: what cannot exceed the best needs no factorisation.
        trace = gram.diagonal(dim1=1, dim2=2).real.sum(1)
        if not bool(torch.isfinite(trace).all()):
            return math.inf
        gram = gram[trace > best]
        for _ in range(3):
            if len(gram) == 0:
                break
            first = int(torch.linalg.vector_norm(gram @ (gram @ gram.sum(2, keepdim=True)), dim=(1, 2)).argmax())
            best = max(best, float(torch.linalg.eigvalsh(gram[first])[-1]))
            keep = torch.linalg.cholesky_ex(best * (1 + 1e-10) * identity - gram).info > 0
            keep[first] = False
            gram = gram[keep]
        if len(gram):
            best = max(best, float(torch.linalg.eigvalsh(gram)[:, -1].max()))
    return math.sqrt(best)


def grouped(weight: Tensor, groups: int) -> Iterator[Tensor]:
    if groups < 1 or weight.shape[0] % groups:
        raise UserError(f"{weight.shape[0]} output channels cannot be divided into {groups} groups")
    yield from weight.chunk(groups)
