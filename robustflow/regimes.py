"""The regimes: which steps a block consists of, and which inequality their step sizes keep.

| regime | a layer, or a pair of layers | what is kept |
|---|---|---|
| unconstrained | x + B ReLU(Ax + a) | nothing |
| naive | ½(x + B ReLU(Ax + a)) | ‖A‖, ‖B‖ ≤ 1 |
| nonexpansive | x − h Aᵀ ReLU(Ax + b) | ‖A‖ ≤ 1, 0 ≤ h ≤ 2 |
| prescribed | x + h_E Wᵀσ(Wx + v), then x − h_C Aᵀσ(Ax + b), h fixed | √(1 − h_C + h_C²)(1 + h_E) ≤ 1, AᵀA = I |
| sharp | the same pair, h learned | max(1 − a h_C, h_C − 1)(1 + h_E) ≤ 1, AᵀA = I |
| shared | the same pair with W = A, h learned | ‖A‖ ≤ 1, h_C ≤ 1, h_E ≤ a h_C |
| flexible | x − h Aᵀσ(Ax + b), h of either sign | the product of all layers' constants ≤ 1, AᵀA = I |
| cpl, sll, aol, cayley | what others use: `robustflow.peers` | ‖layer‖ ≤ 1, by their parametrisations |

σ is a leaky ReLU with slopes in [a, 1], a = ½ in prescribed, sharp, shared and flexible. Unconstrained, naive,
nonexpansive, prescribed and flexible are the classifiers of Celledoni et al., arXiv 2210.02373; *sharp* replaces their
bound of the contractive step by its exact constant. Prescribed, sharp and flexible need AᵀA = I exactly: with only
‖A‖ ≤ 1 a contractive step need not contract at all (a direction with Ax = 0 stays as it is), and the expansion before
it is then not made up for. Hence they use patch kernels for A. *Shared* needs no more than ‖A‖ ≤ 1: what the kernel
does not see, neither step moves (the proof: `robustflow.step_rules.shared_kernel_pair`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from robustflow.block_shape import BlockShape
from robustflow.errors import UserError
from robustflow.fields import GradientField, TwoKernelField
from robustflow.operators import Convolution, PatchConvolution
from robustflow.peers import AOLConvolution, CayleyConvolution, MaxMin, SLLStep
from robustflow.steps import AveragedStep, EulerStep

PAIR_SLOPE = 0.5
# Step sizes are stored in float32: the inequality is met with this much to spare, so that rounding cannot break it.
_ROUNDING = 1e-6


def prescribed_contraction(h: float, slope: float = PAIR_SLOPE) -> float:
    """√(1 − 2ah + h²): the paper's bound of x − hAᵀσ(Ax + b) with AᵀA = I, √(1 − h + h²) at a = ½.

    >>> round(prescribed_contraction(0.5), 4)
    0.866
    """
    return math.sqrt(1 - 2 * slope * h + h * h)


def sharp_contraction(h: float, slope: float = PAIR_SLOPE) -> float:
    """max(1 − ah, h − 1): the exact Lipschitz constant of the same step (h ≥ 0), ⅓ at best for a = ½.

    The Jacobian I − hAᵀDA with aI ≤ D ≤ I is symmetric with eigenvalues in [1 − h, 1 − ah].

    >>> round(sharp_contraction(4 / 3), 4)
    0.3333
    """
    return max(1 - slope * h, h - 1)


class Pair(nn.Sequential):
    """An expansive step followed by a contractive one, with ``contraction(h_C)·(1 + h_E) ≤ 1`` after every update.

    Shape: (B, C, H, W) → (B, C, H, W).
    """

    def __init__(
        self, expansive: EulerStep, contractive: EulerStep, contraction: Callable[[float, float], float]
    ) -> None:
        super().__init__(expansive, contractive)
        self._contraction = contraction
        self.constrain_()

    @property
    def step_sizes(self) -> tuple[nn.Parameter, nn.Parameter]:
        """(h_E, h_C)."""
        expansive, contractive = cast(Iterable[EulerStep], self)
        return expansive.step_size, contractive.step_size

    @torch.no_grad()
    def constrain_(self, *, exact: bool = False) -> None:
        """Clamp h_C to [0, 4/3], or to where it does not expand, and then h_E to what the inequality leaves."""
        expansive, contractive = self.step_sizes
        if expansive.is_meta:  # shapes only
            return
        h = min(max(float(contractive), 0.0), 4 / 3)
        # The paper's bound exceeds 1 beyond h = 2a, where no expansion could bring the product back to 1.
        contractive.fill_(2 * PAIR_SLOPE if self._contraction(h, PAIR_SLOPE) > 1 else h)
        # Where the bound is not below 1 there is nothing to make up for: no expansion.
        room = 1 / self._contraction(float(contractive), PAIR_SLOPE) - 1
        expansive.clamp_(0.0, max(room, 0.0) * (1 - _ROUNDING))


class SharedKernelPair(nn.Sequential):
    """An expansive and a contractive step along one kernel, with h_C ≤ 1 and h_E ≤ a·h_C after every update.

    Shape: (B, C, H, W) → (B, C, H, W).
    """

    def __init__(self, expansive: EulerStep, contractive: EulerStep) -> None:
        super().__init__(expansive, contractive)
        self.orthonormal = isinstance(getattr(expansive.field, "operator", None), PatchConvolution)
        self.constrain_()

    @torch.no_grad()
    def constrain_(self, *, exact: bool = False) -> None:
        expansive, contractive = cast(Iterable[EulerStep], self)
        # Below 1 by what a kernel's norm may exceed 1 by in float32.
        contractive.step_size.clamp_(0.0, 1 - 4 * _ROUNDING)
        if not contractive.step_size.is_meta:
            expansive.step_size.clamp_(0.0, PAIR_SLOPE * float(contractive.step_size) * (1 - _ROUNDING))


@torch.no_grad()
def balance_signed_steps_(steps: Iterable[EulerStep]) -> None:
    """Shrink the negative (expanding) step sizes until Π c(h_i) ≤ 1, c(h) = max(1 − ah, h − 1) or 1 + |h|.

    All steps must have AᵀA = I. The contracting steps are left alone; the factor on the others is found by bisection.
    """
    signed = list(steps)
    if not signed:
        return
    sizes = torch.stack([step.step_size.detach().double() for step in signed]).clamp(-2.0, 2.0)
    slopes = torch.tensor([step.field.slope for step in signed], dtype=torch.float64)
    sizes = sizes.cpu()
    contraction = torch.maximum(1 - slopes * sizes, sizes - 1).clamp_min(1e-12).log()[sizes >= 0].sum()

    def log_product(scale: float) -> float:
        return float(contraction + torch.log1p(-scale * sizes[sizes < 0]).sum())

    low, high = 0.0, 1.0
    if log_product(1.0) > -_ROUNDING:
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if log_product(middle) <= -_ROUNDING else (low, middle)
        # Contracting steps alone may leave no room at all (Π = 1, all h = 0): then nothing may expand.
        sizes = torch.where(sizes < 0, low * sizes, sizes)
    for step, size in zip(signed, sizes, strict=True):
        step.step_size.fill_(float(size))


@torch.no_grad()
def nominal_constant(model: nn.Module) -> float:
    """Π of the exact constants of all gradient steps, taking every kernel to have norm 1 and, with slopes > 0, AᵀA = I.

    What the steps contract at least: 1 for most regimes, 0.866 a pair in *prescribed*, whose inequality is not tight.
    Training divides logits by it, so that a margin in the loss means the same distance in every regime. It is no bound
    to certify with.
    """
    product = 1.0
    # Along a convolution a pair is worth 1 as a whole; along patches AᵀA = I makes its two constants count.
    whole = [pair for pair in model.modules() if isinstance(pair, SharedKernelPair) and not pair.orthonormal]
    counted = {step for pair in whole for step in pair}
    for module in model.modules():
        if isinstance(module, EulerStep) and isinstance(module.field, GradientField) and module not in counted:
            h = -module.field.sign * float(module.step_size)
            product *= sharp_contraction(h, module.field.slope) if h >= 0 else 1 - h
    return product


@dataclass(frozen=True)
class Regime:
    """How a block's layers are built, and what the network must do after every update besides its layers' own part."""

    name: str
    description: str
    constrained: bool
    layers_per_unit: int
    build: Callable[[BlockShape, int], nn.Module]
    balanced: bool = False


def _unconstrained(shape: BlockShape, index: int) -> nn.Module:
    inner, outer = shape.free(), shape.free()
    # Starts close to the identity, as residual networks without normalisation must.
    with torch.no_grad():
        outer.weight.mul_(0.1)
    return EulerStep(TwoKernelField(inner, outer), 1.0, learned=False)


def _naive(shape: BlockShape, index: int) -> nn.Module:
    inner, outer = shape.spectral(index), shape.spectral(index)
    if isinstance(inner, Convolution):
        # From B = Aᵀ of nearly isometric A: two random kernels of norm 1 leave half of every image in each layer.
        inner.start_isometric_()
        with torch.no_grad():
            outer.weight.copy_(inner.weight)
    return AveragedStep(TwoKernelField(inner, outer))


def _nonexpansive(shape: BlockShape, index: int) -> nn.Module:
    return EulerStep(GradientField(shape.spectral(index), slope=0.0, sign=-1), 2.0, interval=(0.0, 2.0))


def _pair(
    shape: BlockShape, index: int, contraction: Callable[[float, float], float], start: float, *, learned: bool
) -> Pair:
    expansive = GradientField(shape.spectral(2 * index), slope=PAIR_SLOPE, sign=1)
    contractive = GradientField(shape.orthonormal(2 * index + 1), slope=PAIR_SLOPE, sign=-1)
    # From the step size that contracts most, and all the expansion that it leaves room for.
    room = 1 / contraction(start, PAIR_SLOPE) - 1
    steps = (EulerStep(expansive, room, learned=learned), EulerStep(contractive, start, learned=learned))
    return Pair(*steps, contraction)


def _prescribed(shape: BlockShape, index: int) -> nn.Module:
    # Fixed, as in the paper. Left to training both step sizes of a pair go to 0 (measured): the bound √(1 − h + h²) is
    # so far above what the step really does that every nonlinearity costs margin, and the network turns linear.
    return _pair(shape, index, prescribed_contraction, 0.5, learned=False)


def _sharp(shape: BlockShape, index: int) -> nn.Module:
    return _pair(shape, index, sharp_contraction, 4 / 3, learned=True)


def _shared(shape: BlockShape, index: int) -> nn.Module:
    operator = shape.spectral(index)
    steps = [EulerStep(GradientField(operator, slope=PAIR_SLOPE, sign=s), h) for s, h in ((1, PAIR_SLOPE), (-1, 1.0))]
    return SharedKernelPair(*steps)


def _flexible(shape: BlockShape, index: int) -> nn.Module:
    field = GradientField(shape.orthonormal(index), slope=PAIR_SLOPE, sign=-1)
    # Alternates as the others do at the start; training may turn any layer into either kind.
    return EulerStep(field, 4 / 3 if index % 2 else -1.0)


def _cpl(shape: BlockShape, index: int) -> nn.Module:
    return EulerStep(GradientField(shape.convolution(shape.reach), slope=0.0, sign=-1), 2.0, learned=False)


def _sll(shape: BlockShape, index: int) -> nn.Module:
    return SLLStep(shape.channels, shape.reach, shape.hidden(shape.channels))


def _aol(shape: BlockShape, index: int) -> nn.Module:
    return nn.Sequential(AOLConvolution(shape.channels, shape.channels, shape.reach), _paired("aol", shape))


def _cayley(shape: BlockShape, index: int) -> nn.Module:
    return nn.Sequential(CayleyConvolution(shape.channels, shape.reach), _paired("cayley", shape))


def _paired(regime: str, shape: BlockShape) -> MaxMin:
    if shape.channels % 2:
        raise UserError(f"{regime} pairs channels in MaxMin: channels and dense must be even, not {shape.channels}")
    return MaxMin()


REGIMES: dict[str, Regime] = {
    regime.name: regime
    for regime in (
        Regime("unconstrained", "residual network without constraints: x + B ReLU(Ax + a)", False, 1, _unconstrained),
        Regime("naive", "averaged residual steps ½(x + B ReLU(Ax + a)) with norms at most 1", True, 1, _naive),
        Regime("nonexpansive", "contractive steps only, step sizes in [0, 2]", True, 1, _nonexpansive),
        Regime("prescribed", "expansive/contractive pairs under √(1 − h_C + h_C²)(1 + h_E) ≤ 1", True, 2, _prescribed),
        Regime("flexible", "signed steps; only the product of all constants is at most 1", True, 1, _flexible, True),
        Regime("sharp", "pairs under the exact constant max(1 − a h_C, h_C − 1)(1 + h_E) ≤ 1", True, 2, _sharp),
        Regime("shared", "pairs along one kernel under h_C ≤ 1, h_E ≤ a h_C", True, 2, _shared),
        Regime("cpl", "peer: convex potential steps x − 2Wᵀ ReLU(Wx + b)/‖W‖² (Meunier et al. 2022)", True, 1, _cpl),
        Regime("sll", "peer: x − 2Wᵀ T⁻¹ ReLU(Wx + b), T from row sums of |WWᵀ| (Araujo et al. 2023)", True, 1, _sll),
        Regime("aol", "peer: almost-orthogonal convolutions and MaxMin (Prach & Lampert 2022)", True, 1, _aol),
        Regime("cayley", "peer: Cayley-orthogonal convolutions and MaxMin (Trockman & Kolter 2021)", True, 1, _cayley),
    )
}

# Their steps may have fewer hidden units than dimensions. Of the others most need AᵀA = I or have no hidden units;
# shared, whose constant on patches counts on AᵀA = I too (`nominal_constant`), is left as it is.
ANY_HIDDEN = frozenset({"naive", "nonexpansive", "cpl", "sll"})
