"""The work of one shard, as it is sent to wherever it runs, and the state of the process that its bits depend on."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from attacks.contract import ATTACKS, Attack
from attacks.executors import Tick
from attacks.sets import SETS, AttackSet, resolve
from attacks.sweep import SweepResult, sweep
from attacks.victim import AttackInputError

TICK_SECONDS = 0.5
SHIPPED = dict(ATTACKS), dict(SETS)  # what every process has without being told
FLAGS = (
    (torch.backends.cuda.matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32"),
    (torch.backends.cudnn, "deterministic"), (torch.backends.cudnn, "benchmark"),
)


@dataclass(frozen=True)
class Settings:
    """What of a process's state the logits depend on, down to the last bit."""

    threads: int
    dtype: torch.dtype
    flags: tuple[bool, ...]

    @classmethod
    def current(cls, threads: int) -> Settings:
        return cls(threads, torch.get_default_dtype(), tuple(getattr(place, name) for place, name in FLAGS))

    def apply(self) -> None:
        torch.set_num_threads(self.threads)
        torch.set_default_dtype(self.dtype)
        for (place, name), value in zip(FLAGS, self.flags, strict=True):
            setattr(place, name, value)

    @contextmanager
    def applied(self) -> Iterator[None]:
        before = Settings.current(torch.get_num_threads())
        self.apply()
        try:
            yield
        finally:
            before.apply()


@dataclass(frozen=True)
class Task:
    """What all shards share; sent once to every worker."""

    model: Callable[[Tensor], Tensor]
    epsilons: list[float]
    attacks: str
    options: dict[str, Any]
    settings: Settings
    extras: tuple[list[Attack], list[AttackSet]]  # registered by the caller: a worker does not know them


@dataclass(frozen=True)
class Part:
    """The images of one shard."""

    images: Tensor
    labels: Tensor
    radii: Tensor
    places: Tensor


def extras(attacks: str) -> tuple[list[Attack], list[AttackSet]]:
    chosen = [attack for attack in resolve(attacks)[0] if SHIPPED[0].get(attack.name) is not attack]
    return chosen, [entry for name, entry in SETS.items() if SHIPPED[1].get(name) != entry]


def baked(model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A copy with plain weights if any is parametrised: such a module cannot be sent."""
    if not isinstance(model, nn.Module) or not any(parametrize.is_parametrized(m) for m in model.modules()):
        return model
    try:
        plain = copy.deepcopy(model)
    except RuntimeError as error:
        raise AttackInputError(f"the model cannot be copied ({str(error).splitlines()[0]}): detach its weights first"
                               ) from error
    for module in [module for module in plain.modules() if parametrize.is_parametrized(module)]:
        # A copy shares the class that parametrising made for the original, and removing deletes from that class.
        shared = type(module)
        own = {key: value for key, value in vars(shared).items() if key not in ("__dict__", "__weakref__")}
        module.__class__ = type(shared.__name__, shared.__bases__, own)
        for name in list(getattr(module, "parametrizations", {})):
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return plain


def run_shard(task: Task, part: Part, tick: Tick) -> SweepResult:
    """The sweep of one shard, wherever this runs; ``tick`` hears of its forward passes now and then."""
    ATTACKS.update({attack.name: attack for attack in task.extras[0]})
    SETS.update({entry.name: entry for entry in task.extras[1]})
    seen, text, last = 0, "clean", time.monotonic()

    def count(inputs: Tensor) -> None:
        nonlocal seen, last
        seen += len(inputs)
        if time.monotonic() - last > TICK_SECONDS:
            tick(seen, text)
            last = time.monotonic()

    def describe(description: str, done: int, total: int) -> None:
        nonlocal text
        text = description

    with task.settings.applied(), _watched(task.model, count) as model:
        return sweep(
            model, part.images, part.labels, task.epsilons, task.attacks, certified_radii=part.radii.numpy(),
            indices=part.places.numpy(), progress=describe, **task.options,
        )


@contextmanager
def _watched(
    model: Callable[[Tensor], Tensor], count: Callable[[Tensor], None]
) -> Iterator[Callable[[Tensor], Tensor]]:
    if isinstance(model, nn.Module):
        handle = model.register_forward_pre_hook(lambda _, inputs: count(inputs[0]))
        try:
            yield model
        finally:
            handle.remove()
    else:
        def counted(inputs: Tensor) -> Tensor:
            count(inputs)
            return model(inputs)

        yield counted
