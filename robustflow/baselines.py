"""The unconstrained network that a user would pick instead: a residual network with batch normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from robustflow.errors import UserError


class Residual(nn.Module):
    """shortcut(x) + body(x).

    Shape: whatever body and shortcut agree on.
    """

    def __init__(self, body: nn.Sequential, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut if shortcut is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.body(x)


def _conv_bn_relu(in_channels: int, out_channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    ]


def resnet_features(
    normalize: nn.Module, input_shape: tuple[int, int, int], channels: Sequence[int]
) -> tuple[nn.Sequential, int]:
    """A nine-layer-style residual network (He et al. 2016, in the shape that trains fastest on CIFAR-10).

    A stem, then for every further entry of ``channels`` a convolution, a 2 × 2 max-pool and a residual block of two
    convolutions; global max-pooling at the end. Returns the features and how many there are.
    """
    halvings = len(channels) - 1
    if min(input_shape[1:]) >> halvings < 1:
        raise UserError(f"{halvings} poolings are too many for an image of {input_shape[1]}×{input_shape[2]}")
    stages: list[nn.Module] = [normalize, *_conv_bn_relu(input_shape[0], channels[0])]
    for before, after in pairwise(channels):
        stages += [*_conv_bn_relu(before, after), nn.MaxPool2d(2)]
        stages.append(Residual(nn.Sequential(*_conv_bn_relu(after, after), *_conv_bn_relu(after, after))))
    last = (input_shape[1] >> halvings, input_shape[2] >> halvings)
    stages += [nn.MaxPool2d(last), nn.Flatten()]
    return nn.Sequential(*stages), channels[-1]
