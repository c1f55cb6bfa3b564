"""Every wrong input is one clear line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attacks import AttackInputError, sweep


def linear(images: Tensor) -> Tensor:
    return images.flatten(1)[:, :3]


IMAGES = torch.rand(4, 1, 2, 2)
# Classified right, so that every attack has something to do.
GOOD: dict[str, Any] = {
    "model": linear, "images": IMAGES, "labels": linear(IMAGES).argmax(dim=1), "epsilons": [0.1, 0.2],
}


def returns(logits: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda images: logits


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"labels": torch.rand(4)}, "integers"),
        ({"labels": torch.tensor([True, False, True, True])}, "integers"),
        ({"labels": "0120"}, "integers"),
        ({"labels": [0.5, 1, 2, 0]}, "integers"),
        ({"labels": torch.tensor([0, 1, 2])}, "shape"),
        ({"labels": torch.zeros(4, 3, dtype=torch.int64)}, "shape"),
        ({"labels": torch.tensor([0, 1, 3, 0])}, "out of range"),
        ({"labels": torch.tensor([0, 1, -1, 0])}, "negative"),
        ({"images": torch.rand(4, 1, 2, 2) * 4 - 2}, "normalised"),
        ({"images": torch.rand(4, 1, 2, 2) * 255}, "255"),
        ({"images": torch.rand(4, 1, 2, 2) + 0.5}, "clip"),
        ({"images": (torch.rand(4, 1, 2, 2) * 255).byte()}, "255"),
        ({"images": torch.rand(0, 1, 2, 2), "labels": torch.zeros(0, dtype=torch.int64)}, "nothing to attack"),
        ({"images": torch.rand(4, 2, 2)}, "shape"),
        ({"images": [[0.5]]}, "tensor"),
        ({"images": (torch.rand(4, 1, 2, 2) - 0.5) / 0.25}, "put the normalisation inside the model"),
        ({"eight_bit": True}, "multiples of 1/255"),
        ({"labels": None}, "integers"),
        ({"labels": torch.zeros(4, dtype=torch.complex64)}, "integers"),
        ({"images": torch.full((4, 1, 2, 2), torch.nan)}, "NaN"),
        ({"images": torch.full((4, 1, 2, 2), torch.inf)}, "infinite"),
        ({"epsilons": [-0.1, 0.1]}, "negative"),
        ({"epsilons": [0.1, float("nan")]}, "finite"),
        ({"epsilons": [0.1, 0.1]}, "more than once"),
        ({"epsilons": [0.2, 0.1]}, "increasing"),
        ({"epsilons": []}, "empty"),
        ({"epsilons": 0.5}, "list of numbers"),
        ({"epsilons": ["a"]}, "list of numbers"),
        ({"epsilons": [0.1, 0.2, 0.2, 0.3]}, "0.2 more than once"),
        ({"epsilons": [float("inf")]}, "finite"),
        ({"attacks": "fgsm9000"}, "standard.*ddn"),
        ({"attacks": "ddn,,deepfool"}, "unknown attack ''"),
        ({"attacks": ""}, "comma list"),
        ({"attacks": None}, "comma list"),
        ({"certified_radii": [0.1, 0.2]}, "certified_radii"),
        ({"certified_radii": [0.1, 0.2, 0.3, float("nan")]}, "NaN"),
        ({"certified_radii": ["a"] * 4}, "numbers"),
        ({"batch_size": 0}, "batch_size"),
        ({"indices": [1, 2, 3, 3]}, "distinct"),
        ({"indices": [1, 2]}, "indices"),
        ({"model": 7}, "callable"),
        ({"model": returns(torch.full((4, 3), torch.nan))}, "NaN"),
        ({"model": returns(torch.rand(4))}, "shape"),
        ({"model": returns(torch.rand(4, 1))}, "2 classes"),
        ({"model": returns(torch.rand(3, 3))}, "shape"),
        ({"model": returns(torch.ones(4, 3, dtype=torch.int64))}, "floating"),
        ({"model": lambda images: [1, 2]}, "floating"),
        ({"model": lambda images: linear(images).detach()}, "no gradient"),
        ({"model": lambda images: torch.where(images.flatten(1)[:, :3] == 0, torch.nan, 1.0) / 0}, "NaN or infinite"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(4, 3))}, "training mode"),
    ],
)
def test_one_line_says_what_is_wrong(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(AttackInputError, match=says) as caught:
        sweep(**{**GOOD, **wrong})
    assert "\n" not in str(caught.value)


def test_arrays_and_lists_are_welcome() -> None:
    images = np.random.default_rng(0).random((4, 1, 2, 2))
    one = sweep(linear, images, [0, 1, 2, 0], np.array([0.1, 0.2]))  # type: ignore[arg-type]
    two = sweep(linear, torch.tensor(images), torch.tensor([0, 1, 2, 0], dtype=torch.uint8), [0.1, 0.2])
    assert one.samples.equals(two.samples)
