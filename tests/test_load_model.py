"""Loading by name and by path: what is stored is what runs and what is certified; anything else is one line."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import robustflow
from robustflow import bench, certify, checkpoints, cli, create_model, data, model_cards, models, networks
from robustflow.errors import UserError
from robustflow.operators import Convolution

Make = Callable[..., Path]
RESULTS = Path(__file__).resolve().parent.parent / "results" / "cifar10"
committed = pytest.mark.skipif(not RESULTS.is_dir(), reason="no committed results beside the tests (not a checkout)")


def change(folder: Path, **changes: Any) -> None:
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps(card | changes))


def images(count: int = 5) -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(2))


# ------------------------------------------------------------------------------------------- what is loaded
@pytest.mark.parametrize("regime", list(networks.list_models()))
def test_every_regime_loads_as_it_was_stored(regime: str, make_trained: Make, tmp_path: Path) -> None:
    folder = make_trained(tmp_path, regime)
    card = json.loads((folder / "card.json").read_text())
    options = {key: value for key, value in card["config"]["network"].items() if key != "normalize"}
    reference = create_model(regime, input_shape=(1, 8, 8), **options)
    checkpoints.load_weights(reference, folder / "model.safetensors")
    state = torch.random.get_rng_state()
    model = robustflow.load_model(folder)
    assert torch.equal(torch.random.get_rng_state(), state), "loading must not touch the caller's random numbers"
    assert not model.training
    assert model.input_shape == (1, 8, 8)
    assert model.class_names == tuple("0123456789")
    with torch.no_grad():
        assert torch.equal(model(images()), reference.eval()(images()))
    assert all(not tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    # Trainable as before: fixed step sizes stay fixed, and power iteration goes on from somewhere.
    wanted = [parameter.requires_grad for parameter in reference.parameters()]
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    for layer in (layer for layer in model.modules() if isinstance(layer, Convolution) and layer.image_size):
        assert 0 < float(layer.direction.norm()) < 1e6
        layer.constrain_()
        assert bool(torch.isfinite(layer.weight).all())


def test_bounds_are_those_of_the_weights_as_they_are_now(make_trained: Make, tmp_path: Path) -> None:
    model = robustflow.load_model(make_trained(tmp_path))
    first = model.lipschitz_bound
    assert isinstance(first, float)
    assert model.features_bound == certify(model, images(), torch.zeros(5, dtype=torch.long)).lipschitz
    head = torch.linalg.matrix_norm(model.head.weight.double(), 2).item()
    assert first == pytest.approx(model.features_bound * head, rel=1e-6)
    # It bounds what the module computes: steepest slopes between images and at their gradients.
    x = images(64).double()
    double = copy.deepcopy(model).double().requires_grad_(False)
    difference = (double(x[:32]) - double(x[32:])).norm(dim=1) / (x[:32] - x[32:]).flatten(1).norm(dim=1)
    jacobian = torch.autograd.functional.jacobian(lambda one: double(one).flatten(), x[:1]).reshape(10, -1)
    steepest = torch.linalg.matrix_norm(jacobian, 2)
    assert max(float(difference.max()), float(steepest)) <= first
    assert float(steepest) > 0.01 * first
    for scale, write in ((2.0, lambda w: w.mul_(2.0)), (4.0, lambda w: w.data.mul_(2.0))):
        with torch.no_grad():
            write(model.head.weight)
        assert model.lipschitz_bound == pytest.approx(scale * first, rel=1e-9)
    with torch.no_grad():
        model.features[0].std.mul_(0.5)  # a buffer counts as well
    assert model.lipschitz_bound == pytest.approx(2 * scale * first, rel=1e-9)


def test_bounds_are_computed_once(make_trained: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    plain = models.account
    monkeypatch.setattr(models, "account", lambda *args: calls.append(1) or plain(*args))
    model = robustflow.load_model(make_trained(tmp_path))
    assert [model.lipschitz_bound, model.features_bound] == [model.lipschitz_bound, model.features_bound]
    assert len(calls) == 2  # features, and all
    twin = copy.deepcopy(model)
    twin.features[1].weight.data.mul_(3.0)
    assert twin.features_bound > model.features_bound
    for step in (part for part in twin.modules() if hasattr(part, "slope")):
        step.slope = 0.9  # no weight, but it is what the rule of the step depends on
    before = len(calls)
    assert twin.lipschitz_bound > 0
    assert len(calls) == before + 2


def test_certify_with_and_without_labels(make_trained: Make, tmp_path: Path) -> None:
    model = robustflow.load_model(make_trained(tmp_path))
    x = images(7)
    mine = model.certify(x)
    assert mine.predictions.tolist() == model(x).argmax(1).tolist()
    assert (mine.radii > 0).all()
    np.testing.assert_array_equal(mine.radii, certify(model, x, torch.as_tensor(mine.predictions)).radii)
    labels = torch.as_tensor(mine.predictions).clone()
    labels[:3] = (labels[:3] + 1) % 10
    given = model.certify(x, labels)
    assert given.radii[:3].tolist() == [0.0] * 3
    np.testing.assert_array_equal(given.radii[3:], mine.radii[3:])
    np.testing.assert_allclose(certify(model, x, batch_size=3).radii, mine.radii, rtol=1e-12)
    # The radius of the prediction is what the margins of the logits give, up to their rounding error.
    double = copy.deepcopy(model).double().requires_grad_(False)
    logits = double(x.double())
    rows = double.head.weight
    for place, y in enumerate(mine.predictions):
        others = [j for j in range(10) if j != y]
        radius = min(float((logits[place, y] - logits[place, j]) / (rows[y] - rows[j]).norm()) for j in others)
        assert mine.radii[place] == pytest.approx(radius / model.features_bound, rel=1e-6)


@committed
@pytest.mark.parametrize("name", ["sharp", "resnet"])
def test_committed_models_load_without_their_data(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RESULTS.parent.parent)
    monkeypatch.setenv(data.ENVIRONMENT_VARIABLE, "/nowhere")
    model = robustflow.load_model(f"cifar10/{name}")
    record = json.loads((RESULTS / "evaluations" / "cifar10-test" / f"{name}.json").read_text())
    assert model.features_bound == pytest.approx(record["lipschitz_bound"], rel=1e-9)
    assert model.features[0].mean.tolist() == pytest.approx([0.4915, 0.4821, 0.4464])
    # Images with their committed predictions: those that the report shows.
    examples, _ = checkpoints.read_tensors(RESULTS / "evaluations" / "cifar10-test" / f"{name}.examples.safetensors")
    shown = examples["images"].float() / 255
    with torch.no_grad():
        assert model(shown).argmax(1).tolist() == examples["prediction"].tolist()
        assert model(examples["adversarials"]).argmax(1).tolist() == examples["adversarial_prediction"].tolist()
    rows = pd.read_csv(RESULTS / "evaluations" / "cifar10-test" / f"{name}.csv").set_index("index")
    radii = model.certify(shown, examples["label"]).radii
    np.testing.assert_allclose(radii, rows.loc[examples["index"].tolist(), "certified_radius"], rtol=0, atol=1e-6)


def test_shapes_known_without_the_data_are_those_of_the_data() -> None:
    digits = data.load("digits")
    assert (digits.input_shape, digits.class_names) == (data.INPUT_SHAPES["digits"], data.CLASS_NAMES["digits"])
    assert data.INPUT_SHAPES.keys() == data.CLASS_NAMES.keys() == data.DATASETS.keys()


def test_a_card_may_tell_shape_and_classes_itself(make_trained: Make, tmp_path: Path) -> None:
    folder = make_trained(tmp_path)
    names = [f"digit {n}" for n in range(10)]
    change(folder, data={"dataset": "my own", "input_shape": [1, 8, 8], "class_names": names})
    assert robustflow.load_model(folder).class_names == tuple(names)
    wrong: list[dict[str, Any]] = [
        {"dataset": "my own"}, {"dataset": ["cifar10"]}, {"input_shape": [1, 8, 8]}, {},
    ]  # fmt: skip
    for told in wrong:
        change(folder, data=told)
        with pytest.raises(UserError, match=r"card\.json tells neither data\.input_shape"):
            robustflow.load_model(folder)
    for shape, given in (([1, 8], names), ([1, 8, -8], names), ([1, 8, 8], []), ([1, 8, 8], [3]), ("188", names)):
        change(folder, data={"input_shape": shape, "class_names": given})
        with pytest.raises(UserError, match="must be three sizes"):
            robustflow.load_model(folder)


# --------------------------------------------------------------------------------------------- names and paths
def test_names_and_paths(make_trained: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(models.ENVIRONMENT_VARIABLE, raising=False)
    with pytest.raises(UserError, match=r"no trained model 'a/sharp'.*\(none in results, runs\)"):
        robustflow.load_model("a/sharp")
    make_trained(tmp_path / "runs" / "a")
    make_trained(tmp_path / "elsewhere" / "a", "naive")
    make_trained(tmp_path / "elsewhere" / "b", "naive", name="one")
    make_trained(tmp_path / "elsewhere" / "b", "naive", name="two")
    assert list(robustflow.list_trained()) == ["a/sharp"]
    monkeypatch.setenv(models.ENVIRONMENT_VARIABLE, os.pathsep.join(["/none", str(tmp_path / "elsewhere")]))
    assert list(robustflow.list_trained()) == ["a/sharp", "a/naive", "b/one", "b/two"]
    assert robustflow.load_model("a/sharp").card["name"] == "sharp"
    assert robustflow.load_model("runs/a/models/sharp").regime == "sharp"
    assert robustflow.load_model(tmp_path / "runs" / "a").regime == "sharp"  # an OUT with one model
    with pytest.raises(UserError, match=r"has 2 models, choose one: .*models/one, .*models/two"):
        robustflow.load_model("elsewhere/b")
    with pytest.raises(UserError, match=r"^no trained model 'a/sharq': .*\(a/sharp, a/naive, b/one, b/two\)$"):
        robustflow.load_model("a/sharq")
    with pytest.raises(UserError, match="runs holds no trained model"):
        robustflow.load_model("runs")


def test_a_seed_has_a_name_and_what_has_no_weights_is_not_listed(
    make_trained: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(models.ENVIRONMENT_VARIABLE, raising=False)
    for seed in (0, 1):
        make_trained(tmp_path / "runs" / "a" / f"seed-{seed}")
    (tmp_path / "runs/a/seed-1/models/sharp/model.safetensors").unlink()
    assert list(robustflow.list_trained()) == ["a/seed-0/sharp"]
    assert robustflow.load_model("a/seed-0/sharp").regime == "sharp"
    with pytest.raises(UserError, match=r"seed-1.*model\.safetensors is missing"):
        robustflow.load_model("a/seed-1/sharp")
    with pytest.raises(UserError, match=r"\(a/seed-0/sharp\)$"):
        robustflow.load_model("a/seed-2/sharp")


def test_the_command_line_lists_describes_and_refuses(
    make_trained: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_trained(tmp_path / "runs" / "a")
    assert cli.main(["list", "trained"]) == 0
    assert capsys.readouterr().out.split() == ["a/sharp", "runs/a/models/sharp"]
    assert cli.main(["describe", "a/sharp"]) == 0
    assert capsys.readouterr().out.startswith("# sharp\n")
    assert cli.main(["describe", "a/nothing"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# --------------------------------------------------------------------------------------- what is refused
def refused(folder: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        robustflow.load_model(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500 + 2 * len(str(folder))


def test_what_does_not_fit_the_card_is_one_line(make_trained: Make, tmp_path: Path) -> None:
    folder = make_trained(tmp_path)
    weights, card = folder / "model.safetensors", (folder / "card.json").read_text()
    tensors, _ = checkpoints.read_tensors(weights)
    checkpoints.write_tensors(weights, tensors | {"head.bias": tensors["head.bias"] + 1e-3})
    refused(folder, r"model\.safetensors is not the file that .*card\.json describes \(its SHA-256 differs\)")
    checkpoints.write_tensors(weights, tensors | {"head.bias": tensors["head.bias"] * torch.nan})
    change(folder, sha256=checkpoints.sha256(weights))
    refused(folder, "NaN or infinite values in head.bias")
    checkpoints.write_tensors(weights, tensors | {"head.bias": torch.zeros(10, dtype=torch.complex64)})
    change(folder, sha256=checkpoints.sha256(weights))
    refused(folder, "another architecture: head.bias is complex64, not float32")
    checkpoints.write_tensors(weights, tensors | {"head.bias": torch.zeros(10).to(torch.float8_e4m3fn)})
    change(folder, sha256=checkpoints.sha256(weights))
    refused(folder, "8-bit floats in head.bias")
    weights.unlink()
    refused(folder, r"model\.safetensors is missing")
    (folder / "card.json").unlink()
    refused(folder, "holds no trained model")
    (folder / "card.json").write_text(card[:100])
    refused(folder, r"card\.json cannot be read as JSON")


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"channels": [8, 8]}, "another architecture: .* not "),
        ({"channels": [4]}, "another architecture"),
        ({"layers": 4}, "another architecture"),
        ({"layers": 3}, "works in pairs"),
        ({"kernel_size": 4}, "odd kernel size"),
        ({"width": 3}, "is not the card of a model: network.width"),
        ({"channels": "all"}, "is not the card of a model: network.channels"),
    ],
)
def test_another_architecture(network: dict[str, Any], message: str, make_trained: Make, tmp_path: Path) -> None:
    folder = make_trained(tmp_path, "prescribed")
    config = json.loads((folder / "card.json").read_text())["config"]
    change(folder, config=config | {"network": config["network"] | network})
    refused(folder, message)


def test_the_benchmark_and_load_model_agree(make_trained: Make, tmp_path: Path) -> None:
    folder = make_trained(tmp_path, "flexible")
    _, config = models.read_card(folder)
    theirs = bench.load_model(config, data.load("digits"), folder)
    assert torch.equal(theirs(images()), robustflow.load_model(folder)(images()))


# ------------------------------------------------------------------------------------------------ model cards
@committed
def test_figures_are_the_summary_s_and_belong_to_these_weights(tmp_path: Path) -> None:
    told = model_cards.describe(RESULTS / "models" / "sharp")
    summary = json.loads((RESULTS / "summary.json").read_text())
    (row,) = [model for model in summary["evaluations"][0]["models"] if model["name"] == "sharp"]
    found = {(one["quantity"], one["epsilon"]): one for one in told["figures"]}
    assert found["clean", 0.0]["k"] == row["clean"]["k"]
    assert len(found) == 1 + 2 * (len(row["certified"]) - 1)
    for point in row["certified"][1:]:
        one = found["certified", point["epsilon"]]
        assert {key: one[key] for key in ("k", "n", "value", "low", "high")} == {
            key: point[key] for key in ("k", "n", "value", "low", "high")
        }
    json.dumps(told, allow_nan=False)
    text = model_cards.to_markdown(told)
    assert "| certified | 36/255 | 50.4 (47.3–53.5) | 504 of 1000 |" in text
    assert "Limits:" in text
    assert told["intended_use"].startswith("Research")
    resnet = model_cards.describe(RESULTS / "models" / "resnet")
    assert any("Nothing is certified" in limit for limit in resnet["limits"])
    out = tmp_path / "out"
    for file in ("summary.json", "models/sharp/card.json"):
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(RESULTS / file, out / file)
    change(out / "models" / "sharp", sha256="0" * 64)  # trained again since: the figures are of other weights
    assert model_cards.describe(out)["figures"] == []
    (out / "summary.json").write_text('{"models": [3]}')
    with pytest.raises(UserError, match=r"summary\.json is not the summary of a benchmark"):
        model_cards.describe(out)


def test_a_card_without_an_evaluation_says_so(make_trained: Make, tmp_path: Path) -> None:
    told = model_cards.describe(make_trained(tmp_path))
    assert told["figures"] == []
    assert "its figures are not known" in told["limits"][0]
    assert told["input"]["shape"] == [1, 8, 8]
