"""Where the time of a training step and of an evaluation goes, against what this machine can do with the same shapes.

Times are of random images, so that no data set is needed: what a step costs does not depend on what it learns.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm.auto import tqdm

from robustflow import bench, config, networks
from robustflow.config import ModelConfig, TrainConfig
from robustflow.data import ImageSet, Split, to_float
from robustflow.image_task import ImageTask, build_loss
from robustflow.measurements.family import Record, Request
from robustflow.memory import keep_freed_memory
from robustflow.optimizers import build_optimizers
from robustflow.training import Training, generator

# (config, model): the recipe of gradient flows on patches, the paper's own network, an ordinary residual network.
SUBJECTS = (
    ("cifar10/cpu-15min", "nonexpansive"),
    ("cifar10/paper", "nonexpansive-0.3"),
    ("cifar10/cpu", "resnet"),
)
PAPER = SUBJECTS[1]
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PHASES = ("data", "forward", "backward", "update", "constraint")
STEPS, WARM, REPEATS, SIZE, CLASSES = 5, 2, 4, 32, 10
GOALS = {"share of the convolution peak": 0.45, "images per second over a plain loop": 2.0}
CPU = torch.device("cpu")


def random_images(count: int) -> ImageSet:
    """Uniform pixels and labels in the shape of CIFAR-10."""
    drawn = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, SIZE, SIZE, 3), generator=drawn, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (count,), generator=drawn)
    split = Split(pixels, labels)
    splits = {"train": split, "validation": split.head(0), "test": split.head(0)}
    names = tuple(str(number) for number in range(CLASSES))
    return ImageSet("random", splits, names, (0.5,) * 3, (0.25,) * 3, "uniform random numbers")


# ------------------------------------------------------------------------------------------------------------- profile
def profile(request: Request) -> Record:
    """Seconds of each phase of a step, for every subject and precision; rates beside those of bare products."""
    rows = []
    bar = tqdm([(s, p) for s in SUBJECTS for p in PRECISIONS], desc="profile", unit="training", disable=None)
    for (name, model), precision in bar:
        bar.set_postfix_str(f"{model}, {precision}")
        rows.append({"config": name, **_profiled(_find(name, model), precision)})
    return {"steps": STEPS, "phases": list(PHASES), "goal": GOALS["share of the convolution peak"], "rows": rows}


def _find(name: str, model: str) -> ModelConfig:
    """A model of a shipped config; training sees single views, so its mirror image is left out."""
    found = config.read(name).model(model)
    return found.model_copy(update={"network": found.network.model_copy(update={"mirror": False})})


def _profiled(subject: ModelConfig, precision: str) -> Record:
    train = subject.train.model_copy(update={"precision": precision})
    batch = train.batch_size
    with _training(subject, train, batch * (STEPS + WARM)) as training, _clocks(training) as spent:
        seconds = _steps(training, spent)
        model = training.model
        assert isinstance(model, networks.Classifier)
        operations = 6 * batch * networks.multiply_adds(model)  # forward once, backward twice; 2 a multiply-add
    peak = convolution_peak(subject.network.channels, batch, PRECISIONS[precision])
    rate = operations / seconds["step"]
    return {
        "model": subject.name,
        "precision": precision,
        "batch": batch,
        "parameters": networks.parameter_count(model),
        "multiply_adds": operations // (6 * batch),
        "seconds": seconds,
        "operations_per_second": rate,
        "convolution_peak": peak,
        "share_of_peak": rate / peak,
    }


@contextmanager
def _training(subject: ModelConfig, train: TrainConfig, count: int) -> Iterator[Training]:
    images = random_images(count)
    torch.manual_seed(0)
    keep_freed_memory()  # as `Training.run` does
    with tempfile.TemporaryDirectory(prefix="robustflow-profile-") as folder:
        task = ImageTask(bench.build_model(subject, images), images, train, device=CPU)
        yield Training(task, train, Path(folder), seed=0, device=CPU, identity="profile")


def _steps(training: Training, spent: Mapping[str, list[float]]) -> dict[str, float]:
    """Median seconds of the phases over steps, those of the first few left out; "step" is their sum."""
    order = torch.arange(training.task.size).split(training.config.batch_size)
    for batch in order[: STEPS + WARM]:
        training.step(batch)
    found = {phase: statistics.median(spent[phase][WARM:]) for phase in PHASES}
    return found | {"step": sum(found.values())}


@contextmanager
def _clocks(training: Training) -> Iterator[Mapping[str, list[float]]]:
    """Time stamps at the borders of the phases, put there from outside: the training itself knows of no clock."""
    spent: dict[str, list[float]] = defaultdict(list)
    last = time.perf_counter()

    def lap(phase: str | None) -> None:
        nonlocal last
        now = time.perf_counter()
        if phase is not None:
            spent[phase].append(now - last)
        last = now

    task, whole = training.task, training.task.loss
    constrain = task.constrain

    def loss(batch: Tensor, drawn: torch.Generator, share: float) -> tuple[Tensor, Mapping[str, float]]:
        lap(None)
        found = whole(batch, drawn, share)
        lap("forward")
        return found

    def constrained(exact: bool = False) -> None:
        lap("update")
        constrain(exact)
        lap("constraint")

    task.loss, task.constrain = loss, constrained  # type: ignore[method-assign]
    handles: list[Any] = [training.model.register_forward_pre_hook(lambda *_: lap("data"))]
    handles.append(training.optimizers[0].register_step_pre_hook(lambda *_: lap("backward")))
    try:
        yield spent
    finally:
        task.loss, task.constrain = whole, constrain  # type: ignore[method-assign]
        for handle in handles:
            handle.remove()


def convolution_peak(channels: tuple[int, ...], batch: int, dtype: torch.dtype) -> float:
    """Operations a second of the fastest of 3 × 3 convolutions, one a block, forward, in channels-last memory."""
    rates = []
    for place, width in enumerate(channels):
        size = SIZE >> place
        x = torch.rand(batch, width, size, size).to(dtype).to(memory_format=torch.channels_last)
        kernel = torch.rand(width, width, 3, 3).to(dtype).to(memory_format=torch.channels_last)
        seconds = _fastest(functools.partial(F.conv2d, x, kernel, padding=1))
        rates.append(2 * kernel.numel() * batch * size * size / seconds)
    return max(rates)


def _fastest(call: Callable[[], Any]) -> float:
    """Seconds of the fastest of a few calls, after one that warms up."""
    seconds = []
    with torch.no_grad():
        for _ in range(REPEATS + 1):
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


# ---------------------------------------------------------------------------------------------------------------- loop
class PlainImages(Dataset[tuple[Tensor, int]]):
    """One image at a time, cropped and flipped by torchvision's transforms: the loop of most tutorials."""

    def __init__(self, split: Split, crop: int) -> None:
        self.split = split
        self.transform = v2.Compose(
            [v2.RandomCrop(SIZE, padding=crop, padding_mode="reflect"), v2.RandomHorizontalFlip()]
        )

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = to_float(self.split.pixels[index : index + 1])[0]
        return self.transform(image), int(self.split.labels[index])


def loop(request: Request) -> Record:
    """Training images per second of the paper's own network: in float32 one image at a time, and as here.

    The two take turns, so that a drift of the machine meets both; the constraint after a step is the same for both.
    """
    subject = _find(*PAPER)
    batch = subject.train.batch_size
    count = batch * (STEPS + 1)
    images = random_images(count)
    seconds: dict[str, list[float]] = defaultdict(list)
    ways: dict[str, Callable[[], float]] = {"plain": functools.partial(_plain, subject, images)}
    ways |= {precision: functools.partial(_ours, subject, precision, count) for precision in PRECISIONS}
    for _ in range(2):
        for name, run in ways.items():
            seconds[name].append(run())
        ways = dict(reversed(ways.items()))
    rates = {name: batch / min(each) for name, each in seconds.items()}
    return {
        "config": PAPER[0],
        "model": subject.name,
        "batch": batch,
        "goal": GOALS["images per second over a plain loop"],
        "seconds_a_step": dict(seconds),
        "images_per_second": rates,
        "ratios": {name: rates[name] / rates["plain"] for name in PRECISIONS},
    }


def _ours(subject: ModelConfig, precision: str, count: int) -> float:
    train = subject.train.model_copy(update={"precision": precision})
    with _training(subject, train, count) as training:
        batches = torch.arange(count).split(train.batch_size)
        return _median(training.step, batches)


def _plain(subject: ModelConfig, images: ImageSet) -> float:
    torch.manual_seed(0)
    keep_freed_memory(False)
    model = bench.build_model(subject, images)
    [optimizer] = build_optimizers(model, subject.train)
    objective = build_loss(subject.train.loss)
    split = images.splits["train"]
    loader = iter(DataLoader(PlainImages(split, subject.train.crop), subject.train.batch_size, shuffle=True,
                             generator=generator(0)))  # fmt: skip

    def step(_: Tensor) -> None:
        pixels, labels = next(loader)
        loss = objective(model(pixels), labels, model.head.weight, 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.constrain_()

    return _median(step, torch.arange(len(split)).split(subject.train.batch_size))


def _median(step: Callable[[Tensor], None], batches: tuple[Tensor, ...]) -> float:
    """Seconds of a step, the first left out."""
    seconds = []
    for batch in batches:
        started = time.perf_counter()
        step(batch)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


__all__ = ["loop", "profile"]
