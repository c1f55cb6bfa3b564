"""Weights and training states on disk: safetensors, never pickles, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from robustflow.errors import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place if the block ends well, and vanishes otherwise."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    except OSError as error:
        raise UserError(f"cannot write to {path.parent}: {error.strerror}") from error
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.chmod(0o644)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Indented JSON; infinities and NaN are refused (they are not JSON), as are values that JSON does not know."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any] | None = None) -> None:
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path) as partial:
        try:
            save_file(plain, partial, {"robustflow": json.dumps(metadata or {})})
        except SafetensorError as error:  # what it makes of a full disk
            raise UserError(f"cannot write {path}: {error}") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        UserError: missing, truncated, or something else than safetensors (a pickle is never opened).
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("robustflow", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"checkpoint {path} is not a whole safetensors file: {error}") from error


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes that a safetensors file declares, from its header alone.

    Raises:
        UserError: as `read_tensors`.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"checkpoint {path} is not a whole safetensors file: {error}") from error


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_weights(model: nn.Module, path: Path) -> None:
    """Read weights into a model of the same architecture; the model is left alone if anything is wrong.

    Raises:
        UserError: another architecture, a broken file, or weights that are not finite.
    """
    tensors, _ = read_tensors(path)
    expected = model.state_dict()
    check_architecture(model, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, path)
    for name, tensor in sorted(tensors.items()):
        if tensor.is_floating_point() != expected[name].is_floating_point() or tensor.is_complex():
            found = str(tensor.dtype).removeprefix("torch.")
            wanted = str(expected[name].dtype).removeprefix("torch.")
            raise UserError(f"checkpoint {path} is of another architecture: {name} is {found}, not {wanted}")
        if tensor.is_floating_point() and tensor.element_size() < 2:
            raise UserError(f"checkpoint {path} holds 8-bit floats in {name}: cast the weights before saving them")
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"checkpoint {path} holds NaN or infinite values in {name}")
    model.load_state_dict(tensors)


def check_architecture(model: nn.Module, shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    """Raise UserError unless the shapes found in a file are those of the model, which may be on the meta device."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if name not in shapes or name not in expected:
            where = "the checkpoint" if name not in shapes else "this model"
            shown = name if len(name) <= 120 else f"{name[:117]}..."
            raise UserError(f"checkpoint {path} is of another architecture: {where} has no tensor {shown!r}")
        if shapes[name] != expected[name]:
            found, wanted = shapes[name], expected[name]
            raise UserError(f"checkpoint {path} is of another architecture: {name} is {found}, not {wanted}")


def pack_optimizers(optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The state of optimizers as named tensors: "optimizer.INDEX.PARAMETER.KEY"."""
    packed = {}
    for index, optimizer in enumerate(optimizers):
        for parameter, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                if value is not None:
                    packed[f"optimizer.{index}.{parameter}.{key}"] = torch.as_tensor(value)
    return packed


def unpack_optimizers(optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    for index, optimizer in enumerate(optimizers):
        whole = optimizer.state_dict()
        prefix = f"optimizer.{index}."
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith(prefix):
                parameter, key = name.removeprefix(prefix).split(".", 1)
                state.setdefault(int(parameter), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})


def finite(value: float) -> float | None:
    """``value`` for JSON: None where it is not a finite number."""
    return value if math.isfinite(value) else None
