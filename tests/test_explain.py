"""What is printed of a bound: every layer, and how much of its bound is seen to be reached."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from robustflow import bench, cli
from robustflow.bounds import account
from robustflow.data import load
from robustflow.errors import UserError
from robustflow.falsifier import lower_estimates
from robustflow.fields import GradientField
from robustflow.networks import Classifier, create_model

SMALL: dict[str, Any] = {
    "input_shape": (2, 8, 8),
    "channels": (4, 6),
    "layers": 2,
    "mean": [0.5] * 2,
    "std": [0.25] * 2,
}


@pytest.mark.parametrize("regime", ["naive", "nonexpansive", "sharp", "flexible", "resnet"])
@pytest.mark.parametrize("mirror", [False, True])
def test_every_layer_is_estimated_from_below(regime: str, mirror: bool) -> None:
    torch.manual_seed(0)
    model = create_model(regime, mirror=mirror, **SMALL).eval()
    audit = account(model, SMALL["input_shape"])
    reached = lower_estimates(model, torch.rand(4, 2, 8, 8), audit, iterations=6)
    assert set(reached) == {"", *(entry.layer for entry in audit.layers if entry.layer != "mirror")}
    for entry in audit.layers:
        if entry.layer in reached:
            assert reached[entry.layer] <= entry.bound * (1 + 1e-9), entry
    assert 0 < reached[""] <= audit.lipschitz
    text = audit.explain(reached)
    assert "tightness" in text
    assert re.search(r"reach \S+ were found \(\S+ % of the bound\)", text.splitlines()[-1])


def test_estimates_of_layers_that_are_known_exactly() -> None:
    """An orthogonal step reaches its constant, a normalisation before a head its fold."""
    torch.manual_seed(0)
    model = create_model("sharp", input_shape=(1, 4, 4), channels=(4,), layers=2, kernel="patch", lift="patch").eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, GradientField):
                module.bias.fill_(5.0)  # all activations on
    audit = account(model, (1, 4, 4))
    reached = lower_estimates(model, torch.rand(3, 1, 4, 4), audit, iterations=40)
    for entry in audit.layers:
        loose = entry.layer.endswith(".1")  # the contractive step has slope 1 everywhere here: |1 − h| = 1/3 as well
        assert reached[entry.layer] == pytest.approx(entry.bound, rel=1e-3 if not loose else 0.02), entry


def test_folded_entries_contain_what_lies_between() -> None:
    from robustflow.networks import Normalize

    torch.manual_seed(0)
    features = nn.Sequential(Normalize([0.5], [0.1]), nn.Identity(), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8))
    model = Classifier(features, nn.Linear(8, 3), (1, 4, 4), regime="own").eval()
    audit = account(model, (1, 4, 4))
    folded = next(entry for entry in audit.layers if " + " in entry.layer)
    assert folded.layer == "features.0 + features.4"
    reached = lower_estimates(model, torch.rand(3, 1, 4, 4), audit, iterations=60)
    assert reached[folded.layer] == pytest.approx(folded.bound, rel=1e-3)
    assert reached["features.2"] <= 1


def test_unbounded_layers_have_no_tightness() -> None:
    audit = account(nn.Sequential(nn.Linear(1, 1), nn.ReLU()), (1,))
    lines = audit.explain({"0": 0.0}).splitlines()
    assert "%" not in lines[2]
    assert lines[-1].startswith("Lipschitz bound")
    assert "reach" not in lines[-1]
    broken = account(nn.Sequential(nn.Linear(1, 1).double(), nn.Linear(1, 1).double()), (1,))
    assert "nan" not in broken.explain({"": 1.0}).lower() or math.isnan(broken.lipschitz)


def test_a_model_s_directory_is_a_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """
    title = "Tiny"
    dataset = "digits"
    [network]
    channels = [4]
    layers = 2
    kernel = "patch"
    lift = "patch"
    [train]
    epochs = 1
    batch_size = 500
    [evaluate]
    images = 4
    epsilons = [0]
    attacks = ["deepfool"]
    [[models]]
    name = "one"
    regime = "sharp"
    [[models]]
    name = "two"
    regime = "nonexpansive"
    """
    (tmp_path / "tiny.toml").write_text(text)
    out = tmp_path / "out"
    assert cli.main(["train", str(tmp_path / "tiny.toml"), "--out", str(out), "--device", "cpu"]) == 0
    capsys.readouterr()
    target = out / "models" / "two"
    assert cli.main(["certify", str(target), "--explain"]) == 0
    printed = capsys.readouterr().out
    assert "two on digits-test" in printed
    assert "one on" not in printed
    assert "tightness" in printed
    assert (out / "evaluations" / "digits-test" / "two.csv").exists()
    assert not (out / "evaluations" / "digits-test" / "one.csv").exists()
    assert cli.main(["certify", str(target), "--model", "one"]) == 2
    assert "leave --model out" in capsys.readouterr().err
    assert bench.locate(out) == (out, None)
    assert bench.locate(out / "models" / "three") == (out / "models" / "three", None)
    with pytest.raises(UserError, match="not a directory"):
        bench.read_directory(bench.locate(out / "models" / "three")[0])
    assert len(load("digits").splits["test"]) > 4
