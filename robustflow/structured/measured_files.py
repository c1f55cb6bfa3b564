"""A measured model on disk: NAME.json with its figures, NAME.safetensors with the series that plots need."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError

from robustflow import checkpoints
from robustflow.errors import UserError
from robustflow.records import Record
from robustflow.strict import first_line
from robustflow.structured.systems import Measured

LARGEST = 300_000  # bytes of series a model


class MeasuredRecord(Record):
    """measured/NAME.json; a figure that is no finite number is a string, "inf" or "nan"."""

    schema_version: Literal[1] = 1
    name: str
    seed: int | None
    figures: dict[str, float | Literal["inf", "-inf", "nan"]]
    parameters: int = Field(ge=0)
    seconds: float
    test_n: int = Field(ge=1)
    identity: str
    environment: dict[str, Any]


def write(folder: Path, measured: Measured, **facts: Any) -> None:
    """Series first: a NAME.json stands for both."""
    series = {key: np.ascontiguousarray(value) for key, value in measured.series.items()}
    size = sum(value.nbytes for value in series.values())
    assert size <= LARGEST, f"{facts['name']}: {size} bytes of series, at most {LARGEST}"
    path = folder / f"{facts['name']}.safetensors"
    if series:
        checkpoints.write_tensors(path, {key: torch.from_numpy(value) for key, value in series.items()})
    else:
        path.unlink(missing_ok=True)
    figures = {key: float(value) for key, value in measured.figures.items()}
    plain = {key: value if math.isfinite(value) else str(value) for key, value in figures.items()}
    record = MeasuredRecord(**facts, figures=plain)  # type: ignore[arg-type]
    checkpoints.write_json(folder / f"{facts['name']}.json", record.model_dump())


def read_record(folder: Path, name: str) -> MeasuredRecord:
    """
    Raises:
        UserError: it is missing or garbled.
    """
    path = folder / f"{name}.json"
    try:
        record = MeasuredRecord.model_validate(checkpoints.read_json(path))
    except ValidationError as error:
        raise UserError(f"{path}: {first_line(error)}; delete it and run `robustflow bench` again") from None
    if record.name != name:
        raise UserError(f"{path}: this is the file of {record.name!r}")
    return record


def read(folder: Path, name: str) -> tuple[MeasuredRecord, Measured]:
    """What was measured of a model, and when, as it was written."""
    record, path = read_record(folder, name), folder / f"{name}.safetensors"
    tensors = checkpoints.read_tensors(path)[0] if path.exists() else {}
    figures = {key: float(value) for key, value in record.figures.items()}
    return record, Measured(figures, {key: tensor.numpy() for key, tensor in tensors.items()})
