"""Losses that train a margin: from logits, labels and the head's rows to one number.

For a certificate it is the margin relative to L·‖w_y − w_j‖ that counts; the losses differ in how they push it up.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# (logits (B, K), labels (B,), head rows (K, D), progress of training in [0, 1]) -> scalar
Loss = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def hinge(margin: float) -> Loss:
    """Multi-class hinge Σ_{j≠y} max(0, margin − f_y + f_j)/K: the loss of the paper (arXiv 2210.02373).

    >>> hinge(0.5)(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), torch.eye(2), 0.0).item()
    0.0
    """

    def loss(logits: Tensor, labels: Tensor, rows: Tensor, progress: float) -> Tensor:
        return F.multi_margin_loss(logits, labels, margin=margin)

    return loss


def cross_entropy(temperature: float = 1.0, smoothing: float = 0.0) -> Loss:
    """T·CE(f/T, (1 − s)·onehot(y) + s/K): a share s of every label is spread over all K classes.

    Source of the smoothing: Szegedy, Vanhoucke, Ioffe, Shlens & Wojna, CVPR 2016.

    >>> even = cross_entropy(smoothing=0.2)(torch.zeros(1, 4), torch.tensor([0]), torch.eye(4), 0.0)
    >>> round(float(even), 4)  # log 4
    1.3863
    """

    def loss(logits: Tensor, labels: Tensor, rows: Tensor, progress: float) -> Tensor:
        return temperature * F.cross_entropy(logits / temperature, labels, label_smoothing=smoothing)

    return loss


def offset_cross_entropy(offset: float, temperature: float) -> Loss:
    """T·CE((f − u·onehot(y))/T, y): cross-entropy after taking the offset u from the right class.

    Source: Prach & Lampert (AOL), ECCV 2022. With T = ¼ and u of two to three times the target radius it stops pushing
    samples that are certified well beyond the target.

    >>> labels = torch.tensor([0])
    >>> plain, shifted = (offset_cross_entropy(u, 1.0)(torch.eye(2)[:1], labels, torch.eye(2), 0.0) for u in (0.0, 0.3))
    >>> bool(shifted > plain)
    True
    """

    def loss(logits: Tensor, labels: Tensor, rows: Tensor, progress: float) -> Tensor:
        shifted = logits - offset * F.one_hot(labels, logits.shape[1])
        return temperature * F.cross_entropy(shifted / temperature, labels)

    return loss


def certified_cross_entropy(epsilon: float, temperature: float) -> Loss:
    """T·CE of the worst logits that the certificate admits at ε: f_j + ε·‖w_y − w_j‖ for every j ≠ y, L = 1.

    The certificate-aware loss (EMMA in Hu et al., NeurIPS 2023, with every class shifted by its own pairwise margin).
    ε grows linearly from a tenth to its full value over the training. The distances carry no gradient: a head must not
    make its rows alike to look robust.
    """

    def loss(logits: Tensor, labels: Tensor, rows: Tensor, progress: float) -> Tensor:
        radius = epsilon * (0.1 + 0.9 * progress)
        distances = torch.cdist(rows.detach(), rows.detach())[labels]
        return temperature * F.cross_entropy((logits + radius * distances) / temperature, labels)

    return loss
