"""Pull found adversarials along their segment towards the clean image."""

from __future__ import annotations

import torch
from torch import Tensor

from attacks.victim import Victim, l2_norms, margins

ROUNDS = 6  # forward passes a row at most
AIM = 1e-3  # aim this far (of the clean margin) behind the boundary: a point on it would flip with rounding


def shrink(
    model: Victim, clean: Tensor, found: Tensor, labels: Tensor, start: Tensor, end: Tensor, rounds: int = ROUNDS
) -> tuple[Tensor, Tensor]:
    r"""A smaller adversarial :math:`x + t (x' - x)`, :math:`0 < t \le 1`, from a root of the margin along the segment.

    The bracket starts at t = 0 (margin ``start`` > 0) and t = 1 (margin ``end`` < 0) and is narrowed by false
    position in the Illinois form; a point replaces the found one only when its own forward pass says misclassified.
    One forward pass a row and round, and rows leave once they are tight (a linear margin: after one round).

    Shape: clean, found (N, C, H, W); labels, start, end (N,) -> images (N, C, H, W), norms (N,) float64.
    """
    found, norms = found.clone(), l2_norms(found - clean)
    aim = AIM * start
    low, high = torch.zeros_like(start), torch.ones_like(start)
    at_low, at_high = start + aim, end + aim  # of the shifted margin, whose root lies just behind the boundary
    last = torch.zeros_like(start)
    direction = found.double() - clean.double()
    for _ in range(rounds):
        active = ((high - low > 1e-3 * high) & (at_high < -aim) & (at_low > 0)).nonzero()[:, 0]
        if len(active) == 0:
            break
        lo, hi, g_lo, g_hi = low[active], high[active], at_low[active], at_high[active]
        t = lo + (hi - lo) * (g_lo / (g_lo - g_hi)).clamp(0.02, 0.98)
        trial = (clean[active].double() + t[:, None, None, None] * direction[active]).to(clean.dtype).clamp(0.0, 1.0)
        margin = margins(model.verified_logits(trial), labels[active])
        trial_norms = l2_norms(trial - clean[active])
        broken = (margin < 0) & (trial_norms < norms[active])
        side = torch.where(broken, -1.0, 1.0).to(last.dtype)
        again = side == last[active]  # the same end moved twice: halve the weight of the other one (Illinois)
        low[active], at_low[active] = torch.where(broken, lo, t), torch.where(
            broken, torch.where(again, g_lo / 2, g_lo), (margin + aim[active]).clamp_min(0))
        high[active], at_high[active] = torch.where(broken, t, hi), torch.where(
            broken, margin + aim[active], torch.where(again, g_hi / 2, g_hi))
        last[active] = side
        rows = active[broken]
        found[rows], norms[rows] = trial[broken], trial_norms[broken]
    return found, norms
