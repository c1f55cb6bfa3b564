"""`robustflow evaluate`: the bracket of a model of the user's own, from the command line into a directory."""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from robustflow import bracket_files, checkpoints, environment, own_model, robustbench
from robustflow.bracket import EPSILONS, evaluate
from robustflow.data import DATASETS
from robustflow.errors import UserError
from robustflow.tables import epsilon_label


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="MODEL",
        help="package.module:factory, where factory() returns the model, or a directory OUT/models/NAME of ours")
    add("--weights", type=Path, metavar="FILE", help="a safetensors file with the model's state_dict")
    add("--dataset", choices=tuple(DATASETS), help="default: cifar10, or that of the directory of ours")
    add("--data", type=Path, metavar="DIR", help="data directory (or $ROBUSTFLOW_DATA, or a cache)")
    add("--split", choices=("test", "validation"), default="test", help="default: test")
    add("--images", type=int, metavar="N", help="only the first N images of the split")
    add("--epsilons", metavar="LIST", default=",".join(epsilon_label(epsilon) for epsilon in EPSILONS),
        help="L2 radii in pixels of [0, 1], increasing, comma-separated, as 0.14 or 36/255 (default: %(default)s)")
    add("--attacks", metavar="SET", default="standard", help="a set, an attack or a comma list (default: standard)")
    add("--audit", action="store_true", help="attack certified images, too: the test of the certificate")
    add("--eight-bit", action="store_true", help="round adversarials to multiples of 1/255")
    add("--seed", type=int, default=0, help="of the attacks' random starts (default: 0)")
    add("--batch-size", type=int, default=250, metavar="N", help="default: 250")
    add("--out", type=Path, metavar="DIR", help="default: runs/evaluate/NAME")
    add("--robustbench", action="store_true", help="also write robustbench.json, an entry of their model_info")
    add("--device", default="auto", help="auto, cpu or cuda (default: auto)")


def parse_epsilons(text: str) -> list[float]:
    """
    >>> parse_epsilons("0.14, 36/255")[0]
    0.14
    """
    try:
        return [float(Fraction(part.strip())) for part in text.split(",")]
    except (ValueError, ZeroDivisionError, OverflowError):
        raise UserError(f"--epsilons {text}: give numbers such as 0.14,36/255, comma-separated") from None


def _follow(bar: Any) -> Callable[[str, int, int], None]:
    def show(text: str, done: int, total: int) -> None:
        bar.set_description(text, refresh=False)
        bar.total, bar.n = total, done
        bar.refresh()

    return show


def run(options: argparse.Namespace) -> tuple[int, Path]:
    """Evaluate and write; returns the number of alarms and where everything is."""
    started = time.perf_counter()
    device = environment.choose_device(options.device)
    epsilons = parse_epsilons(options.epsilons)
    if options.robustbench and not any(math.isclose(epsilon, robustbench.REFERENCE) for epsilon in epsilons):
        raise UserError(f"--robustbench needs ε = {robustbench.REFERENCE}: add it to --epsilons")
    if options.images is not None and options.images < 1:
        raise UserError(f"--images {options.images}: give at least 1")
    own = own_model.load(options.model, options.weights, options.dataset, options.data)
    if isinstance(own.model, nn.Module):
        own.model.to(device)
    split = own.images.splits[options.split].head(options.images)
    images, out = split.images(), options.out or Path("runs") / "evaluate" / own.name
    shards = out / "shards"
    title = f"{own.name} on {own.images.name}, {options.split}"
    with tqdm(desc=own.name, disable=None, unit="pass") as bar:
        bracket = evaluate(
            own.model,
            images,
            split.labels,
            epsilons,
            options.attacks,
            audit=options.audit,
            batch_size=options.batch_size,
            device=device,
            seed=options.seed,
            eight_bit=options.eight_bit,
            folder=shards,
            executor=options.executor,
            workers=options.workers,
            identity=own.identity,
            progress=_follow(bar),
        )
    config = {name: getattr(options, name) for name in ("split", "images", "attacks", "audit", "eight_bit",
                                                        "batch_size", "executor", "workers")}  # fmt: skip
    facts = {
        "model": own.source,
        "config": {"dataset": own.images.name, "source": own.images.source, "epsilons": epsilons} | config,
        "seed": options.seed,
        "environment": environment.describe(device),
        "wall_seconds": round(time.perf_counter() - started, 3),
    }
    bracket_files.save(bracket, images, out, title, facts)
    if options.robustbench:
        info = robustbench.model_info(bracket, dataset=own.images.name)
        checkpoints.write_json(out / "robustbench.json", info)
    shutil.rmtree(shards, ignore_errors=True)  # only now: whatever is killed before goes on from them
    print(f"{title}\n{bracket}")
    return len(bracket.alarms), out


__all__ = ["add_options", "run"]
