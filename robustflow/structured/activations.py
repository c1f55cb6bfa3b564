"""Activations σ of the fields, with what their mathematics needs: an antiderivative and the largest slope."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robustflow.errors import UserError


@dataclass(frozen=True)
class Activation:
    """σ = ``function``, Σ' = σ for Σ = ``integral``, and 0 ≤ σ' ≤ ``slope``."""

    function: Callable[[Tensor], Tensor]
    integral: Callable[[Tensor], Tensor]
    slope: float


def _log_cosh(x: Tensor) -> Tensor:
    return x.abs() + F.softplus(-2 * x.abs()) - math.log(2.0)


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.5)


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(F.relu, lambda x: 0.5 * F.relu(x) ** 2, 1.0),
    "leaky-relu": Activation(_leaky, lambda x: 0.5 * x * _leaky(x), 1.0),  # slopes ½ and 1
    "tanh": Activation(torch.tanh, _log_cosh, 1.0),
    "sigmoid": Activation(torch.sigmoid, F.softplus, 0.25),
}


def activation_of(name: str) -> Activation:
    """The activation of this name.

    >>> activation_of("sigmoid").slope
    0.25
    """
    if name not in ACTIVATIONS:
        raise UserError(f"unknown activation {name!r}: one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
