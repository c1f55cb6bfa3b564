"""Masked gradients: a robust accuracy that stands only because the gradients lead nowhere.

Two signs, both sound on their own images and free of thresholds on the network:

- an attack without gradients breaks images, inside the same ball, that every gradient attack left standing (Athalye,
  Carlini and Wagner, 2018, arXiv:1802.00420: "black-box attacks are better than white-box attacks"), and by a clear
  lead: at most ``LEAD`` times the norm that the gradient attacks reached, so that no photo finish counts. Where
  minimum-norm gradient attacks ran, which no epsilon bounds, such a lead counts at any distance: on CIFAR-10 images
  1,500 questions for a class get within 2 to 5 times the norm of DDN, too far for most radii of interest;
- the margin's gradient at the clean image is exactly zero or not finite, so that no gradient attack can even start.

A random step larger than epsilon is not compared with the attack at epsilon: noise outside of the ball says nothing
about the ball. Noise inside of it is where the attack without gradients starts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from attacks.victim import Victim, margins

LEAD = 0.9  # at most this share of the gradient attacks' norm
SHARE, FEWEST = 0.01, 2  # of the images attacked: fewer are luck, not a mask


def dead_gradients(victim: Victim, images: Tensor, labels: Tensor) -> Tensor:
    r"""Where :math:`\nabla_x m(x)` of the margin :math:`m = f_y - \max_{j \ne y} f_j` is zero or not finite.

    Shape: images (N, C, H, W), labels (N,) -> (N,) bool. One forward and one backward pass an image.

    >>> from attacks import Victim
    >>> images, labels = torch.full((1, 1, 1, 2), 0.7), torch.tensor([0])
    >>> dead_gradients(Victim(lambda x: x.flatten(1)), images, labels)
    tensor([False])
    >>> dead_gradients(Victim(lambda x: x.flatten(1).round()), images, labels)
    tensor([True])
    """
    with torch.enable_grad():
        inputs = images.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(margins(victim(inputs), labels).sum(), [inputs])
    size = gradient.flatten(1).abs().amax(dim=1)
    return (size == 0) | ~torch.isfinite(size)


def gradient_masking(
    epsilons: Sequence[float] | np.ndarray, gradient_norms: np.ndarray, norms: np.ndarray, attacked: np.ndarray,
    dead: np.ndarray | None = None, attack: str = "the attack without gradients", unbounded: bool = False,
) -> list[str]:
    """The signs of masked gradients as warnings, one line each; empty if there is none.

    ``gradient_norms`` are the smallest adversarial norms found with gradients (inf: none), ``norms`` the smallest
    found at all, ``attacked`` the images attacked, ``dead`` those of them with a dead gradient; all of shape (N,).
    ``unbounded``: minimum-norm gradient attacks ran on the images attacked, so their norms can be compared directly.
    A sweep with both kinds of attacks, such as the set "check", calls it by itself and puts the lines in its warnings.

    >>> norms = np.array([0.1, 0.1, 0.1, 0.1])
    >>> lines = gradient_masking([0.12], np.array([np.inf, np.inf, 0.15, 0.1]), norms, np.ones(4, dtype=bool))
    >>> lines[0][:80]
    'masked gradients: the attack without gradients breaks 3 of 4 images at epsilon 0'
    """
    count = int(attacked.sum())
    needed = max(FEWEST, SHARE * count)
    found: list[str] = []
    clear = attacked & (norms < LEAD * gradient_norms)
    leads = [int((clear & (norms <= epsilon) & (gradient_norms > epsilon)).sum()) for epsilon in epsilons]
    if leads and max(leads) >= needed:
        worst = int(np.argmax(leads))
        found.append(f"masked gradients: {attack} breaks {leads[worst]} of {count} images at epsilon"
                     f" {epsilons[worst]:.4g} that no gradient attack breaks there; the robust accuracy of gradient"
                     " attacks on this model means nothing")
    elif unbounded and clear.sum() >= needed:
        found.append(f"masked gradients: {attack} finds adversarials of {int(clear.sum())} of {count} images at less"
                     f" than {LEAD:g} times the norm that any gradient attack needs, all beyond the radii asked for")
    if dead is not None and (dead & attacked).sum() >= needed:
        found.append(f"masked gradients: the gradient of the margin is zero or not finite on {int(dead.sum())} of"
                     f" {count} images; gradient attacks cannot start there")
    return found
