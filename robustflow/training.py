"""Training one model of any kind: deterministic in (config, seed), killed and resumed at will.

What is trained is a `Task`: images (`image_task`) or the steps of a flow (`structured.task`). Every random choice is
drawn from (seed, epoch) or (seed, step), so that the state of a training is just weights, optimizer and the number of
the step. A training that is killed goes on from its last checkpoint and, on a CPU with the same number of threads, ends
with the same weights as one that was not.

Several processes (see `distributed`) train one model together: each draws the whole batch as a single process would,
and its task takes a part of it. They end with the single process's weights within rounding.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from robustflow import checkpoints
from robustflow.config import LoopConfig
from robustflow.distributed import ALONE, Group
from robustflow.errors import UserError
from robustflow.memory import keep_freed_memory
from robustflow.optimizers import build_optimizers, schedule

STATE, LOG, WEIGHTS = "training.safetensors", "train.jsonl", "model.safetensors"


class Task(Protocol):
    """What a training needs to know of its model and its data."""

    @property
    def model(self) -> nn.Module:
        """On its device, in its dtype."""

    @property
    def size(self) -> int:
        """Training examples."""

    def loss(self, batch: Tensor, drawn: torch.Generator, share: float) -> tuple[Tensor, Mapping[str, float]]:
        """Loss of the examples with these numbers, and what the log adds up over them.

        ``drawn`` is the step's own generator, ``share`` in [0, 1) of the training is done.
        """

    def figures(self, sums: Mapping[str, float], seen: int, last: bool) -> dict[str, Any]:
        """What the log says besides the loss: of the sums over the ``seen`` examples, and of the validation data."""

    def constrain(self, exact: bool = False) -> None:
        """Bring the weights back to where they must be: after every step, and exactly at the end."""


def generator(seed: int, *numbers: int) -> torch.Generator:
    """A generator of its own for every (seed, numbers)."""
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(seed)


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
    seen: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def note(self) -> dict[str, float]:
        plain = asdict(self)
        return plain.pop("sums") | plain

    @classmethod
    def read(cls, note: Mapping[str, Any]) -> Progress:
        known = {key: note[key] for key in ("step", "seconds", "loss_sum", "seen")}
        return cls(**known, sums={key: value for key, value in note.items() if key not in known})


class Training:
    """One training in a directory that holds its state, its log and, once it is done, its weights."""

    def __init__(
        self,
        task: Task,
        config: LoopConfig,
        directory: Path,
        *,
        seed: int,
        device: torch.device,
        identity: str,
        group: Group = ALONE,
        listener: Callable[[int], None] | None = None,
    ) -> None:
        """``listener`` hears the number of steps that are done, in place of a progress bar."""
        self.task, self.model, self.config, self.directory = task, task.model, config, directory
        self.seed, self.device, self.identity, self.group, self.listener = seed, device, identity, group, listener
        if config.batch_size > task.size:
            raise UserError(f"batch_size {config.batch_size} is larger than the {task.size} training examples")
        self.steps_per_epoch = task.size // config.batch_size
        self.total = self.steps_per_epoch * config.epochs
        self.optimizers = build_optimizers(self.model, config)
        self.base_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.progress = Progress()

    def run(self) -> float:
        """Train to the end, from the last checkpoint if there is one, and write the weights. Returns the seconds used.

        Raises:
            UserError: the loss stopped being finite. The last checkpoint stays; no model is written.
        """
        if self.device.type == "cpu":
            keep_freed_memory()
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
                    order = torch.randperm(self.task.size, generator=generator(self.seed, epoch, 0)).to(self.device)
                    order_epoch = epoch
                batch = order[position * self.config.batch_size :][: self.config.batch_size]
                self.step(batch)
                bar.update()
                if self.listener is not None:
                    self.listener(self.progress.step)
                self.progress.seconds = time.monotonic() - started
                if self._ends_a_line():
                    line = self._end_epoch()
                    shown = {key: value for key, value in line.items() if isinstance(value, float) and key != "seconds"}
                    bar.set_postfix({key: f"{value:.3g}" for key, value in shown.items()})
                    self.progress.seconds = time.monotonic() - started
                if time.monotonic() - saved > self.config.checkpoint_seconds and self.progress.step < self.total:
                    self._save()
                    saved = time.monotonic()
        return self._finish(started)

    def _ends_a_line(self) -> bool:
        epoch, position = divmod(self.progress.step, self.steps_per_epoch)
        return position == 0 and (epoch % self.config.log_every == 0 or epoch == self.config.epochs)

    def step(self, batch: Tensor) -> None:
        """One update from the examples with these numbers."""
        share = self.progress.step / self.total
        loss, sums = self.task.loss(batch, generator(self.seed, self.progress.step, 1), share)
        summed, *totals = self.group.total(float(loss.detach()), *sums.values())
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
        factor = schedule(self.config, share)
        for optimizer, rates in zip(self.optimizers, self.base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optimizer.step()
        self.task.constrain()
        self.progress.step += 1
        self.progress.loss_sum += value * len(batch)
        self.progress.seen += len(batch)
        for key, total in zip(sums, totals, strict=True):
            self.progress.sums[key] = self.progress.sums.get(key, 0) + total

    def _end_epoch(self) -> dict[str, Any]:
        done = self.progress
        last = done.step == self.total
        if last:
            # The weights that are validated at the end are the ones that are stored.
            self.task.constrain(exact=True)
        self.group.spread_(self._tensors().values())
        line = {
            "epoch": done.step // self.steps_per_epoch,
            "step": done.step,
            "loss": done.loss_sum / done.seen,
            **(self.task.figures(done.sums, done.seen, last) if self.group.leads else {}),
            "lr": self.optimizers[-1].param_groups[0]["lr"],
            "seconds": round(done.seconds, 3),
        }
        if self.group.leads:
            with (self.directory / LOG).open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
        done.loss_sum, done.seen, done.sums = 0.0, 0, {}
        return line

    def _save(self) -> None:
        if not self.group.leads:
            return
        tensors = {f"model.{name}": tensor for name, tensor in self._tensors().items()}
        metadata = {"identity": self.identity, "progress": self.progress.note()}
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
            self.progress = Progress.read(metadata["progress"])
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
