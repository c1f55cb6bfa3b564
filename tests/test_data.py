"""Image sets: values, splits, augmentation against a slow reference, and one line for every broken file."""

from __future__ import annotations

import builtins
import io
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from robustflow import data
from robustflow.errors import UserError


def arrays(classes: int = 10, n: int = 20, test: int = 10) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8),
        "y_train": np.arange(n) % classes,
        "x_test": rng.integers(0, 256, (test, 32, 32, 3), dtype=np.uint8),
        "y_test": np.arange(test)[::-1] % classes,
    }


def write(folder: Path, name: str = "cifar10", **changes: Any) -> Path:
    path = folder / f"{name}.npz"
    content = {key: value for key, value in (arrays() | changes).items() if value is not None}
    np.savez(path, **content)
    return path


def test_digits_are_scikit_learn_s() -> None:
    images = data.load("digits")
    assert {name: len(split) for name, split in images.splits.items()} == {
        "train": 1200,
        "validation": 197,
        "test": 400,
    }
    assert images.input_shape == (1, 8, 8)
    assert images.class_names == tuple("0123456789")
    bunch = load_digits()
    pixels = torch.cat([images.splits[name].images() for name in data.SPLITS])
    labels = torch.cat([images.splits[name].labels for name in data.SPLITS])
    # The splits in their order are the published set, grey levels 0…16 spread over [0, 1] to half a level of 255.
    np.testing.assert_allclose(pixels[:, 0].numpy(), bunch.images / 16, atol=0.5 / 255 + 1e-6)
    assert (labels.numpy() == bunch.target).all()
    assert (pixels.min(), pixels.max()) == (0, 1)
    train = images.splits["train"].images().double()
    assert images.mean == pytest.approx([float(train.mean())], abs=1e-4)
    assert images.std == pytest.approx([float(train.std(correction=0))], abs=1e-4)


def test_an_array_file_round_trips(tmp_path: Path) -> None:
    content = arrays()
    write(tmp_path)
    images = data.load("cifar10", tmp_path)
    assert images.source == "cifar10.npz"
    assert images.input_shape == (3, 32, 32)
    assert images.class_names[:2] == ("airplane", "automobile")
    # The validation split is the last tenth of the training images and no part of "train".
    np.testing.assert_array_equal(images.splits["train"].pixels.numpy(), content["x_train"][:18])
    np.testing.assert_array_equal(images.splits["validation"].pixels.numpy(), content["x_train"][18:])
    np.testing.assert_array_equal(images.splits["test"].pixels.numpy(), content["x_test"])
    np.testing.assert_array_equal(images.splits["test"].labels.numpy(), content["y_test"])
    train = content["x_train"][:18] / 255
    assert images.mean == pytest.approx(train.mean((0, 1, 2)), abs=1e-4)
    assert images.std == pytest.approx(train.std((0, 1, 2)), abs=1e-4)
    x = images.splits["test"].images(2, 5)
    np.testing.assert_allclose(x.numpy(), content["x_test"][2:5].transpose(0, 3, 1, 2) / 255, atol=1e-7)
    assert len(images.splits["test"].head(3)) == 3
    assert len(images.splits["test"].head(None)) == 10


def test_cifar_keeps_the_last_5000_for_validation(tmp_path: Path) -> None:
    small = np.zeros((50_000, 2, 2, 3), dtype=np.uint8)
    write(tmp_path, x_train=small, y_train=np.zeros(50_000, dtype=np.int64), x_test=small[:10])
    images = data.load("cifar10", tmp_path)
    assert (len(images.splits["train"]), len(images.splits["validation"])) == (45_000, 5_000)


def test_cifar100_from_a_made_up_array_file(tmp_path: Path) -> None:
    write(tmp_path, "cifar100", **arrays(100, 200, 100))
    images = data.load("cifar100", tmp_path)
    assert len(images.class_names) == 100
    assert int(images.splits["test"].labels.max()) == 99
    write(tmp_path, "cifar100", **arrays(101, 200, 101))
    with pytest.raises(UserError, match=r"y_train\[100\] is 100, outside 0…99"):
        data.load("cifar100", tmp_path)


class Planted:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return builtins.open, (str(self.path), "w")


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"y_test": None}, "no array y_test"),
    ({"x_train": None, "y_train": None}, "no array x_train, y_train"),
    ({"x_train": arrays()["x_train"].astype(np.float32)}, "x_train must be uint8.*float32"),
    ({"x_test": arrays()["x_test"].transpose(0, 3, 1, 2)}, "x_test must be uint8"),
    ({"x_test": arrays()["x_test"][0]}, "x_test must be uint8"),
    ({"x_test": np.zeros((0, 32, 32, 3), np.uint8), "y_test": np.zeros(0, int)}, "x_test must be uint8"),
    ({"x_test": np.zeros((10, 16, 16, 3), np.uint8)}, "different shape"),
    ({"y_train": np.arange(19) % 10}, "y_train must be 20 integers"),
    ({"y_train": np.zeros((20, 1), int)}, "y_train must be 20 integers"),
    ({"y_train": np.zeros(20)}, "y_train must be 20 integers, not float64"),
    ({"y_train": np.array([0] * 7 + [10] + [0] * 12)}, r"y_train\[7\] is 10, outside 0…9"),
    ({"y_test": np.array([0] * 9 + [-1])}, r"y_test\[9\] is -1, outside 0…9"),
]


@pytest.mark.parametrize(("changes", "message"), BROKEN)
def test_wrong_arrays_are_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as caught:
        data.load("cifar10", tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_a_truncated_file_is_one_line(kept: float, tmp_path: Path) -> None:
    path = write(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(len(whole) * kept)])
    with pytest.raises(UserError, match=r"^.*cifar10\.npz cannot be read as an array file[^\n]*$"):
        data.load("cifar10", tmp_path)


def test_a_flipped_byte_inside_an_array_is_found(tmp_path: Path) -> None:
    path = write(tmp_path)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 3] ^= 0xFF
    path.write_bytes(bytes(whole))
    with pytest.raises(UserError, match="cannot be read"):
        data.load("cifar10", tmp_path)


def test_pickles_are_refused_and_never_run(tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    objects = np.empty(20, dtype=object)
    objects[:] = Planted(trace)
    write(tmp_path, y_train=objects)
    with pytest.raises(UserError, match="cannot be read"):
        data.load("cifar10", tmp_path)
    (tmp_path / "cifar10.npz").write_bytes(pickle.dumps(Planted(trace)))
    with pytest.raises(UserError, match="cannot be read"):
        data.load("cifar10", tmp_path)
    bare = io.BytesIO()
    np.save(bare, np.zeros(3))
    (tmp_path / "cifar10.npz").write_bytes(bare.getvalue())
    with pytest.raises(UserError, match="cannot be read"):
        data.load("cifar10", tmp_path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Planted(trace))).close()
    assert trace.exists(), "the planted pickle would have shown"


def test_unknown_name_and_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown dataset 'mnist'; known are: cifar10, cifar100, digits"):
        data.load("mnist")
    with pytest.raises(UserError, match=r"data directory .*nowhere does not exist[^\n]*--data"):
        data.load("cifar10", tmp_path / "nowhere")


def test_no_download_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr(datasets, "CIFAR10", offline)
    with pytest.raises(UserError, match=r"^cifar10 is not in [^\n]* could not be downloaded[^\n]*--data[^\n]*$"):
        data.load("cifar10", tmp_path)


def test_a_download_becomes_an_image_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    content = arrays()

    class Fake:
        classes = tuple(f"name {i}" for i in range(10))

        def __init__(self, root: str, train: bool, download: bool) -> None:
            assert (root, download) == (str(tmp_path), True)
            part = "train" if train else "test"
            self.data, self.targets = content[f"x_{part}"], content[f"y_{part}"].tolist()

    monkeypatch.setattr(datasets, "CIFAR10", Fake)
    images = data.load("cifar10", tmp_path)
    assert images.source == "torchvision"
    assert images.class_names == Fake.classes
    np.testing.assert_array_equal(images.splits["test"].labels.numpy(), content["y_test"])


def test_directory_is_the_argument_else_the_variable_else_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named, variable, cache = (tmp_path / name for name in ("named", "variable", "cache"))
    named.mkdir()
    variable.mkdir()
    monkeypatch.setattr(data.platformdirs, "user_cache_dir", lambda *_, **__: str(cache))
    monkeypatch.setenv(data.ENVIRONMENT_VARIABLE, str(variable))
    assert data.data_directory(named) == named
    assert data.data_directory(None) == variable
    assert not cache.exists()
    monkeypatch.setenv(data.ENVIRONMENT_VARIABLE, str(tmp_path / "gone"))
    with pytest.raises(UserError, match="gone does not exist"):
        data.data_directory(None)
    for unset in (
        lambda: monkeypatch.setenv(data.ENVIRONMENT_VARIABLE, ""),
        lambda: monkeypatch.delenv(data.ENVIRONMENT_VARIABLE),
    ):
        unset()
        assert data.data_directory(None) == cache / "data"
        assert (cache / "data").is_dir()


def slow_views(image: np.ndarray, crop: int, flip: bool) -> list[np.ndarray]:
    """Every view that augmentation may show of one image, by padding, cutting and flipping."""
    height, width, _ = image.shape
    padded = np.pad(image, ((crop, crop), (crop, crop), (0, 0)), mode="reflect")
    views = [padded[i : i + height, j : j + width] for i in range(2 * crop + 1) for j in range(2 * crop + 1)]
    return views + [view[:, ::-1] for view in views] if flip else views


@pytest.mark.parametrize(("crop", "flip"), [(0, False), (0, True), (1, False), (2, True), (4, False)])
def test_augmentation_shows_the_views_of_padding_cropping_flipping_all_equally_often(crop: int, flip: bool) -> None:
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    wanted = Counter(view.tobytes() for view in slow_views(image, crop, flip))
    count = 200 * wanted.total()
    batch = torch.from_numpy(image).expand(count, -1, -1, -1)
    shown = data.augment(batch, crop=crop, flip=flip, generator=torch.Generator().manual_seed(0))
    assert (shown.shape, shown.dtype) == (batch.shape, torch.uint8)
    found = Counter(view.tobytes() for view in shown.numpy())
    assert found.keys() == wanted.keys()
    square = sum((found[view] - 200 * times) ** 2 / (200 * times) for view, times in wanted.items())
    assert square < len(wanted) + 6 * np.sqrt(2 * len(wanted))  # chi square, six standard deviations


def test_augmentation_keeps_each_image_its_own() -> None:
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (50, 4, 4, 1), dtype=np.uint8)
    batch = torch.from_numpy(images)

    def drawn(seed: int) -> Tensor:
        return data.augment(batch, crop=2, flip=True, generator=torch.Generator().manual_seed(seed))

    for image, view in zip(images, drawn(0).numpy(), strict=True):
        assert any((view == candidate).all() for candidate in slow_views(image, 2, True))
    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))
    np.testing.assert_array_equal(batch.numpy(), images)
    with pytest.raises(ValueError, match="too large"):
        data.augment(batch, crop=4, flip=False, generator=torch.Generator())


def test_every_dataset_is_described() -> None:
    assert data.describe().keys() == data.DATASETS.keys()
