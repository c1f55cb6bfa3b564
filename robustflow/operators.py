"""The linear maps inside a step, each with its exact adjoint and the constraint that it keeps.

Weights are plain tensors, never parametrisations: an optimizer updates them and `constrain_` brings them back to the
constraint set. What is stored is therefore what is certified, attacked and exported.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustflow import norms
from robustflow.errors import UserError

# The polar iteration takes a singular value s to s(3 − s²)/2 and converges from (0, √3). This is how far the root mean
# square of s² − 1 may be from 0 for it to be tried; where a single s has left the interval, the next steps see it grow.
_POLAR_BASIN = 0.25


class Convolution(nn.Module):
    """A zero-padded convolution x ↦ K ∗ x with odd kernel, stride 1 and no bias.

    With ``image_size`` n given, the kernel is held at spectral norm 1: after every update by one power iteration (which
    trains well, but only estimates a norm from below), and by the rigorous embedding bound of `robustflow.norms` when
    `constrain_` is asked to be exact. Both measure the circular convolution on a torus of size n + padding, of which
    the zero-padded one is a restriction: what training holds at 1 is what the certificate will see. (On small images
    the zero-padded norm itself is well below it; held at 1 instead, the last exact step shrank trained kernels by up
    to 30 % a layer and took the network's accuracy with it.) Without ``image_size`` the kernel is free.

    Shape: (B, in_channels, H, W) → (B, out_channels, H, W); `adjoint` goes back.

    >>> layer = Convolution(3, 8, 3, image_size=(8, 8))
    >>> layer.constrain_(exact=True)
    >>> x, y = torch.randn(1, 3, 8, 8), torch.randn(1, 8, 8, 8)
    >>> bool(torch.isclose((layer(x) * y).sum(), (x * layer.adjoint(y)).sum(), atol=1e-4))
    True
    """

    direction: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, *, image_size: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise UserError(f"a zero-padded convolution needs an odd kernel size, not {kernel_size}")
        self.in_channels, self.out_channels, self.image_size = in_channels, out_channels, image_size
        self.padding = kernel_size // 2
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        if image_size is not None:
            # Where power iteration stands. It belongs to the state of a training, not to the model: not persistent.
            torus = [size + self.padding for size in image_size]
            self.register_buffer("direction", torch.randn(1, in_channels, *torus), persistent=False)
            self.constrain_(exact=False, iterations=20)

    @torch.no_grad()
    def start_isometric_(self, spread: float = 0.1) -> None:
        """Start from a matrix with orthonormal rows or columns in the middle of the kernel, and a little of the rest.

        Source: delta-orthogonal kernels of Xiao, Bahri, Sohl-Dickstein, Schoenholz & Pennington, ICML 2018. A random
        kernel of norm 1 shortens most images to about half; after a few layers there is nothing left to learn from.
        ``spread``: what stays of the random kernel, so that the other pixels are seen from the first step on.

        >>> layer = Convolution(4, 4, 3, image_size=(8, 8))
        >>> layer.start_isometric_(spread=0.0)
        >>> x = torch.randn(1, 4, 8, 8)
        >>> bool(torch.isclose(layer(x).norm(), x.norm(), rtol=1e-4))
        True
        """
        if self.weight.is_meta:  # on "meta" a network has shapes only
            return
        middle = torch.empty_like(self.weight[:, :, 0, 0])
        nn.init.orthogonal_(middle)
        self.weight.mul_(spread)
        self.weight[:, :, self.padding, self.padding] += middle
        self.constrain_(iterations=20)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, self.weight, bias, padding=self.padding)

    def adjoint(self, y: Tensor) -> Tensor:
        """Kᵀ ∗ y, the transpose of `forward` without bias, padding included."""
        return F.conv_transpose2d(y, self.weight, padding=self.padding)

    @torch.no_grad()
    def constrain_(self, *, exact: bool = False, iterations: int = 1) -> None:
        """Divide the kernel by its spectral norm: an estimate, or, if ``exact``, a proved upper bound."""
        if self.image_size is None or self.weight.is_meta:  # on "meta" a network has shapes only
            return
        if exact:
            bound = norms.conv2d_norm(self.weight.double().cpu(), self.image_size, padding=self.padding)
            self.weight.div_(bound if bound > 0 else 1.0)
            return
        self.find_direction_(iterations)
        with torch.autocast(self.weight.device.type, enabled=False):
            self.weight.div_(self._circular(self.direction, self.weight).norm().clamp_min(1e-12))

    @torch.no_grad()
    def find_direction_(self, iterations: int = 30) -> None:
        """Power iteration: where the kernel as it is now stretches most. The kernel stays."""
        if self.image_size is None or self.weight.is_meta:
            return
        transposed = self.weight.flip(2, 3).transpose(0, 1)
        with torch.autocast(self.weight.device.type, enabled=False):
            for _ in range(iterations):
                back = self._circular(self._circular(self.direction, self.weight), transposed)
                self.direction.copy_(back / back.norm().clamp_min(1e-12))

    def _circular(self, x: Tensor, kernel: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (self.padding,) * 4, mode="circular"), kernel)


class PatchConvolution(nn.Module):
    """A matrix W with orthonormal rows (or columns, if tall) on disjoint p × p patches, optionally on a shifted grid.

    Kernel = stride = p, so that no two patches overlap: the layer's singular values are those of the small matrix, and
    W orthogonal makes the layer orthogonal, borders included. (A zero-padded convolution is never orthogonal.) Shifting
    the grid between layers by `torch.roll`, itself an isometry, lets patches talk to each other.

    Shape: (B, in_channels, H, W) → (B, out_channels, H/p, W/p), H and W multiples of p; `adjoint` goes back.

    >>> layer = PatchConvolution(3, 12, patch=2, shift=1)
    >>> x = torch.randn(1, 3, 8, 8)
    >>> bool(torch.allclose(layer.adjoint(layer(x)), x, atol=1e-5))
    True
    """

    def __init__(self, in_channels: int, out_channels: int, patch: int = 2, shift: int = 0) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.patch, self.shift = in_channels, out_channels, patch, shift
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels * patch * patch))
        nn.init.orthogonal_(self.weight)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (2, 3))
        p, (batch, channels, height, width) = self.patch, x.shape
        # Like a convolution, without the pixels at the far edges that no patch covers.
        rows, columns = height // p, width // p
        x = x[:, :, : rows * p, : columns * p].permute(0, 2, 3, 1).reshape(batch, rows, p, columns, p, channels)
        x = x.transpose(2, 3).reshape(batch, rows, columns, -1)
        return F.linear(x, self.matrix(), bias).permute(0, 3, 1, 2)

    def adjoint(self, y: Tensor) -> Tensor:
        """Wᵀ on every patch and the grid shifted back."""
        p, (batch, _, height, width) = self.patch, y.shape
        rows = (y.permute(0, 2, 3, 1) @ self.matrix()).view(batch, height, width, p, p, self.in_channels)
        x = rows.transpose(2, 3).reshape(batch, height * p, width * p, self.in_channels).permute(0, 3, 1, 2)
        return torch.roll(x, (self.shift, self.shift), (2, 3)) if self.shift else x

    def matrix(self) -> Tensor:
        """W with its columns in the order in which channels-last memory holds a patch: row, column, channel."""
        kernel = self.weight.view(self.out_channels, self.in_channels, self.patch, self.patch)
        return kernel.permute(0, 2, 3, 1).reshape(self.out_channels, -1)

    @torch.no_grad()
    def constrain_(self, *, exact: bool = False) -> None:
        """Return to the orthonormal matrices: one polar iteration 3/2 W − 1/2 W Wᵀ W, or, if ``exact``, the projection.

        The iteration is only used close to the constraint set, where one step squares the error. Under autocast its
        products are those of the lower precision: they make up a small correction, and the final projection is exact.
        """
        w = self.weight
        tall = w.shape[0] > w.shape[1]
        gram = w.T @ w if tall else w @ w.T
        excess = gram - torch.eye(len(gram), device=w.device)
        if exact or not bool(excess.norm() < _POLAR_BASIN * len(gram) ** 0.5):
            if not bool(torch.isfinite(w).all()):
                return  # the training loop reports divergence; an SVD would only raise something less clear
            u, _, v = torch.linalg.svd(w.double(), full_matrices=False)
            w.copy_(u @ v)
        else:
            w.sub_(w @ excess if tall else excess @ w, alpha=0.5)


class UnitRowLinear(nn.Linear):
    """A linear head whose rows have norm 1, so that margins and radii are in the same units.

    With unit rows the radius of a pair is (f_y − f_j)/(L·‖w_y − w_j‖), and ‖w_y − w_j‖ ≤ 2.

    >>> UnitRowLinear(4, 3).weight.norm(dim=1).round(decimals=4).tolist()
    [1.0, 1.0, 1.0]
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        nn.init.zeros_(self.bias)
        self.constrain_()

    @torch.no_grad()
    def constrain_(self, *, exact: bool = False) -> None:
        if self.weight.is_meta:
            return
        self.weight.div_(self.weight.norm(dim=1, keepdim=True).clamp_min(1e-12))
