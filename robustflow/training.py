"""Training one model: deterministic in (config, seed), killed and resumed at will.

Every random choice is drawn from (seed, epoch) or (seed, step), so that the state of a training is just weights,
optimizer and the number of the step. A training that is killed goes on from its last checkpoint and, on a CPU with the
same number of threads, ends with the same weights as one that was not.

Several processes (see `distributed`) train one model together: each draws the whole batch and its augmentation as a
single process would, and takes its part of it. They end with the single process's weights within rounding.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from robustflow import checkpoints, losses
from robustflow.config import CrossEntropyLoss, HingeLoss, LossConfig, OffsetLoss, TrainConfig
from robustflow.data import ImageSet, Split, augment, to_float
from robustflow.distributed import ALONE, Group
from robustflow.errors import UserError
from robustflow.networks import Classifier
from robustflow.optimizers import build_optimizers, schedule
from robustflow.regimes import REGIMES, nominal_constant

STATE, LOG, WEIGHTS = "training.safetensors", "train.jsonl", "model.safetensors"


def build_loss(config: LossConfig) -> losses.Loss:
    if isinstance(config, HingeLoss):
        return losses.hinge(config.margin)
    if isinstance(config, CrossEntropyLoss):
        return losses.cross_entropy(config.temperature)
    if isinstance(config, OffsetLoss):
        return losses.offset_cross_entropy(config.offset, config.temperature)
    return losses.certified_cross_entropy(config.epsilon, config.temperature)


def check_state(state: Path, identity: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a training's checkpoint.

    Raises:
        UserError: it is broken, or of a training with another config, seed or data.
    """
    tensors, metadata = checkpoints.read_tensors(state)
    if metadata.get("identity") != identity:
        raise UserError(
            f"{state} belongs to a training with another config, seed or data: finish that one, choose another --out, "
            "or delete the file"
        )
    return tensors, metadata


@dataclass
class Progress:
    """Where a training stands; everything of its state that is not a tensor."""

    step: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    correct: int = 0
    seen: int = 0


class Training:
    """One training in a directory that holds its state, its log and, once it is done, its weights."""

    def __init__(
        self,
        model: Classifier,
        images: ImageSet,
        config: TrainConfig,
        directory: Path,
        *,
        seed: int,
        device: torch.device,
        identity: str,
        group: Group = ALONE,
        listener: Callable[[int], None] | None = None,
    ) -> None:
        """``listener`` hears the number of steps that are done, in place of a progress bar."""
        self.config, self.directory, self.seed, self.device = config, directory, seed, device
        self.identity, self.group, self.listener = identity, group, listener
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
        self.data, self.validation = images.splits["train"].to(device), images.splits["validation"].to(device)
        if config.batch_size > len(self.data):
            raise UserError(f"batch_size {config.batch_size} is larger than the {len(self.data)} training images")
        self.part = group.part(model, config.batch_size)
        if config.crop >= min(images.input_shape[1:]):
            raise UserError(f"crop {config.crop} is too large for images of {images.input_shape[1:]}")
        self.steps_per_epoch = len(self.data) // config.batch_size
        self.total = self.steps_per_epoch * config.epochs
        self.loss = build_loss(config.loss)
        self.scaled = model.regime in REGIMES and REGIMES[model.regime].constrained
        self.optimizers = build_optimizers(self.model, config)
        self.base_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.progress = Progress()

    def run(self) -> float:
        """Train to the end, from the last checkpoint if there is one, and write the weights. Returns the seconds used.

        Raises:
            UserError: the loss stopped being finite. The last checkpoint stays; no model is written.
        """
        self._restore()
        self.model.train()
        saved, started = time.monotonic(), time.monotonic() - self.progress.seconds
        bar = tqdm(
            total=self.total,
            initial=self.progress.step,
            desc=self.directory.name,
            disable=True if self.listener is not None or not self.group.leads else None,
            unit="step",
        )
        order, order_epoch = torch.empty(0), -1
        with bar:
            while self.progress.step < self.total:
                epoch, position = divmod(self.progress.step, self.steps_per_epoch)
                if epoch != order_epoch:
                    order = torch.randperm(len(self.data), generator=self._generator(epoch, 0)).to(self.device)
                    order_epoch = epoch
                batch = order[position * self.config.batch_size :][: self.config.batch_size]
                self._step(batch)
                bar.update()
                if self.listener is not None:
                    self.listener(self.progress.step)
                self.progress.seconds = time.monotonic() - started
                if self.progress.step % self.steps_per_epoch == 0:
                    line = self._end_epoch()
                    bar.set_postfix(
                        loss=f"{line['loss']:.3f}",
                        train=f"{line['train_accuracy']:.1%}",
                        validation="-" if line["validation_accuracy"] is None else f"{line['validation_accuracy']:.1%}",
                    )
                    self.progress.seconds = time.monotonic() - started
                if time.monotonic() - saved > self.config.checkpoint_seconds and self.progress.step < self.total:
                    self._save()
                    saved = time.monotonic()
        return self._finish(started)

    def _generator(self, *numbers: int) -> torch.Generator:
        seed = self.seed
        for number in numbers:
            seed = (seed * 1_000_003 + number + 1) % (2**63 - 1)
        return torch.Generator().manual_seed(seed)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        enabled = self.config.precision == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def _step(self, batch: Tensor) -> None:
        config, labels = self.config, self.data.labels[batch]
        drawn = self._generator(self.progress.step, 1)
        pixels = augment(self.data.pixels[batch], crop=config.crop, flip=config.flip, generator=drawn)
        pixels, labels = pixels[self.part], labels[self.part]
        with self._autocast():
            logits = self.model(to_float(pixels))
        share = self.progress.step / self.total
        if self.scaled:
            logits = logits / nominal_constant(self.model)
        loss = self.loss(logits.float(), labels, self.model.head.weight, share)
        correct = (logits.detach().argmax(1) == labels).sum()
        summed, right = self.group.total(float(loss.detach()), int(correct))
        value = summed / self.group.size
        if not math.isfinite(value):
            raise UserError(
                f"training of {self.directory.name} diverged at step {self.progress.step} (loss {value}): lower its "
                "learning rate; the last checkpoint is kept"
            )
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.group.average_([weight.grad for weight in self.model.parameters() if weight.grad is not None])
        factor = schedule(config, share)
        for optimizer, rates in zip(self.optimizers, self.base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optimizer.step()
        with self._autocast():
            self.model.constrain_()
        self.progress.step += 1
        self.progress.loss_sum += value * len(batch)
        self.progress.correct += int(right)
        self.progress.seen += len(batch)

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

    def _end_epoch(self) -> dict[str, Any]:
        done = self.progress
        last = done.step == self.total
        if last:
            # The weights that are validated at the end are the ones that are stored.
            self.model.constrain_(exact=True)
        self.group.spread_(self._tensors().values())
        validated = self.validation if last else self.validation.head(self.config.validate_images)
        line = {
            "epoch": done.step // self.steps_per_epoch,
            "step": done.step,
            "loss": done.loss_sum / done.seen,
            "train_accuracy": done.correct / done.seen,
            "validation_accuracy": self.accuracy(validated) if len(validated) and self.group.leads else None,
            "validation_n": len(validated),
            "lr": self.optimizers[-1].param_groups[0]["lr"],
            "seconds": round(done.seconds, 3),
        }
        if self.group.leads:
            with (self.directory / LOG).open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
        done.loss_sum, done.correct, done.seen = 0.0, 0, 0
        return line

    def _save(self) -> None:
        if not self.group.leads:
            return
        tensors = {f"model.{name}": tensor for name, tensor in self._tensors().items()}
        metadata = {"identity": self.identity, "progress": asdict(self.progress)}
        checkpoints.write_tensors(
            self.directory / STATE, tensors | checkpoints.pack_optimizers(self.optimizers), metadata
        )

    def _tensors(self) -> dict[str, Tensor]:
        """Parameters and all buffers, those that only a training needs (power iteration) included."""
        return dict(self.model.named_parameters()) | dict(self.model.named_buffers())

    def _restore(self) -> None:
        state, log = self.directory / STATE, self.directory / LOG
        self.directory.mkdir(parents=True, exist_ok=True)
        found = state.exists()
        if found:
            tensors, metadata = check_state(state, self.identity)
            with torch.no_grad():
                for name, tensor in self._tensors().items():
                    tensor.copy_(tensors[f"model.{name}"])
            checkpoints.unpack_optimizers(self.optimizers, tensors)
            self.progress = Progress(**metadata["progress"])
        self.group.agree(self.progress.step, f"the checkpoint {state}")
        if not found and self.group.leads:
            log.unlink(missing_ok=True)
        elif log.exists() and self.group.leads:
            # Epochs after the checkpoint are about to be trained again: their lines go.
            lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= self.progress.step]
            checkpoints.write_text(log, "".join(kept))

    def _finish(self, started: float) -> float:
        for name, tensor in self.model.state_dict().items():
            if not bool(torch.isfinite(tensor).all()):
                raise UserError(f"training of {self.directory.name} ended with NaN or infinite values in {name}")
        if self.group.leads:
            checkpoints.write_tensors(self.directory / WEIGHTS, self.model.state_dict())
        return time.monotonic() - started
