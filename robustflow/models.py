"""Trained networks to load by name or path: weights, what the card says of them, and what is proved about them.

A trained network is a directory OUT/models/NAME with model.safetensors and card.json, as `robustflow train` writes it.
Neither the data set nor anything outside that directory is needed to load it: its input normalisation is among the
weights, the shape of an image follows from the data set's name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robustflow import checkpoints, networks
from robustflow.bounds import account
from robustflow.certificates import Certificate, certify
from robustflow.config import ModelConfig
from robustflow.data import CLASS_NAMES, INPUT_SHAPES
from robustflow.errors import UserError
from robustflow.networks import RESNET, Classifier
from robustflow.records import Card

CARD, WEIGHTS = "card.json", "model.safetensors"
ENVIRONMENT_VARIABLE = "ROBUSTFLOW_MODELS"
LARGEST = 65_536  # what an image may have of channels, rows or columns
PLAIN = (bool, int, float, str, tuple, type(None))


class TrainedClassifier(Classifier):
    """A `Classifier` with trained weights: images (n, C, H, W) in [0, 1] → logits (n, classes).

    ``card``: what card.json says; ``class_names``: what the logits stand for.
    """

    def __init__(self, network: Classifier, card: dict[str, Any], class_names: tuple[str, ...]) -> None:
        nn.Module.__init__(self)  # not Classifier's, which moves weights to their constraint set: these are as stored
        self.features, self.head, self.input_shape = network.features, network.head, network.input_shape
        self.regime, self.mirror = network.regime, network.mirror
        self.card, self.class_names = card, class_names
        self._known: tuple[str, float, float] | None = None

    @property
    def lipschitz_bound(self) -> float:
        """L with ‖f(x) − f(y)‖₂ ≤ L·‖x − y‖₂ for the logits f: features and head, from the weights as they are now.

        Computed once, and again after any weight has changed. Radii do not come from it but, more sharply, from
        ``features_bound`` and the head's rows (`robustflow.certificates`).
        """
        return self._bounds()[2]

    @property
    def features_bound(self) -> float:
        """The same for the features before the head: the bound L of tables and reports."""
        return self._bounds()[1]

    def certify(self, images: Tensor | np.ndarray, labels: Tensor | np.ndarray | None = None) -> Certificate:
        """Radii within which no perturbation changes the answer, see `robustflow.certify`.

        Without labels the prediction is certified, be it right or wrong; with them only right predictions are.
        """
        return certify(self, images, labels)

    def _bounds(self) -> tuple[str, float, float]:
        content = _digest(self)
        if self._known is None or self._known[0] != content:
            features = account(self.features, self.input_shape).lipschitz
            self._known = (content, features, account(self, self.input_shape).lipschitz)
        return self._known


def _digest(module: nn.Module) -> str:
    """A hash of every weight and of every plain attribute of every layer (slopes, strides, the mode)."""
    digest = hashlib.blake2b()
    for name, part in module.named_modules():
        hooks = len(part._forward_hooks) + len(part._forward_pre_hooks)
        plain = {key: value for key, value in vars(part).items() if isinstance(value, PLAIN) and key != "_known"}
        digest.update(repr((name, type(part), hooks, sorted(plain.items()))).encode())
    # By content: a tensor's version does not see what is written through .data.
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_model(name_or_path: str | Path) -> TrainedClassifier:
    """A trained network in evaluation mode, on the CPU, with `lipschitz_bound` and `certify`.

    ``name_or_path`` is a name of `list_trained` ("cifar10/sharp"), a directory OUT/models/NAME, or an OUT with a single
    model. The weights must have the SHA-256 of the card and fit the architecture that it describes, which is checked
    before any memory is taken for it.

    Raises:
        UserError: nothing of that name (the line lists what there is), a card or checkpoint that is missing, broken,
            changed or of another architecture, weights that are NaN or infinite.

    >>> model = load_model("cifar10/sharp")  # doctest: +SKIP
    >>> model.certify(images).radii  # doctest: +SKIP
    """
    folder = find_trained(name_or_path)
    card, config = read_card(folder)
    shape, class_names = input_of(card, folder)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise UserError(f"checkpoint {weights} is missing: train the model again, or put the file back")
    if checkpoints.sha256(weights) != card["sha256"]:
        raise UserError(f"{weights} is not the file that {folder / CARD} describes (its SHA-256 differs)")
    network = _outline(config, shape, len(class_names), weights)
    network.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():  # where power iteration starts, should the training go on: not among the weights
        for name in module._non_persistent_buffers_set:
            module.get_buffer(name).normal_(generator=generator)
    checkpoints.load_weights(network, weights)
    return TrainedClassifier(network, card, class_names).eval()


class _Uninitialised(TorchFunctionMode):
    """Leaves random numbers out: on meta there are none, but asking for them loads torch's compiler, for seconds."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return args[0] if func in (Tensor.normal_, Tensor.uniform_) else func(*args, **(kwargs or {}))


def _outline(config: ModelConfig, shape: tuple[int, int, int], classes: int, weights: Path) -> Classifier:
    """The network as shapes without memory, once they are known to be those of the file: a card may claim anything."""
    shapes = checkpoints.read_shapes(weights)
    network, blocks = config.network, len(config.network.channels)
    layers = 0 if config.regime == RESNET else blocks * network.layers + network.dense_layers
    if blocks + layers > len(shapes):  # each has a tensor at least
        raise UserError(
            f"checkpoint {weights} is of another architecture: {len(shapes)} tensors for {blocks} blocks with "
            f"{layers} layers"
        )
    options = network.model_dump(exclude={"normalize"})
    try:
        with torch.device("meta"), _Uninitialised():
            outline = networks.create_model(config.regime, input_shape=shape, classes=classes, **options)
    except UserError as error:
        raise UserError(f"{weights.parent / CARD}: {error}") from None
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{weights.parent / CARD} describes a network that cannot be built: {reason}") from None
    checkpoints.check_architecture(outline, shapes, weights)
    return outline


def input_of(card: dict[str, Any], folder: Path) -> tuple[tuple[int, int, int], tuple[str, ...]]:
    """(shape of an image, class names): the card's, else those of the data set that it names."""
    told, dataset = card["data"], card["data"].get("dataset")
    shape, names = told.get("input_shape"), told.get("class_names")
    if shape is None or names is None:
        if not isinstance(dataset, str) or dataset not in INPUT_SHAPES:
            raise UserError(
                f"{folder / CARD} tells neither data.input_shape with data.class_names nor a known data.dataset "
                f"({', '.join(INPUT_SHAPES)})"
            )
        return INPUT_SHAPES[dataset], CLASS_NAMES[dataset]
    sizes = isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and 0 < n <= LARGEST for n in shape)
    if not sizes or not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"{folder / CARD}: data.input_shape must be three sizes up to {LARGEST}, data.class_names a list of names"
        )
    return (shape[0], shape[1], shape[2]), tuple(names)


def read_card(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    """card.json as it is, and the model's config in it.

    Raises:
        UserError: no card, or one that describes no model of ours.
    """
    path = folder / CARD
    if not path.is_file():
        raise UserError(f"{folder} holds no trained model (no {CARD})")
    content = checkpoints.read_json(path)
    try:
        card = Card.model_validate(content)
        config = ModelConfig.model_validate_json(json.dumps(card.config))
    except (ValidationError, RecursionError) as error:
        key, message = "", type(error).__name__
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])[:120] + ": "
            message = first["msg"]
        raise UserError(f"{path} is not the card of a model: {key}{message}") from None
    return content | {"data": card.data, "sha256": card.sha256}, config


def search_path() -> list[Path]:
    """Where names are looked up: ./results, ./runs, and the directories in $ROBUSTFLOW_MODELS."""
    more = os.environ.get(ENVIRONMENT_VARIABLE, "")
    return [Path("results"), Path("runs"), *(Path(part).expanduser() for part in more.split(os.pathsep) if part)]


def _with_card() -> dict[str, Path]:
    """As `list_trained`, those whose weights are not there included."""
    found: dict[str, Path] = {}
    for root in search_path():
        for pattern in (f"*/models/*/{CARD}", f"*/seed-*/models/*/{CARD}"):
            for card in sorted(root.glob(pattern)):
                out = card.parents[2].relative_to(root).as_posix()
                found.setdefault(f"{out}/{card.parent.name}", card.parent)
    return found


def list_trained() -> dict[str, Path]:
    """OUT/NAME, or OUT/seed-N/NAME → directory, of every trained model on the `search_path` whose weights are there.

    The earlier directory has a name first.
    """
    return {name: folder for name, folder in _with_card().items() if (folder / WEIGHTS).is_file()}


def find_trained(name_or_path: str | Path) -> Path:
    """The directory of a trained model, see `load_model`.

    Raises:
        UserError: there is none, or several.
    """
    named, path = _with_card(), Path(name_or_path)
    if str(name_or_path) in named:
        return named[str(name_or_path)]
    if os.path.isdir(path):  # False for what no file can be called, where Path.is_dir raises
        if (path / CARD).is_file():
            return path
        inside = sorted(card.parent for card in path.glob(f"models/*/{CARD}"))
        if len(inside) == 1:
            return inside[0]
        if inside:
            raise UserError(f"{path} has {len(inside)} models, choose one: {', '.join(str(one) for one in inside)}")
        raise UserError(f"{path} holds no trained model: neither {CARD} nor models/*/{CARD}")
    shown = repr(str(name_or_path)) if len(str(name_or_path)) <= 80 else f"{str(name_or_path)[:77]!r}..."
    there = ", ".join(list_trained()) or "none in " + ", ".join(str(root) for root in search_path())
    raise UserError(f"no trained model {shown}: neither a directory nor one of the names that there are ({there})")


__all__ = ["TrainedClassifier", "find_trained", "input_of", "list_trained", "load_model", "read_card", "search_path"]
