"""What the page of `robustflow measure attacks` says of each part."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from robustflow.measurements.family import Record, markdown_table
from robustflow.tables import count, epsilon_label, percent


def _at(rows: Iterable[Record], epsilon: float) -> Record | None:
    return next((row for row in rows if row["epsilon"] == epsilon), None)


def _epsilons(part: Record) -> list[str]:
    return [epsilon_label(epsilon) for epsilon in part["compared_at"]]


def points(difference: Record) -> str:
    """A difference of accuracies in points, with its interval.

    >>> points({"difference": 0.035, "low": 0.01, "high": 0.06})
    '+3.5 (+1.0 to +6.0)'
    """
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * difference[key] for key in ("difference", "low", "high")))


# ---------------------------------------------------------------------------------------------------------------- sets
def sets(part: Record) -> str:
    blocks = [_weakness(part), _comparison(part), _differences(part), _first(part), _cost(part)]
    return "\n\n".join(block for block in blocks if block)


def _weakness(part: Record) -> str:
    """The published attack against the standard set, on all images of the benchmark."""
    models = [model for model in part["models"] if model["weakness"]]
    if not models:
        return ""
    rows = []
    for model in models:
        found = model["benchmark"]
        worst = max(model["weakness"], key=lambda row: row["difference"])
        rows.append(
            [model["model"]]
            + [f"{_value(found[name], epsilon)}" for epsilon in part["compared_at"] for name in ("paper", "standard")]
            + [f"{points(worst)} at ε = {epsilon_label(worst['epsilon'])}"]
        )
    header = ["model", *(f"{name}, ε = {label}" for label in _epsilons(part) for name in ("paper", "standard")),
              "largest gap"]  # fmt: skip
    again = [model["runs"].get(name, {}) for model in models for name in ("paper", "standard")]
    compared = [run for run in again if "verdicts_unlike_the_benchmark" in run]
    text = (
        f"**The published attack against the standard set**: accuracy in percent under foolbox's L2PGD with 10 steps "
        f"(paper) and under `standard` alone, {part['split']} images, n = {part['n']}, from the rows of "
        f"{part['benchmark']}; the gap in points with its paired 95 % interval, at the ε where it is largest."
    )
    if compared:
        unlike = sum(run["verdicts_unlike_the_benchmark"] for run in compared)
        total = sum(run["n"] * len(run["accuracy"]) for run in compared)
        text += f" Attacked again here, among other images, {unlike} of {total:,} verdicts come out differently."
    return text + "\n\n" + markdown_table(header, rows)


def _value(found: Record, epsilon: float) -> str:
    row = _at(found["accuracy"], epsilon)
    return "–" if row is None else f"{100 * row['value']:.1f}"


def _comparison(part: Record) -> str:
    """Every run on every model at the radii where all are compared."""
    names = [run["name"] for run in part["runs"]]
    blocks = []
    for epsilon in part["compared_at"]:
        rows = [
            [model["model"], _rate(_at(model["certified"], epsilon))]
            + [_rate(_at(model["runs"][name]["accuracy"], epsilon)) for name in names]
            for model in part["models"]
        ]
        header = ["model", f"certified (n = {part['n']})"]
        header += [f"{run['name']} (n = {part['models'][0]['runs'][run['name']]['n']})" for run in part["runs"]]
        title = f"**Robust accuracy at ε = {epsilon_label(epsilon)}** in percent (95 % interval), first images."
        blocks.append(f"{title} A single attack's name means that attack by itself.\n\n{markdown_table(header, rows)}")
    return "\n\n".join(blocks)


def _rate(row: Record | None) -> str:
    return "–" if row is None else percent(row)


def _differences(part: Record) -> str:
    """What the standard set misses of what the longer sets break; and of the undecided, what they decide."""
    others = list(dict.fromkeys(row["b"] for model in part["models"] for row in model["differences"]))
    if not others:
        return ""
    rows, lines = [], []
    for model in part["models"]:
        for epsilon in part["compared_at"]:
            found = {row["b"]: row for row in model["differences"] if row["epsilon"] == epsilon}
            undecided = _at(model["undecided"], epsilon) or {}
            cells = [model["model"], epsilon_label(epsilon)]
            cells += [points(found[other]) if other in found else "–" for other in others]
            keys = ["undecided", *(f"broken_by_{other}" for other in others)]
            rows.append(cells + [f"{undecided.get(key, '–')}" for key in keys])
    header = ["model", "ε", *(f"standard − {other}" for other in others), "undecided after standard"]
    header += [f"of them broken by {other}" for other in others]
    for other in others:
        found_by = [(row, model["model"]) for model in part["models"] for row in model["differences"]]
        worst, name = max((pair for pair in found_by if pair[0]["b"] == other), key=lambda pair: pair[0]["difference"])
        lines.append(
            f"Largest difference standard − {other}: {100 * worst['difference']:.1f} points "
            f"({name}, ε = {epsilon_label(worst['epsilon'])}, {worst['only_a']} of {worst['n']} images)."
        )
    text = (
        "**What `standard` misses**: its robust accuracy minus that of another set, in points with the paired 95 % "
        "interval, on the same images. " + " ".join(lines) + "\n\n"
    )
    return text + markdown_table(header, rows)


def _first(part: Record) -> str:
    """Which attack of the standard set breaks which image first, over all models."""
    if not all(model["first_to_break"] for model in part["models"]):
        return ""
    names = list(part["models"][0]["first_to_break"][0]["counts"])
    rows = []
    for epsilon in part["epsilons"]:
        found = [(_at(model["first_to_break"], epsilon) or {"counts": {}})["counts"] for model in part["models"]]
        rows.append([epsilon_label(epsilon), *(f"{sum(counts[name] for counts in found)}" for name in names)])
    text = (
        "**Which attack breaks an image first**: images of all models that an attack, by itself, breaks at ε and none "
        "of those to its left does.\n\n"
    )
    return text + markdown_table(["ε", *names], rows)


def _cost(part: Record) -> str:
    rows = []
    for run in part["runs"]:
        found = [model["runs"][run["name"]] for model in part["models"]]
        images = sum(entry["n"] for entry in found)
        passes = sum(sum(entry["forward_passes"].values()) for entry in found)
        seconds = sum(entry["cpu_seconds"] for entry in found)
        grid = f"{len(part['epsilons'])} ε" if run["every_epsilon"] else f"ε = {', '.join(_epsilons(part))}"
        rows.append([run["name"], grid, f"{images}", f"{passes / images:,.0f}", f"{1000 * seconds / images:,.0f} ms"])
    header = ["run", "radii", "images of all models", "forward passes an image", "CPU time an image"]
    text = "**What it costs.** Images certified at ε are attacked by none at ε." + _masked(part)
    return text + "\n\n" + markdown_table(header, rows)


def _masked(part: Record) -> str:
    """Whose gradients the set `check` has found to be masked."""
    if "check" not in (run["name"] for run in part["runs"]):
        return ""
    flagged = [
        model["model"]
        for model in part["models"]
        if any(warning.startswith("masked gradients") for warning in model["runs"]["check"]["warnings"])
    ]
    return f" Gradients that `check` finds masked: {', '.join(flagged) or 'none'}."


# ------------------------------------------------------------------------------------------------------------- foolbox
def foolbox(part: Record) -> str:
    rows = []
    for model in part["models"]:
        differences = model["sweep_minus_plain"]
        worst = max(differences, key=lambda row: row["difference"])
        best = min(differences, key=lambda row: row["difference"])
        sweep, plain = model["sweep"], model["plain"]
        rows.append(
            [
                model["model"] + (" (certified images left out)" if model["certified_left_out"] else ""),
                f"{model['n']}",
                f"{count(sweep['forward_passes'])} / {count(plain['forward_passes'])}",
                f"{model['times_fewer_passes']:.1f}×",
                f"{sweep['cpu_seconds']:.1f} s / {plain['cpu_seconds']:.1f} s",
                f"{model['times_fewer_seconds']:.1f}×",
                f"{100 * best['difference']:+.1f} to {100 * worst['difference']:+.1f}",
                f"{plain['by_attack']['refused']}",
            ]
        )
    header = ["model", "n", "forward passes: sweep / plain", "fewer passes", "CPU time: sweep / plain", "less time",
              "robust accuracy, sweep − plain, points over all ε", "plain successes that are none"]  # fmt: skip
    text = (
        f"The attacks of `standard` at {len(part['epsilons'])} ε: one sweep, and foolbox's own attacks called one by "
        "one with `epsilons=[…]`, nothing left out. The sweep's cost includes certifying and its second looks.\n\n"
    )
    return text + markdown_table(header, rows)


# ------------------------------------------------------------------------------------------------------------- workers
def workers(part: Record) -> str:
    def seconds(values: list[float]) -> str:
        return ", ".join(f"{value:.1f}" for value in values)

    rows: list[list[Any]] = [["none (in-process)", f"{part['serial_seconds']:.1f}"]]
    rows += [[number, seconds(values)] for number, values in part["wall_seconds"].items()]
    verdict = "met" if part["ratio"] <= part["goal"] else f"not met: {_why(part)}"
    text = (
        f"{part['model']}, n = {part['n']} in shards of {part['shard']}, `standard` at {len(part['epsilons'])} ε, on "
        f"{part['cores']} cores. Two workers take {part['ratio']:.2f} of one worker's time (goal ≤ {part['goal']}: "
        f"{verdict}). Norms are {'the same to the bit' if part['same_norms'] else 'NOT the same'}.\n\n"
    )
    return text + markdown_table(["workers", "wall seconds, start of the processes included"], rows)


def _why(part: Record) -> str:
    """What is known of the reasons: too few cores, or other work on them (the run before leaves a load of its own)."""
    if part["cores"] < 2:
        return "there is one core for both workers"
    load = ", ".join(f"{value:.1f}" for value in part["load_before"])
    return f"starting a worker takes a while, and the load average before each run was {load}"
