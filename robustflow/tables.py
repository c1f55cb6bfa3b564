"""table.md for reading and table.csv for computing: a row a model and evaluation, from summary.json's figures."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Container, Iterable
from decimal import ROUND_CEILING, Context
from typing import Any

# The radii at which certified accuracy is usually quoted; a report of a grid without them takes four others.
QUOTED = (36 / 255, 72 / 255, 108 / 255, 1.0)

NOT_ATTACKED = "Certified only: these images were not attacked, so that attacked accuracy was not measured."


def epsilon_label(epsilon: float) -> str:
    """How an ε is printed: a short decimal as it is, a multiple of 1/255 as k/255.

    >>> [epsilon_label(e) for e in (0.0, 36 / 255, 0.3, 0.6, 1.0, 0.12345)]
    ['0', '36/255', '0.3', '0.6', '1', '0.12345']
    """
    decimal = f"{epsilon:g}"
    pixels = epsilon * 255
    if len(decimal) <= 4 or not math.isclose(pixels, round(pixels), abs_tol=1e-6):
        return decimal
    return f"{round(pixels)}/255"


def quoted(grid: list[float]) -> list[int]:
    """Where in the grid a page's columns are: the quoted radii, filled up to four from the largest down."""
    quoted = [i for i, epsilon in enumerate(grid) if any(abs(epsilon - q) < 1e-6 for q in QUOTED)]
    others = [i for i, epsilon in reversed(list(enumerate(grid))) if epsilon > 0 and i not in quoted]
    return sorted(quoted + others[: max(0, 4 - len(quoted))])


def percent(rate: dict[str, Any]) -> str:
    """61.2 (58.1–64.2): the rate and its interval in percent."""
    return f"{100 * rate['value']:.1f} ({100 * rate['low']:.1f}–{100 * rate['high']:.1f})"


def count(number: float | None) -> str:
    """
    >>> [count(n) for n in (None, 950, 15_300, 888_575, 350_000_000)]
    ['–', '950', '15.3 k', '889 k', '350 M']
    """
    if number is None:
        return "–"
    for scale, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= scale:
            return f"{number / scale:.3g}{unit}"
    return f"{number:g}"


def bound(value: float | None) -> str:
    """A Lipschitz bound rounded up, so that what is printed is still a bound.

    >>> bound(None), bound(1.0), bound(0.98765432), bound(123456789.0)
    ('none', '1', '0.987655', '1.23457e+8')
    """
    if value is None:
        return "none"
    rounded = Context(prec=6, rounding=ROUND_CEILING).create_decimal(repr(value)).normalize()
    return str(rounded if abs(rounded) >= 1e6 else format(rounded, "f")).replace("E", "e")


def duration(seconds: float | None) -> str:
    """
    >>> [duration(s) for s in (None, 0.31, 42.0, 754.0, 9000.0)]
    ['–', '0.3 s', '42 s', '12.6 min', '2.5 h']
    """
    if seconds is None:
        return "–"
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def to_markdown(summary: dict[str, Any]) -> str:
    """Three small tables an evaluation (models, certified, attacked): ε in the columns, n and units above them.

    A split that is not attacked has the first two, without columns of attacks.
    """
    models = {model["name"]: model for model in summary["models"]}
    parts = [f"# {cell(summary['title'] or summary['name'] or 'Benchmark')}"]
    for evaluation in summary["evaluations"]:
        n, rows = evaluation["n"], evaluation["models"]
        parts.append(f"## {cell(evaluation['dataset'])}, {cell(evaluation['split'])}: n = {n} images")
        parts.append(
            "Accuracies in percent of the n images, with 95 % Wilson intervals. ε bounds the L2 norm of the change,"
            " pixels in [0, 1]; an area is that under accuracy (0 to 1) against ε up to 1 or the largest ε."
            f" {attack_line(evaluation)}"
        )
        head = ["model", "regime", "clean", "area certified", "area attacked", "bound L", "parameters"]
        head += ["multiply-adds", "training", "alarms"]
        parts.append(table(head, (_costs(row, models[row["name"]]) for row in rows), 2, hidden(evaluation)))
        shown = [i for i, e in enumerate(evaluation["epsilons"]) if e > 0]
        head = ["model", *(f"ε = {epsilon_label(evaluation['epsilons'][i])}" for i in shown)]
        for key, meaning in (
            ("certified", "Certified: proved correct on the whole ball of radius ε"),
            ("attacked", "Attacked: still correct after every attack of norm at most ε"),
        ):
            if key not in kinds(evaluation):
                continue
            parts.append(f"{meaning} (percent of n = {n}).")
            parts.append(table(head, ([row["name"], *(_rate(row, key, i) for i in shown)] for row in rows)))
    return "\n\n".join(parts) + "\n"


def kinds(evaluation: dict[str, Any]) -> tuple[str, ...]:
    """The curves that an evaluation has: a split may be certified and not attacked."""
    return ("certified", "attacked") if evaluation["attack_sets"] else ("certified",)


def attack_line(evaluation: dict[str, Any]) -> str:
    sets = evaluation["attack_sets"]
    return f"Attack sets: {cell(', '.join(sets))}." if sets else NOT_ATTACKED


def hidden(evaluation: dict[str, Any]) -> set[str]:
    """The columns that a split without attacks does not have; those of alarms stay where an earlier attack had any."""
    if evaluation["attack_sets"]:
        return set()
    raised = any(row["alarm_count"] for row in evaluation["models"])
    return {"area attacked"} if raised else {"area attacked", "alarms"}


def uncertified(row: dict[str, Any]) -> bool:
    """Whether a model has no certificate at all: its certified curve is a dash for the reader, not a measured 0 %."""
    return row["lipschitz_bound"] is None and all(point["k"] == 0 for point in row["certified"])


def _rate(row: dict[str, Any], key: str, i: int) -> str:
    return "–" if key == "certified" and uncertified(row) else percent(row[key][i])


def _costs(row: dict[str, Any], model: dict[str, Any]) -> list[str]:
    areas = [None if uncertified(row) else row["area"]["certified"], row["area"]["attacked"]]
    return [
        row["name"],
        model["regime"],
        percent(row["clean"]),
        *("–" if value is None else f"{value:.3f}" for value in areas),
        bound(row["lipschitz_bound"]),
        count(model["parameters"]),
        count(model["multiply_adds"]),
        duration(model["seconds"]["train"]),
        "–" if row["alarm_count"] is None else str(row["alarm_count"]),
    ]


def table(head: list[str], rows: Iterable[list[str]], left: int = 1, hidden: Container[str] = ()) -> str:
    """Markdown; the columns named in ``hidden`` are left out."""
    lines = [head, ["---"] * left + ["---:"] * (len(head) - left), *([cell(text) for text in row] for row in rows)]
    lines = [[text for name, text in zip(head, line, strict=True) if name not in hidden] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(text: str) -> str:
    """Names are free text: keep them from ending a cell or becoming HTML where the markdown is shown."""
    for old, new in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), (">", "&gt;"), ("\n", " "), ("\r", " ")):
        text = text.replace(old, new)
    return text


def to_csv(summary: dict[str, Any]) -> str:
    """One wide line for each model and evaluation; rates as fractions, empty where an evaluation lacks that ε."""
    models = {model["name"]: model for model in summary["models"]}
    grid = sorted({e for evaluation in summary["evaluations"] for e in evaluation["epsilons"]})
    records = []
    for evaluation in summary["evaluations"]:
        for row in evaluation["models"]:
            model = models[row["name"]]
            record: dict[str, Any] = {key: evaluation[key] for key in ("dataset", "split", "n")}
            record |= {"model": row["name"], "regime": model["regime"]} | _columns("clean", row["clean"])
            for key in ("certified", "attacked"):
                points = {point["epsilon"]: point for point in row[key] or ()}
                for epsilon in grid:
                    record |= _columns(f"{key}@{epsilon_label(epsilon)}", points.get(epsilon, {}))
                record[f"area_{key}"] = row["area"][key]
            record |= {f"{key}_certified_radius": row["certified_radius"][key] for key in ("median", "mean")}
            record["lipschitz_bound"] = row["lipschitz_bound"]
            record |= {key: model[key] for key in ("parameters", "multiply_adds", "seed")}
            record |= {"train_seconds": model["seconds"]["train"], "alarms": row["alarm_count"]}
            records.append(record)
    return csv_text(records)


def csv_text(records: list[dict[str, Any]]) -> str:
    """Records with the keys of the first as a table of comma-separated values."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _columns(name: str, rate: dict[str, Any]) -> dict[str, Any]:
    return {name: rate.get("value"), f"{name}_low": rate.get("low"), f"{name}_high": rate.get("high")}
