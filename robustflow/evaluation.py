"""Certify and attack a trained model on one split: a row an image, from both sides.

The one place that calls the package `attacks`. The two stages of a model on a split share NAME.csv and NAME.json in
OUT/evaluations/DATASET-SPLIT/: `certify` writes index, label, prediction and certified radius, `attack` adds what it
found. The JSON file is written last and tells what its stage depended on; a stage that is done is not repeated.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

import attacks
from robustflow import checkpoints, environment
from robustflow.alarms import find_alarms
from robustflow.certificates import certify
from robustflow.data import ImageSet, Split
from robustflow.errors import UserError
from robustflow.evaluate_config import EvaluateConfig
from robustflow.falsifier import falsify_network
from robustflow.networks import Classifier

# Raised whenever the numbers of a stage would come out differently from the same weights and images.
CERTIFY_VERSION, ATTACK_VERSION = 1, 2
# Images of one shard, and threads that attack it. Last bits depend on both, so neither is left to the machine.
SHARD_SIZE, THREADS = 250, 1


@dataclass(frozen=True)
class Subject:
    """One model on one split, and the folder where its rows go."""

    name: str
    model: Classifier
    weights_sha256: str
    split: Split
    folder: Path

    @property
    def rows_file(self) -> Path:
        return self.folder / f"{self.name}.csv"

    @property
    def record_file(self) -> Path:
        return self.folder / f"{self.name}.json"

    def record(self) -> dict[str, Any]:
        return checkpoints.read_json(self.record_file) if self.record_file.exists() else {}

    def certificate_identity(self) -> str:
        digest = hashlib.sha256(self.split.pixels.cpu().numpy().tobytes() + self.split.labels.cpu().numpy().tobytes())
        return _hash([CERTIFY_VERSION, self.weights_sha256, digest.hexdigest()])


def _hash(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def check_attacks(config: EvaluateConfig) -> None:
    """Refuse an unknown attack before anything is trained."""
    for name in config.attacks:
        attacks.resolve(name)


def open_evaluation(out: Path, images: ImageSet, split_name: str, config: EvaluateConfig) -> tuple[Split, Path]:
    """The images to evaluate on and the folder for their rows, described by its evaluation.json."""
    split = images.splits[split_name].head(config.images_of(split_name))
    folder = out / "evaluations" / f"{images.name}-{split_name}"
    description = {
        "schema_version": 1,
        "dataset": images.name,
        "source": images.source,
        "split": split_name,
        "n": len(split),
        "epsilons": list(config.epsilons),
        "attack_sets": list(config.attacks) if split_name in config.attacked_splits else [],
        "class_names": list(images.class_names),
    }
    path = folder / "evaluation.json"
    if not path.exists() or checkpoints.read_json(path) != description:
        checkpoints.write_json(path, description)
    return split, folder


def certify_subject(subject: Subject, *, batch_size: int = 250) -> dict[str, Any]:
    """Certified radii of every image, the account of the bound, and an attempt to falsify it.

    Raises:
        UserError: a layer without a rule, or a pair of points that refutes the bound (the pair is saved).
    """
    identity = subject.certificate_identity()
    record = subject.record()
    if record.get("certificate_identity") == identity and subject.rows_file.exists():
        return record
    started = time.perf_counter()
    images = subject.split.images().cpu()
    labels = subject.split.labels.cpu()
    certificate = certify(subject.model, images, labels, batch_size=batch_size)
    seconds = time.perf_counter() - started
    falsifications = falsify_network(subject.model, images[:4], audit=certificate.account)
    for found in falsifications:
        if found.violated:
            pair = subject.folder / f"{subject.name}.falsified.safetensors"
            checkpoints.write_tensors(pair, {"x": found.x, "y": found.y}, found.as_dict())
            raise UserError(
                f"the certificate of {subject.name} is refuted at {found.layer}: observed {found.observed:.9g} > "
                f"claimed {found.claimed:.9g}; the pair is in {pair}"
            )
    rows = pd.DataFrame(
        {
            "index": np.arange(len(labels)),
            "label": labels.numpy(),
            "prediction": certificate.predictions,
            "certified_radius": certificate.radii,
        }
    )
    record = {
        "name": subject.name,
        "lipschitz_bound": checkpoints.finite(certificate.lipschitz),
        "certified_object": certificate.certified_object,
        "account": [
            {key: checkpoints.finite(value) if isinstance(value, float) else value for key, value in row.items()}
            for row in certificate.account.rows()
        ],
        # The first is the whole network, the others the entries of its account and the layers inside them.
        "falsifier": {key: checkpoints.finite(value) for key, value in falsifications[0].as_dict().items()},
        "falsifier_layers": {found.layer: checkpoints.finite(found.ratio) for found in falsifications[1:]},
        "seconds": {"certify": round(seconds, 3)},
        "environment": environment.describe("cpu"),
        "certificate_identity": identity,
    }
    _write(subject, rows, record)
    return record


def attack_identity(record: dict[str, Any], config: EvaluateConfig, seed: int, device_type: str) -> str:
    """What the verdicts of a certified model depend on, as a hash."""
    options = [list(config.epsilons), list(config.attacks), config.audit, config.batch_size, seed, device_type]
    # Only where it is on, so that results of before this option stay valid.
    options += ["8 bit"] if config.eight_bit else []
    return _hash([ATTACK_VERSION, record["certificate_identity"], *options])


def attack_subject(
    subject: Subject,
    config: EvaluateConfig,
    *,
    seed: int,
    device: torch.device,
    show_progress: bool = True,
    executor: str = "serial",
    workers: int | None = None,
) -> dict[str, Any]:
    """Attack every image with every set, each on its own; keep the smallest adversarial of all.

    An image with an adversarial inside its certified ball is an alarm: re-checked in float64, saved, recorded.
    Finished shards wait in shards/NAME/SET/ until all is done; where they run (``executor``, ``workers``) changes no
    number, see `attacks.sharded_sweep`.

    Raises:
        UserError: the split has not been certified.
        attacks.AttackInputError: the model cannot be attacked, or not by this executor.
    """
    record = subject.record()
    if record.get("certificate_identity") != subject.certificate_identity():
        raise UserError(f"{subject.name} has no certificate for these images: run `robustflow certify` first")
    identity = attack_identity(record, config, seed, device.type)
    if record.get("attack_identity") == identity and subject.rows_file.exists():
        return record
    rows = read_rows(subject.rows_file)[["index", "label", "prediction", "certified_radius"]]
    images, labels = subject.split.images().cpu(), subject.split.labels.cpu()
    model = subject.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    shards = subject.folder / "shards" / subject.name
    seconds, passes = 0.0, dict[str, int]()
    warnings: list[str] = []
    best, names, adversarials = np.full(len(labels), np.inf), np.full(len(labels), "", dtype=object), images.clone()
    for chosen in config.attacks:
        with tqdm(desc=f"{subject.name}: {chosen}", disable=None if show_progress else True, unit="pass") as bar:
            result = attacks.sharded_sweep(
                model,
                images,
                labels,
                config.epsilons,
                chosen,
                certified_radii=rows["certified_radius"].to_numpy(),
                audit=config.audit,
                batch_size=config.batch_size,
                device=device,
                seed=seed,
                eight_bit=config.eight_bit,
                folder=shards / chosen,
                shard_size=SHARD_SIZE,
                threads=THREADS,
                executor=executor,
                workers=workers,
                progress=_shown_on(bar, f"{subject.name}: {chosen}"),
            )
        seconds += sum(result.seconds.values())
        norms = result.samples["adversarial_norm"].to_numpy()
        rows[f"norm_{chosen}"] = norms
        better = norms < best
        best[better], names[better] = norms[better], result.samples["attack"].to_numpy()[better]
        adversarials[torch.from_numpy(better)] = result.adversarials[torch.from_numpy(better)]
        passes |= {f"{chosen}: {name}": count for name, count in result.forward_passes.items()}
        warnings += [f"{chosen}: {warning}" for warning in result.warnings]
    rows.insert(4, "adversarial_norm", best)
    rows.insert(5, "attack", names)
    alarms = find_alarms(model, rows, images, adversarials, folder=subject.folder, name=subject.name)
    _write_examples(subject, rows, images, adversarials, config.examples)
    record |= {
        "seconds": {"certify": record["seconds"]["certify"], "attack": round(seconds, 3)},
        "forward_passes": passes,
        "warnings": warnings,
        "alarms": alarms,
        "attack_environment": environment.describe(device) | {"threads": THREADS},
        "attack_seed": seed,
        "attack_identity": identity,
    }
    _write(subject, rows, record)
    shutil.rmtree(shards)
    with contextlib.suppress(OSError):  # others are still at work in it
        shards.parent.rmdir()
    return record


def _write_examples(subject: Subject, rows: pd.DataFrame, images: Tensor, adversarials: Tensor, count: int) -> None:
    """The first broken images with their adversarials, for the report's picture."""
    norm = rows["adversarial_norm"].to_numpy()
    broken = torch.from_numpy(np.flatnonzero((norm > 0) & np.isfinite(norm))[:count])
    path = subject.folder / f"{subject.name}.examples.safetensors"
    if not len(broken):
        path.unlink(missing_ok=True)
        return
    chosen = broken.numpy()
    device = next(subject.model.parameters()).device
    with torch.inference_mode():
        predictions = subject.model(adversarials[broken].to(device)).argmax(1)
    tensors = {
        "index": broken,
        "label": torch.from_numpy(rows["label"].to_numpy()[chosen]),
        "prediction": torch.from_numpy(rows["prediction"].to_numpy()[chosen]),
        "adversarial_prediction": predictions,
        "images": (images[broken] * 255).round().to(torch.uint8),
        "adversarials": adversarials[broken],
        "norm": torch.from_numpy(norm[chosen]),
    }
    checkpoints.write_tensors(path, tensors)


def read_rows(path: Path) -> pd.DataFrame:
    """The per-image rows as written; floats round-trip exactly."""
    try:
        rows = pd.read_csv(path, dtype=str, keep_default_na=False)
        # Converted by Python: exact for every float, whatever the parser of this pandas rounds.
        kinds: dict[str, type] = {"index": int, "label": int, "prediction": int, "certified_radius": float}
        rows = rows.assign(**{name: [kind(cell) for cell in rows[name]] for name, kind in kinds.items()})
    except KeyError as error:
        raise UserError(f"{path} has no column {error}; delete it and certify again") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; delete it and certify again") from error
    return rows


def _write(subject: Subject, rows: pd.DataFrame, record: dict[str, Any]) -> None:
    checkpoints.write_text(subject.rows_file, rows.to_csv(index=False, lineterminator="\n"))
    checkpoints.write_json(subject.record_file, record)


def _shown_on(bar: Any, title: str) -> Callable[[str, int, int], None]:
    """A progress callback for a sweep in shards: the bar counts forward passes, and only this run's make its rate."""
    started = False

    def show(text: str, done: int, total: int) -> None:
        nonlocal started
        if not started:
            bar.initial, started = done, True
        bar.set_description(f"{title} · {text}", refresh=False)
        bar.total, bar.n = total, done
        bar.refresh()

    return show
