"""The directory of one trained model: weights, log, and a card that says what they are; trained once, never over."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustflow import checkpoints, environment
from robustflow.config import LoopConfig, Strict
from robustflow.distributed import ALONE, Group
from robustflow.errors import UserError
from robustflow.training import STATE, WEIGHTS, Task, Training

CARD = "card.json"


def read_card(folder: Path) -> dict[str, Any]:
    if not (folder / CARD).is_file():
        raise UserError(f"{folder} holds no trained model (no {CARD}): run `robustflow train` first")
    return checkpoints.read_json(folder / CARD)


def identity_of(config: Strict, seed: int, data: Any) -> str:
    """What decides the weights: the model's config, the seed, and ``data``, which stands for the examples."""
    # Without defaults, so that an option added later does not disown the models of before.
    # Where training starts is in ``data``, by content.
    free = {"train": {"checkpoint_seconds", "log_every", "start"}}
    decisive = config.model_dump(mode="json", exclude_defaults=True, exclude=free)
    return hashlib.sha256(json.dumps([decisive, seed, data], sort_keys=True).encode()).hexdigest()


def is_finished(folder: Path, identity: str) -> bool:
    """Whether the model is trained.

    Raises:
        UserError: it is, but with another config, seed or data.
    """
    if not (folder / CARD).is_file():
        return False
    if read_card(folder).get("identity") != identity:
        raise UserError(
            f"{folder} holds a model that was trained with another config, seed or data: choose another --out, or "
            "delete that directory"
        )
    return True


def check_weights(folder: Path) -> None:
    """Raise UserError where the weights are not those that the card describes."""
    if checkpoints.sha256(folder / WEIGHTS) != read_card(folder).get("sha256"):
        raise UserError(f"{folder / WEIGHTS} is not the file that {folder / CARD} describes (its SHA-256 differs)")


def train_once(
    folder: Path,
    config: LoopConfig,
    build: Callable[[], Task],
    about: Callable[[nn.Module], Mapping[str, Any]],
    data: Mapping[str, Any],
    *,
    identity: str,
    seed: int,
    device: torch.device,
    group: Group = ALONE,
    listener: Callable[[int], None] | None = None,
    before: float = 0.0,
) -> None:
    """Train what ``build`` makes (after the seed was set), unless it is done, and write its card.

    ``about`` says what the card tells of the trained model, ``data`` what it tells of the examples. ``before`` are the
    seconds that went into the weights it starts with: the card's ``seconds.train`` has them too.

    Raises:
        UserError: as `is_finished` and `Training.run`.
    """
    finished = is_finished(folder, identity)
    group.agree(int(finished), f"the model {folder}")
    if finished:
        return
    torch.manual_seed(seed)
    started = time.monotonic()
    task = build()
    built = time.monotonic() - started
    training = Training(task, config, folder, seed=seed, device=device, identity=identity, group=group,
                        listener=listener)  # fmt: skip
    seconds = training.run()
    if not group.leads:
        return
    card = {
        "schema_version": 1,
        "name": folder.name,
        **about(task.model),
        "seed": seed,
        "seconds": {"train": round(before + seconds, 3), "build": round(built, 3)},
        "processes": group.size,
        "environment": environment.describe(device),
        "data": dict(data),
        "identity": identity,
        "sha256": checkpoints.sha256(folder / WEIGHTS),
    }
    checkpoints.write_json(folder / CARD, card)
    (folder / STATE).unlink(missing_ok=True)
