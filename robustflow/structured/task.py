"""Learning a flow from its steps: the mean square of the error of K predictions in a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from robustflow.errors import UserError
from robustflow.steps import Flow
from robustflow.structured.config import UnrollConfig
from robustflow.structured.systems import Data


def rollout(model: nn.Module, start: Tensor, steps: int) -> Tensor:
    """Ψ(x), Ψ(Ψ(x)), …: (N, *state) → (N, steps, *state).

    >>> rollout(nn.Threshold(0.5, 0.0), torch.tensor([[0.3], [0.7]]), 2).squeeze(2)
    tensor([[0.0000, 0.0000],
            [0.7000, 0.7000]])
    """
    states, x = [], start
    for _ in range(steps):
        x = model(x)
        states.append(x)
    return torch.stack(states, 1)


class UnrollTask:
    """A model of one step δt and trajectories, as a `training.Task`.

    Loss: (1/K) Σ_{k ≤ K} mean |Ψᵏ(x₀ + η) − x_k|², where x₀, …, x_K is a window of the trajectory, its place drawn for
    every example and step, and η is uniform in ±noise. Source of unrolling and noise: Celledoni, Jackaman, Murari,
    Owren, Predictions based on pixel data (2023), section 4.

    Raises:
        UserError: trajectories are shorter than the steps to unroll.
    """

    def __init__(
        self, model: nn.Module, train: Data, validation: Data, config: UnrollConfig, device: torch.device
    ) -> None:
        self.config, self.device = config, device
        self.dtype = torch.float64 if config.precision == "float64" else torch.float32
        self.model = model.to(device=device, dtype=self.dtype)
        self.constraints: list[Callable[..., None]] = [
            constrain
            for module in model.modules()
            if callable(constrain := getattr(module, "constrain_", None)) and not isinstance(module, Flow)
        ]  # a Flow only calls those of its layers
        self.size, self.length = len(train), train.targets.shape[1]
        longest = max(config.unroll)
        if longest > self.length:
            raise UserError(f"unroll {longest} is more than the {self.length} steps of a training trajectory")
        self.inputs, self.targets = self._here(train.inputs), self._here(train.targets)
        self.moves = self.targets.shape[2:] == self.inputs.shape[1:]  # a regression's outputs are no next inputs
        if longest > 1 and not self.moves:
            raise UserError(f"unroll {longest}: outputs of shape {tuple(self.targets.shape[2:])} are not states")
        self.validation = self._here(validation.inputs), self._here(validation.targets[:, :longest])

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(device=self.device, dtype=self.dtype)

    def loss(self, batch: Tensor, drawn: torch.Generator, share: float) -> tuple[Tensor, Mapping[str, float]]:
        steps = self.config.unroll[int(share * len(self.config.unroll))]
        start, targets = self._window(batch, steps, drawn)
        if self.config.noise:
            noise = torch.rand(start.shape, generator=drawn, dtype=self.dtype).to(self.device)
            start = start + self.config.noise * (2 * noise - 1)
        return (rollout(self.model, start, steps) - targets).square().mean(), {}

    def _window(self, batch: Tensor, steps: int, drawn: torch.Generator) -> tuple[Tensor, Tensor]:
        if steps == self.length:
            return self.inputs[batch], self.targets[batch]
        first = torch.randint(self.length - steps + 1, (len(batch),), generator=drawn).to(self.device)
        begins = first.view(-1, *[1] * (self.inputs.dim() - 1)) == 0
        start = torch.where(begins, self.inputs[batch], self.targets[batch, first - 1])
        return start, self.targets[batch[:, None], first[:, None] + torch.arange(steps, device=self.device)]

    def figures(self, sums: Mapping[str, float], seen: int, last: bool) -> dict[str, Any]:
        """The same error over the longest unrolling from the start of every validation trajectory, without noise."""
        inputs, targets = self.validation
        self.model.eval()
        total = 0.0
        with torch.no_grad():
            for start, wanted in zip(inputs.split(self.config.batch_size), targets.split(self.config.batch_size),
                                     strict=True):  # fmt: skip
                predicted = rollout(self.model, start, wanted.shape[1])
                total += float((predicted - wanted).square().mean()) * len(start)
        self.model.train()
        return {"validation_loss": total / len(inputs), "validation_n": len(inputs)}

    def constrain(self, exact: bool = False) -> None:
        for constrain in self.constraints:
            constrain(exact=exact)
