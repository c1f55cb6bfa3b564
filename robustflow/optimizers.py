"""What updates the weights: the optimizers of a training and the schedule of their learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustflow.config import LoopConfig, TrainConfig
from robustflow.networks import Classifier

# Newton–Schulz: the quintic a·s + b·s³ + c·s⁵ that lifts small singular values fastest. It ends between 0.7 and 1.2,
# not at 1. Source: K. Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024.
_QUINTIC, _ITERATIONS = (3.4445, -4.7750, 2.0315), 4


@torch.no_grad()
def orthogonalized(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """About U Vᵀ of the matrix U S Vᵀ, by products in ``dtype`` alone.

    >>> orthogonalized(torch.diag(torch.tensor([3.0, 2.0])), torch.float32).diag().sub(1).abs().max().item() < 0.4
    True
    """
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    # The momentum of a unit that is never active decays to denormal numbers, whose products take a CPU many times
    # as long. What is below 1e-7 of the whole changes nothing else.
    x = F.hardshrink(x / x.norm().clamp_min(1e-7), 1e-7).to(dtype)
    a, b, c = _QUINTIC
    with torch.autocast(matrix.device.type, enabled=False):
        for _ in range(_ITERATIONS):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Steps along orthogonalised momentum: M ← βM + (1 − β)G, W ← W − lr·√max(1, rows/columns)·UVᵀ of (1 − β)G + βM.

    What `torch.optim.Muon` does without weight decay, but Newton–Schulz may run in float32: that one always runs it in
    bfloat16, the slower of the two on a CPU without AMX.
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float, momentum: float, dtype: torch.dtype) -> None:
        super().__init__(list(matrices), {"lr": lr, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                mean = state["momentum_buffer"].lerp_(weight.grad, 1 - group["momentum"])
                direction = orthogonalized(weight.grad.lerp(mean, group["momentum"]), self.dtype)
                weight.add_(direction, alpha=-group["lr"] * max(1, weight.shape[0] / weight.shape[1]) ** 0.5)


def build_optimizers(model: nn.Module, config: LoopConfig) -> list[torch.optim.Optimizer]:
    """The optimizers that together update every parameter.

    "muon", of classifiers only, takes steps of orthogonalised momentum (`Muon`) on the orthonormal matrices,
    whose constraint then needs no more than one polar iteration, and NAdam on the rest.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.optimizer == "sgd":
        return [
            torch.optim.SGD(
                trained,
                config.learning_rate,
                config.momentum,
                weight_decay=config.weight_decay,
                nesterov=config.nesterov,
            )
        ]
    if config.optimizer == "adam":
        return [torch.optim.Adam(trained, config.learning_rate, weight_decay=config.weight_decay)]
    chosen: list[torch.optim.Optimizer] = []
    if config.optimizer == "muon":
        assert isinstance(model, Classifier)
        assert isinstance(config, TrainConfig)
        matrices = model.orthonormal_weights()
        if matrices:
            precision = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
            chosen.append(Muon(matrices, config.muon_learning_rate, config.momentum, precision))
        identities = {id(matrix) for matrix in matrices}
        trained = [parameter for parameter in trained if id(parameter) not in identities]
    chosen.append(torch.optim.NAdam(trained, config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay))
    return chosen


def schedule(config: LoopConfig, progress: float) -> float:
    """The factor on every learning rate at ``progress`` in [0, 1).

    >>> config = TrainConfig(epochs=1, schedule="cosine")
    >>> schedule(config, 0.0), round(schedule(config, 0.5), 6)
    (1.0, 0.5)
    """
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "steps":
        return 0.1 ** int(progress * config.epochs / config.step_every)
    if config.schedule == "one-cycle" and progress < config.warmup:
        return 0.1 + 0.9 * progress / config.warmup
    start = config.warmup if config.schedule == "one-cycle" else 0.0
    return 0.5 * (1 + math.cos(math.pi * (progress - start) / (1 - start)))
