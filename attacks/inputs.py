"""Checks of what the caller passes: one clear line for each mistake."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attacks.victim import AttackInputError


def check_images(images: Any) -> Tensor:
    """Images as a float32 tensor (N, C, H, W), N >= 1, finite and in [0, 1]."""
    images = torch.from_numpy(images) if isinstance(images, np.ndarray) else images
    if not isinstance(images, Tensor):
        raise AttackInputError(f"images must be a tensor of shape (N, C, H, W), got {type(images).__name__}")
    if images.ndim != 4:
        raise AttackInputError(f"images must have shape (N, C, H, W), got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise AttackInputError(f"images must be floats in [0, 1], got {images.dtype}; divide 8-bit images by 255")
    if images.numel() == 0:
        raise AttackInputError(f"there is nothing to attack: images have shape {tuple(images.shape)}")
    if not torch.isfinite(images).all():
        raise AttackInputError("images hold NaN or infinite pixels")
    low, high = images.min().item(), images.max().item()
    if low < 0 or high > 1:
        hint = "divide by 255" if low >= 0 and high > 2 else (
            "they look normalised: pass pixels in [0, 1] and put the normalisation inside the model" if low < 0
            else "clip them")
        raise AttackInputError(f"images must lie in [0, 1] but reach from {low:.4g} to {high:.4g}; {hint}")
    return images.detach().float().contiguous()


def check_labels(labels: Any, count: int) -> Tensor:
    """Labels as an int64 tensor (count,), not negative."""
    labels = labels if isinstance(labels, Tensor) else torch.from_numpy(np.asarray(labels)) if isinstance(
        labels, (list, tuple, np.ndarray)) and np.asarray(labels).dtype.kind in "iufb" else labels
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex() or (
            labels.dtype == torch.bool):
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise AttackInputError(f"labels must be integers, one an image, got {kind}")
    if tuple(labels.shape) != (count,):
        raise AttackInputError(f"labels must have shape ({count},), one an image, got {tuple(labels.shape)}")
    if labels.min() < 0:
        raise AttackInputError(f"labels must not be negative, got {int(labels.min())}")
    return labels.detach().long()


def check_range(labels: Tensor, classes: int) -> None:
    """No label beyond the model's classes."""
    if labels.max() >= classes:
        raise AttackInputError(f"label {int(labels.max())} is out of range: the model has {classes} classes")


def check_epsilons(epsilons: Any) -> np.ndarray:
    """Radii as a strictly increasing float64 array, finite and not negative."""
    try:
        grid = np.asarray([float(value) for value in epsilons], dtype=np.float64)
    except (TypeError, ValueError):
        raise AttackInputError(f"epsilons must be a list of numbers, got {epsilons!r}") from None
    if grid.size == 0:
        raise AttackInputError("epsilons is empty; give at least one radius in pixels of [0, 1]")
    if not np.isfinite(grid).all():
        raise AttackInputError("epsilons must be finite, got " + ", ".join(f"{e:g}" for e in grid))
    if (grid < 0).any():
        raise AttackInputError(f"epsilons must not be negative, got {grid.min():g}")
    if len(np.unique(grid)) < len(grid):
        twice = next(e for e in grid if (grid == e).sum() > 1)
        raise AttackInputError(f"epsilons holds {twice:g} more than once")
    if (np.diff(grid) <= 0).any():
        raise AttackInputError("epsilons must be increasing, got " + ", ".join(f"{e:g}" for e in grid))
    return grid


def check_radii(radii: Any, count: int) -> np.ndarray:
    """Certified radii as a float64 array (count,) without NaN; None: all zero."""
    if radii is None:
        return np.zeros(count)
    radii = radii.detach().cpu().numpy() if isinstance(radii, Tensor) else radii
    try:
        array = np.asarray(radii, dtype=np.float64)
    except (TypeError, ValueError):
        raise AttackInputError("certified_radii must be numbers, one an image") from None
    if array.shape != (count,):
        raise AttackInputError(f"certified_radii must have shape ({count},), one an image, got {array.shape}")
    if np.isnan(array).any():
        raise AttackInputError(f"certified_radii holds NaN (first at row {int(np.isnan(array).argmax())})")
    return array


def check_indices(indices: Sequence[int] | Tensor | np.ndarray | None, count: int) -> np.ndarray:
    """Places of the images in their dataset as an int64 array (count,) of distinct values; None: 0, 1, 2, ..."""
    if indices is None:
        return np.arange(count, dtype=np.int64)
    array = np.asarray(indices.cpu() if isinstance(indices, Tensor) else indices)
    if array.shape != (count,) or array.dtype.kind not in "iu":
        raise AttackInputError(f"indices must be {count} integers, one an image, got {array.dtype} {array.shape}")
    if array.min() < 0 or len(np.unique(array)) < count:
        raise AttackInputError("indices must be distinct and not negative")
    return array.astype(np.int64)
