"""What of a training is about images: augmentation, the margin's scale, accuracy, autocast, a process's part."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from robustflow import losses
from robustflow.adversarial_training import adversaries, in_unit_ball
from robustflow.config import CrossEntropyLoss, HingeLoss, LossConfig, OffsetLoss, TrainConfig
from robustflow.data import ImageSet, Split, augment, to_float
from robustflow.errors import UserError
from robustflow.networks import Classifier
from robustflow.regimes import REGIMES, nominal_constant


def build_loss(config: LossConfig) -> losses.Loss:
    if isinstance(config, HingeLoss):
        return losses.hinge(config.margin)
    if isinstance(config, CrossEntropyLoss):
        return losses.cross_entropy(config.temperature, config.smoothing)
    if isinstance(config, OffsetLoss):
        return losses.offset_cross_entropy(config.offset, config.temperature)
    return losses.certified_cross_entropy(config.epsilon, config.temperature)


class ImageTask:
    """A classifier and its images, as a `training.Task`."""

    def __init__(
        self,
        model: Classifier,
        images: ImageSet,
        config: TrainConfig,
        *,
        device: torch.device,
        part: slice = slice(None),
    ) -> None:
        """``part``: of every batch, what this process is to see (`distributed.Group.part`)."""
        self.config, self.device, self.part = config, device, part
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model: Classifier = model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
        self.data, self.validation = images.splits["train"].to(device), images.splits["validation"].to(device)
        self.size = len(self.data)
        if config.crop >= min(images.input_shape[1:]):
            raise UserError(f"crop {config.crop} is too large for images of {images.input_shape[1:]}")
        self.objective = build_loss(config.loss)
        self.scaled = model.regime in REGIMES and REGIMES[model.regime].constrained

    def loss(
        self, batch: Tensor, drawn: torch.Generator, share: float, model: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Mapping[str, float]]:
        """As `training.Task`; ``model``: called in place of the task's own."""
        call = self.model if model is None else model
        pixels, labels = self.data.pixels[batch], self.data.labels[batch]
        pixels = augment(pixels, crop=self.config.crop, flip=self.config.flip, generator=drawn)
        images, labels = to_float(pixels[self.part]), labels[self.part]
        with self._autocast():
            if self.config.adversarial is not None:
                images = self._attacked(images, labels, pixels.shape, drawn)
            logits = call(images)
        if self.scaled:
            logits = logits / nominal_constant(self.model)
        loss = self.objective(logits.float(), labels, self.model.head.weight, share)
        return loss, {"correct": int((logits.detach().argmax(1) == labels).sum())}

    def _attacked(self, images: Tensor, labels: Tensor, batch: torch.Size, drawn: torch.Generator) -> Tensor:
        attack = self.config.adversarial
        assert attack is not None
        count, height, width, channels = batch
        # Drawn for the whole batch, so that every process sees the part that one alone would.
        start = in_unit_ball(torch.Size((count, channels, height, width)), drawn)[self.part]
        return adversaries(self.model, images, labels, start, epsilon=attack.epsilon, steps=attack.steps)

    def figures(self, sums: Mapping[str, float], seen: int, last: bool) -> dict[str, Any]:
        validated = self.validation if last else self.validation.head(self.config.validate_images)
        return {
            "train_accuracy": sums["correct"] / seen,
            "validation_accuracy": self.accuracy(validated) if len(validated) else None,
            "validation_n": len(validated),
        }

    def accuracy(self, split: Split, batch_size: int = 500) -> float:
        """Share of a split that the model, in evaluation mode and full precision, classifies right."""
        self.model.eval()
        correct = 0
        with torch.inference_mode():
            for start in range(0, len(split), batch_size):
                stop = start + batch_size
                logits = self.model(split.images(start, stop))
                correct += int((logits.argmax(1) == split.labels[start:stop]).sum())
        self.model.train()
        return correct / len(split)

    def constrain(self, exact: bool = False) -> None:
        if exact:
            self.model.constrain_(exact=True)
            return
        with self._autocast():
            self.model.constrain_()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        enabled = self.config.precision == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)
