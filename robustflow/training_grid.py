"""A grid of trainings, models × seeds, side by side: in this process, in local processes or on a Ray cluster.

Each is trained with the same number of threads wherever it runs, so the weights do not depend on where. Each keeps its
own checkpoint: a training whose worker dies goes on from there in a new one, and the same command after a power cut
does only what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from attacks import AttackInputError
from attacks.executors import Job, Tick, execute
from robustflow import bench, environment
from robustflow.config import Experiment, ModelConfig
from robustflow.data import ImageSet
from robustflow.errors import UserError
from robustflow.starting_point import find_start

EVERY = 0.2  # seconds between a worker's messages of its progress

Listener = Callable[[str, int, str], None]


@dataclass(frozen=True)
class Shared:
    """What all trainings of a grid have in common; sent once to every worker."""

    images: ImageSet
    pixels: str
    device: torch.device
    threads: int


@dataclass(frozen=True)
class Piece:
    """One training: a model and a seed."""

    config: ModelConfig
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.config.name}, seed {self.seed}"

    def steps(self, images: ImageSet) -> int:
        return len(images.splits["train"]) // self.config.train.batch_size * self.config.train.epochs


def train_grid(
    experiment: Experiment,
    folders: Mapping[int, Path],
    images: ImageSet,
    *,
    device: torch.device,
    only: str | None = None,
    executor: str = "serial",
    workers: int | None = None,
    threads: int = 1,
    listener: Listener | None = None,
) -> None:
    """Train every model of an experiment with every seed; ``folders[seed]`` is that seed's output directory.

    ``executor`` and ``workers`` as in `attacks.executors.execute`, ``threads``: of each training. On Ray, the folders
    must be on a file system that every node sees. ``listener(training, steps done, text)`` hears of progress (from Ray
    only of ends).

    Raises:
        UserError: a training failed, for example diverged (the others are done first, all that failed are named); a
            worker died twice on one training; Ray is missing.
    """
    chosen = bench.chosen_models(experiment, only)
    if executor == "ray":  # whose workers have a working directory and an environment of their own
        chosen = [_located(config) for config in chosen]
    pieces = [
        Piece(config, seed, (out / "models" / config.name).resolve())
        for seed, out in folders.items()
        for config in chosen
    ]
    shared = Shared(images, bench.fingerprint(images), device, threads)
    done = dict.fromkeys(range(len(pieces)), 0)
    failed: dict[int, str] = {}
    steps = [piece.steps(images) for piece in pieces]
    again: set[int] = set()
    with tqdm(total=sum(steps), desc=f"{len(pieces)} trainings", unit="step", disable=None) as bar:

        def tick(number: int, step: int, text: str) -> None:
            if text:  # the executor's word that a worker died: the checkpoint's step comes with the next message
                again.add(number)
            else:
                bar.update(step - done[number])
                done[number] = step
            if listener is not None:
                listener(pieces[number].name, step, text)

        job = Job(_train, shared, range(len(pieces)), pieces.__getitem__, tick, threads, device.type == "cuda")
        try:
            with closing(execute(job, executor, workers)) as outcomes:
                for number, line in outcomes:
                    tick(number, steps[number], "")
                    if line is not None:
                        failed[number] = line
        except AttackInputError as error:
            where = f" ({'; '.join(f'piece {k} is {pieces[k].name}' for k in sorted(again))})" if again else ""
            raise UserError(f"{error}{where}") from error
    for number, piece in enumerate(pieces):
        if number not in failed and not (piece.folder / bench.CARD).is_file():
            failed[number] = f"{piece.folder} was written on another machine: put --out where every machine sees it"
    if failed:
        lines = "; ".join(f"{pieces[number].name}: {failed[number]}" for number in sorted(failed))
        raise UserError(f"{len(failed)} of {len(pieces)} trainings failed: {lines}")


def _located(config: ModelConfig) -> ModelConfig:
    """The config with the directory, not the name, of what its training starts from."""
    start = find_start(config)
    if start is None:
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"start": str(start.folder.resolve())})})


def _train(shared: Shared, piece: Piece, tick: Tick) -> str | None:
    """Train one piece; returns what is wrong with it in one line, or None."""
    last = 0.0

    def heard(step: int) -> None:
        nonlocal last
        if time.monotonic() - last > EVERY:
            last = time.monotonic()
            tick(step, "")

    threads = torch.get_num_threads()
    torch.set_num_threads(shared.threads)
    try:
        device = environment.choose_device(shared.device.type)  # sets in a worker what it has set here
        bench.train_model(
            piece.config, piece.folder, shared.images, seed=piece.seed, device=device, pixels=shared.pixels,
            listener=heard,
        )  # fmt: skip
    except UserError as error:
        return str(error)
    finally:
        torch.set_num_threads(threads)
    return None
