"""Two evaluations of the same images, side by side: paired differences, who is better at each ε, where they disagree.

Both saw the same images, so that the comparison is of answers, image by image, and far sharper than two separate rates.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from robustflow import checkpoints, models
from robustflow.errors import UserError
from robustflow.statistics import Rate, paired_difference
from robustflow.tables import epsilon_label, percent

QUANTITIES = ("clean", "certified", "attacked")
LEVEL = 0.05
SAMPLES = ("index", "label", "prediction", "certified_radius", "adversarial_norm")


@dataclass(frozen=True)
class Rows:
    """One model on one split: a row an image, and what the rows are about.

    ``norms``: of the smallest adversarial found by each attack set; ``certified``: whether radii could be computed.
    """

    name: str
    path: Path
    dataset: str
    split: str
    epsilons: list[float]
    rows: pd.DataFrame = field(repr=False)
    norms: dict[str, np.ndarray] = field(repr=False)

    @property
    def correct(self) -> np.ndarray:
        return (self.rows["prediction"] == self.rows["label"]).to_numpy()

    @property
    def certified(self) -> bool:
        return not bool(self.rows["certified_radius"].isna().any())


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    ``table``: a row a quantity and ε: quantity, epsilon, n, a and b (shares of the n images) with their 95 % Wilson
    intervals (a_low, …), difference a − b with its 95 % interval (low, high), only_a, only_b (images that one alone
    gets right), p_value (McNemar's, exact, of this row alone) and better ("" where p ≥ 0.05).

    ``disagreements``: for the same rows in the same order, the indices of the images (only_a, only_b).
    """

    a: Rows
    b: Rows
    names: tuple[str, str]
    table: pd.DataFrame = field(repr=False)
    disagreements: list[dict[str, list[int]]] = field(repr=False)
    notes: list[str]

    def __str__(self) -> str:
        where = f"the same {len(self.a.rows)} images of {self.a.dataset}, {self.a.split}"
        lines = [f"A: {self.names[0]}; B: {self.names[1]}; on {where}"]
        head = ("", "ε", "A", "B", "A − B, points", "only A", "only B", "p", "better")
        rows = [head] + [
            (
                row["quantity"],
                epsilon_label(row["epsilon"]),
                _percent(row, "a"),
                _percent(row, "b"),
                f"{100 * row['difference']:+.1f} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})",
                str(row["only_a"]),
                str(row["only_b"]),
                f"{row['p_value']:.2g}",
                row["better"] or "–",
            )
            for row in self.table.to_dict("records")
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines += ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.append("percent, with 95 % intervals; p: McNemar's exact test of that line alone, – where p ≥ 0.05")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON, with the indices of the images on which the two disagree."""
        sides = {
            side: {"name": name, "path": str(rows.path), "attack_sets": list(rows.norms)}
            for side, name, rows in (("a", self.names[0], self.a), ("b", self.names[1], self.b))
        }
        records = self.table.to_dict("records")
        told = [{**row, "images": images} for row, images in zip(records, self.disagreements, strict=True)]
        where = {"dataset": self.a.dataset, "split": self.a.split, "n": len(self.a.rows)}
        return {"schema_version": 1, **sides, **where, "level": LEVEL, "rows": told, "notes": self.notes}


def _percent(row: Any, side: str) -> str:
    return percent({"value": row[side], "low": row[f"{side}_low"], "high": row[f"{side}_high"]})


def compare(a: Rows, b: Rows) -> Comparison:
    """Paired differences of ``a`` and ``b`` at every ε that both were evaluated at.

    certified(ε): right with a radius above ε; attacked(ε): right without an adversarial of norm ≤ ε, by the attack sets
    that both have. The statistics are those of `robustflow.statistics.paired_difference`.

    Raises:
        UserError: not the same images, labels and split, or no common ε.
    """
    _check_same_images(a, b)
    grid = [e for e in a.epsilons if any(math.isclose(e, other, abs_tol=1e-12) for other in b.epsilons)]
    if not grid:
        raise UserError(f"{a.path} and {b.path} have no ε in common: evaluate both at the same radii")
    sets = [name for name in a.norms if name in b.norms]
    notes = []
    if not (a.certified and b.certified):
        without = " and ".join(str(rows.path) for rows in (a, b) if not rows.certified)
        notes.append(f"certified accuracy left out: no certificate in {without}")
    if not sets:
        different = f"A was attacked with {', '.join(a.norms)}, B with {', '.join(b.norms)}"
        spared = " and ".join(str(rows.path) for rows in (a, b) if not rows.norms)
        notes.append(f"attacked accuracy left out: {f'no attacks in {spared}' if spared else different}")
    elif set(a.norms) != set(b.norms):
        notes.append(f"attacked by {', '.join(sets)} alone, which both have")
    names = (a.name, b.name) if a.name != b.name else (f"{a.name} (A)", f"{b.name} (B)")
    masks: dict[tuple[str, float], tuple[np.ndarray, np.ndarray]] = {("clean", 0.0): (a.correct, b.correct)}
    for epsilon in (e for e in grid if e > 0):
        if a.certified and b.certified:
            masks["certified", epsilon] = (_certified(a, epsilon), _certified(b, epsilon))
        if sets:
            masks["attacked", epsilon] = (_attacked(a, epsilon, sets), _attacked(b, epsilon, sets))
    ordered = sorted(masks, key=lambda key: (QUANTITIES.index(key[0]), key[1]))
    table = pd.DataFrame([{"quantity": q, "epsilon": e} | _row(*masks[q, e], names) for q, e in ordered])
    index = a.rows["index"].to_numpy()
    disagreements = [
        {"only_a": index[x & ~y].tolist(), "only_b": index[y & ~x].tolist()} for x, y in (masks[key] for key in ordered)
    ]
    return Comparison(a, b, names, table, disagreements, notes)


def _certified(side: Rows, epsilon: float) -> np.ndarray:
    return side.correct & (side.rows["certified_radius"].to_numpy() > epsilon)


def _attacked(side: Rows, epsilon: float, sets: list[str]) -> np.ndarray:
    return side.correct & ~(np.minimum.reduce([side.norms[name] for name in sets]) <= epsilon)


def _row(a: np.ndarray, b: np.ndarray, names: tuple[str, str]) -> dict[str, Any]:
    found = paired_difference(a, b)
    row: dict[str, Any] = {"n": len(a)}
    for side, mask in (("a", a), ("b", b)):
        rate = Rate(int(mask.sum()), len(mask))
        row |= {side: rate.value, f"{side}_low": rate.low, f"{side}_high": rate.high}
    row |= {key: value for key, value in found.as_dict().items() if key != "n"}
    better = "" if found.p_value >= LEVEL else names[0] if found.difference > 0 else names[1]
    return row | {"better": better}


def _check_same_images(a: Rows, b: Rows) -> None:
    both = f"{a.path} and {b.path}"
    for what in ("dataset", "split"):
        if getattr(a, what) != getattr(b, what):
            raise UserError(f"{both} are about different images: {what} {getattr(a, what)} and {getattr(b, what)}")
    if len(a.rows) != len(b.rows):
        raise UserError(f"{both} are about different images: {len(a.rows)} and {len(b.rows)} of them")
    for what, line in (("index", "image"), ("label", "label")):
        differ = np.flatnonzero((a.rows[what] != b.rows[what]).to_numpy())
        if len(differ):
            first = int(differ[0])
            raise UserError(
                f"{both} are about different images: {line} {a.rows[what].iloc[first]} and "
                f"{b.rows[what].iloc[first]} in row {first + 1}"
            )


def read(spec: str | Path, split: str | None = None) -> Rows:
    """The rows that ``spec`` names: a table OUT/evaluations/SET/NAME.csv, the output directory of `robustflow evaluate`
    (or its samples.csv), or a trained model as `robustflow.load_model` takes it, with its rows in the same OUT.

    ``split`` chooses where a model was evaluated on several.

    Raises:
        UserError: nothing of that name, or files that do not fit together.
    """
    path = Path(spec)
    if os.path.isfile(path):  # False for what no file can be called, where Path.is_file raises
        return _own(path) if path.name == "samples.csv" else _of_benchmark(path)
    if os.path.isfile(path / "samples.csv"):
        return _own(path / "samples.csv")
    folder = models.find_trained(spec)
    found = sorted(folder.parent.parent.glob(f"evaluations/*/{folder.name}.csv"))
    if split is not None:
        found = [file for file in found if file.parent.name.endswith(f"-{split}")]
    if not found:
        raise UserError(f"{folder} was not evaluated{f' on {split}' if split else ''}: run `robustflow certify` first")
    if len(found) > 1:
        raise UserError(f"{folder} was evaluated {len(found)} times, choose with --split: {', '.join(map(str, found))}")
    return _of_benchmark(found[0])


def _of_benchmark(path: Path) -> Rows:
    card = checkpoints.read_json(path.parent / "evaluation.json")
    return _rows(path, path.stem, card, lambda: (card["dataset"], card["split"], card["epsilons"], card["attack_sets"]))


def _own(path: Path) -> Rows:
    content = checkpoints.read_json(path.parent / "summary.json")

    def told() -> tuple[Any, Any, Any, Any]:
        config = content["config"]
        return config["dataset"], config["split"], config["epsilons"], [content["attacks"]]

    return _rows(path, path.parent.resolve().name, content, told)


def _rows(path: Path, name: str, card: Any, told: Any) -> Rows:
    try:
        dataset, split, epsilons, sets = told()
        epsilons, n = [float(epsilon) for epsilon in epsilons], int(card["n"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path.parent}: its json file does not tell what {path.name} is about ({error!r})") from None
    try:
        text = pd.read_csv(path, dtype=str, keep_default_na=False)
        kinds: dict[str, Callable[[str], float]] = dict(zip(SAMPLES, (int, int, int, _number, float), strict=True))
        if not sets:  # certified only
            del kinds["adversarial_norm"]
        rows = pd.DataFrame({key: [kind(cell) for cell in text[key]] for key, kind in kinds.items()})
        # Tables of `robustflow evaluate` know one set and have no column for it.
        columns = {one: f"norm_{one}" if len(sets) > 1 or f"norm_{one}" in text else SAMPLES[-1] for one in sets}
        norms = {one: np.array([float(cell) for cell in text[column]]) for one, column in columns.items()}
    except KeyError as error:
        raise UserError(f"{path} is not a table of per-image rows: no column {error}") from None
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path} is not a table of per-image rows: {str(error).splitlines()[0][:120]}") from None
    if len(rows) != n or rows["index"].duplicated().any() or any(np.isnan(norm).any() for norm in norms.values()):
        raise UserError(f"{path} is damaged: {len(rows)} rows of {n}, each with its own index and no NaN, are expected")
    return Rows(name, path, str(dataset), str(split), epsilons, rows, norms)


def _number(cell: str) -> float:
    return float(cell) if cell else math.nan  # pandas writes NaN, "could not be certified", as nothing


__all__ = ["Comparison", "Rows", "compare", "read"]
