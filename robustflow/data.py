"""Image sets as uint8 arrays, their splits, and augmentation in batches on the device.

Where an image comes from: `load` finds the arrays in a directory or downloads them, `Split` holds them as uint8
(N, H, W, C) on the device, `images` turns a batch into floats in [0, 1] (N, C, H, W). Nothing is normalised here: that
is part of a model, so that radii are in pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import platformdirs
import torch
from torch import Tensor

from robustflow.errors import UserError

ENVIRONMENT_VARIABLE = "ROBUSTFLOW_DATA"
SPLITS = ("train", "validation", "test")
DIGITS_VALIDATION, DIGITS_TEST = 197, 400


@dataclass(frozen=True)
class Split:
    """Images (N, H, W, C) uint8 and labels (N,) int64, on one device."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Split:
        return Split(self.pixels.to(device), self.labels.to(device))

    def head(self, count: int | None) -> Split:
        """The first ``count`` images (all, if None or fewer)."""
        return Split(self.pixels[:count], self.labels[:count])

    def images(self, start: int = 0, stop: int | None = None) -> Tensor:
        """A slice as floats in [0, 1], (N, C, H, W)."""
        return to_float(self.pixels[start:stop])


@dataclass(frozen=True)
class ImageSet:
    """A labelled image set with its three splits and the statistics of its training pixels in [0, 1]."""

    name: str
    splits: dict[str, Split]
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str

    @property
    def input_shape(self) -> tuple[int, int, int]:
        height, width, channels = self.splits["train"].pixels.shape[1:]
        return (channels, height, width)


def to_float(pixels: Tensor) -> Tensor:
    """uint8 (N, H, W, C) → float32 in [0, 1], (N, C, H, W).

    >>> to_float(torch.full((1, 2, 2, 1), 255, dtype=torch.uint8)).max().item()
    1.0
    """
    return pixels.permute(0, 3, 1, 2).float().div_(255)


def augment(pixels: Tensor, *, crop: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Reflect-padded crops of ±``crop`` pixels and left-right flips, drawn for each image, in one gather.

    Reflection and flip are index arithmetic, so nothing is padded or copied twice. Random numbers are drawn on the CPU:
    a seed means the same augmentation on every device.

    Shape: uint8 (N, H, W, C) → uint8 (N, H, W, C).

    Raises:
        ValueError: the crop is as large as the image.

    >>> batch = torch.arange(16, dtype=torch.uint8).view(1, 4, 4, 1)
    >>> augment(batch, crop=0, flip=False, generator=torch.Generator()).equal(batch)
    True
    """
    count, height, width, _ = pixels.shape
    if crop >= min(height, width):
        raise ValueError(f"a crop of ±{crop} pixels is too large for images of {height}×{width}")
    shifts = torch.randint(-crop, crop + 1, (2, count, 1), generator=generator)
    flipped = (torch.rand(count, 1, generator=generator) < 0.5) & flip
    rows = _reflect(torch.arange(height) + shifts[0], height)
    columns = torch.arange(width).expand(count, width)
    columns = _reflect(torch.where(flipped, width - 1 - columns, columns) + shifts[1], width)
    batch, rows, columns = (
        index.to(pixels.device) for index in (torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :])
    )
    return pixels[batch, rows, columns]


def _reflect(index: Tensor, size: int) -> Tensor:
    """…2 1 | 0 1 2 … n−1 | n−2 …: mirror at the border pixel, which is not repeated."""
    return (size - 1) - ((size - 1) - index.abs()).abs()


def load(name: str, directory: Path | str | None = None) -> ImageSet:
    """Load an image set by name.

    ``digits`` is embedded in scikit-learn and needs no directory. The others are looked for in ``directory``, else in
    the directory named by the environment variable ROBUSTFLOW_DATA, else in the user's cache directory: first an array
    file NAME.npz (x_train, y_train, x_test, y_test; uint8, NHWC), then torchvision's download.

    The validation split is the last tenth of the training images (CIFAR: the last 5,000), kept out of "train".

    Raises:
        UserError: unknown name, missing directory, broken or mislabelled arrays, no way to download.

    >>> load("digits").splits["test"].pixels.shape
    torch.Size([400, 8, 8, 1])
    """
    if name not in DATASETS:
        raise UserError(f"unknown dataset {name!r}; known are: {', '.join(DATASETS)}")
    x_train, y_train, x_test, y_test, class_names, source = DATASETS[name](directory)
    cut = len(x_train) - (DIGITS_VALIDATION if name == "digits" else len(x_train) // 10)
    mean, std = channel_statistics(x_train[:cut])
    return ImageSet(
        name,
        {
            "train": _split(x_train[:cut], y_train[:cut]),
            "validation": _split(x_train[cut:], y_train[cut:]),
            "test": _split(x_test, y_test),
        },
        class_names,
        mean,
        std,
        source,
    )


def channel_statistics(pixels: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every channel of uint8 pixels (N, H, W, C), in [0, 1], to four digits.

    From the 256 counts of each channel: exact, and without a floating-point copy of the data set.
    """
    values = np.arange(256) / 255
    moments = []
    for channel in range(pixels.shape[-1]):
        share = np.bincount(pixels[..., channel].ravel(), minlength=256) / pixels[..., channel].size
        mean = float(share @ values)
        moments.append((round(mean, 4), round(float(np.sqrt(share @ (values - mean) ** 2)), 4)))
    means, deviations = zip(*moments, strict=True)
    return means, deviations


Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[str, ...], str]


def _split(pixels: np.ndarray, labels: np.ndarray) -> Split:
    return Split(torch.from_numpy(np.ascontiguousarray(pixels)), torch.from_numpy(labels.astype(np.int64)))


def _digits(directory: Path | str | None) -> Arrays:
    from sklearn.datasets import load_digits  # here, because only this dataset needs it

    bunch = load_digits()
    # 17 grey levels 0…16, spread over 0…255. Order as published: the last images are by other writers.
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int64)
    test = DIGITS_TEST
    names = CLASS_NAMES["digits"]
    return pixels[:-test], labels[:-test], pixels[-test:], labels[-test:], names, "scikit-learn load_digits"


def _cifar(name: str, classes: int) -> Callable[[Path | str | None], Arrays]:
    def read(directory: Path | str | None) -> Arrays:
        folder = data_directory(directory)
        arrays = folder / f"{name}.npz"
        if arrays.exists():
            return _read_arrays(arrays, classes, CLASS_NAMES[name])
        return _download(name, folder, classes)

    return read


def data_directory(directory: Path | str | None) -> Path:
    """``directory``, else $ROBUSTFLOW_DATA, else the user's cache directory, which alone is made if missing."""
    chosen = directory or os.environ.get(ENVIRONMENT_VARIABLE)
    if not chosen:
        cache = Path(platformdirs.user_cache_dir("robustflow", appauthor=False)) / "data"
        cache.mkdir(parents=True, exist_ok=True)
        return cache
    folder = Path(chosen).expanduser()
    if not folder.is_dir():
        raise UserError(f"data directory {folder} does not exist: create it, or name another with --data")
    return folder


def _read_arrays(path: Path, classes: int, class_names: tuple[str, ...]) -> Arrays:
    try:
        # Opened here: np.load leaves a file open that it cannot read.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            missing = {"x_train", "y_train", "x_test", "y_test"} - set(file.files)
            if missing:
                raise UserError(f"{path} has no array {', '.join(sorted(missing))}")
            x_train, y_train, x_test, y_test = (file[key] for key in ("x_train", "y_train", "x_test", "y_test"))
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib, EOF and pickle errors alike: the file cannot be read
        # Not numpy's own words, which advise to open pickles.
        raise UserError(
            f"{path} cannot be read as an array file (truncated?): write it again with numpy.savez, x_train, y_train, "
            "x_test and y_test as arrays of integers"
        ) from error
    for part, pixels, labels in (("train", x_train, y_train), ("test", x_test, y_test)):
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] not in (1, 3) or not len(pixels):
            raise UserError(f"{path}: x_{part} must be uint8 (N, H, W, C), not {pixels.dtype} {pixels.shape}")
        if labels.shape != (len(pixels),) or labels.dtype.kind not in "iu":
            raise UserError(
                f"{path}: y_{part} must be {len(pixels)} integers, not {labels.dtype} of shape {labels.shape}"
            )
        wrong = (labels < 0) | (labels >= classes)
        if wrong.any():
            index = int(np.flatnonzero(wrong)[0])
            raise UserError(f"{path}: y_{part}[{index}] is {labels[index]}, outside 0…{classes - 1}")
    if x_train.shape[1:] != x_test.shape[1:]:
        raise UserError(f"{path}: x_train and x_test hold images of different shape")
    return x_train, y_train, x_test, y_test, class_names, path.name


def _download(name: str, folder: Path, classes: int) -> Arrays:
    from torchvision import datasets  # here: importing torchvision takes a second that most commands do not need

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        train, test = (kind(str(folder), train=part, download=True) for part in (True, False))
    except Exception as error:
        raise UserError(
            f"{name} is not in {folder} (no {name}.npz) and could not be downloaded: {type(error).__name__}; "
            f"put {name}.npz there or name its directory with --data"
        ) from error
    return (
        np.asarray(train.data), np.asarray(train.targets), np.asarray(test.data), np.asarray(test.targets),
        tuple(train.classes), "torchvision",
    )  # fmt: skip


CLASS_NAMES: dict[str, tuple[str, ...]] = {
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "cifar100": tuple(f"class {number}" for number in range(100)),
    "digits": tuple(str(digit) for digit in range(10)),
}

# Of one image, (channels, height, width): what a model of these images takes, without the images at hand.
INPUT_SHAPES: dict[str, tuple[int, int, int]] = {"cifar10": (3, 32, 32), "cifar100": (3, 32, 32), "digits": (1, 8, 8)}

DATASETS: dict[str, Callable[[Path | str | None], Arrays]] = {
    "cifar10": _cifar("cifar10", 10),
    "cifar100": _cifar("cifar100", 100),
    "digits": _digits,
}


def describe() -> dict[str, str]:
    """What `robustflow list datasets` says."""
    return {
        "cifar10": "32×32 colour images, 10 classes: cifar10.npz in the data directory, or torchvision's download",
        "cifar100": "32×32 colour images, 100 classes: cifar100.npz in the data directory, or torchvision's download",
        "digits": "8×8 grey images of handwritten digits, 10 classes: embedded, nothing to download",
    }
