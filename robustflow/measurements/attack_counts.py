"""The numbers of `robustflow measure attacks`, counted from the norms that were found, image by image."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from robustflow.measurements.family import Record
from robustflow.measurements.targets import EPSILONS, Target, as_norms
from robustflow.statistics import Rate, paired_difference

Norms = dict[str, np.ndarray]
LONGER = ("strong", "autoattack", "check")  # the sets that `standard` is held against


def robust(norms: np.ndarray, epsilon: float) -> np.ndarray:
    """Right, and not broken at ε: booleans (N,) of norms (N,), which are 0 where the clean image is misclassified."""
    return (norms > 0) & (norms > epsilon)


def broken(norms: np.ndarray, epsilon: float) -> np.ndarray:
    """Right, and broken at ε."""
    return (norms > 0) & (norms <= epsilon)


def rates(norms: np.ndarray, grid: Iterable[float]) -> list[Record]:
    """
    >>> [row["k"] for row in rates(np.array([0.0, 0.3, np.inf]), [0.2, 0.3])]
    [2, 1]
    """
    return [{"epsilon": epsilon} | Rate(int(robust(norms, epsilon).sum()), len(norms)).as_dict() for epsilon in grid]


def differences(norms: Norms, a: str, b: str, grid: Iterable[float]) -> list[Record]:
    """Robust accuracy under a minus that under b at every ε, on the images that both attacked."""
    count = min(len(norms[a]), len(norms[b]))
    return [
        {"a": a, "b": b, "epsilon": epsilon}
        | paired_difference(*(robust(norms[name][:count], epsilon) for name in (a, b))).as_dict()
        for epsilon in grid
    ]


def first_to_break(norms: Norms, order: Iterable[str], grid: Iterable[float]) -> list[Record]:
    """At every ε how many images each attack breaks by itself that none before it does.

    >>> norms = {"a": np.array([0.1, 0.5, 0.0]), "b": np.array([0.1, 0.2, 0.0])}
    >>> first_to_break(norms, ["a", "b"], [0.2])
    [{'epsilon': 0.2, 'counts': {'a': 1, 'b': 1}}]
    """
    found = []
    for epsilon in grid:
        counts, done = {}, np.zeros(len(next(iter(norms.values()))), dtype=bool)
        for name in order:
            new = broken(norms[name], epsilon) & ~done
            counts[name], done = int(new.sum()), done | new
        found.append({"epsilon": epsilon, "counts": counts})
    return found


def broken_by_one_alone(norms: Norms, epsilon: float) -> dict[str, dict[str, int]]:
    """How many images the row breaks at ε and the column does not, of those that both attacked.

    >>> broken_by_one_alone({"a": np.array([0.1, 0.5]), "b": np.array([0.1, 0.2])}, 0.2)
    {'a': {'a': 0, 'b': 0}, 'b': {'a': 1, 'b': 0}}
    """

    def count(row: str, column: str) -> int:
        both = min(len(norms[row]), len(norms[column]))
        return int((broken(norms[row][:both], epsilon) & ~broken(norms[column][:both], epsilon)).sum())

    return {row: {column: count(row, column) for column in norms} for row in norms}


def summary(target: Target, entries: dict[str, Record], grid: list[float], order: Iterable[str]) -> Record:
    """Everything about one model: from the benchmark's rows, and from the runs on its first images.

    ``order``: the attacks of `standard`, in its order, as far as each has a run by itself.
    """
    norms = {name: as_norms(entry["norms"]) for name, entry in entries.items()}
    alone = [name for name in order if name in norms]
    return {
        "model": target.name,
        "regime": target.regime,
        "benchmark_attacked_by_revision": target.attacked_by,
        "certified": rates(target.radii, [0.0, *grid]),
        "benchmark": {
            name: {"accuracy": rates(found, [0.0, *target.epsilons]), "forward_passes": _passes(target, name)}
            for name, found in target.norms.items()
        },
        "weakness": differences(target.norms, "paper", "standard", target.epsilons)
        if _has(target.norms, "paper")
        else [],
        "runs": {name: _run(name, entry, norms[name], target) for name, entry in entries.items()},
        "differences": [
            row for other in LONGER if _has(norms, other) for row in differences(norms, "standard", other, EPSILONS)
        ],
        "undecided": [_undecided(norms, target.radii, epsilon) for epsilon in EPSILONS],
        "first_to_break": first_to_break({name: norms[name] for name in alone}, alone, grid) if alone else [],
        "broken_by_row_not_by_column": [
            {"epsilon": epsilon, "counts": broken_by_one_alone(norms, epsilon)} for epsilon in EPSILONS
        ],
    }


def _has(norms: Norms, other: str) -> bool:
    return "standard" in norms and other in norms


def _passes(target: Target, chosen: str) -> int:
    """Forward passes of a set when the benchmark was attacked with it."""
    return sum(count for name, count in target.forward_passes.items() if name.split(": ")[0] == chosen)


def _run(name: str, entry: Record, norms: np.ndarray, target: Target) -> Record:
    count, epsilons = len(norms), entry["epsilons"]
    found_by = np.array(entry["found_by"], dtype=object)
    kept = {key: entry[key] for key in ("forward_passes", "seconds", "wall_seconds", "cpu_seconds", "warnings")}
    result: Record = {
        "n": count,
        "accuracy": rates(norms, epsilons),
        "passes_per_image": sum(entry["forward_passes"].values()) / count,
        # The images broken at each ε by the attack that found the smallest adversarial of each.
        "smallest_found_by": {
            attack: [int((broken(norms, epsilon) & (found_by == attack)).sum()) for epsilon in epsilons]
            for attack in entry["forward_passes"]
            if attack != "clean"
        },
    }
    # The same attacks and radii, in batches of other images: the verdicts should be the same.
    if name in target.norms and tuple(epsilons) == target.epsilons:
        before = target.norms[name][:count]
        differing = [int((robust(before, epsilon) != robust(norms, epsilon)).sum()) for epsilon in epsilons]
        result["verdicts_unlike_the_benchmark"] = sum(differing)
    return result | kept


def _undecided(norms: Norms, radii: np.ndarray, epsilon: float) -> Record:
    """Images neither certified nor broken by `standard`, and how many of them a longer attack breaks."""
    found: Record = {"epsilon": epsilon}
    if "standard" not in norms:
        return found
    certified = radii[: len(norms["standard"])] > epsilon
    open_images = robust(norms["standard"], epsilon) & ~certified
    found |= {"n": len(certified), "certified": int(certified.sum()), "undecided": int(open_images.sum())}
    for other in LONGER:
        if other in norms:
            both = min(len(open_images), len(norms[other]))
            found[f"broken_by_{other}"] = int((open_images[:both] & broken(norms[other][:both], epsilon)).sum())
    return found
