"""The ways to keep kernels orthonormal that `robustflow measure training` compares: each does, and learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import scipy.linalg
import torch
from torch import Tensor

from robustflow import bench, cli, data
from robustflow.image_task import ImageTask
from robustflow.measurements import orthogonality, training_pages
from robustflow.measurements.orthogonality import WAYS, Trainee, Way

DIGITS = data.load("digits")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("DATASET", "digits"), ("CHANNELS", [6, 8]), ("BATCH", 100), ("SECONDS", 0.2), ("SIZES", (8, 16)),
        ("IMAGES", 50), ("ADAM_RATES", (3e-3,)), ("RATES", {"momentum": (0.02,)}),
    ):  # fmt: skip
        monkeypatch.setattr(orthogonality, name, value)


@pytest.mark.parametrize("shape", [(5, 5), (4, 9), (9, 4)])
def test_cholesky_is_the_whitened_matrix(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    v = torch.randn(shape, dtype=torch.float64)
    w = orthogonality.cholesky(v)
    short = min(shape)
    torch.testing.assert_close(w @ w.T if shape[0] <= shape[1] else w.T @ w, torch.eye(short, dtype=torch.float64))
    # V = LW, with L lower triangular: nothing but a change of basis of the rows (columns, if tall).
    factor = v @ w.T if shape[0] <= shape[1] else (w.T @ v).T
    torch.testing.assert_close(factor.triu(1), torch.zeros(short, short, dtype=torch.float64), atol=1e-10, rtol=0)


def test_the_maps_of_skew_matrices_against_scipy() -> None:
    torch.manual_seed(0)
    v = torch.randn(6, 6, dtype=torch.float64)
    skew = (v - v.T).numpy()
    eye = torch.eye(6, dtype=torch.float64).numpy()
    expected = (eye - skew) @ scipy.linalg.inv(eye + skew)
    torch.testing.assert_close(orthogonality.cayley(v), torch.from_numpy(expected))
    torch.testing.assert_close(orthogonality.exponential(v), torch.from_numpy(scipy.linalg.expm(skew)))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_every_way_learns_and_keeps_every_kernel_orthonormal(way: Way) -> None:
    subject = orthogonality._subject(3e-3 if way.name != "momentum" else 0.02, DIGITS)
    torch.manual_seed(0)
    model = bench.build_model(subject, DIGITS)
    task = ImageTask(model, DIGITS, subject.train, device=torch.device("cpu"))
    trainee = Trainee(way, model, subject.train)
    before = [tensor.detach().clone() for tensor in (trainee.made() or current(trainee)).values()]
    losses = []

    for step in range(30):
        batch = torch.arange(100) + 100 * (step % 10)

        def loss(model: orthogonality.Map, batch: Tensor = batch) -> Tensor:
            value = task.loss(batch, torch.Generator().manual_seed(0), 0.0, model)[0]
            losses.append(float(value.detach()))
            return value

        trainee.step(loss, 0.3)
        for weight in (trainee.made() or current(trainee)).values():
            w = weight.detach().double()
            gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
            assert (gram - torch.eye(len(gram), dtype=torch.float64)).abs().max() < 2e-3, way.name
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    made = trainee.made()
    trainee.finish()
    for (name, kernel), start in zip(trainee.kernels.items(), before, strict=True):
        assert (kernel.weight - start).abs().max() > 1e-3, name  # it is the kernels, too, that learn
        if made:
            torch.testing.assert_close(kernel.weight.detach(), made[name].detach(), atol=1e-4, rtol=0)


def current(trainee: Trainee) -> dict[str, Tensor]:
    return {name: kernel.weight for name, kernel in trainee.kernels.items()}


def test_the_page_has_every_way_and_its_best_run(tmp_path: Path) -> None:
    out = tmp_path / "training"
    assert cli.main(["measure", "training", "--out", str(out), "--only", "orthogonality"]) == 0
    part = json.loads((out / "orthogonality.json").read_text())
    assert {row["way"] for row in part["learning"]} == {way.name for way in WAYS} == {r["way"] for r in part["cost"]}
    assert all(0 <= row["certified_interval"][0] <= row["certified"] <= row["clean"] <= 1 for row in part["learning"])
    assert all(row["defect"] < 1e-2 and row["seconds"] > 0 for row in part["cost"])
    page = (out / "table.md").read_text()
    for row in training_pages.best_runs(part):
        assert f"| {row['way']} |" in page
        assert f"{100 * row['certified']:.1f} (" in page
    assert (out / "plots" / "orthogonality.png").stat().st_size > 5000


def test_the_best_run_of_a_way_is_the_one_with_most_certified() -> None:
    rows = [{"way": "a", "certified": 0.1}, {"way": "b", "certified": 0.3}, {"way": "a", "certified": 0.2}]
    assert [row["certified"] for row in training_pages.best_runs({"learning": rows})] == [0.2, 0.3]


def test_a_wrong_data_directory_is_one_line_and_what_was_measured_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(orthogonality, "DATASET", "cifar10")
    (tmp_path / "orthogonality.json").write_text("kept")
    words = ["measure", "training", "--out", str(tmp_path), "--only", "orthogonality", "--data", str(tmp_path / "no")]
    assert cli.main(words) == 2
    assert f"data directory {tmp_path / 'no'} does not exist" in capsys.readouterr().err
    assert (tmp_path / "orthogonality.json").read_text() == "kept"
