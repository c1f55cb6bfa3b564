"""The stages of a benchmark over its output directory: train → certify → attack → report, each resumable on its own.

OUT/config.json         the experiment, resolved
OUT/models/NAME/        weights, card and training log of one model
OUT/evaluations/SET/    per-image rows of every model on one split of one dataset
OUT/summary.json …      what `robustflow.report` makes of them
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from robustflow import checkpoints, data, evaluation, networks
from robustflow.bounds import account
from robustflow.config import Experiment, ModelConfig
from robustflow.data import ImageSet
from robustflow.distributed import ALONE, Group
from robustflow.errors import UserError
from robustflow.falsifier import lower_estimates
from robustflow.image_task import ImageTask
from robustflow.networks import Classifier
from robustflow.starting_point import find_start, start_of
from robustflow.trained import CARD, check_weights, identity_of, is_finished, read_card, train_once
from robustflow.training import STATE, WEIGHTS, check_state

CONFIG = "config.json"


def open_directory(out: Path, experiment: Experiment, name: str, images: ImageSet) -> None:
    """Make the output directory and note the experiment in it.

    Raises:
        UserError: the directory cannot be written, or holds a model of another config, whose note then stays.
    """
    pixels = fingerprint(images)
    for config in experiment.models:
        folder = out / "models" / config.name
        wanted = identity(config, folder, experiment.seed, pixels)
        if not is_finished(folder, wanted) and (folder / STATE).is_file():
            check_state(folder / STATE, wanted)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output directory {out} cannot be made: {error.strerror}; choose another with --out") from None
    resolved = {"name": name, "command": f"robustflow bench {name}"} | experiment.model_dump(mode="json")
    checkpoints.write_json(out / CONFIG, resolved)


def read_directory(out: Path) -> tuple[Experiment, str]:
    """The experiment of an output directory and the name of its config."""
    if not out.is_dir():
        raise UserError(f"{out} is not a directory: run `robustflow bench CONFIG --out {out}` first")
    raw = checkpoints.read_json(out / CONFIG)
    try:
        if "system" in raw:
            raise UserError(f"{out} holds a structured system, not classifiers: only those are certified and attacked")
        name = raw.pop("name")
        raw.pop("command")
        return Experiment.model_validate_json(json.dumps(raw)), name
    except (KeyError, AttributeError, TypeError, ValidationError) as error:
        raise UserError(f"{out / CONFIG} is not the config of a benchmark: {type(error).__name__}") from error


def build_model(config: ModelConfig, images: ImageSet) -> Classifier:
    """The network of a config for an image set, with its input normalisation, not yet trained."""
    options = config.network.model_dump(exclude={"normalize"})
    mean, std = images.mean, images.std
    if config.network.normalize != "standardize":
        std = (1.0,) * len(std)
    if config.network.normalize == "none":
        mean = (0.0,) * len(mean)
    return networks.create_model(
        config.regime,
        input_shape=images.input_shape,
        classes=len(images.class_names),
        mean=mean,
        std=std,
        **options,
    )


def load_model(config: ModelConfig, images: ImageSet, folder: Path) -> Classifier:
    """The trained network of a benchmark, its weights checked against its card.

    Raises:
        UserError: not trained yet, a broken checkpoint, another architecture, or weights that are not the card's.
    """
    read_card(folder)
    model = build_model(config, images)
    checkpoints.load_weights(model, folder / WEIGHTS)
    check_weights(folder)
    return model.eval()


def fingerprint(images: ImageSet) -> str:
    """SHA-256 over all pixels and labels that a training can see."""
    digest = hashlib.sha256()
    for split in ("train", "validation"):
        for tensor in (images.splits[split].pixels, images.splits[split].labels):
            digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def identity(config: ModelConfig, folder: Path, seed: int, pixels: str) -> str:
    """What decides the weights of the model in ``folder``: config, seed, images, the weights that it begins with."""
    start = start_of(config, folder)
    return identity_of(config, seed, pixels if start is None else [pixels, start])


def train(
    experiment: Experiment,
    out: Path,
    images: ImageSet,
    *,
    device: torch.device,
    only: str | None = None,
    group: Group = ALONE,
) -> None:
    """Train every model that is not finished; a model that was trained otherwise is an error, not overwritten."""
    pixels = fingerprint(images)
    chosen = chosen_models(experiment, only)
    for config in chosen:
        # Before the first training, not after hours of it.
        model = build_model(config, images)
        group.part(model, config.train.batch_size)
        if not (out / "models" / config.name / CARD).is_file() and (start := find_start(config)) is not None:
            start.load(model)
    for config in chosen:
        folder = out / "models" / config.name
        train_model(config, folder, images, seed=experiment.seed, device=device, pixels=pixels, group=group)


def chosen_models(experiment: Experiment, only: str | None) -> list[ModelConfig]:
    return list(experiment.models) if only is None else [experiment.model(only)]


def train_model(
    config: ModelConfig,
    folder: Path,
    images: ImageSet,
    *,
    seed: int,
    device: torch.device,
    pixels: str,
    group: Group = ALONE,
    listener: Callable[[int], None] | None = None,
) -> None:
    wanted = identity(config, folder, seed, pixels)
    start = None if is_finished(folder, wanted) else find_start(config)
    if start is not None:
        group.agree(int(start.sha256[:15], 16), f"the weights of {start.folder}, where {config.name} begins")

    def build() -> ImageTask:
        model = build_model(config, images)
        if start is not None:
            start.load(model)
        part = group.part(model, config.train.batch_size)
        return ImageTask(model, images, config.train, device=device, part=part)

    def about(model: nn.Module) -> dict[str, Any]:
        assert isinstance(model, Classifier)
        return {
            "regime": config.regime,
            "description": networks.list_models()[config.regime],
            "parameters": networks.parameter_count(model),
            "multiply_adds": networks.multiply_adds(model),
            "config": config.model_dump(mode="json"),
        } | ({} if start is None else {"start": start.note})

    examples = {
        "dataset": images.name,
        "source": images.source,
        "input_shape": list(images.input_shape),
        "class_names": list(images.class_names),
        "train_n": len(images.splits["train"]),
        "validation_n": len(images.splits["validation"]),
        "sha256": pixels,
    }
    train_once(
        folder, config.train, build, about, examples, identity=wanted, seed=seed,
        device=device, group=group, listener=listener,
        before=0.0 if start is None else start.seconds["train"],
    )  # fmt: skip


def _subjects(
    experiment: Experiment, out: Path, images: ImageSet, only: str | None, splits: tuple[str, ...]
) -> Iterator[tuple[ModelConfig, evaluation.Subject]]:
    """Every model on these splits; each model is read once for each split, fresh from its file."""
    if only is not None:
        experiment.model(only)
    for split_name in splits:
        split, folder = evaluation.open_evaluation(out, images, split_name, experiment.evaluate)
        for config in experiment.models:
            if only in (None, config.name):
                home = out / "models" / config.name
                model = load_model(config, images, home)
                yield config, evaluation.Subject(config.name, model, read_card(home)["sha256"], split, folder)


def certify(
    experiment: Experiment, out: Path, images: ImageSet, *, only: str | None = None, explain: bool = False
) -> list[str]:
    """Certify every model on every split. Returns, if asked to explain, the readable account of each bound."""
    accounts = []
    for config, subject in _subjects(experiment, out, images, only, experiment.evaluate.splits):
        evaluation.certify_subject(subject, batch_size=experiment.evaluate.batch_size)
        if explain:
            audit = account(subject.model, subject.model.input_shape)
            text = audit.explain(lower_estimates(subject.model, subject.split.head(4).images(), audit))
            accounts.append(f"{config.name} on {subject.folder.name}\n{text}\n")
    return accounts


def locate(target: Path) -> tuple[Path, str | None]:
    """(output directory, model) of a path that names an output directory, or one of its models as OUT/models/NAME."""
    resolved = target.resolve()
    if resolved.parent.name == "models" and (resolved / CARD).is_file():
        return resolved.parents[1], resolved.name
    return target, None


def attack(
    experiment: Experiment,
    out: Path,
    images: ImageSet,
    *,
    device: torch.device,
    only: str | None = None,
    executor: str = "serial",
    workers: int | None = None,
) -> int:
    """Attack every model on every split that the config has attacked. Returns the number of alarms."""
    alarms = 0
    for _, subject in _subjects(experiment, out, images, only, experiment.evaluate.attacked_splits):
        record = evaluation.attack_subject(
            subject, experiment.evaluate, seed=experiment.seed, device=device, executor=executor, workers=workers
        )
        alarms += len(record["alarms"])
    return alarms


def unfinished(experiment: Experiment, out: Path) -> list[str]:
    """The models that no report can show yet: not trained, or not certified and attacked where the config says so."""
    config = experiment.evaluate

    def done(name: str, split: str) -> bool:
        path = out / "evaluations" / f"{experiment.dataset}-{split}" / f"{name}.json"
        stage = "attack_identity" if split in config.attacked_splits else "certificate_identity"
        return path.is_file() and stage in checkpoints.read_json(path)

    names = [model.name for model in experiment.models]
    trained = [name for name in names if (out / "models" / name / CARD).is_file()]
    return [name for name in names if name not in trained or not all(done(name, split) for split in config.splits)]


def load_data(experiment: Experiment, directory: Path | None) -> ImageSet:
    return data.load(experiment.dataset, directory)
