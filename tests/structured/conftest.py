"""A planted system whose every number is known in closed form: ẋ = −x in the plane, sampled every δt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from robustflow.config import Strict
from robustflow.structured import catalogue
from robustflow.structured.systems import Data, Drawing, Measured, Reference, Split, System, checked

STEP = 0.25
EXACT = math.exp(-STEP)


CONFIG = """
title = "Decay"
system = "decay"
seeds = [0, 1, 2]
[data]
train = 40
validation = 10
test = 20
offsets = [0.5, 0.0]
[train]
epochs = 20
batch_size = 10
learning_rate = 0.1
unroll = [1, 2, 4]
noise = 0.01
precision = "float64"
[[models]]
name = "scale"
network = { kind = "scale" }
[[models]]
name = "matrix"
network = { kind = "matrix" }
train = { optimizer = "sgd", schedule = "cosine", precision = "float32", log_every = 8 }
"""


class DecayOptions(Strict):
    steps: int = 4
    offsets: tuple[float, ...] = (0.0, 0.0)


class DecayNetwork(Strict):
    kind: Literal["scale", "matrix"]


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.exactly = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x

    def constrain_(self, exact: bool = False) -> None:
        self.factor.data.clamp_(-1, 1)
        self.exactly += exact


class Decay(System):
    name, title, equations, property = "decay", "Decay", "ẋ = −x", "lines through 0"
    step = STEP
    options = DecayOptions
    references = (Reference("error of e^−δt", 0.5, "published", "another δt", model="scale"),)
    measurements = 0

    def data(self, split: Split, seed: int, size: int, options: Mapping[str, Any]) -> Data:
        chosen = self.options(**options)
        number = {"train": 2 * seed + 10, "validation": 2 * seed + 11, "test": 1}[split]
        start = torch.randn(size, 2, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        start = start + torch.tensor(chosen.offsets, dtype=torch.float64)
        return Data(start, torch.stack([start * EXACT**k for k in range(1, chosen.steps + 1)], 1))

    def build(self, network: Mapping[str, Any], data: Data) -> nn.Module:
        options = checked(DecayNetwork, network, f"{self.name} network")
        return Scale(0.1 + float(torch.rand(()))) if options.kind == "scale" else nn.Linear(2, 2, bias=False)

    def prepared(self) -> dict[str, nn.Module]:
        return {"exact": Scale(EXACT)}

    def measure(self, model: nn.Module, test: Data) -> Measured:
        Decay.measurements += 1
        assert test.inputs.dtype == next(model.parameters()).dtype == torch.float64
        assert not model.training
        point = model(torch.tensor([[1.0, 0.0]], dtype=torch.float64))[0]
        error = model(test.inputs) - test.targets[:, 0]
        figures = {"error of e^−δt": abs(float(point[0]) - EXACT), "test MSE": float(error.square().mean())}
        if isinstance(model, nn.Linear):
            figures["time to blow up"] = math.inf
        return Measured(figures, {"point": point.numpy(), "start": np.float64(1.0)})

    def draw(self, measured: Mapping[str, Sequence[Measured]]) -> list[Drawing]:
        figure = Figure(figsize=(4, 3), layout="constrained")
        ax = figure.subplots()
        for name, each in measured.items():
            ax.plot([one.series["point"][0] for one in each], "o", label=name)
        ax.legend()
        return [Drawing("points", "Where (1, 0) goes in one step.", figure)]


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Decay:
    system = Decay()
    monkeypatch.setitem(catalogue.SYSTEMS, "decay", system)
    return system


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "decay.toml"
    path.write_text(CONFIG, encoding="utf-8")
    return path
