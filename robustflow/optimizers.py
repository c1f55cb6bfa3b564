"""What updates the weights: the optimizers of a training and the schedule of their learning rates."""

from __future__ import annotations

import math

import torch
from torch import nn

from robustflow.config import LoopConfig, TrainConfig
from robustflow.networks import Classifier


def build_optimizers(model: nn.Module, config: LoopConfig) -> list[torch.optim.Optimizer]:
    """The optimizers that together update every parameter.

    "muon", of classifiers only, takes steps of orthogonalised momentum (torch.optim.Muon) on the orthonormal matrices,
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
            chosen.append(
                torch.optim.Muon(
                    matrices, config.muon_learning_rate, weight_decay=0.0, momentum=config.momentum, ns_steps=4
                )
            )
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
