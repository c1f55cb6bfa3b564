"""Every loss against a loop over images and classes."""

from __future__ import annotations

import math

import pytest
import torch

from robustflow.config import CertifiedLoss, CrossEntropyLoss, HingeLoss, OffsetLoss
from robustflow.image_task import build_loss
from robustflow.losses import certified_cross_entropy, cross_entropy, hinge, offset_cross_entropy

torch.manual_seed(0)
LOGITS, LABELS, ROWS = (
    torch.randn(6, 4, dtype=torch.float64),
    torch.tensor([0, 1, 2, 3, 3, 0]),
    torch.randn(4, 5).double(),
)


def softmax_loss(logits: list[float], label: int) -> float:
    return -math.log(math.exp(logits[label]) / sum(math.exp(value) for value in logits))


def test_hinge() -> None:
    total = 0.0
    for f, y in zip(LOGITS.tolist(), LABELS.tolist(), strict=True):
        total += sum(max(0.0, 0.7 - f[y] + f[j]) for j in range(4) if j != y) / 4
    assert float(hinge(0.7)(LOGITS, LABELS, ROWS, 0.3)) == pytest.approx(total / 6)


@pytest.mark.parametrize(("offset", "temperature"), [(0.0, 1.0), (0.4, 0.25), (1.5, 3.0)])
def test_offset_cross_entropy(offset: float, temperature: float) -> None:
    total = 0.0
    for f, y in zip(LOGITS.tolist(), LABELS.tolist(), strict=True):
        shifted = [(value - offset * (j == y)) / temperature for j, value in enumerate(f)]
        total += temperature * softmax_loss(shifted, y)
    assert float(offset_cross_entropy(offset, temperature)(LOGITS, LABELS, ROWS, 0.0)) == pytest.approx(total / 6)
    if offset == 0:
        assert float(cross_entropy(temperature)(LOGITS, LABELS, ROWS, 0.0)) == pytest.approx(total / 6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_by_its_formula(smoothing: float) -> None:
    total = 0.0
    for logits, label in zip(LOGITS.tolist(), LABELS.tolist(), strict=True):
        normaliser = math.log(sum(math.exp(value / 2) for value in logits))
        shares = [smoothing / len(logits) + (1 - smoothing) * (j == label) for j in range(len(logits))]
        total += 2 * sum(share * (normaliser - value / 2) for share, value in zip(shares, logits, strict=True))
    assert float(cross_entropy(2.0, smoothing)(LOGITS, LABELS, ROWS, 0.0)) == pytest.approx(total / len(LABELS))


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_certified_cross_entropy(progress: float) -> None:
    """ε grows from a tenth to all of it; every class but the label is raised by ε·‖w_y − w_j‖."""
    radius, total = 0.8 * (0.1 + 0.9 * progress), 0.0
    for f, y in zip(LOGITS.tolist(), LABELS.tolist(), strict=True):
        worst = []
        for j, value in enumerate(f):
            distance = math.sqrt(sum((a - b) ** 2 for a, b in zip(ROWS[y].tolist(), ROWS[j].tolist(), strict=True)))
            worst.append((value + radius * distance * (j != y)) / 0.5)
        total += 0.5 * softmax_loss(worst, y)
    loss = certified_cross_entropy(0.8, 0.5)(LOGITS, LABELS, ROWS, progress)
    assert float(loss) == pytest.approx(total / 6, rel=1e-6)


def test_the_certificate_s_loss_gives_the_head_no_reason_to_make_its_rows_alike() -> None:
    rows = ROWS.clone().requires_grad_()
    logits = LOGITS.clone().requires_grad_()
    certified_cross_entropy(0.8, 0.5)(logits, LABELS, rows, 1.0).backward()
    assert rows.grad is None
    assert logits.grad is not None


@pytest.mark.parametrize(
    ("configured", "loss"),
    [
        (HingeLoss(kind="hinge", margin=0.3), hinge(0.3)),
        (CrossEntropyLoss(kind="cross-entropy", temperature=2.0), cross_entropy(2.0)),
        (OffsetLoss(kind="offset", offset=0.2, temperature=0.5), offset_cross_entropy(0.2, 0.5)),
        (CertifiedLoss(kind="certified", epsilon=0.3, temperature=0.5), certified_cross_entropy(0.3, 0.5)),
    ],
)
def test_a_config_builds_its_loss(configured, loss) -> None:
    assert torch.equal(build_loss(configured)(LOGITS, LABELS, ROWS, 0.4), loss(LOGITS, LABELS, ROWS, 0.4))
