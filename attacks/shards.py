"""A sweep in shards by image index: each finished shard is a file, so a killed sweep goes on where it was."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from attacks.contract import Progress
from attacks.executors import Job, execute
from attacks.inputs import check_epsilons, check_images, check_indices, check_labels, check_radii
from attacks.sets import expected_passes, resolve
from attacks.shard_files import digest, model_identity, read_shard, sweep_away_partials, write_shard
from attacks.shard_work import Part, Settings, Task, baked, extras, run_shard
from attacks.sweep import SweepResult, sweep
from attacks.victim import AttackInputError

VERSION = 1  # raised whenever a shard would come out differently from the same weights, images and options
SHARD_SIZE = 250
PER_SHARD = ("certified_radii", "indices", "progress")  # options of a sweep that are not the same for all shards


def sharded_sweep(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    epsilons: Sequence[float],
    attacks: str = "standard",
    *,
    folder: Path | str,
    identity: str | None = None,
    shard_size: int = SHARD_SIZE,
    executor: str = "serial",
    workers: int | None = None,
    threads: int = 1,
    progress: Progress | None = None,
    **options: Any,
) -> SweepResult:
    r"""A :func:`sweep` of images :math:`[k s, (k + 1) s)` for every k, each kept in a file of ``folder``.

    Killed at any point, the same call does only the shards that are missing. A shard's file carries the hash of all
    that it depends on: its images, labels, radii and indices, the radii of attack, the attacks, ``options`` (those of
    :func:`sweep`), the type of device, the versions, and the model (see :func:`shard_files.model_identity`;
    ``identity`` adds to it and is needed where the model is no module). Files of other hashes are left alone, so runs
    can share a folder, a changed option never meets an old file, and more images reuse the shards that stay the same.

    ``executor``: "serial" (here), "workers" (``workers`` local processes, by default one a core), "ray" (the cluster
    that this machine belongs to, else one of its own). A shard is the same work in all three, done with ``threads``
    threads: on one type of device and CPU the results are the same, bit by bit. The number of threads belongs to the
    identity since small matrix products differ in their last bit with it (measured: a linear layer on 7 images). One
    is the default, so that a result does not depend on the machine's cores; use them with "workers".

    ``progress(text, done, total)`` counts forward passes: those of finished shards and of those under way, and how
    many there will be (as the finished shards had for an image; before there are any: as the attacks declare).

    Shape: as :func:`sweep`, whose result it returns: rows in the order of ``images``, passes and seconds added up.
    Errors: AttackInputError as :func:`sweep` and :func:`executors.execute`, and if the folder cannot be written.

    >>> import tempfile
    >>> images, weight = torch.full((3, 1, 1, 2), 0.5), torch.tensor([[3.0, 4.0], [-3.0, -4.0]])
    >>> model = lambda x: (x.flatten(1) - 0.4) @ weight.T
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     result = sharded_sweep(model, images, torch.zeros(3, dtype=torch.long), [0.1, 0.2], "deepfool",
    ...                            folder=folder, identity="example 1", shard_size=2)
    ...     len(list(Path(folder).iterdir())), len(result.samples), result.robust_accuracy()
    (2, 3, [1.0, 0.0])
    """
    known = {
        name: parameter.default for name, parameter in inspect.signature(sweep).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    for name in options:
        if name not in known:
            raise TypeError(f"sharded_sweep() got an unexpected keyword argument {name!r}")
    for name, value in (("shard_size", shard_size), ("threads", threads)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise AttackInputError(f"{name} must be a positive integer, got {value!r}")
    images = check_images(images).cpu()
    count = len(images)
    labels, grid = check_labels(labels, count).cpu(), check_epsilons(epsilons).tolist()
    radii = torch.from_numpy(check_radii(options.get("certified_radii"), count).copy())  # a frame lends it read-only
    places = torch.from_numpy(check_indices(options.get("indices"), count).copy())
    device = torch.device(options.get("device", known["device"]))
    shared = {name: options.get(name, value) for name, value in known.items() if name not in PER_SHARD}
    shared["device"] = str(device)
    settings = Settings.current(threads)
    parts = {
        number: slice(first, min(first + shard_size, count))
        for number, first in enumerate(range(0, count, shard_size))
    }

    def part(number: int) -> Part:
        # Copies: the same place in memory relative to a cache line, wherever the shard runs.
        return Part(*(tensor[parts[number]].clone() for tensor in (images, labels, radii, places)))

    common = _identity(model_identity(model, identity), attacks, grid, shared, device, settings)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AttackInputError(f"cannot make the folder {folder} for shards: {error.strerror}") from error
    sweep_away_partials(folder)
    stamps = {number: digest(common, *vars(part(number)).values()) for number in parts}
    files = {number: folder / f"{number:05d}-{stamp[:16]}.safetensors" for number, stamp in stamps.items()}
    found = {number: read_shard(files[number], stamps[number]) for number in parts}
    done = {number: result for number, result in found.items() if result is not None}
    bound = expected_passes(attacks, grid, **{k: v for k, v in shared.items() if k == "eight_bit"})
    meter = _Meter({number: part.stop - part.start for number, part in parts.items()}, bound, progress)
    for number, result in done.items():
        meter.finish(number, result)
    missing = [number for number in parts if number not in done]
    if missing:
        with settings.applied():
            task = Task(baked(model), grid, attacks, shared, settings, extras(attacks))
        job = Job(run_shard, task, missing, part, meter.tick, threads, device.type == "cuda")
        meter.show(f"{len(done)} of {len(parts)} shards done before")
        with closing(execute(job, executor, workers)) as outcomes:
            for number, result in outcomes:
                write_shard(files[number], result, stamps[number])
                done[number] = result
                meter.finish(number, result)
                meter.show(f"shard {number + 1} of {len(parts)} done")
    return _joined([done[number] for number in parts])


def _identity(
    model: str, attacks: str, grid: list[float], shared: dict[str, Any], device: torch.device, settings: Settings
) -> str:
    chosen, reach = resolve(attacks)
    described = [[a.name, a.kind, a.cost, type(a).__qualname__] for a in chosen]
    same_machine = [str(settings.dtype), settings.threads, settings.flags if device.type == "cuda" else None]
    options = shared | {"device": device.type}
    return digest(VERSION, torch.__version__, model, described, repr(reach), grid, options, same_machine)


class _Meter:
    """Forward passes done, and to be expected in all."""

    def __init__(self, sizes: dict[int, int], bound: int, progress: Progress | None) -> None:
        self.sizes, self.bound, self.progress = sizes, bound, progress
        self.finished: dict[int, int] = {}
        self.running: dict[int, int] = {}

    def finish(self, number: int, result: SweepResult) -> None:
        self.running.pop(number, None)
        self.finished[number] = sum(result.forward_passes.values())

    def tick(self, number: int, passes: int, text: str) -> None:
        self.running[number] = passes
        self.show(f"shard {number + 1} of {len(self.sizes)}, {text}")

    def show(self, text: str) -> None:
        if self.progress is None:
            return
        done, images = sum(self.finished.values()), sum(self.sizes[number] for number in self.finished)
        each = done / images if images else self.bound
        open_ = [number for number in self.sizes if number not in self.finished]
        rest = sum(max(each * self.sizes[number], self.running.get(number, 0)) for number in open_)
        self.progress(text, done + sum(self.running.values()), math.ceil(done + rest))


def _joined(results: list[SweepResult]) -> SweepResult:
    """One result of all shards, in their order."""
    joined = SweepResult(
        results[0].epsilons, pd.concat([result.samples for result in results], ignore_index=True),
        torch.cat([result.adversarials for result in results]), warnings=_agreed([r.warnings for r in results]),
    )
    for result in results:
        for name, passes in result.forward_passes.items():
            joined.forward_passes[name] = joined.forward_passes.get(name, 0) + passes
        for name, seconds in result.seconds.items():
            joined.seconds[name] = joined.seconds.get(name, 0.0) + seconds
    return joined


def _agreed(warnings: list[list[str]]) -> list[str]:
    """Each warning once, though its numbers differ from shard to shard; with how many shards give it."""
    alike: dict[str, list[str]] = {}
    for text in (text for shard in warnings for text in dict.fromkeys(shard)):
        alike.setdefault(re.sub(r"\d[\d.]*(e[+-]?\d+)?", "#", text), []).append(text)
    return [
        texts[0] if len(texts) == len(warnings) and len(set(texts)) == 1
        else f"{texts[0]} (so in {len(texts)} of {len(warnings)} shards; the numbers are of the first)"
        for texts in alike.values()
    ]
