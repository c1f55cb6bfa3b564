"""The commands about trained models: `robustflow compare`, `describe` and `export`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from robustflow import checkpoints, compare, compare_files, export, model_cards, models
from robustflow.errors import UserError

Command = Callable[[argparse.Namespace], int]
Add = Callable[[str, Command, str], argparse.ArgumentParser]
MODEL = "a trained model: a name that `robustflow list trained` shows, or a directory OUT/models/NAME"


def register(add: Add) -> None:
    """Add the commands with their options; ``add`` is given name, function and help, and returns the parser."""
    sub = add("compare", _compare, "compare two evaluations of the same images, image by image")
    for side in ("a", "b"):
        text = f"{MODEL}; or its rows OUT/evaluations/SET/NAME.csv; or the directory of `robustflow evaluate`"
        sub.add_argument(side, metavar=side.upper(), help=text)
    sub.add_argument("--split", choices=("test", "validation"), help="which, for models evaluated on both")
    sub.add_argument("--out", type=Path, metavar="DIR", help="write compare.csv, compare.json and compare.png there")
    sub = add("describe", _describe, "print a trained model's card: figures with intervals, intended use, limits")
    sub.add_argument("model", metavar="MODEL", help=MODEL)
    sub.add_argument("--json", action="store_true", help="as JSON instead of Markdown")
    sub = add("export", _export, "write a trained model for other software, with its card beside it")
    sub.add_argument("model", metavar="MODEL", help=MODEL)
    sub.add_argument("--format", choices=export.FORMATS, required=True, help="a torch.export program, or ONNX")
    sub.add_argument("--out", type=Path, required=True, metavar="FILE", help="such as model.pt2 or model.onnx")


def _compare(options: argparse.Namespace) -> int:
    comparison = compare.compare(*(compare.read(side, options.split) for side in (options.a, options.b)))
    print(comparison)
    if options.out:
        compare_files.save(comparison, options.out)
    return 0


def _describe(options: argparse.Namespace) -> int:
    description = model_cards.describe(options.model)
    if options.json:
        print(json.dumps(description, indent=1, ensure_ascii=False))
    else:
        print(model_cards.to_markdown(description), end="")
    return 0


def _export(options: argparse.Namespace) -> int:
    card = options.out.with_suffix(".json")
    if card == options.out:
        raise UserError(f"--out {options.out}: its card takes that name; choose another suffix than .json")
    model, description = models.load_model(options.model), model_cards.describe(options.model)
    difference = export.save(model, options.out, options.format)
    file = {"file": options.out.name, "format": options.format, "sha256": checkpoints.sha256(options.out)}
    checkpoints.write_json(card, description | {"export": file | {"difference": difference}})
    print(f"{options.out} and {card}: logits within {difference:.2g} of the original")
    return 0


__all__ = ["register"]
