"""What `certify` takes, what it refuses, and in which words."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from robustflow.certificates import Certificate, certify
from robustflow.errors import UserError
from robustflow.networks import create_model


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def certify_with(**changes: Any) -> Certificate:
    arguments: dict[str, Any] = {
        "module": nn.Sequential(nn.Flatten(), nn.Linear(4, 2)),
        "images": torch.rand(3, 1, 2, 2),
        "labels": torch.tensor([0, 1, 1]),
    }
    arguments |= changes
    return certify(arguments.pop("module"), arguments.pop("images"), arguments.pop("labels"), **arguments)


def poisoned_head() -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    torch.nn.init.constant_(net[1].bias, math.nan)
    return net


def poisoned_layer() -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    net[1].weight.data[0, 0] = math.nan
    return net


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.rand(3, 1, 2, 2) + 1}, r"\[0, 1\]"),
        ({"images": -torch.rand(3, 1, 2, 2)}, r"\[0, 1\]"),
        ({"images": torch.full((3, 1, 2, 2), math.nan)}, "NaN"),
        ({"images": torch.zeros(3, 1, 2, 2, dtype=torch.uint8)}, "divide by 255"),
        ({"images": torch.rand(3, 1, 2, 2).half()}, "float32 or float64"),
        ({"images": torch.rand(3, 1, 5, 2)}, "does not take"),
        ({"images": torch.rand(3)}, "batch"),
        ({"images": torch.rand(0, 1, 2, 2)}, "n >= 1"),
        ({"labels": torch.tensor([0, 1, 2])}, r"outside 0\.\.1"),
        ({"labels": torch.tensor([0, 1, -1])}, r"outside 0\.\.1"),
        ({"labels": torch.tensor([0, 1])}, "3 integers"),
        ({"labels": torch.tensor([0.0, 1.0, 1.0])}, "3 integers"),
        ({"batch_size": 0}, "batch_size"),
        ({"module": nn.Sequential(nn.Flatten(), nn.ReLU())}, "head is a ReLU, not linear"),
        ({"module": nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.Softmax(1))}, "head is a Softmax"),
        ({"module": nn.Sequential()}, "empty"),
        ({"module": nn.Linear(4, 2)}, "cannot be certified"),
        ({"module": nn.Sequential(nn.Flatten(), Odd(), nn.Linear(4, 2))}, "1 is a Odd"),
        ({"module": nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).half()}, "float16"),
        ({"module": nn.Sequential(nn.Flatten(), nn.Linear(4, 1))}, "single class"),
        ({"module": nn.Sequential(nn.Linear(2, 2))}, "flat"),
        ({"module": poisoned_head()}, "NaN"),
        ({"module": poisoned_layer()}, r"1\.weight holds NaN"),
        ({"module": nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(4, 2))}, r"BatchNorm2d.*\.eval\(\)"),
        ({"module": nn.Sequential(nn.Flatten(), nn.Linear(4, 4).bfloat16(), nn.Linear(4, 2))}, r"cast the model first"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        certify_with(**changes)


def test_classifier_refuses_images_of_another_size() -> None:
    model = create_model("naive", input_shape=(1, 4, 4), channels=(2,), layers=2)
    with pytest.raises(UserError, match=r"the network takes \(1, 4, 4\)"):
        certify(model.eval(), torch.rand(1, 1, 8, 8), torch.tensor([0]))


def test_numpy_arrays_are_taken() -> None:
    certificate = certify_with(images=np.zeros((1, 1, 2, 2), dtype=np.float32), labels=np.array([0]))
    assert certificate.radii.shape == (1,)


def test_parametrised_weights_are_certified_as_stored() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), parametrizations.spectral_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2)
    ).eval()
    plain = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), net[3])
    plain[1].weight.data, plain[1].bias.data = net[1].weight.detach().clone(), net[1].bias.detach()
    x = torch.rand(10, 1, 2, 2)
    labels = plain(x).argmax(1)
    np.testing.assert_array_equal(certify(net, x, labels).radii, certify(plain, x, labels).radii)


@pytest.mark.parametrize("kind", [parametrizations.spectral_norm, parametrizations.orthogonal])
def test_certifying_a_parametrised_network_leaves_it_as_it_is(kind: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), kind(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2)).eval()
    images = torch.rand(3, 1, 2, 2)
    before, names = net(images), [name for name, _ in net.named_parameters()]
    certify(net, images)
    assert torch.equal(net(images), before)
    assert [name for name, _ in net.named_parameters()] == names
    net(images).sum().backward()  # and it can still be trained
