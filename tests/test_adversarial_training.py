"""The attack inside of adversarial training, against linear models, whose worst point in a ball is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustflow.adversarial_training import adversaries


def attack(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, epsilon: float, steps: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return adversaries(model, images, labels, epsilon=epsilon, steps=steps, generator=generator)


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_it_stays_in_the_ball_and_among_images(steps: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    images = torch.rand(16, 3, 4, 4).round()  # at the border of [0, 1]
    moved = attack(model, images, torch.arange(16) % 3, 0.5, steps)
    assert (moved - images).flatten(1).norm(dim=1).max() <= 0.5 + 1e-6
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert not moved.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_finds_the_worst_point_of_a_linear_model() -> None:
    torch.manual_seed(1)
    weights = torch.randn(48)
    head = nn.Linear(48, 2)
    with torch.no_grad():
        head.weight.copy_(torch.stack([weights, -weights]))
        head.bias.zero_()
    images, labels = torch.full((6, 3, 4, 4), 0.5), torch.arange(6) % 2
    moved = attack(nn.Sequential(nn.Flatten(), head), images, labels, 0.3, 40) - images
    sign = torch.where(labels == 0, -1.0, 1.0)
    # How far the logits move of what they could at most; a tangential part of the random start remains.
    assert ((moved.flatten(1) @ weights * sign) / (0.3 * weights.norm())).min() > 0.95


def test_two_steps_already_raise_the_loss_more_than_noise() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    images, labels = torch.rand(32, 3, 8, 8), torch.arange(32) % 5
    moved = attack(model, images, labels, 0.4, 2)
    noise = torch.randn_like(images)
    noise = (images + 0.4 * noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).clamp(0, 1)
    loss = nn.functional.cross_entropy
    clean, found, random = (loss(model(x), labels).item() for x in (images, moved, noise))
    assert found - clean > 5 * abs(random - clean)


def test_a_seed_gives_the_same_images() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    images, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 0, 1])
    assert torch.equal(attack(model, images, labels, 0.2, 3), attack(model, images, labels, 0.2, 3))
