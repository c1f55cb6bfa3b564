"""Adversarial training: the images that the loss sees are attacked first. A baseline; it proves nothing.

Source: Madry, Makelov, Schmidt, Tsipras & Vladu, "Towards deep learning models resistant to adversarial attacks",
arXiv 1706.06083. The attack runs on the network as it trains: batch normalisation uses the statistics of its batches,
and its running statistics are of attacked images.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _shortened(delta: Tensor, radius: float) -> Tensor:
    """δ·min(1, radius/‖δ‖) for each image."""
    norms = delta.flatten(1).norm(dim=1).clamp_min(1e-12)
    return delta * (radius / norms).clamp_max(1.0).view(-1, *(1,) * (delta.dim() - 1))


def in_unit_ball(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Points drawn evenly from the unit L2 ball, one for each image of ``shape`` (B, C, H, W).

    On the CPU, so that a seed means the same points on every device.
    """
    direction = torch.randn(shape, generator=generator)
    length = torch.rand(shape[0], generator=generator) ** (1 / shape[1:].numel())
    return direction * (length / direction.flatten(1).norm(dim=1)).view(-1, *(1,) * (len(shape) - 1))


def adversaries(
    logits: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, start: Tensor, *, epsilon: float, steps: int
) -> Tensor:
    """x + δ, ‖δ‖₂ ≤ ε, by projected gradient ascent of cross-entropy from x + ε·``start``.

    A step goes 2.5·ε/steps along the normalised gradient of each image, then back into the ball and into [0, 1].

    Shape: images (B, C, H, W) in [0, 1], labels (B,), start as images → (B, C, H, W) in [0, 1], without a gradient.

    >>> x, y = torch.full((2, 1, 2, 2), 0.5), torch.tensor([0, 1])
    >>> sums = lambda x: torch.stack([-x.sum((1, 2, 3)), x.sum((1, 2, 3))], 1)
    >>> start = in_unit_ball(x.shape, torch.Generator().manual_seed(0))
    >>> moved = adversaries(sums, x, y, start, epsilon=0.2, steps=40) - x
    >>> [round(total, 1) for total in moved.sum((1, 2, 3)).tolist()]  # along (1, 1, 1, 1)/2: at most 0.4
    [0.4, -0.4]
    """
    shape = (len(images), *(1,) * (images.dim() - 1))
    delta = epsilon * start.to(images)
    for _ in range(steps):
        x = (images + delta).clamp(0, 1).requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(logits(x).float(), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, x)
        direction = gradient / gradient.flatten(1).norm(dim=1).clamp_min(1e-12).view(shape)
        delta = _shortened((x.detach() - images) + 2.5 * epsilon / steps * direction, epsilon)
    return (images + delta).clamp(0, 1).detach()
