"""Trained networks for other software: plain modules, torch.export programs and ONNX files, with the same logits.

What leaves is the evaluation mode: weights with their parametrisations baked in, no class of ours, any batch size,
images (n, C, H, W) float32 in [0, 1] to logits. "The same" is within 1e-5 of the largest logit of the images compared,
or within 1e-5 where that is below 1: what the order of float32 sums leaves open. The certificate is about the network
with these weights in real arithmetic and stays true of a faithful export; nothing in the file proves it again.

One limit: ONNX has no complex inverse, so a *cayley* network cannot be written as ONNX; its plain module stays float32.
"""

from __future__ import annotations

import copy
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from robustflow import checkpoints
from robustflow.baking import baked_copy
from robustflow.errors import UserError

TOLERANCE = 1e-5
FORMATS = ("torch", "onnx")
PIP = "pip install 'robustflow[export]'"
CHECKED = 3  # images that a written file is compared on, another number than it was traced with


def to_plain(model: nn.Module, input_shape: tuple[int, ...] | None = None) -> fx.GraphModule:
    """The model as an ordinary ``nn.Module`` of torch operations alone, on the CPU: robustflow is not needed to run it.

    ``input_shape`` of one image is only needed where the model does not tell it. The module can be moved, cast, copied,
    differentiated and saved as any other; what it computes in evaluation mode is fixed.

    Raises:
        UserError: the model cannot be traced, or gave other logits then.

    >>> from robustflow import create_model
    >>> model = create_model("sharp", input_shape=(1, 8, 8), channels=(4,), layers=2).eval()
    >>> plain, images = to_plain(model), torch.rand(5, 1, 8, 8)
    >>> bool(torch.allclose(plain(images), model(images), atol=1e-5)), type(plain.eval()).__name__
    (True, 'GraphModule')
    """
    traced = program(model, input_shape).module(check_guards=False)
    assert isinstance(traced, fx.GraphModule)
    # A module of torch.export refuses eval() and train(); one that is made from its graph is an ordinary one.
    plain = fx.GraphModule(traced, traced.graph).eval()
    _compare(plain, _ready(model), _shape(model, input_shape), "the plain module")
    return plain


def program(model: nn.Module, input_shape: tuple[int, ...] | None = None) -> torch.export.ExportedProgram:
    """The model as a torch.export program with a dynamic batch size, traced in evaluation mode in float32 on the CPU.

    Raises:
        UserError: torch.export cannot trace it.
    """
    ready, shape = _ready(model), _shape(model, input_shape)
    batch = torch.export.Dim("batch", min=1)
    try:
        with _quiet(), torch.no_grad():
            return torch.export.export(ready, (torch.zeros(2, *shape),), dynamic_shapes=({0: batch},))
    except Exception as error:  # whatever the tracer meets in a stranger's model
        raise UserError(f"torch.export cannot trace this {type(model).__name__}: {_line(error)}") from error


def save(model: nn.Module, path: Path | str, kind: str, input_shape: tuple[int, ...] | None = None) -> float:
    """Write the model as a torch.export program (``kind`` "torch", by custom FILE.pt2) or as ONNX ("onnx").

    The file is read again and compared: returns the largest difference between its logits and the model's, divided by
    the largest logit where that exceeds 1. A file that differs by more than 1e-5 is not kept.

    Raises:
        UserError: an unknown format, a model that cannot be exported, a package that is missing.
    """
    if kind not in FORMATS:
        raise UserError(f"unknown format {kind!r}: one of {', '.join(FORMATS)}")
    writer: Callable[[torch.export.ExportedProgram, Path], Callable[[Tensor], Tensor]]
    writer = _write_torch if kind == "torch" else _write_onnx
    if kind == "onnx":
        require_onnx()
    traced = program(model, input_shape)
    with checkpoints.replacing(Path(path)) as partial:
        return _compare(writer(traced, partial), _ready(model), _shape(model, input_shape), str(path))


def _write_torch(traced: torch.export.ExportedProgram, path: Path) -> Callable[[Tensor], Tensor]:
    buffer = io.BytesIO()
    torch.export.save(traced, buffer)
    path.write_bytes(buffer.getvalue())
    buffer.seek(0)
    return torch.export.load(buffer).module()


def _write_onnx(traced: torch.export.ExportedProgram, path: Path) -> Callable[[Tensor], Tensor]:
    onnxruntime = importlib.import_module("onnxruntime")
    try:
        with _quiet():
            made = torch.onnx.export(
                traced, input_names=["images"], output_names=["logits"], dynamo=True, external_data=False, verbose=False
            )
            assert made is not None
            made.save(str(path), external_data=False)
    except Exception as error:  # an operator that ONNX does not know
        raise UserError(f"this model cannot be written as ONNX: {_line(error)}") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def require_onnx() -> None:
    """Raise UserError, with the command that installs them, unless the packages of the extra are there."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError:
            raise UserError(f"ONNX needs the package {name}: {PIP}") from None


def _compare(
    exported: Callable[[Tensor], Tensor], ready: nn.Module, shape: tuple[int, ...], what: str
) -> float:
    images = torch.rand(CHECKED, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = ready(images), exported(images)
    # A difference of rounding grows with the logits.
    difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1.0))
    if found.shape != expected.shape or not difference <= TOLERANCE:
        raise UserError(f"{what} gives other logits than the model (relative difference {difference:.3g}): not kept")
    return difference


def _ready(model: nn.Module) -> nn.Module:
    """A float32 copy on the CPU in evaluation mode, parametrised weights as plain ones."""
    try:
        # Evaluation mode first: in training mode a parametrised weight may change whenever it is read.
        return baked_copy(copy.deepcopy(model).eval()).to("cpu", torch.float32).requires_grad_(False)
    except RuntimeError as error:  # weights that are not leaves of autograd's graph
        raise UserError(f"this {type(model).__name__} cannot be copied: {_line(error)}") from error


def _shape(model: nn.Module, input_shape: tuple[int, ...] | None) -> tuple[int, ...]:
    shape = input_shape if input_shape is not None else getattr(model, "input_shape", None)
    if shape is None:
        raise UserError(f"a {type(model).__name__} does not tell the shape of its images: give input_shape=(C, H, W)")
    return tuple(shape)


def _line(error: BaseException) -> str:
    """The first cause of an error in one line: exporters wrap it in advice to their own developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch and its exporters tell their own developers."""
    loggers: list[Any] = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


__all__ = ["FORMATS", "program", "require_onnx", "save", "to_plain"]
