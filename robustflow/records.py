"""The shapes of the files in a benchmark directory, checked by pydantic: unknown keys are kept, wrong types refused."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Record(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class TrainingSeconds(Record):
    train: float


class Card(Record):
    """models/NAME/card.json"""

    schema_version: Literal[1]
    name: str
    regime: str
    description: str = ""
    parameters: int = Field(ge=0)
    multiply_adds: int | None = None
    config: dict[str, Any]
    seed: int
    seconds: TrainingSeconds
    environment: dict[str, Any] = {}
    data: dict[str, Any] = {}
    sha256: str = ""


class Epoch(Record):
    """A line of models/NAME/train.jsonl"""

    epoch: int
    loss: float
    train_accuracy: float | None = None
    validation_accuracy: float | None = None
    validation_n: int | None = None


class EvaluationCard(Record):
    """evaluations/DATASET-SPLIT/evaluation.json"""

    schema_version: Literal[1]
    dataset: str
    split: str
    n: int = Field(ge=1)
    epsilons: list[float] = Field(min_length=1)
    attack_sets: list[str]  # none: certified, not attacked
    class_names: list[str] = []
    models: list[str] | None = None


class Layer(Record):
    """A line of the certificate's account: the bound of a layer and the product so far"""

    layer: str
    kind: str
    formula: str = ""
    bound: float | None = None
    product: float | None = None


class EvaluationSeconds(Record):
    certify: float
    attack: float | None = None  # not attacked, or not yet


class Alarm(Record):
    """An image with an adversarial inside its certified ball: the certificate or the arithmetic is wrong"""

    index: int
    certified_radius: float
    adversarial_norm: float
    attack: str = ""
    confirmed_in_float64: bool | None = None
    file: str | None = None


class ModelCard(Record):
    """evaluations/DATASET-SPLIT/NAME.json"""

    name: str
    lipschitz_bound: float | None
    certified_object: str = ""
    account: list[Layer] = []
    seconds: EvaluationSeconds
    forward_passes: dict[str, int] = {}
    warnings: list[str] = []
    alarms: list[Alarm] = []
    environment: dict[str, Any] = {}
    falsifier: dict[str, Any] | None = None
