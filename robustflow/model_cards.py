"""What a stranger has to know of a trained model: its card with figures (n, interval), intended use and limits.

The figures are those of the benchmark directory that the model lies in, if they were measured on these very weights.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from robustflow import checkpoints
from robustflow.errors import UserError
from robustflow.models import find_trained, input_of, read_card
from robustflow.tables import bound, epsilon_label, percent

SCHEMA_VERSION = 1


def describe(name_or_path: str | Path) -> dict[str, Any]:
    """card.json with ``input``, ``figures``, ``intended_use`` and ``limits``, ready for JSON.

    ``figures``: a row a quantity, dataset, split and ε, with k, n, value and its 95 % Wilson interval, from the
    summary.json of the benchmark; none where there is no such file or it tells of other weights.

    Raises:
        UserError: as `robustflow.load_model`, or a summary.json that is none.
    """
    folder = find_trained(name_or_path)
    card, _ = read_card(folder)
    shape, names = input_of(card, folder)
    figures, evaluated = _figures(folder, card)
    takes = {"shape": list(shape), "range": [0.0, 1.0], "layout": "NCHW, float", "class_names": list(names)}
    return {
        **card,
        "input": takes,
        "lipschitz_bound": evaluated.get("lipschitz_bound"),
        "figures": figures,
        "intended_use": _intended_use(card, shape, len(names)),
        "limits": _limits(card, figures, evaluated),
    }


def _figures(folder: Path, card: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(figures, what the evaluation says besides): empty where the model was not evaluated."""
    path = folder.parent.parent / "summary.json"
    if folder.parent.name != "models" or not path.is_file():
        return [], {}
    summary = checkpoints.read_json(path)
    rows: list[dict[str, Any]] = []
    told: dict[str, Any] = {}
    try:
        if not any(model["name"] == card["name"] and model["sha256"] == card["sha256"] for model in summary["models"]):
            return [], {}
        for evaluation in summary["evaluations"]:
            where = {"dataset": evaluation["dataset"], "split": evaluation["split"]}
            for model in (model for model in evaluation["models"] if model["name"] == card["name"]):
                told = model
                rows.append({**where, "quantity": "clean", "epsilon": 0.0, **model["clean"]})
                for quantity in ("certified", "attacked"):
                    points = model[quantity] or ()  # none where the split was not attacked
                    rows += [{**where, "quantity": quantity, **point} for point in points if point["epsilon"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not the summary of a benchmark ({error}): run `robustflow report` again") from None
    return rows, told


def _intended_use(card: dict[str, Any], shape: tuple[int, int, int], classes: int) -> str:
    return (
        f"Research on certified robustness: a classifier of {card['data'].get('dataset', 'its')} images into {classes} "
        f"classes, to be compared, attacked and certified. It takes images of shape {shape} in [0, 1], not normalised: "
        "that is part of the model."
    )


def _limits(card: dict[str, Any], figures: list[dict[str, Any]], evaluated: dict[str, Any]) -> list[str]:
    limits = [
        f"Certified is {evaluated['certified_object']}."
        if evaluated.get("certified_object")
        else "No evaluation lies beside this model: its figures are not known.",
        "Only L2 perturbations of single images are covered: other norms, rotations, blur or other data are not.",
        "Attacked accuracy is an upper bound of robustness: a stronger attack may break more.",
        f"One training (seed {card['seed']}): another seed gives other figures. The intervals are about the choice of "
        "test images alone.",
        "Not for decisions about people or where an error does harm.",
    ]
    seen = {key: _images(figures, key) for key in ("clean", "attacked")}
    if certified_only := [name for name in seen["clean"] if name not in seen["attacked"]]:
        limits.insert(3, f"Not attacked on {', '.join(certified_only)}: there attacked accuracy was not measured.")
    certified = [row for row in figures if row["quantity"] == "certified"]
    if certified and not any(row["k"] for row in certified):
        smallest = epsilon_label(certified[0]["epsilon"])
        limits.insert(1, f"Nothing is certified at ε ≥ {smallest}: the bound is too large.")
    return limits


def _images(figures: list[dict[str, Any]], quantity: str) -> list[str]:
    return list(dict.fromkeys(f"{row['dataset']}, {row['split']}" for row in figures if row["quantity"] == quantity))


def to_markdown(description: dict[str, Any]) -> str:
    """The card to read, as model hubs show it."""
    data, takes = description["data"], description["input"]
    lines = [
        f"# {_text(description['name'])}",
        "",
        f"{_text(description['regime'])}: {_text(description.get('description', ''))}.",
        "",
        _text(description["intended_use"]),
        "",
        f"- parameters: {description['parameters']:,}; multiply-adds an image: {description['multiply_adds']:,}"
        if description.get("multiply_adds")
        else f"- parameters: {description['parameters']:,}",
        f"- trained on {_text(data.get('dataset', 'unknown data'))}, {_text(data.get('train_n', '?'))} images, seed "
        f"{description['seed']}, {description['seconds']['train']:.0f} s",
        f"- input {tuple(takes['shape'])} in [0, 1] → logits of {_text(', '.join(takes['class_names'][:10]))}"
        + (", …" if len(takes["class_names"]) > 10 else ""),
        f"- SHA-256 of the weights: {description['sha256']}",
    ]
    if description["figures"]:
        lines += [f"- Lipschitz bound of the features: {bound(description['lipschitz_bound'])}", ""]
        lines += ["| data | | ε (L2) | percent (95 % interval) | images |", "| --- | --- | ---: | ---: | ---: |"]
    for row in description["figures"]:
        lines.append(
            f"| {_text(row['dataset'])}, {_text(row['split'])} | {row['quantity']} | {epsilon_label(row['epsilon'])} "
            f"| {percent(row)} | {row['k']} of {row['n']} |"
        )
    return "\n".join([*lines, "", "Limits:", "", *(f"- {_text(limit)}" for limit in description["limits"])]) + "\n"


def _text(value: Any) -> str:
    """On one line, with what HTML or Markdown would act upon escaped: a card may hold anything."""
    return re.sub(r"([\\`*\[\]<>|#&])", r"\\\1", " ".join(str(value).split()))


__all__ = ["describe", "to_markdown"]
