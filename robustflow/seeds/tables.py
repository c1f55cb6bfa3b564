"""table.md and table.csv of a directory of seeds: a row a model and evaluation, means over seeds with intervals."""

from __future__ import annotations

from typing import Any

from robustflow.tables import (
    attack_line,
    bound,
    cell,
    count,
    csv_text,
    duration,
    epsilon_label,
    hidden,
    kinds,
    table,
)

LEGEND = (
    "Accuracies in percent of the n images: mean over seeds ± standard deviation over seeds (95 % t-interval of the"
    " mean for other trainings on these images; 95 % interval for other trainings on other images). One seed, marked *:"
    " the accuracy and its 95 % Wilson interval, which knows nothing of other trainings."
)
AGAINST = {
    "best": "the best at ε = {epsilon}, chosen by these very figures, so that its lead is flattered by luck",
    "first": "the first with a certificate in the config, chosen before there were figures",
}


def percent_over_seeds(rate: dict[str, Any]) -> str:
    """61.2 ± 0.4 (60.3–62.1; 58.8–63.5): mean, standard deviation, both intervals; 61.2* (58.1–64.2) for one seed."""
    ends = [(rate["low"], rate["high"]), (rate["wide_low"], rate["wide_high"])]
    spans = [f"{100 * low:.1f}–{100 * high:.1f}" for low, high in ends]
    if rate["sd"] is None:
        return f"{100 * rate['mean']:.1f}* ({spans[0]})"
    return f"{100 * rate['mean']:.1f} ± {100 * rate['sd']:.1f} ({'; '.join(spans)})"


def points(difference: dict[str, Any]) -> str:
    """-2.1 (-3.0 to -1.2) in percentage points; * where an interval knows nothing of other trainings."""
    low, high = 100 * difference["low"], 100 * difference["high"]
    mark = "" if difference["over"] == "seeds and images" else "*"
    return f"{100 * difference['difference']:+.1f}{mark} ({low:+.1f} to {high:+.1f})"


def spread(figure: dict[str, Any], digits: int = 3) -> str:
    """0.213 ± 0.004, or the number alone where there is one."""
    text = f"{figure['mean']:.{digits}f}"
    return text if figure["sd"] is None else f"{text} ± {figure['sd']:.{digits}f}"


def time_spread(figure: dict[str, Any]) -> str:
    """
    >>> time_spread({"mean": 900.0, "sd": 30.0, "values": [870.0, 900.0, 930.0]})
    '15.0 min (14.5 min to 15.5 min)'
    """
    ends = [duration(end) for end in (min(figure["values"]), max(figure["values"]))]
    return duration(figure["mean"]) + (f" ({ends[0]} to {ends[1]})" if ends[0] != ends[1] else "")


def epochs(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "–"
    low, high = min(figure["values"]), max(figure["values"])
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def to_markdown(summary: dict[str, Any]) -> str:
    """An evaluation is two tables or more: models, certified, attacked if it was, and differences against a model."""
    models = {model["name"]: model for model in summary["models"]}
    parts = [f"# {cell(summary['title'] or summary['name'] or 'Benchmark')}: seeds {_listed(summary['seeds'])}"]
    for evaluation in summary["evaluations"]:
        rows, n = evaluation["models"], evaluation["n"]
        parts.append(f"## {cell(evaluation['dataset'])}, {cell(evaluation['split'])}: n = {n} images")
        parts.append(f"{LEGEND} {attack_line(evaluation)}")
        head = ["model", "regime", "seeds", "clean", "area certified", "area attacked", "bound L", "parameters"]
        head += ["multiply-adds", "epochs", "training", "alarms"]
        parts.append(table(head, (_costs(row, models[row["name"]]) for row in rows), 2, hidden(evaluation)))
        shown = [i for i, e in enumerate(evaluation["epsilons"]) if e > 0]
        columns = [f"ε = {epsilon_label(evaluation['epsilons'][i])}" for i in shown]
        for kind, meaning in (
            ("certified", "Certified: proved correct on the whole ball of radius ε"),
            ("attacked", "Attacked: still correct after every attack of norm at most ε"),
        ):
            if kind not in kinds(evaluation):
                continue
            parts.append(f"{meaning} (percent of n = {n}).")
            lines = [[row["name"], *(_rate(row, kind, i) for i in shown)] for row in rows]
            parts.append(table(["model", *columns], lines))
        for group in evaluation["differences"]:
            why = AGAINST[group["why"]].format(epsilon=epsilon_label(group["chosen_at"]))
            parts.append(
                f"Difference in points to {cell(group['against'])} ({why}): on the same images, with the 95 % interval"
                " for other trainings of both on other images; * where a model has one seed: for other images only."
                " Intervals are not corrected for their number."
            )
            for kind in kinds(evaluation):
                lines = [
                    [row["name"], points(row["clean"]), *(points(row[kind][i]) for i in shown)]
                    for row in group["others"]
                ]
                parts.append(table([f"{kind}, minus {cell(group['against'])}", "clean", *columns], lines))
    if summary["notes"]:
        parts.append("\n".join(f"- {cell(note)}" for note in summary["notes"]))
    return "\n\n".join(parts) + "\n"


def _rate(row: dict[str, Any], kind: str, i: int) -> str:
    return "–" if kind == "certified" and uncertified(row) else percent_over_seeds(row[kind][i])


def uncertified(row: dict[str, Any]) -> bool:
    """Whether a model has no certificate with any seed: a dash for the reader, not a measured 0 %."""
    return row["lipschitz_bound"] is None and all(point["mean"] == 0 for point in row["certified"])


def _listed(seeds: list[int]) -> str:
    return ", ".join(map(str, seeds))


def _costs(row: dict[str, Any], model: dict[str, Any]) -> list[str]:
    areas = [None if uncertified(row) else row["area"]["certified"], row["area"]["attacked"]]
    return [
        row["name"],
        model["regime"],
        str(len(row["seeds"])),
        percent_over_seeds(row["clean"]),
        *("–" if area is None else spread(area) for area in areas),
        bound(row["lipschitz_bound"]),
        count(model["parameters"]),
        count(model["multiply_adds"]),
        epochs(model["epochs"]),
        time_spread(model["seconds"]["train"]),
        "–" if row["alarm_count"] is None else str(row["alarm_count"]),
    ]


def to_csv(summary: dict[str, Any]) -> str:
    """One wide line for each model and evaluation; rates as fractions, empty where there is none."""
    models = {model["name"]: model for model in summary["models"]}
    grid = sorted({e for evaluation in summary["evaluations"] for e in evaluation["epsilons"]})
    records = []
    for evaluation in summary["evaluations"]:
        for row in evaluation["models"]:
            model = models[row["name"]]
            record: dict[str, Any] = {key: evaluation[key] for key in ("dataset", "split", "n")}
            record |= {"model": row["name"], "regime": model["regime"], "seeds": " ".join(map(str, row["seeds"]))}
            record |= _columns("clean", row["clean"])
            for kind in ("certified", "attacked"):
                found = {point["epsilon"]: point for point in row[kind] or ()}
                for epsilon in grid:
                    record |= _columns(f"{kind}@{epsilon_label(epsilon)}", found.get(epsilon, {}))
                area = row["area"][kind] or {}
                record |= {f"area_{kind}": area.get("mean"), f"area_{kind}_sd": area.get("sd")}
            record["lipschitz_bound"] = row["lipschitz_bound"]
            record |= {key: model[key] for key in ("parameters", "multiply_adds")}
            record |= {"epochs": (model["epochs"] or {}).get("mean")}
            record |= {f"train_seconds{end}": model["seconds"]["train"][k] for end, k in (("", "mean"), ("_sd", "sd"))}
            records.append(record | {"alarms": row["alarm_count"]})
    return csv_text(records)


def _columns(name: str, rate: dict[str, Any]) -> dict[str, Any]:
    keys = {"": "mean", "_sd": "sd", "_low": "low", "_high": "high", "_wide_low": "wide_low", "_wide_high": "wide_high"}
    return {f"{name}{end}": rate.get(key) for end, key in keys.items()}
