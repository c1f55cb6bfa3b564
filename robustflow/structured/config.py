"""One typed object for an experiment with a system, read from a TOML file with a key ``system``.

title = "Heat equation"
system = "heat"
seeds = [0, 1, 2, 3, 4]
[data]
train = 1000          # examples; and the options of the system
validation = 50
test = 50
[train]               # defaults of every model
epochs = 900
batch_size = 32
unroll = [3, 4, 5]
[[models]]
name = "trained"
network = {…}         # what the system's `build` takes
train = {noise = 0.01}
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from robustflow.config import LoopConfig, Name, Strict, validated, with_defaults
from robustflow.errors import UserError
from robustflow.structured.catalogue import SYSTEMS, find
from robustflow.structured.systems import System, checked


class UnrollConfig(LoopConfig):
    """How the steps of a flow are learned.

    ``unroll``: how many steps are predicted in a row; the training is divided into as many equal phases. ``noise``:
    uniform ± on the first input, in the units of the state.
    """

    optimizer: Literal["adam", "nadam", "sgd"] = "adam"
    unroll: tuple[int, ...] = Field((1,), min_length=1)
    noise: float = Field(0.0, ge=0, allow_inf_nan=False)
    precision: Literal["float32", "float64"] = "float32"

    @field_validator("unroll", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("unroll")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if min(value) < 1:
            raise ValueError("every number of steps is at least 1")
        return value


class DataConfig(Strict):
    """How many examples each split has. All other keys of the table are options of the system."""

    train: int = Field(ge=1)
    validation: int = Field(ge=1)
    test: int = Field(ge=1)
    options: dict[str, Any] = Field(default_factory=dict)


class StructuredModelConfig(Strict):
    """One model: a network of the system, and its training where it says nothing of its own."""

    name: Name
    network: dict[str, Any]
    train: UnrollConfig


class StructuredExperiment(Strict):
    """A system, its data, and the models that learn it with every seed."""

    title: str
    system: str
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    data: DataConfig
    models: tuple[StructuredModelConfig, ...] = Field(min_length=1)

    @field_validator("seeds", "models", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("system")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in SYSTEMS:
            raise ValueError(f"one of {', '.join(SYSTEMS)}")
        return value

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if min(value) < 0 or len(set(value)) < len(value):
            raise ValueError("whole numbers of at least 0, every one once")
        return value

    @model_validator(mode="after")
    def _distinct(self) -> StructuredExperiment:
        names = [*find(self.system).prepared(), *(model.name for model in self.models)]
        if len(set(names)) < len(names):
            raise ValueError("every model needs a name of its own (a system's prepared models have theirs)")
        return self

    def model(self, name: str) -> StructuredModelConfig:
        for model in self.models:
            if model.name == name:
                return model
        raise UserError(f"no model {name!r} here; there are: {', '.join(model.name for model in self.models)}")

    def options(self, origin: str = "data") -> dict[str, Any]:
        """The options of the system, checked and with their defaults.

        Raises:
            UserError: an unknown key or a wrong value.
        """
        return checked(self.the_system.options, self.data.options, origin).model_dump()

    @property
    def the_system(self) -> System:
        return find(self.system)


def from_dict(raw: dict[str, Any], origin: str = "config") -> StructuredExperiment:
    """Build an experiment from plain data; the tables [network] and [train] are defaults of every model.

    Raises:
        UserError: an unknown key or a wrong value, in one line that begins with ``origin``.
    """
    raw = with_defaults(raw, origin)
    if isinstance(table := raw.get("data"), dict):
        counts = {key: value for key, value in table.items() if key in ("train", "validation", "test")}
        raw["data"] = counts | {"options": {key: value for key, value in table.items() if key not in counts}}
    experiment = validated(StructuredExperiment, raw, origin)
    experiment.options(f"{origin}: data")
    return experiment
