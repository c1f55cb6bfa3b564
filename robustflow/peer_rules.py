"""Lipschitz and rounding rules of `robustflow.peers`: the maps that their weights make, measured in float64.

The certified object is the network in real arithmetic with the stored weights; what float64 makes of a parametrisation
differs from it by an error that is bounded here, too, and counted in both rules.
"""

from __future__ import annotations

import copy
import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from robustflow import norms
from robustflow.errors import UserError
from robustflow.fields import GradientField
from robustflow.layer_rules import LayerBound, Shape, layer_bounds, register
from robustflow.operators import Convolution
from robustflow.peers import AOLConvolution, CayleyConvolution, MaxMin, SLLStep, absolute_gram
from robustflow.rounding import Rounding, gamma, register_rounding, rounding_of
from robustflow.spectra import inflation, largest_norm, normalised, symbols
from robustflow.steps import EulerStep

UNIT = norms.UNIT
Peer = TypeVar("Peer", AOLConvolution, SLLStep, CayleyConvolution)


def _exact(module: Peer) -> Peer:
    return copy.deepcopy(module).to("cpu", torch.float64).requires_grad_(False)


# -------------------------------------------------------------------------------------------------------------- MaxMin
@register(MaxMin)
def _maxmin(module: MaxMin, shape: Shape, name: str) -> list[LayerBound]:
    return [LayerBound(name, "MaxMin", "a permutation of channels where one looks: 1", 1.0)]


@register_rounding(MaxMin)
def _(module: MaxMin, shape: Shape, constant: float) -> Rounding:
    # Of a pair (x, y) either output is off by at most u(|x| + |y|) from x − y and u of itself from the sum.
    return Rounding(size=4 * UNIT)


# ----------------------------------------------------------------------------------------------------------------- AOL
def _scale_error(kernel: Tensor, weights: Tensor) -> float:
    """Relative error of a factor (Σ_j S_ij w_j/w_i)^{−1/2}, S = `absolute_gram`, computed in float64.

    A sum of m products is off by γ_m times the sum of their absolute values; S of absolute weights collects those.
    """
    sums, absolute = ((absolute_gram(k) * weights).sum(1) for k in (kernel, kernel.abs()))
    terms = kernel.shape[0] * kernel.shape[2] * kernel.shape[3] + kernel.shape[1] * 4 * kernel.shape[2] ** 2
    worst = float((absolute / sums.clamp_min(1e-30)).max())
    return gamma(terms + 16) * (worst + 4)


def _aol_map(module: AOLConvolution) -> tuple[nn.Conv2d, float]:
    """The convolution that is applied, and the relative error of its kernel's columns."""
    exact = _exact(module)
    made = nn.Conv2d(module.in_channels, module.out_channels, exact.weight.shape[-1], padding=module.padding)
    made = made.double().requires_grad_(False)
    made.weight.copy_(exact._kernel())
    made.bias.copy_(exact.bias)  # type: ignore[union-attr]
    return made, _scale_error(exact.weight, torch.ones(()))


@register(AOLConvolution)
@torch.no_grad()
def _aol(module: AOLConvolution, shape: Shape, name: str) -> list[LayerBound]:
    """The norm of KD, which is at most AOL's own 1 (the square root of a largest row sum) and usually well below."""
    made, error = _aol_map(module)
    (measured,) = layer_bounds(made, shape, name)
    return [LayerBound(name, "AOLConvolution", f"{measured.formula} of K·D", norms.up(measured.bound * (1 + error)))]


@register_rounding(AOLConvolution)
@torch.no_grad()
def _(module: AOLConvolution, shape: Shape, constant: float) -> Rounding:
    made, error = _aol_map(module)
    inside = rounding_of(made, shape, constant)
    return Rounding(size=inside.size * (1 + error) + error * constant, fixed=inside.fixed)


# ----------------------------------------------------------------------------------------------------------------- SLL
def _sll_map(module: SLLStep) -> tuple[Tensor, Tensor, float]:
    """T^{−1/2}K and T^{−1/2}b, and the relative error of T^{−1/2}."""
    exact = _exact(module)
    ratios = (exact.log_q[None, :] - exact.log_q[:, None]).exp()
    # exp is good to a few units in the last place of a number up to e^|log q_j − log q_i|, whose argument is rounded.
    exponents = gamma(8) * (1 + 4 * float(exact.log_q.abs().max()))
    return *exact._kernel(), _scale_error(exact.weight.transpose(0, 1), ratios) + exponents


@register(SLLStep)
@torch.no_grad()
def _sll(module: SLLStep, shape: Shape, name: str) -> list[LayerBound]:
    """With T the step is 1-Lipschitz if WWᵀ ≼ T. Checked on what is applied, K' = T^{−1/2}K: with ρ the largest row sum
    Σ_j |K'K'ᵀ|_ij p_j/p_i for positive weights p (p = q√T is the theorem's own), K'K'ᵀ ≼ ρ and the constant is at most
    max(1, 2ρ − 1).
    """
    if module.padding != module.weight.shape[-1] // 2:
        size, where = module.weight.shape[-1], f"{name or 'the module'} (SLLStep)"
        raise UserError(f"{where} has padding {module.padding}: set it to {size // 2}, which keeps the image's size")
    kernel, _, error = _sll_map(module)
    weight = module.weight.detach().to("cpu", torch.float64)
    # √T of a row is by how much its kernel was divided; a row of zeros may have any weight.
    before, after = (k.flatten(1).norm(dim=1) for k in (weight, kernel))
    root = torch.where(after > 0, before / after.clamp_min(1e-300), 1.0)
    p = module.log_q.detach().to("cpu", torch.float64).exp() * root

    def row_sums(k: Tensor) -> Tensor:
        return (absolute_gram(k.transpose(0, 1)) @ p) / p

    slack = gamma(kernel[0].numel() + 4 * kernel.shape[0] * kernel.shape[-1] ** 2)
    rho = float((row_sums(kernel) + slack * row_sums(kernel.abs())).max()) * (1 + error) ** 2 * (1 + slack)
    formula = f"max(1, 2ρ − 1), WWᵀ ≼ ρT by row sums weighted with q, ρ ≤ {norms.up(rho):.12g}"
    return [LayerBound(name, "SLLStep", formula, max(1.0, norms.up(2 * rho * (1 + 4 * UNIT) - 1)))]


@register_rounding(SLLStep)
@torch.no_grad()
def _(module: SLLStep, shape: Shape, constant: float) -> Rounding:
    kernel, bias, error = _sll_map(module)
    operator = Convolution(module.channels, len(kernel), kernel.shape[-1])
    field = GradientField(operator, slope=0.0, sign=-1)
    same = EulerStep(field, 2.0).double().requires_grad_(False)
    operator.weight.copy_(kernel)
    field.bias.copy_(bias)
    inside = rounding_of(same, shape, constant)
    # A relative error e of T^{−1/2} is one of 2e and a little of everything that is taken from x: 2K'ᵀReLU(K'x + b').
    shift = float(bias.norm()) * math.sqrt(shape[1] * shape[2])
    off = 2 * (2 * error + error**2) * 2 * constant
    return Rounding(inside.size + off, inside.out, inside.fixed + off * shift)


# -------------------------------------------------------------------------------------------------------------- Cayley
@register(CayleyConvolution)
@torch.no_grad()
def _cayley(module: CayleyConvolution, shape: Shape, name: str) -> list[LayerBound]:
    """σ of the circular convolution that is really applied: its kernel is what it makes of single bright pixels."""
    exact = _exact(module)
    channels, height, width = shape
    pixels = torch.zeros(channels, *shape, dtype=torch.float64)
    pixels[torch.arange(channels), torch.arange(channels), 0, 0] = 1
    # Images of pixels → kernel (out, in, H, W) of y[p] = Σ_d K[d] x[p − d]; the sign of d leaves the norm as it is.
    kernel, scale = normalised((exact(pixels) - exact.bias.view(-1, 1, 1)).transpose(0, 1).contiguous())
    margin = inflation(height * width * channels, channels)
    # At least 1: in real arithmetic Q is orthogonal.
    bound = max(1.0, norms.up(largest_norm(symbols(kernel, (height, width))) * (1 + margin), scale))
    return [LayerBound(name, "CayleyConvolution", "max σ(Q(ω)) of the materialised map on the torus", bound)]


@register_rounding(CayleyConvolution)
@torch.no_grad()
def _(module: CayleyConvolution, shape: Shape, constant: float) -> Rounding:
    """With P = (I + A)⁻¹, ‖P‖ ≤ 1 since A is skew: the residual of the computed P̂ bounds ‖P̂ − P‖ ≤ ‖P̂(I + A) − I‖.

    A scalar error ε of A, from gain and ‖K‖, moves P by at most ε·max μ/(1 + μ²) ≤ ε/2, an error δA by at most ‖δA‖. An
    FFT of N pixels is taken to be no worse than summing directly, ‖error‖ ≤ √N γ_N ‖Fx‖ in either direction, as the
    library's elementwise functions are taken to be good to the last place.
    """
    exact = _exact(module)
    channels, height, width = shape
    system = torch.eye(channels, dtype=torch.complex128) + exact._skew(height, width)
    inverse = exact._kernel(height, width)
    identity = torch.eye(channels, dtype=torch.complex128)
    lengths = [m.flatten(1).norm(dim=1) for m in (inverse @ system - identity, inverse, system)]
    solved = float((lengths[0] + gamma(2 * channels + 8) * (lengths[1] * lengths[2] + 1)).max())
    taps = exact.weight[0, 0].numel()
    # An angle of up to 4π is rounded a few times, a cosine or a sine once more.
    phases = 3 * gamma(taps + 64) * math.sqrt(taps) * abs(float(exact.gain))
    product = math.sqrt(2 * channels) * gamma(2 * channels + 8)
    pixels = height * width
    transforms = 2 * math.sqrt(pixels) * gamma(2 * pixels + 16)
    inside = solved + gamma(exact.weight.numel() + 8) + phases + product + transforms
    bias = float(exact.bias.norm()) * math.sqrt(pixels)
    return Rounding(size=2 * inside * (1 + 1e-6) + 8 * UNIT, out=4 * UNIT, fixed=4 * UNIT * bias)
