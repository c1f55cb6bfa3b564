"""One typed object for a whole experiment, read from a TOML file.

`Experiment` is everything that a run depends on besides the data directory, the device and the seed. A key that is not
known or a value of the wrong type is one line that names file, key and what was expected.
"""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from robustflow import data, networks
from robustflow.errors import UserError
from robustflow.evaluate_config import EvaluateConfig, Radius
from robustflow.strict import Strict, validated

MAXIMUM_CONFIG_BYTES = 64_000  # tomllib takes time with the square of the depth of a dotted key


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class NetworkConfig(Strict):
    """The options of `robustflow.create_model`; ``normalize`` chooses its mean and std from the training images."""

    channels: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(32, 64, 128), min_length=1)
    layers: int = Field(4, ge=0)
    kernel: Literal["convolution", "patch"] = "convolution"
    kernel_size: int = Field(3, ge=1)
    patch: int = Field(2, ge=1)
    lift: Literal["convolution", "patch"] = "convolution"
    dense: int = Field(0, ge=0)
    dense_layers: int = Field(0, ge=0)
    hidden_ratio: float = Field(1.0, gt=0, le=1, description="hidden units of a step for every dimension it acts on")
    mirror: bool = False
    normalize: Literal["none", "center", "standardize"] = "center"

    @field_validator("channels", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class HingeLoss(Strict):
    kind: Literal["hinge"]
    margin: float = Field(gt=0)


class CrossEntropyLoss(Strict):
    kind: Literal["cross-entropy"]
    temperature: float = Field(1.0, gt=0)
    smoothing: float = Field(0.0, ge=0, lt=1, description="share of every label that is spread over all classes")


class OffsetLoss(Strict):
    kind: Literal["offset"]
    offset: float = Field(0.3, ge=0)
    temperature: float = Field(0.25, gt=0)


class CertifiedLoss(Strict):
    kind: Literal["certified"]
    epsilon: Radius = 36 / 255
    temperature: float = Field(0.25, gt=0)


LossConfig = Annotated[
    HingeLoss | CrossEntropyLoss | OffsetLoss | CertifiedLoss, Field(discriminator="kind", description="loss")
]


class AdversarialConfig(Strict):
    """The attack inside adversarial training: ``steps`` of projected gradient ascent in the L2 ball of ``epsilon``."""

    epsilon: Radius = Field(gt=0)
    steps: int = Field(2, ge=1)


class LoopConfig(Strict):
    """What any training has, of whatever it is."""

    epochs: int = Field(ge=1)
    batch_size: int = Field(128, ge=1)
    optimizer: str
    learning_rate: float = Field(3e-3, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = Field(False, description="of optimizer 'sgd'")
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["one-cycle", "cosine", "steps", "constant"] = "one-cycle"
    warmup: float = Field(0.2, ge=0, lt=1, description="share of the training in which one-cycle rises")
    step_every: int = Field(30, ge=1, description="epochs between the drops of 'steps', by a factor of ten")
    log_every: int = Field(1, ge=1, description="epochs to a line of the log, validated at its end")
    checkpoint_seconds: float = Field(120.0, gt=0)

    @field_validator("nesterov")
    @classmethod
    def _with_momentum(cls, value: bool, info: ValidationInfo) -> bool:
        if value and (info.data.get("optimizer") != "sgd" or not info.data.get("momentum")):
            raise ValueError("nesterov needs optimizer = 'sgd' and a momentum above 0")
        return value


class TrainConfig(LoopConfig):
    """How a classifier is trained. ``muon_learning_rate``: the step for orthonormal matrices under optimizer "muon"."""

    loss: LossConfig = Field(default_factory=lambda: OffsetLoss(kind="offset", offset=0.3, temperature=0.25))
    start: str | None = Field(None, description="a trained model, directory or OUT/NAME, whose weights it begins with")
    adversarial: AdversarialConfig | None = None
    optimizer: Literal["sgd", "nadam", "muon"] = "muon"
    muon_learning_rate: float = Field(0.02, gt=0)
    crop: int = Field(2, ge=0)
    flip: bool = True
    precision: Literal["float32", "bfloat16"] = "float32"
    channels_last: bool = True
    validate_images: int = Field(1000, ge=0, description="validation images after an epoch; all at the end")


class ModelConfig(Strict):
    """One model of a benchmark: a regime, with the experiment's network and training where it says nothing else."""

    name: Name
    regime: str
    network: NetworkConfig
    train: TrainConfig

    @field_validator("regime")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in networks.list_models():
            raise ValueError(f"one of {', '.join(networks.list_models())}")
        return value


class Experiment(Strict):
    """A benchmark: data, models, evaluation."""

    title: str
    dataset: str
    seed: int = Field(0, ge=0)
    models: tuple[ModelConfig, ...] = Field(min_length=1)
    evaluate: EvaluateConfig

    @field_validator("dataset")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in data.DATASETS:
            raise ValueError(f"one of {', '.join(data.DATASETS)}")
        return value

    @field_validator("models")
    @classmethod
    def _distinct(cls, value: tuple[ModelConfig, ...]) -> tuple[ModelConfig, ...]:
        names = [model.name for model in value]
        if len(set(names)) < len(names):
            raise ValueError("every model needs a name of its own")
        return value

    def model(self, name: str) -> ModelConfig:
        for model in self.models:
            if model.name == name:
                return model
        raise UserError(f"no model {name!r} here; there are: {', '.join(model.name for model in self.models)}")


def read(path: Path | str) -> Experiment:
    """Read an experiment with classifiers from a TOML file, or by the name of a config that comes with the package.

    Raises:
        UserError: no such file, no TOML, an unknown key or a wrong value.

    >>> read("quickstart").dataset
    'digits'
    """
    raw, origin = read_toml(path)
    if "system" in raw:
        raise UserError(
            f"{origin} is of a system, without classifiers: `robustflow bench` and `robustflow train` take it"
        )
    return from_dict(raw, origin)


def read_toml(path: Path | str) -> tuple[dict[str, Any], str]:
    """The plain content of a config, and the file it is in."""
    file = find(path)
    try:
        if file.stat().st_size > MAXIMUM_CONFIG_BYTES:
            raise UserError(f"{file} is larger than {MAXIMUM_CONFIG_BYTES} bytes: not a config")
        return tomllib.loads(file.read_text(encoding="utf-8")), str(file)
    except (ValueError, RecursionError, OSError) as error:  # no TOML, no text, numbers of 5,000 digits; too deep
        raise UserError(f"{file} cannot be read as TOML: {error}") from error


def from_dict(raw: dict[str, Any], origin: str = "config") -> Experiment:
    """Build an experiment from plain data; the tables [network] and [train] are defaults of every model."""
    return validated(Experiment, with_defaults(raw, origin), origin)


def with_defaults(raw: dict[str, Any], origin: str) -> dict[str, Any]:
    """The tables [network] and [train] moved into every model that says nothing else."""
    raw = dict(raw)
    shared = {key: raw.pop(key, {}) for key in ("network", "train")}
    models = raw.get("models")
    if isinstance(models, (list, tuple)) and all(isinstance(model, dict) for model in models):
        for table in shared.values():
            if not isinstance(table, dict):
                raise UserError(f"{origin}: network and train must be tables")
        raw["models"] = tuple({**model, **_merged(shared, model)} for model in models)
    return raw


def _merged(shared: dict[str, dict[str, Any]], model: dict[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for key, defaults in shared.items():
        own = model.get(key, {})
        merged[key] = {**defaults, **own} if isinstance(own, dict) else own
    return merged


def config_directory() -> Path:
    """Where the configs are: beside the package in a checkout, inside it in an installed wheel."""
    beside = Path(__file__).resolve().parent.parent / "configs"
    return beside if beside.is_dir() else Path(str(resources.files("robustflow") / "configs"))


def list_configs() -> dict[str, Path]:
    """Names of the configs that come with the package, as `find` takes them."""
    folder = config_directory()
    return {str(path.relative_to(folder).with_suffix("")): path for path in sorted(folder.rglob("*.toml"))}


def find(path: Path | str) -> Path:
    """A file, or the name of a config that comes with the package ("quickstart", "cifar10/cpu", "configs/…")."""
    file = Path(path)
    if file.is_file():
        return file
    name = str(path).removeprefix("configs/").removesuffix(".toml")
    configs = list_configs()
    if name not in configs:
        raise UserError(f"no config {path}: neither a file nor one of {', '.join(configs)}")
    return configs[name]
