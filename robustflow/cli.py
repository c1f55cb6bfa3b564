"""The command line: `robustflow bench CONFIG` does everything, the other commands one stage of it.

Exit codes: 0 done; 1 an alarm (an attack inside a certified ball); 2 bad input, told in one line; 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

import attacks
from robustflow import (
    bench,
    config,
    data,
    distributed,
    environment,
    evaluate_command,
    evaluation,
    model_commands,
    models,
    networks,
)
from robustflow.config import Experiment
from robustflow.data import ImageSet
from robustflow.errors import UserError
from robustflow.measurements import FAMILIES, Request, measure
from robustflow.parser import Parser
from robustflow.report import build_report
from robustflow.seeds import command as seed_stages
from robustflow.seeds.reading import check_out, seed_directories
from robustflow.structured import commands as systems
from robustflow.training_grid import train_grid


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        if distributed.launched() and options.command is not _train:
            raise UserError("under torchrun only `robustflow train` works: start the other commands without it")
        return options.command(options)
    except (UserError, attacks.AttackInputError) as error:
        print(f"robustflow: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("robustflow: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except OSError as error:  # a full disk, a directory that may not be written
        print(f"robustflow: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="robustflow", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    for name, command, text in (
        ("bench", _bench, "train, certify and attack every model of a config, or measure those of a system; report"),
        ("train", _train, "train the models of a config that are not finished"),
    ):
        sub = add(name, command, text)
        sub.add_argument("config", metavar="CONFIG", help="a TOML file, or a name that `robustflow list` shows")
        sub.add_argument("--out", type=Path, help="output directory (default: runs/CONFIG)")
        seeds = sub.add_mutually_exclusive_group()
        seeds.add_argument("--seed", type=seed_stages.seed_number, help="instead of the config's seed")
        text = f"{name} every model with each of these seeds, comma-separated, in OUT/seed-N"
        seeds.add_argument("--seeds", type=seed_stages.seed_list, metavar="LIST", help=text)
        _add_machine(sub)
        _add_executor(sub, "trainings" if name == "train" else "attacks")
    for name, command, text in (
        ("certify", _certify, "certify the trained models of an output directory"),
        ("attack", _attack, "attack the certified models of an output directory"),
    ):
        sub = add(name, command, text)
        place = "output directory of `robustflow train`, of one seed or of several"
        if name == "certify":
            sub.add_argument("out", type=Path, metavar="TARGET", help=f"{place}, or one model's: OUT/models/NAME")
            text = "print each bound layer by layer, with what it loses against a lower estimate"
            sub.add_argument("--explain", action="store_true", help=text)
        else:
            sub.add_argument("out", type=Path, metavar="OUT", help=place)
            _add_executor(sub)
        _add_machine(sub)
    sub = add("evaluate", _evaluate, "certify and attack a model of your own")
    evaluate_command.add_options(sub)
    _add_executor(sub)
    sub = add("report", _report, "rebuild summary, tables, plots and report.html from the rows of a directory")
    sub.add_argument("out", type=Path, metavar="OUT", help="output directory of `robustflow bench`, of seeds too")
    sub = add("measure", _measure, "measure what the project claims of its own certificates and attacks")
    sub.add_argument("what", choices=tuple(FAMILIES), help="what to measure")
    sub.add_argument("--out", type=Path, required=True, help="where the numbers, table.md and plots go")
    parts = "; ".join(f"{name}: {','.join(family.parts)}" for name, family in FAMILIES.items())
    sub.add_argument("--only", metavar="PARTS", help=f"measure these again, comma-separated ({parts})")
    sub.add_argument("--bench", type=Path, metavar="DIR", help="a benchmark directory whose models are measured, too")
    sub.add_argument("--data", type=Path, metavar="DIR", help="data directory of that benchmark")
    model_commands.register(add)
    sub = add("list", _list, "list models, trained models, attacks, datasets, systems and configs")
    choices = ("models", "trained", "attacks", "datasets", "systems", "configs")
    sub.add_argument("what", nargs="?", choices=choices, help="only these")
    return parser


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="NAME", help="only this model of the config")
    parser.add_argument("--data", type=Path, metavar="DIR", help="data directory (or $ROBUSTFLOW_DATA, or a cache)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")


def _add_executor(parser: argparse.ArgumentParser, what: str = "attacks") -> None:
    text = f"where {what} run: in this process, in local processes, on a Ray cluster; the numbers are the same"
    parser.add_argument("--executor", choices=("serial", "workers", "ray"), default="serial", help=text)
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core; on Ray all its CPUs)")


def _prepare(options: argparse.Namespace) -> tuple[Experiment, Path, ImageSet]:
    """Read config and data, check what can be checked at once, and only then open the output directory."""
    experiment, name, out, images = _read(options)
    bench.open_directory(out, experiment, name, images)
    return experiment, out, images


def _read(options: argparse.Namespace) -> tuple[Experiment, str, Path, ImageSet]:
    experiment = config.read(options.config)
    if options.seed is not None:
        experiment = experiment.model_copy(update={"seed": options.seed})
    if options.model is not None:
        experiment.model(options.model)
    evaluation.check_attacks(experiment.evaluate)
    known = {str(path): name for name, path in config.list_configs().items()}
    file = config.find(options.config)
    name = known.get(str(file.resolve()), str(options.config))
    out = options.out or Path("runs") / file.stem
    check_out(out, options.seeds is not None)
    return experiment, name, out, bench.load_data(experiment, options.data)


def _bench(options: argparse.Namespace) -> int:
    started = time.monotonic()
    if systems.is_structured(options.config):
        return systems.run(options, report=True)
    device = environment.choose_device(options.device)
    if options.seeds is not None:
        return _bench_seeds(options, device)
    experiment, out, images = _prepare(options)
    bench.train(experiment, out, images, device=device, only=options.model)
    bench.certify(experiment, out, images, only=options.model)
    alarms = bench.attack(
        experiment, out, images, device=device, only=options.model, executor=options.executor, workers=options.workers
    )
    if waiting := bench.unfinished(experiment, out):
        print(f"{out}: no report before {', '.join(waiting)} are done, too")
        return _verdict(alarms, out)
    report = build_report(out)
    print((out / "table.md").read_text(encoding="utf-8"))
    print(f"{report} ({time.monotonic() - started:.0f} s)")
    return _verdict(alarms, report)


def _bench_seeds(options: argparse.Namespace, device: torch.device) -> int:
    out, folders = _train_side_by_side(options, device)
    seed_stages.certify(folders, options)
    alarms = seed_stages.attack(folders, options, device)
    return _verdict(alarms, seed_stages.report(out, folders))


def _verdict(alarms: int, place: Path) -> int:
    if alarms:
        print(f"robustflow: ALARM: {alarms} adversarials inside certified balls, see {place}", file=sys.stderr)
        return 1
    return 0


def _train(options: argparse.Namespace) -> int:
    if systems.is_structured(options.config):
        return systems.run(options, report=False)
    device = environment.choose_device(options.device)
    if options.seeds is not None or options.executor != "serial":
        _train_side_by_side(options, device)
        return 0
    with distributed.joined(device) as group:
        with group.leader_first():
            experiment, name, out, images = _read(options)
        if group.leads:
            bench.open_directory(out, experiment, name, images)
        bench.train(experiment, out, images, device=device, only=options.model, group=group)
    return 0


def _train_side_by_side(options: argparse.Namespace, device: torch.device) -> tuple[Path, dict[int, Path]]:
    if distributed.launched():
        raise UserError("--seeds and --executor start processes of their own: leave torchrun out")
    experiment, name, out, images = _read(options)
    folders = {seed: out / f"seed-{seed}" for seed in options.seeds or ()} or {experiment.seed: out}
    for seed, folder in folders.items():
        bench.open_directory(folder, experiment.model_copy(update={"seed": seed}), name, images)
    train_grid(
        experiment, folders, images, device=device, only=options.model, executor=options.executor,
        workers=options.workers,
    )  # fmt: skip
    return out, folders


def _certify(options: argparse.Namespace) -> int:
    environment.choose_device(options.device)
    systems.refuse(options.out)
    out, model = bench.locate(options.out)
    if model is not None and options.model not in (None, model):
        raise UserError(f"{options.out} is the model {model}, not {options.model}: leave --model out")
    if model is None and (folders := seed_directories(out)):
        seed_stages.certify(folders, options)
        return 0
    experiment, _ = bench.read_directory(out)
    images = bench.load_data(experiment, options.data)
    only = options.model or model
    for account in bench.certify(experiment, out, images, only=only, explain=options.explain):
        print(account)
    return 0


def _attack(options: argparse.Namespace) -> int:
    device = environment.choose_device(options.device)
    systems.refuse(options.out)
    if folders := seed_directories(options.out):
        return _verdict(seed_stages.attack(folders, options, device), options.out)
    experiment, _ = bench.read_directory(options.out)
    evaluation.check_attacks(experiment.evaluate)
    images = bench.load_data(experiment, options.data)
    alarms = bench.attack(
        experiment, options.out, images, device=device, only=options.model, executor=options.executor,
        workers=options.workers,
    )
    return _verdict(alarms, options.out)


def _evaluate(options: argparse.Namespace) -> int:
    alarms, out = evaluate_command.run(options)
    print(out)
    return _verdict(alarms, out)


def _report(options: argparse.Namespace) -> int:
    print((systems.report if systems.holds_systems(options.out) else build_report)(options.out))
    return 0


def _measure(options: argparse.Namespace) -> int:
    only = options.only.split(",") if options.only else None
    table = measure(FAMILIES[options.what], Request(options.out, options.bench, options.data), only)
    print(table.read_text(encoding="utf-8"))
    return 0


def _attack_lines() -> Iterator[str]:
    """A line a set, then a table of the attacks, left-aligned."""
    for chosen in attacks.SETS.values():
        yield f"{chosen.name:15} set of {', '.join(chosen.attacks)}: {chosen.good_at}"
    rows = [{key: str(value) for key, value in row.items()} for row in attacks.describe()]
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    for row in [{key: key.replace("_", " ") for key in widths}, *rows]:
        yield "  ".join(cell.ljust(widths[key]) for key, cell in row.items()).rstrip()


def _list(options: argparse.Namespace) -> int:
    sections: dict[str, Callable[[], Iterator[str]]] = {
        "models": lambda: (f"{name:15} {text}" for name, text in networks.list_models().items()),
        "trained": lambda: (f"{name:37} {path}" for name, path in models.list_trained().items()),
        "attacks": _attack_lines,
        "datasets": lambda: (f"{name:15} {text}" for name, text in data.describe().items()),
        "systems": systems.lines,
        "configs": lambda: (f"{name:15} {path}" for name, path in config.list_configs().items()),
    }
    chosen = [options.what] if options.what else list(sections)
    for what in chosen:
        if len(chosen) > 1:
            print(f"{what}:")
        for line in sections[what]():
            print(f"  {line}" if len(chosen) > 1 else line)
    return 0


if __name__ == "__main__":
    distributed.leave(main())
