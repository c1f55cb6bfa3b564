"""A finished shard as one file: named and stamped with what it depends on, written whole or not at all."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from attacks.sweep import SweepResult
from attacks.victim import AttackInputError

NUMBERS = ("index", "label", "prediction", "adversarial_norm")  # columns of numbers; "attack" is the one of words


def digest(*parts: Any) -> str:
    """SHA-256 of tensors (bytes, type, shape) and of anything else that JSON can write."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            total.update(json.dumps([str(part.dtype), list(part.shape)]).encode())
            total.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            total.update(json.dumps(part, sort_keys=True, default=repr).encode())
    return total.hexdigest()


def model_identity(model: Callable[[Tensor], Tensor], identity: str | None) -> str:
    """A hash of a model's weights, buffers, classes and plain attributes (numbers, words), and of ``identity``.

    What is neither is not seen: a function kept as an attribute, the code of ``forward``. A model that is no module
    has no weights to read, so there the caller's ``identity`` must say what it is.
    Errors: AttackInputError if it does not.

    >>> layer = nn.Linear(2, 2)
    >>> before = model_identity(layer, None)
    >>> _ = layer.weight.data.mul_(2)
    >>> before == model_identity(layer, None)
    False
    """
    if identity is not None and not isinstance(identity, str):
        raise AttackInputError(f"identity must be a string that names the model, got {type(identity).__name__}")
    if not isinstance(model, nn.Module):
        if identity is None:
            raise AttackInputError("the weights of a model that is no torch.nn.Module cannot be read: pass"
                                   " identity='...', a string that changes whenever the model does")
        return digest(identity)
    plain, torchs_own = (bool, int, float, str, type(None)), vars(nn.Module()).keys()
    parts: list[Any] = [identity]
    for name, module in model.named_modules():
        attributes = {
            key: value for key, value in vars(module).items()
            if key not in torchs_own and (
                isinstance(value, plain) or (isinstance(value, tuple) and all(isinstance(v, plain) for v in value)))
        }
        parts.append([name, type(module).__qualname__, attributes])
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        # The memory format belongs to it: other kernels, other last bits.
        parts += [[name, list(tensor.stride())], tensor]
    return digest(*parts)


def write_shard(path: Path, result: SweepResult, identity: str) -> None:
    """The result of one shard, in a temporary file beside ``path`` that then takes its place.

    Errors: AttackInputError if the folder cannot be written.
    """
    tensors = {name: torch.from_numpy(result.samples[name].to_numpy().copy()) for name in NUMBERS}
    tensors["adversarials"] = result.adversarials.contiguous()
    rest = {
        "identity": identity, "epsilons": result.epsilons, "attack": result.samples["attack"].tolist(),
        "forward_passes": result.forward_passes, "seconds": result.seconds, "warnings": result.warnings,
    }
    partial = path.with_name(f".{path.name}{_mark(os.getpid())}")
    try:
        save_file(tensors, partial, {"shard": json.dumps(rest)})
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise AttackInputError(f"cannot write shard {path}: {error}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def read_shard(path: Path, identity: str) -> SweepResult | None:
    """What :func:`write_shard` wrote; None if it is missing, cut off, or of another identity: then it is done again."""
    try:
        with safe_open(path, framework="pt") as file:
            rest = json.loads(file.metadata()["shard"])
            if rest["identity"] != identity:
                return None
            tensors = {name: file.get_tensor(name) for name in (*NUMBERS, "adversarials")}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None
    samples = pd.DataFrame({name: tensors[name].numpy() for name in NUMBERS} | {"attack": rest["attack"]})
    return SweepResult(
        rest["epsilons"], samples, tensors["adversarials"], rest["forward_passes"], rest["seconds"], rest["warnings"]
    )


def sweep_away_partials(folder: Path) -> None:
    """Remove what killed processes of this machine left half written; those of living ones stay."""
    for path in folder.glob(f".*{_mark('*')}"):
        pid = int(digits) if (digits := path.name.split("-")[-1].removesuffix(".partial")).isdecimal() else 0
        if pid == os.getpid() or not _alive(pid):
            with suppress(OSError):
                path.unlink()


def _mark(pid: int | str) -> str:
    return f".{socket.gethostname()}-{pid}.partial"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        return True
    return pid > 0


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
