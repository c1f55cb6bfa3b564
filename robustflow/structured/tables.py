"""table.md for reading and table.csv for computing: a row a figure, a column a model, what others say beside it."""

from __future__ import annotations

from typing import Any

from robustflow.tables import cell, count, csv_text, duration, table


def number(value: float | None, digits: int = 3) -> str:
    """
    >>> [number(x) for x in (5.4e-3, 0.0312345, 1234.5, 0.0, 2.22e-16, None)]
    ['5.4e-3', '0.0312', '1.23e+3', '0', '2.22e-16', '–']
    """
    if value is None:
        return "–"
    text = f"{value:.{digits}g}"
    if "e" not in text and (value == 0 or 0.01 <= abs(value) < 1000):
        return text
    mantissa, _, exponent = (text if "e" in text else f"{value:.{digits - 1}e}").partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{'-' if exponent[0] == '-' else '+'}{exponent.lstrip('+-').lstrip('0') or '0'}"


def spread(figure: dict[str, Any] | None) -> str:
    """Mean ± deviation, as `summary.spread` has them.

    >>> spread({"n": 3, "mean": 0.0054, "deviation": 0.00031, "values": [0.0057, 0.0051, 0.0054]})
    '5.4e-3 ± 3.1e-4'
    >>> spread({"n": 3, "mean": None, "deviation": None, "values": [0.1, None, None]})
    'not finite in 2 of 3'
    """
    if figure is None:
        return "–"
    if figure["mean"] is None:
        return f"not finite in {sum(value is None for value in figure['values'])} of {figure['n']}"
    deviation = figure["deviation"]
    return number(figure["mean"]) + ("" if deviation is None else f" ± {number(deviation, 2)}")


def reference(one: dict[str, Any]) -> str:
    """What others say, in a cell: value, of what, by whom."""
    about = ", ".join(part for part in (one["model"] and f"for {one['model']}", one["text"], one["source"]) if part)
    return f"{number(one['value'])} ({about})"


def references(summary: dict[str, Any], figure: str) -> list[dict[str, Any]]:
    return [one for one in summary["references"] if one["figure"] == figure]


def to_markdown(summary: dict[str, Any]) -> str:
    """The figures, then what the models cost."""
    system, models, seeds = summary["system"], summary["models"], summary["seeds"]
    parts = [f"# {cell(summary['title'] or system['title'])}"]
    parts.append(
        f"{cell(system['equations'])}. The structured model keeps {cell(system['property'])}. "
        f"{'Seeds' if len(seeds) > 1 else 'Seed'} {', '.join(map(str, seeds))}: mean"
        f"{' ± standard deviation over the seeds' if len(seeds) > 1 else ''}; test examples: {summary['data']['test']}."
    )
    head = ["figure", *(model["name"] for model in models)] + (["by others"] if summary["references"] else [])
    rows = []
    for figure in summary["figures"]:
        row = [figure, *(spread(model["figures"].get(figure)) for model in models)]
        if summary["references"]:
            row.append("; ".join(reference(one) for one in references(summary, figure)) or "–")
        rows.append(row)
    parts.append(table(head, rows))
    head = ["model", "parameters", "training a seed", "measuring"]
    parts.append(table(head, [_costs(model) for model in models]))
    return "\n\n".join([*parts, *summary["notes"]]) + "\n"


def _costs(model: dict[str, Any]) -> list[str]:
    trained = model["seconds"]["train"]
    return [
        model["name"],
        count(model["parameters"]),
        "none" if trained is None else duration(trained["mean"]),
        duration(model["seconds"]["measure"]["mean"]),
    ]


def to_csv(summary: dict[str, Any]) -> str:
    """A line for each model and figure, and one for each value by others (no n, no deviation)."""
    keys = ("model", "figure", "n", "mean", "deviation", "parameters", "source", "text")
    records = []
    for model in summary["models"]:
        for figure, values in model["figures"].items():
            measured = {key: values[key] for key in ("n", "mean", "deviation")}
            row = {"model": model["name"], "figure": figure, "source": "measured", "parameters": model["parameters"]}
            records.append(dict.fromkeys(keys, "") | row | measured)
    for one in summary["references"]:
        row = {"model": one["model"] or "", "figure": one["figure"], "mean": one["value"]}
        records.append(dict.fromkeys(keys, "") | row | {"source": one["source"], "text": one["text"]})
    return csv_text(records)
