"""A model of the user's own for the command line: made by a factory, or read from a benchmark directory of ours."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from robustflow import bench, checkpoints, data
from robustflow.data import ImageSet
from robustflow.errors import UserError


@dataclass(frozen=True)
class OwnModel:
    """A model in evaluation mode with the images to evaluate it on.

    ``source``: what the results say of it. ``identity``: what names its unfinished shards if it is no module.
    """

    name: str
    model: Callable[[Tensor], Tensor]
    images: ImageSet
    source: dict[str, Any]
    identity: str


def load(spec: str, weights: Path | None, dataset: str | None, directory: Path | None) -> OwnModel:
    """The model of ``--model`` and the images of ``--dataset``.

    ``spec`` is package.module:factory, where calling factory() gives a model (or a class of models that needs no
    arguments; a module that is there already is taken as it is), or a directory OUT/models/NAME of a benchmark. The
    current directory can be imported from. ``weights`` is a safetensors file with the model's state_dict.

    Raises:
        UserError: nothing of that name, a factory that raises, weights that do not fit.
    """
    if Path(spec).is_dir():
        if weights is not None:
            raise UserError(f"--weights goes with package.module:factory; {spec} has weights of its own")
        return _of_benchmark(Path(spec), dataset, directory)
    module_name, colon, attribute = spec.partition(":")
    if not (module_name and colon and attribute):
        raise UserError(f"--model {spec}: neither package.module:factory nor a directory OUT/models/NAME")
    model, code = _made(module_name, attribute)
    source: dict[str, Any] = {"model": spec, "code_sha256": code, "weights": None, "weights_sha256": None}
    if weights is not None:
        _load_weights(model, weights)
        source |= {"weights": str(weights), "weights_sha256": checkpoints.sha256(weights)}
    if isinstance(model, nn.Module):
        model.eval()
    identity = hashlib.sha256(repr(sorted(source.items())).encode()).hexdigest()
    return OwnModel(attribute, model, data.load(dataset or "cifar10", directory), source, identity)


def _of_benchmark(folder: Path, dataset: str | None, directory: Path | None) -> OwnModel:
    out, name = bench.locate(folder)
    if name is None:
        raise UserError(f"{folder} is not a trained model: give OUT/models/NAME, or package.module:factory")
    experiment, _ = bench.read_directory(out)
    if dataset is not None:
        experiment = experiment.model_copy(update={"dataset": dataset})
    images = bench.load_data(experiment, directory)
    home = out / "models" / name
    model = bench.load_model(experiment.model(name), images, home)
    sha256 = bench.read_card(home)["sha256"]
    source = {"model": str(folder), "code_sha256": None, "weights": bench.WEIGHTS, "weights_sha256": sha256}
    return OwnModel(name, model, images, source, sha256)


def _made(module_name: str, attribute: str) -> tuple[Any, str | None]:
    """(what the factory returns, the SHA-256 of its source file)."""
    here = os.getcwd()
    if here not in sys.path:  # for good: a factory may import more, and so may worker processes
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(
                f"--model: no module {error.name!r}: run the command where it can be imported ({here} is searched)"
            ) from None
        raise UserError(f"--model: importing {module_name} failed: {error}") from error
    except (Exception, SystemExit) as error:  # whatever a stranger's module does
        raise UserError(f"--model: importing {module_name} failed: {_line(error)}") from error
    try:
        factory = reduce(getattr, attribute.split("."), module)
    except AttributeError:
        raise UserError(f"--model: {module_name} has no {attribute!r}") from None
    if not callable(factory):
        raise UserError(f"--model: {module_name}:{attribute} is a {type(factory).__name__}, not a factory of models")
    model = factory
    for _ in range(2):  # a factory may return a class
        if isinstance(model, type) or (model is factory and not isinstance(factory, nn.Module)):
            try:
                model = model()
            except (Exception, SystemExit) as error:
                raise UserError(f"--model: {attribute}() failed: {_line(error)}") from error
    if not callable(model):
        raise UserError(f"--model: {attribute}() returned a {type(model).__name__}, not a model")
    file = inspect.getsourcefile(module)
    return model, checkpoints.sha256(Path(file)) if file and Path(file).is_file() else None


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _load_weights(model: Any, weights: Path) -> None:
    if weights.suffix != ".safetensors":
        # A pickle runs code when it is opened, so none ever is.
        raise UserError(
            f"--weights {weights}: only .safetensors is read; where you trained the model, write it with "
            "safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
        )
    if not isinstance(model, nn.Module):
        raise UserError(f"--weights: the factory returned a {type(model).__name__}, which takes no weights")
    checkpoints.load_weights(model, weights)
