"""The attack inside of adversarial training, against linear models, whose worst point in a ball is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustflow import config, data, image_task
from robustflow.adversarial_training import adversaries, in_unit_ball
from robustflow.networks import create_model


def attack(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, epsilon: float, steps: int) -> torch.Tensor:
    start = in_unit_ball(images.shape, torch.Generator().manual_seed(0))
    return adversaries(model, images, labels, start, epsilon=epsilon, steps=steps)


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


def test_a_training_sees_the_attacked_images() -> None:
    """Its loss is that of images that are up to ε away, and larger than without the attack."""
    digits = data.load("digits")
    settings = config.TrainConfig(
        epochs=1, loss=config.CrossEntropyLoss(kind="cross-entropy"), crop=0, flip=False, optimizer="sgd"
    )
    attacked = settings.model_copy(update={"adversarial": config.AdversarialConfig(epsilon=0.5, steps=3)})
    torch.manual_seed(0)
    model = create_model("resnet", input_shape=(1, 8, 8), channels=(4, 8))
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    values = []
    for chosen in (settings, attacked):
        task = image_task.ImageTask(model, digits, chosen, device=torch.device("cpu"))
        values.append(float(task.loss(torch.arange(64), torch.Generator().manual_seed(1), 0.0)[0].detach()))
    clean, moved = seen[0], seen[-1]
    distances = (moved - clean).flatten(1).norm(dim=1)
    assert len(seen) == 1 + 4
    assert float(distances.min()) > 0.2
    assert float(distances.max()) <= 0.5 + 1e-6
    assert values[1] > values[0] + 0.01


def test_every_process_attacks_its_part_as_one_alone_would() -> None:
    digits = data.load("digits")
    settings = config.TrainConfig(
        epochs=1,
        loss=config.CrossEntropyLoss(kind="cross-entropy"),
        optimizer="sgd",
        adversarial=config.AdversarialConfig(epsilon=0.5, steps=2),
    )
    torch.manual_seed(0)
    model = create_model("nonexpansive", input_shape=(1, 8, 8), channels=(4,), layers=2)
    whole, first, second = (
        float(
            image_task.ImageTask(model, digits, settings, device=torch.device("cpu"), part=part)
            .loss(torch.arange(32), torch.Generator().manual_seed(1), 0.0)[0]
            .detach()
        )
        for part in (slice(None), slice(0, 16), slice(16, 32))
    )
    assert whole == pytest.approx((first + second) / 2, abs=1e-6)
