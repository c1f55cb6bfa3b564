"""`robustflow measure certificates --only views`: views that do not expand, and radii that agree with `certify`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from robustflow import bench, certify, cli, data
from robustflow.config import from_dict
from robustflow.measurements import views
from robustflow.networks import create_model

DIGITS = data.load("digits")


@pytest.mark.parametrize("shift", views.SHIFTS)
def test_a_shift_moves_pixels_and_does_not_expand(shift: tuple[int, int]) -> None:
    torch.manual_seed(0)
    images, fill = torch.rand(2, 3, 5, 6, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    moved = views.shifted(images, *shift, fill)
    for row in range(5):
        for column in range(6):
            source = (row - shift[0], column - shift[1])
            inside = 0 <= source[0] < 5 and 0 <= source[1] < 6
            expected = images[:, :, source[0], source[1]] if inside else fill.expand(2, 3)
            torch.testing.assert_close(moved[:, :, row, column], expected, rtol=0, atol=1e-15)
    jacobian = torch.func.jacrev(lambda x: views.shifted(x[None], *shift, fill).flatten())(images[0]).flatten(1)
    assert torch.linalg.matrix_norm(jacobian, 2) == pytest.approx(1.0)


@pytest.mark.parametrize("mirror", [True, False])
def test_radii_of_the_usual_views_are_those_of_certify(mirror: bool) -> None:
    torch.manual_seed(0)
    model = create_model(
        "sharp", input_shape=(1, 8, 8), channels=(8,), layers=2, kernel="patch", lift="patch", mirror=mirror
    ).eval()
    test = DIGITS.splits["test"].head(60)
    labels = model(test.images()).argmax(1)
    labels[:5] = (labels[:5] + 1) % 10
    found = views.radii(model, test.images().double(), labels, ((0, 0),), mirror)
    np.testing.assert_allclose(found.numpy(), certify(model, test.images(), labels).radii, atol=1e-9)
    assert (found[:5] == 0).all()


def test_the_page_has_every_certified_model(
    tmp_path: Path, make_trained: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "IMAGES", 30)
    experiment = from_dict(
        {
            "title": "t", "dataset": "digits", "network": {"channels": [4], "layers": 2},
            "train": {"epochs": 1, "batch_size": 200, "crop": 1}, "evaluate": {"epsilons": [0.1]},
            "models": [{"name": "a", "regime": "nonexpansive"}, {"name": "b", "regime": "resnet"}],
        }
    )  # fmt: skip
    out = tmp_path / "bench"
    bench.open_directory(out, experiment, "t", DIGITS)
    bench.train(experiment, out, DIGITS, device=torch.device("cpu"))
    target = tmp_path / "measured"
    assert cli.main(["measure", "certificates", "--out", str(target), "--only", "views", "--bench", str(out)]) == 0
    part = json.loads((target / "views.json").read_text())
    assert [(row["model"], row["count"]) for row in part["rows"]] == [("a", 1), ("a", 2), ("a", 10)]
    page = (target / "table.md").read_text()
    assert all(f"| a | {name} |" in page for name in views.VIEWS)
    assert (target / "plots" / "views.png").stat().st_size > 5000


def test_without_models_it_is_one_line_and_the_page_that_is_there_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m"
    out.mkdir()
    (out / "views.json").write_text("kept")
    assert cli.main(["measure", "certificates", "--out", str(out), "--only", "views"]) == 2
    assert "views measures trained models: name their directory with --bench" in capsys.readouterr().err
    assert (out / "views.json").read_text() == "kept"
