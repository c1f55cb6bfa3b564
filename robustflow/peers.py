"""What the field builds 1-Lipschitz layers from, re-implemented from the published formulas, to compare with.

| regime | a layer | why it does not expand |
|---|---|---|
| cpl | x − 2Wᵀ ReLU(Wx + b)/‖W‖² | a gradient step of at most 2/‖W‖²; built from `robustflow.steps` |
| sll | x − 2Wᵀ T⁻¹ ReLU(Wx + b), T_ii = Σ_j abs(WWᵀ)_ij q_j/q_i | WWᵀ ≼ T (Gershgorin after scaling by q) |
| aol | MaxMin(W D x + b), D_ii = (Σ_j abs(WᵀW)_ij)^{−1/2} | DWᵀWD ≼ I, the same with q = 1 |
| cayley | MaxMin(Qx + b), Q = (I − A)(I + A)⁻¹, A = W − Wᵀ, W circular | A is skew, so Q is orthogonal |

Unlike `robustflow.operators` these are parametrisations: stored are plain weights, from which every forward pass makes
the map that it applies, under autograd and, whatever autocast says, in the weights' own precision. The account measures
the map so made, in float64 (`robustflow.peer_rules`).

Under zero padding a row sum near the border holds parts of the sums that T or D is made of, and those may be larger
where the whole cancels. WWᵀ ≼ T holds all the same: on a torus that the image fits into with its padding, W = RCE with
a circular C, an embedding E and a restriction R, and WWᵀ ≼ R(CCᵀ)Rᵀ ≼ RTRᵀ = T.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustflow.errors import UserError


def absolute_gram(kernel: Tensor) -> Tensor:
    """S_ij = Σ_d |Σ_o Σ_t K[o, i, t] K[o, j, t + d]|: the entries of KᵀK between channels i and j, added up.

    Shape: (out, in, k, k) → (in, in), symmetric.

    >>> absolute_gram(torch.tensor([[[[1.0, -2.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]]])).item()  # 2 + 5 + 2
    9.0
    """
    by_input = kernel.transpose(0, 1)
    return F.conv2d(by_input, by_input, padding=kernel.shape[-1] - 1).abs().sum((2, 3))


def _check_kernel_size(kernel_size: int) -> None:
    if kernel_size % 2 == 0:
        raise UserError(f"a convolution that keeps the image's size needs an odd kernel size, not {kernel_size}")


class MaxMin(nn.Module):
    """(max(x, y), min(x, y)) of every pair of channels i and i + C/2: where one looks, a permutation.

    1-Lipschitz and, unlike ReLU, it never loses gradient norm. Source: Anil, Lucas & Grosse, arXiv 1811.05381. Written
    as y + ReLU(x − y) and x − ReLU(x − y), which on a CPU differentiates six times as fast as maximum and minimum.

    Shape: (B, C, …) → the same, C even.

    >>> MaxMin()(torch.tensor([[1.0, 5.0, 3.0, 2.0]])).tolist()
    [[3.0, 5.0, 1.0, 2.0]]
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] % 2:
            raise UserError(f"MaxMin works on pairs of channels: {x.shape[1]} is odd, choose an even number")
        first, second = x.chunk(2, 1)
        excess = F.relu(first - second)
        return torch.cat((second + excess, first - excess), 1)


class AOLConvolution(nn.Module):
    """x ↦ (K D) ∗ x + b, D_ii = (Σ_j S_ij)^{−1/2} with S = `absolute_gram` (K): norm at most 1, zero padding.

    Source: Prach & Lampert, "Almost-orthogonal layers", arXiv 2208.03160. Starts with an orthogonal matrix in the
    middle of the kernel and zeros around it, where D is I; kernels far from orthogonal shrink a lot.

    Shape: (B, in_channels, H, W) → (B, out_channels, H, W).

    >>> AOLConvolution(4, 6)(torch.rand(2, 4, 8, 8)).shape
    torch.Size([2, 6, 8, 8])
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        _check_kernel_size(kernel_size)
        self.in_channels, self.out_channels, self.padding = in_channels, out_channels, kernel_size // 2
        self.weight = nn.Parameter(torch.zeros(out_channels, in_channels, kernel_size, kernel_size))
        middle = torch.empty(out_channels, in_channels)
        nn.init.orthogonal_(middle)
        with torch.no_grad():
            self.weight[:, :, self.padding, self.padding] = middle
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def _kernel(self) -> Tensor:
        """K D, what is applied."""
        with torch.autocast(self.weight.device.type, enabled=False):
            rows = absolute_gram(self.weight).sum(1)
            # A channel that nothing reads has a row of zeros; any larger number is as valid there.
            return self.weight * rows.clamp_min(1e-30).rsqrt().view(-1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self._kernel(), self.bias, padding=self.padding)


class SLLStep(nn.Module):
    """x − 2Kᵀ ∗ T⁻¹ReLU(K ∗ x + b), T_ii = Σ_j S_ij q_j/q_i, S = `absolute_gram` (Kᵀ), q > 0 learned; zero padding.

    Source: Araujo, Havens, Delattre, Allauzen & Hu, "A unified algebraic perspective on Lipschitz neural networks",
    arXiv 2303.03169 (W there is Kᵀ here). ReLU commutes with positive factors, so T^{−1/2} goes into kernel
    and bias: the layer is a contractive step with h = 2 along a kernel of norm at most 1. q is stored as its logarithm.

    Shape: (B, C, H, W) → (B, C, H, W).

    >>> SLLStep(4)(torch.rand(2, 4, 8, 8)).shape
    torch.Size([2, 4, 8, 8])
    """

    def __init__(self, channels: int, kernel_size: int = 3, hidden: int | None = None) -> None:
        """``hidden`` units a pixel: as many as channels where it is not said."""
        super().__init__()
        _check_kernel_size(kernel_size)
        self.channels, self.padding = channels, kernel_size // 2
        hidden = channels if hidden is None else hidden
        self.weight = nn.Parameter(torch.empty(hidden, channels, kernel_size, kernel_size))
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.log_q = nn.Parameter(torch.zeros(hidden))

    def _kernel(self) -> tuple[Tensor, Tensor]:
        """T^{−1/2}K and T^{−1/2}b, what is applied."""
        with torch.autocast(self.weight.device.type, enabled=False):
            ratios = (self.log_q[None, :] - self.log_q[:, None]).exp()
            t = (absolute_gram(self.weight.transpose(0, 1)) * ratios).sum(1)
            scale = t.clamp_min(1e-30).rsqrt()
            return self.weight * scale.view(-1, 1, 1, 1), self.bias * scale

    def forward(self, x: Tensor) -> Tensor:
        kernel, bias = self._kernel()
        hidden = F.relu(F.conv2d(x, kernel, bias, padding=self.padding))
        return x - 2 * F.conv_transpose2d(hidden, kernel, padding=self.padding)


class CayleyConvolution(nn.Module):
    """x ↦ Qx + b, Q = (I − A)(I + A)⁻¹ = 2(I + A)⁻¹ − I, A = W − Wᵀ with W ∝ K a circular convolution: Q is orthogonal.

    Source: Trockman & Kolter, "Orthogonalizing convolutional layers with the Cayley transform", arXiv 2104.07167; as in
    their code W = gain·K/‖K‖ with a learned gain. Frequency by frequency A is a skew-Hermitian matrix F(ω) − F(ω)*, F
    the symbol of K, and (I + A)⁻¹ one inverse. Only half of the frequencies are needed for real images. Kernels larger
    than the image wrap around: the phases see to it (a plain FFT at the image's size would cut them).

    Shape: (B, C, H, W) → (B, C, H, W), any H and W.

    >>> layer, x = CayleyConvolution(2).double(), torch.rand(1, 2, 6, 6, dtype=torch.float64)
    >>> bool(torch.isclose(layer(x).norm(), x.norm()))
    True
    """

    def __init__(self, channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        _check_kernel_size(kernel_size)
        self.channels = channels
        self.weight = nn.Parameter(torch.empty(channels, channels, kernel_size, kernel_size))
        nn.init.kaiming_normal_(self.weight)
        self.gain = nn.Parameter(self.weight.detach().norm())
        self.bias = nn.Parameter(torch.zeros(channels))

    def _skew(self, height: int, width: int) -> Tensor:
        """A(ω) for the frequencies of rfft2: (height·(width//2 + 1), C, C), complex."""
        taps = torch.arange(self.weight.shape[-1], device=self.weight.device) - self.weight.shape[-1] // 2
        angles = []
        for size, kept in ((height, height), (width, width // 2 + 1)):
            turns = torch.outer(torch.arange(kept, device=taps.device), taps) % size
            angles.append(turns.to(torch.float64) * (2 * math.pi / size))
        angle = (angles[0][:, None, :, None] + angles[1][None, :, None, :]).flatten(2).flatten(0, 1)
        kernel = self.weight.flatten(2) * (self.gain / self.weight.norm().clamp_min(1e-30))
        real, imaginary = (torch.tensordot(wave.to(kernel), kernel, ([1], [2])) for wave in (angle.cos(), angle.sin()))
        return torch.complex(real - real.mT, imaginary + imaginary.mT)

    def _kernel(self, height: int, width: int) -> Tensor:
        """(I + A(ω))⁻¹ for the frequencies of rfft2; I + A never is singular, its eigenvalues are 1 + iμ."""
        with torch.autocast(self.weight.device.type, enabled=False):
            skew = self._skew(height, width)
            return torch.linalg.inv(torch.eye(self.channels, dtype=skew.dtype, device=skew.device) + skew)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        # FFT and inverse know no bfloat16.
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.weight.dtype)
            waves = torch.fft.rfft2(x).permute(2, 3, 1, 0)
            # (I + Q)x, whose half is (I + A)⁻¹x.
            added = (2 * self._kernel(height, width)) @ waves.reshape(-1, channels, batch)
            # The size has to be said: without it an odd width would come back even.
            added = torch.fft.irfft2(added.view(waves.shape).permute(3, 2, 0, 1), s=(height, width))
            return added + self.bias.view(-1, 1, 1) - x
