"""Read and check the files of a benchmark directory: what was trained, and what every image's verdict was.

Nothing is repaired here. A file that is missing, cut off or contradicts another is one UserError that names it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file

from robustflow.errors import UserError
from robustflow.records import Alarm, Card, Epoch, EvaluationCard, ModelCard, Record

AnyRecord = TypeVar("AnyRecord", bound=Record)
Named = TypeVar("Named", Card, ModelCard)
SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Verdicts:
    """One model on one dataset: a row an image, and the masks that every figure of the report is counted from."""

    name: str
    card: ModelCard
    rows: pd.DataFrame
    examples: dict[str, np.ndarray] | None

    @property
    def is_attacked(self) -> bool:
        return "adversarial_norm" in self.rows

    @property
    def correct(self) -> np.ndarray:
        return (self.rows["prediction"] == self.rows["label"]).to_numpy()

    @property
    def radii(self) -> np.ndarray:
        """Certified radii, 0 where the prediction is wrong: nothing is certified about a wrong answer."""
        return np.where(self.correct, self.rows["certified_radius"].to_numpy(), 0.0)

    def norms(self, attack_set: str | None = None) -> np.ndarray:
        """Smallest adversarial norm found (by one set, or by all), 0 where the clean image is already wrong."""
        column = "adversarial_norm" if attack_set is None else f"norm_{attack_set}"
        return np.where(self.correct, self.rows[column].to_numpy(), 0.0)

    def certified(self, epsilon: float) -> np.ndarray:
        return self.correct & (self.radii > epsilon)

    def attacked(self, epsilon: float, attack_set: str | None = None) -> np.ndarray:
        return self.correct & ~(self.norms(attack_set) <= epsilon)

    def alarms(self) -> list[Alarm]:
        """The recorded alarms and any crossing of the rows that nobody recorded: an alarm cannot be left out."""
        if not self.is_attacked:
            return self.card.alarms
        recorded = {alarm.index for alarm in self.card.alarms}
        crossed = self.rows[self.correct & (self.radii > 0) & (self.norms() <= self.radii)]
        found = [
            Alarm(
                index=int(row["index"]),
                certified_radius=float(row["certified_radius"]),
                adversarial_norm=float(row["adversarial_norm"]),
                attack=str(row["attack"]),
            )
            for row in crossed.to_dict("records")
            if row["index"] not in recorded
        ]
        return sorted([*self.card.alarms, *found], key=lambda alarm: alarm.index)


@dataclass(frozen=True)
class Evaluation:
    folder: str
    card: EvaluationCard
    models: list[Verdicts]

    @property
    def epsilons(self) -> list[float]:
        return self.card.epsilons

    @property
    def is_attacked(self) -> bool:
        """Whether the config has this split attacked; if not, it is certified only."""
        return bool(self.card.attack_sets)


@dataclass(frozen=True)
class Benchmark:
    config: dict[str, Any]
    cards: list[Card]
    logs: dict[str, pd.DataFrame]
    evaluations: list[Evaluation]


def read_benchmark(out: Path, partial: bool = False) -> Benchmark:
    """Read OUT/config.json, OUT/models and OUT/evaluations; models in the config's order, else by name, evaluations by
    data set, validation before test.

    Raises UserError, naming the file, where one is missing, garbled or at odds with the others. Only train.jsonl and
    the examples may be absent (a model trained elsewhere, attacks that broke nothing). With ``partial``, a model that
    is not trained, or not evaluated on a split, is left out there, and an evaluation may have none.
    """
    out = Path(out)
    if not out.is_dir():
        raise UserError(f"{out}: no such directory; give one written by `robustflow bench`")
    config = _json(out / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{out / 'config.json'}: expected an object with name, title and models")
    names = _model_names(config, out)
    if partial:
        names = [name for name in names if (out / "models" / name / "card.json").is_file()]
    cards = [_record(Card, out / "models" / name / "card.json", name) for name in names]
    logs = {name: log for name in names if (log := _log(out / "models" / name / "train.jsonl")) is not None}
    root = out / "evaluations"
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")) if root.is_dir() else []
    if not folders and not partial:
        raise UserError(f"{root}: no evaluation to report; run `robustflow certify` and `robustflow attack` first")
    evaluations = [_evaluation(folder, names, partial) for folder in folders]
    return Benchmark(config, cards, logs, sorted(evaluations, key=lambda evaluation: place(evaluation.card)))


def place(card: EvaluationCard) -> tuple[str, int, str]:
    """Where a report has an evaluation: what models are chosen by comes before what they are judged by."""
    return card.dataset, SPLITS.index(card.split) if card.split in SPLITS else len(SPLITS), card.split


def _model_names(config: dict[str, Any], out: Path) -> list[str]:
    listed = config.get("models")
    names: list[Any]
    if isinstance(listed, list) and listed:
        names = [entry.get("name") if isinstance(entry, dict) else entry for entry in listed]
    else:
        names = sorted(p.name for p in (out / "models").glob("*") if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise UserError(f"{out / 'models'}: no model to report; run `robustflow train` first")
    for name in names:
        # Names become file names: one with a separator would read (or write) outside the directory.
        if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\\0"):
            raise UserError(f"{out / 'config.json'}: models: {name!r} is not a model name")
    if len(set(names)) < len(names):
        raise UserError(f"{out / 'config.json'}: models: a name occurs twice")
    return names


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; run the benchmark again to write it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({str(error).splitlines()[0]}); run the benchmark again") from None


def _validated(kind: type[AnyRecord], content: Any, where: str) -> AnyRecord:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(f"{where}: {key}: {first['msg']}") from None


def _record(kind: type[Named], path: Path, name: str) -> Named:
    record = _validated(kind, _json(path), str(path))
    if record.name != name:
        raise UserError(f"{path}: name: this is the file of {record.name!r}, expected {name!r}")
    return record


def _log(path: Path) -> pd.DataFrame | None:
    if not path.exists():
        return None
    epochs = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    for number, line in enumerate(lines, start=1):
        try:
            content = json.loads(line)
        except ValueError:
            raise UserError(f"{path}: line {number} is not valid JSON; run `robustflow train` again") from None
        epochs.append(_validated(Epoch, content, f"{path}: line {number}").model_dump())
    return pd.DataFrame(epochs) if epochs else None


def _evaluation(folder: Path, names: list[str], partial: bool = False) -> Evaluation:
    path = folder / "evaluation.json"
    card = _validated(EvaluationCard, _json(path), str(path))
    grid = card.epsilons
    if any(not math.isfinite(e) or e < 0 for e in grid) or any(b <= a for a, b in pairwise(grid)):
        raise UserError(f"{path}: epsilons: expected finite numbers >= 0 in increasing order, got {grid}")
    models: list[Verdicts] = []
    for name in names if card.models is None else [n for n in names if n in card.models]:
        if partial and not (folder / f"{name}.json").is_file():
            continue
        record = _record(ModelCard, folder / f"{name}.json", name)
        if not card.attack_sets:
            record = _certified_only(record)
        elif partial and record.seconds.attack is None:
            continue
        elif record.seconds.attack is None:
            path = folder / f"{name}.json"
            raise UserError(f"{path}: seconds.attack: missing, {name} was not attacked; run `robustflow attack` first")
        rows = _rows(folder / f"{name}.csv", card)
        if models and not rows[["index", "label"]].equals(models[0].rows[["index", "label"]]):
            raise UserError(f"{folder / f'{name}.csv'}: its images or labels differ from those of {models[0].name}.csv")
        examples = _examples(folder / f"{name}.examples.safetensors") if card.attack_sets else None
        models.append(Verdicts(name, record, rows, examples))
    if not models and not partial:
        raise UserError(f"{path}: models: none of them is in config.json")
    return Evaluation(folder.name, card, models)


def _certified_only(record: ModelCard) -> ModelCard:
    """What attacks under an earlier config cost and warned of is no part of this one; an alarm is: it stays refuted."""
    seconds = record.seconds.model_copy(update={"attack": None})
    return record.model_copy(update={"seconds": seconds, "forward_passes": {}, "warnings": []})


def _rows(path: Path, card: EvaluationCard) -> pd.DataFrame:
    """The rows of a model; of a split that is not attacked without the columns that attacks add."""
    sets = [f"norm_{name}" for name in card.attack_sets]
    numbers = ["certified_radius", *(["adversarial_norm", *sets] if sets else [])]
    kinds: dict[str, type] = dict.fromkeys(("index", "label", "prediction"), int) | dict.fromkeys(numbers, float)
    again = f"run `robustflow {'attack' if sets else 'certify'}` again"
    try:
        text = path.read_bytes()
        # Read as text, then converted by Python: exact for every float, whatever the parser of this pandas rounds.
        rows = pd.read_csv(path, dtype=str, keep_default_na=False)
        if missing := [column for column in [*kinds, *(["attack"] if sets else [])] if column not in rows]:
            raise ValueError(f"column {missing[0]!r} is missing")
        for column, kind in kinds.items():
            rows[column] = np.array([kind(cell) for cell in rows[column]])
    except FileNotFoundError:
        raise UserError(f"{path}: missing; {again}") from None
    except (OSError, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{path}: not a table of per-image rows ({str(error).splitlines()[0]}); {again}") from None
    if len(rows) != card.n or not text.endswith(b"\n"):
        raise UserError(f"{path}: cut off: {len(rows)} rows, evaluation.json says n = {card.n}; {again}")
    if rows[numbers].isna().to_numpy().any() or (sets and (rows["adversarial_norm"] < 0).any()):
        raise UserError(f"{path}: a number is missing, NaN or negative; {again}")
    if rows["index"].duplicated().any():
        raise UserError(f"{path}: an image occurs twice; {again}")
    if not sets:
        return rows[[*kinds]]
    right = rows["prediction"] == rows["label"]
    if not np.allclose(rows.loc[right, sets].min(axis=1), rows.loc[right, "adversarial_norm"], rtol=1e-5, atol=1e-7):
        raise UserError(f"{path}: adversarial_norm is not the smallest of {', '.join(sets)}; {again}")
    return rows.fillna({"attack": ""})


def _examples(path: Path) -> dict[str, np.ndarray] | None:
    if not path.exists():
        return None
    try:
        tensors = load_file(path)
        count = len(tensors["index"])
        shape = tensors["images"].shape
        whole = tensors["images"].dtype == np.uint8 and tensors["adversarials"].shape == shape and len(shape) == 4
        vectors = ("label", "prediction", "adversarial_prediction", "norm")
        labels = all(tensors[key].shape == (count,) for key in vectors)
        if not (whole and labels and shape[0] == count and np.isfinite(tensors["adversarials"]).all()):
            raise ValueError("tensors of the wrong shape or type")
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not a file of examples ({error}); run `robustflow attack` again") from None
    return tensors if count else None
