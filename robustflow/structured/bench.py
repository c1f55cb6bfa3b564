"""The stages of a benchmark of a system over its output directory: train → measure → report, for every seed.

OUT/config.json                  the experiment, resolved
OUT/seed-N/models/NAME/          weights, card and training log of one model
OUT/seed-N/measured/NAME.json    its figures on the test examples, and the series of its plots (.safetensors)
OUT/prepared/NAME.json           the same of a model that needs no training
OUT/summary.json …               what `structured.report` makes of them
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import nn

from robustflow import checkpoints, environment
from robustflow.errors import UserError
from robustflow.structured import measured_files
from robustflow.structured.config import StructuredExperiment, StructuredModelConfig
from robustflow.structured.systems import Data
from robustflow.structured.task import UnrollTask
from robustflow.trained import check_weights, identity_of, is_finished, read_card, train_once
from robustflow.training import STATE, WEIGHTS, check_state

CONFIG = "config.json"
Listener = Callable[[str, int], None]


class Bench:
    """An experiment in its output directory."""

    def __init__(self, experiment: StructuredExperiment, out: Path) -> None:
        self.experiment, self.out, self.system = experiment, out, experiment.the_system
        self.options = experiment.options()

    def folder(self, seed: int, config: StructuredModelConfig) -> Path:
        return self.out / f"seed-{seed}" / "models" / config.name

    def measured(self, seed: int) -> Path:
        return self.out / f"seed-{seed}" / "measured"

    @functools.lru_cache(maxsize=1)  # noqa: B019 - a seed's examples are made once, and only if they are needed
    def examples(self, seed: int) -> tuple[Data, Data]:
        """Training and validation examples of a seed."""
        counts = self.experiment.data
        return (
            self.system.data("train", seed, counts.train, self.options),
            self.system.data("validation", seed, counts.validation, self.options),
        )

    @functools.cached_property
    def test(self) -> Data:
        return self.system.data("test", 0, self.experiment.data.test, self.options)

    def build(self, config: StructuredModelConfig, seed: int) -> nn.Module:
        train, _ = self.examples(seed)
        with default_dtype(config.train.precision):
            return self.system.build(config.network, train)

    def load(self, config: StructuredModelConfig, seed: int) -> nn.Module:
        """A trained model, in float64 and evaluation mode, its weights checked against its card.

        Raises:
            UserError: not trained yet, a broken checkpoint, another architecture, or weights that are not the card's.
        """
        folder = self.folder(seed, config)
        read_card(folder)
        model = self.build(config, seed)
        checkpoints.load_weights(model, folder / WEIGHTS)
        check_weights(folder)
        return model.double().eval()

    def identity(self, config: StructuredModelConfig, seed: int) -> str:
        """What decides a model's weights. The examples stand there as the options that make them: their last bits are
        those of a processor's sines, and another machine has to know the model again."""
        data = self.experiment.data.model_dump(mode="json", exclude={"test"})
        return identity_of(config, seed, [self.experiment.system, data])

    def complete(self) -> list[int]:
        """The seeds of which every model is measured."""
        names = [model.name for model in self.experiment.models]
        return [
            seed
            for seed in self.experiment.seeds
            if all((self.measured(seed) / f"{name}.json").is_file() for name in names)
        ]

    def chosen(self, only: str | None) -> list[StructuredModelConfig]:
        return list(self.experiment.models) if only is None else [self.experiment.model(only)]

    def open(self, name: str, seeds: Sequence[int]) -> None:
        """Make the output directory and note the experiment in it.

        Raises:
            UserError: the directory cannot be written, or holds a model of another config, whose note then stays.
        """
        for seed in seeds:
            for config in self.experiment.models:
                folder, identity = self.folder(seed, config), self.identity(config, seed)
                if not is_finished(folder, identity) and (folder / STATE).is_file():
                    check_state(folder / STATE, identity)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output directory {self.out} cannot be made: {error.strerror}; choose another") from None
        note = {"name": name, "command": f"robustflow bench {name}"} | self.experiment.model_dump(mode="json")
        checkpoints.write_json(self.out / CONFIG, note)

    def train(
        self, seeds: Sequence[int], *, device: torch.device, only: str | None = None, listener: Listener | None = None
    ) -> None:
        """Train every model that is not finished; a model that was trained otherwise is an error, not overwritten."""
        waiting = [
            (seed, config)
            for seed in seeds
            for config in self.chosen(only)
            if not is_finished(self.folder(seed, config), self.identity(config, seed))
        ]
        for config in {config.name: config for _, config in waiting}.values():
            # Before the first training, not after minutes of it.
            self._task(config, waiting[0][0], torch.device("cpu"))
        for seed, config in waiting:
            self._train(config, seed, device, listener)

    def _task(self, config: StructuredModelConfig, seed: int, device: torch.device) -> UnrollTask:
        return UnrollTask(self.build(config, seed), *self.examples(seed), config.train, device)

    def _train(self, config: StructuredModelConfig, seed: int, device: torch.device, listener: Listener | None) -> None:
        def about(model: nn.Module) -> dict[str, Any]:
            return {
                "system": self.experiment.system,
                "parameters": parameter_count(model),
                "config": config.model_dump(mode="json"),
            }

        def heard(step: int) -> None:
            assert listener is not None
            listener(f"{config.name}, seed {seed}", step)

        train, validation = self.examples(seed)
        data = {
            "train_n": len(train),
            "validation_n": len(validation),
            "steps": train.targets.shape[1],
            "state": list(train.inputs.shape[1:]),
            "options": self.experiment.data.options,
        }
        train_once(
            self.folder(seed, config), config.train, lambda: self._task(config, seed, device), about, data,
            identity=self.identity(config, seed), seed=seed, device=device, listener=heard if listener else None,
        )  # fmt: skip

    def measure(self, seeds: Sequence[int], only: str | None = None) -> None:
        """Measure every trained model of these seeds, and the prepared ones: what was measured before, only if the
        weights, the test examples or the system's own code have changed."""
        for seed in seeds:
            for config in self.chosen(only):
                weights = read_card(self.folder(seed, config))["sha256"]
                self._measure(
                    self.measured(seed), config.name, seed, weights, functools.partial(self.load, config, seed)
                )
        with default_dtype("float64"):
            prepared = self.system.prepared()
        for name, model in prepared.items():
            self._measure(self.out / "prepared", name, None, "", functools.partial(_ready, model))

    def _measure(self, folder: Path, name: str, seed: int | None, weights: str, load: Callable[[], nn.Module]) -> None:
        source = Path(inspect.getfile(type(self.system))).read_bytes()
        data = self.experiment.data.model_dump(mode="json", include={"test", "options"})
        stated = json.dumps([weights, data, hashlib.sha256(source).hexdigest()], sort_keys=True)
        identity = hashlib.sha256(stated.encode()).hexdigest()
        if (folder / f"{name}.json").is_file() and measured_files.read_record(folder, name).identity == identity:
            return
        model, started = load(), time.monotonic()
        parameters = parameter_count(model)
        measured = self.system.measure(model.requires_grad_(False), self.test)
        measured_files.write(
            folder, measured, name=name, seed=seed, parameters=parameters, test_n=len(self.test),
            seconds=round(time.monotonic() - started, 3), identity=identity, environment=environment.describe("cpu"),
        )  # fmt: skip


def _ready(model: nn.Module) -> nn.Module:
    return model.double().eval()


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@contextlib.contextmanager
def default_dtype(precision: Literal["float32", "float64"]) -> Iterator[None]:
    """What a network is made of in the block has this dtype: a step size 0.1 is float64's 0.1, not float32's."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if precision == "float64" else torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def read_directory(out: Path) -> tuple[Bench, dict[str, Any]]:
    """The benchmark of an output directory, and its config.json.

    Raises:
        UserError: no such directory, or none of a system.
    """
    raw = checkpoints.read_json(out / CONFIG)
    try:
        plain = {key: value for key, value in raw.items() if key not in ("name", "command")}
        return Bench(StructuredExperiment.model_validate_json(json.dumps(plain)), out), raw
    except (AttributeError, ValidationError) as error:
        raise UserError(f"{out / CONFIG} is not the config of a system's benchmark: {type(error).__name__}") from error
