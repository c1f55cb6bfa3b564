"""Images that an 8-bit file can hold: pixels that are multiples of 1/255."""

from __future__ import annotations

import torch
from torch import Tensor

from attacks.victim import AttackInputError

LEVELS = 255
LADDER = (1.0, 1.1, 1.25, 1.5, 2.0)  # lengths, of a shrunk adversarial's, at which rounding is tried


def check_grid(images: Tensor) -> None:
    """Refuse images off the grid: their 8-bit neighbours would not be perturbations of an 8-bit image."""
    off = (images * LEVELS - (images * LEVELS).round()).abs().amax().item()
    if off > 1e-3:
        raise AttackInputError("eight_bit needs images whose pixels are multiples of 1/255, but one is"
                               f" {off:.3g} of a level away; round them first or leave eight_bit off")


def on_grid(images: Tensor, clean: Tensor, epsilon: float | None) -> Tensor:
    r"""Images rounded to multiples of 1/255, towards the clean image where the nearest would leave the ball.

    Truncating a perturbation :math:`\delta` towards 0 never makes it longer, so some choice between the nearest and
    the next level towards the clean image always fits :math:`\|\delta\|_2 \le \varepsilon`. The pixels truncated are
    as few as that takes, those first whose nearest level was the farther away. Unmoved pixels stay as they are, bit
    by bit.

    Shape: images, clean (N, C, H, W) in [0, 1], clean on the grid -> (N, C, H, W), in clean's dtype.

    >>> clean = torch.zeros(1, 1, 1, 3)
    >>> moved = torch.tensor([[[[1.6, 2.8, 0.4]]]]) / 255
    >>> (on_grid(moved, clean, 1.0) * 255).round().tolist()
    [[[[2.0, 3.0, 0.0]]]]
    >>> (on_grid(moved, clean, float(moved.norm())) * 255).round().tolist()
    [[[[1.0, 3.0, 0.0]]]]
    """
    start = (clean.double() * LEVELS).round()
    delta = (images.double() * LEVELS - start).flatten(1)
    size, sign = delta.abs(), delta.sign()
    nearest, truncated = size.round(), size.floor()
    if epsilon is not None:
        # A pixel k/255 in float32 is off by half an ulp at most: the ball is drawn that much smaller.
        limit = LEVELS * max(epsilon - 2 * 2.0**-25 * size.shape[1] ** 0.5, 0.0)
        saved = nearest**2 - truncated**2  # positive where rounding went away from the clean image, else 0
        order = torch.where(saved > 0, nearest - size, -torch.inf).argsort(dim=1, descending=True, stable=True)
        excess = (nearest**2).sum(dim=1, keepdim=True) - limit**2
        before = saved.gather(1, order).cumsum(dim=1) - saved.gather(1, order)
        pulled = torch.zeros_like(size).scatter(1, order, (before < excess).to(size.dtype))
        nearest = torch.where(pulled > 0, truncated, nearest)
    level = (start + (sign * nearest).reshape(start.shape)).clamp(0, LEVELS)
    return torch.where(level == start, clean, (level / LEVELS).to(clean.dtype))
