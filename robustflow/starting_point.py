"""A trained model whose weights another training begins with (``train.start`` of a config)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustflow import checkpoints
from robustflow.config import ModelConfig
from robustflow.errors import UserError
from robustflow.models import find_trained, read_card
from robustflow.networks import Classifier
from robustflow.operators import Convolution
from robustflow.trained import CARD, check_weights
from robustflow.training import WEIGHTS


@dataclass(frozen=True)
class StartingPoint:
    """Its directory, and what its card says."""

    folder: Path
    name: str
    sha256: str
    seconds: dict[str, Any]

    @property
    def note(self) -> dict[str, Any]:
        """What the card of the model that begins here says of it."""
        return {"name": self.name, "sha256": self.sha256, "seconds": self.seconds}

    def load(self, model: Classifier) -> None:
        """Give the model these weights.

        Raises:
            UserError: the file is broken, or of another architecture.
        """
        check_weights(self.folder)
        checkpoints.load_weights(model, self.folder / WEIGHTS)
        for module in model.modules():
            if isinstance(module, Convolution):
                module.find_direction_()  # that of the kernel before; kept, it would make the norm look too small


def find_start(config: ModelConfig) -> StartingPoint | None:
    """Where the training of a model begins: None, from random weights.

    Raises:
        UserError: no such model, one of another regime or network, or weights that are missing or not the card's.
    """
    named = config.train.start
    if named is None:
        return None
    try:
        folder = find_trained(named)
        card, source = read_card(folder)
        if not (folder / WEIGHTS).is_file():
            raise UserError(f"checkpoint {folder / WEIGHTS} is missing: train that model again, or put the file back")
        check_weights(folder)
    except UserError as error:
        raise UserError(f"train.start of {config.name}: {error}") from None
    for key, mine, other in (
        ("regime", config.regime, source.regime),
        *((key, getattr(config.network, key), value) for key, value in source.network),
    ):
        if mine != other:
            raise UserError(f"train.start of {config.name}: {key} is {mine} here and {other} in {folder}")
    return StartingPoint(folder, card["name"], card["sha256"], card["seconds"])


def start_of(config: ModelConfig, folder: Path) -> str | None:
    """The SHA-256 of the weights that the model in ``folder`` began or is to begin with.

    A model that is trained says so itself: what it began with may be gone.

    Raises:
        UserError: as `find_start`.
    """
    try:
        start = find_start(config)
    except UserError:
        note = checkpoints.read_json(folder / CARD).get("start") if (folder / CARD).is_file() else None
        if isinstance(note, dict) and isinstance(note.get("sha256"), str):
            return str(note["sha256"])
        raise
    return None if start is None else start.sha256
