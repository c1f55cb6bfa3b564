"""A bracket in the fields of a RobustBench leaderboard entry, model_info/DATASET/L2/NAME.json of their repository.

The fields and their types are those that RobustBench itself writes and reads (github.com/RobustBench/robustbench:
`ModelInfo` in robustbench/utils.py and the files in model_info/): accuracies and ε are strings, accuracies in percent.
There is no field for a certified accuracy, so none is exported.
"""

from __future__ import annotations

import math
from typing import Any

from robustflow.bracket import Bracket
from robustflow.errors import UserError

# What only the authors of a model know.
TOLD: dict[str, type] = {
    "link": str,
    "name": str,
    "authors": str,
    "additional_data": bool,
    "number_forward_passes": int,
    "venue": str,
    "architecture": str,
    "reported": str,
    "footnote": str,
}
REFERENCE = 0.5  # the ε of their L2 lists


def model_info(
    bracket: Bracket, *, dataset: str | None = None, epsilon: float | None = None, **told: Any
) -> dict[str, Any]:
    """The fields of a RobustBench entry for the threat model L2; null where nothing was measured or told.

    clean_acc = 100 · right/n. autoattack_acc = 100 · (right and not broken at ε)/n, only where the attacks were the set
    ``autoattack`` and nothing else; after other attacks the same figure is ``external``, their field for evaluations
    other than AutoAttack. Both are over the n images of the bracket, which the footnote states (RobustBench: all 10,000
    test images of CIFAR-10).

    Args:
        dataset: as RobustBench calls it: cifar10, cifar100, imagenet.
        epsilon: one of the bracket's; by default 0.5, that of their L2 lists.
        told: link, name, authors, venue, architecture, reported, footnote (text), additional_data (bool),
            number_forward_passes (int): what only the authors know.

    Raises:
        UserError: an ε that was not evaluated, a field that RobustBench does not have, or of another type.

    >>> import torch
    >>> from robustflow.bracket import evaluate
    >>> weight = torch.tensor([[3.0, 4.0], [-3.0, -4.0]])
    >>> bracket = evaluate(lambda x: x.flatten(1) @ weight.T, torch.full((2, 1, 1, 2), 0.5), [0, 1], [0.5])
    >>> info = model_info(bracket, dataset="cifar10", name="A line")
    >>> info["clean_acc"], info["eps"], info["autoattack_acc"], info["external"], info["venue"]
    ('50.0', '0.5', None, '50.0', None)
    """
    wanted = REFERENCE if epsilon is None else float(epsilon)
    rows = [row for row in bracket.summary.to_dict("records") if math.isclose(row["epsilon"], wanted, rel_tol=1e-9)]
    if not rows:
        known = ", ".join(f"{value:.6g}" for value in bracket.epsilons)
        raise UserError(f"RobustBench: ε = {wanted:g} was not evaluated ({known} were): add it to epsilons")
    for key, value in told.items():
        if key not in TOLD:
            raise UserError(f"RobustBench has no field {key!r} to be told; it has {', '.join(TOLD)}")
        # bool is an int to Python, but not to a leaderboard
        if value is not None and type(value) is not TOLD[key]:
            raise UserError(f"RobustBench: {key} must be {TOLD[key].__name__}, not {type(value).__name__}")
    attacked, accuracy = _percent(rows[0]["attacked"]), bracket.accuracy
    by_autoattack = bracket.attacks.strip() == "autoattack"
    footnote = f"Measured with robustflow on n = {accuracy.n} images; attacks: {bracket.attacks}."
    info: dict[str, Any] = {
        "link": told.get("link"),
        "name": told.get("name"),
        "authors": told.get("authors"),
        "additional_data": told.get("additional_data"),
        "number_forward_passes": told.get("number_forward_passes"),
        "dataset": dataset,
        "venue": told.get("venue"),
        "architecture": told.get("architecture"),
        "eps": f"{wanted:.10g}",
        "clean_acc": _percent(accuracy.value),
        "reported": told.get("reported"),
        "corruptions_acc": None,
        "corruptions_acc_3d": None,
        "corruptions_mce": None,
        "corruptions_mce_3d": None,
        "autoattack_acc": attacked if by_autoattack else None,
        "footnote": footnote if told.get("footnote") is None else told["footnote"],
    }
    # Their readers take a present "external" for a number, so it is there only if it is one.
    return info if by_autoattack else info | {"external": attacked}


def _percent(share: float) -> str:
    """As RobustBench rounds it.

    >>> _percent(0.84856)
    '84.86'
    """
    return str(round(100 * share, 2))
