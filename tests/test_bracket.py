"""The bracket of a caller's own model: against closed forms, against planted wrong certificates, and on bad input."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import robustflow
from robustflow import UserError, bench, certificates, data, evaluate
from robustflow.bracket import Bracket, summarize
from robustflow.evaluation import read_rows

ROOT = Path(__file__).resolve().parent.parent
EPSILONS = [0.0, 0.02, 0.05, 0.1, 0.2]
COUNT = 24


class Odd(nn.Module):
    """A layer without a Lipschitz rule."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 1.0


class Failing(nn.Module):
    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.answer = answer
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.answer(x)


def linear(*before: nn.Module, scale: float = 1.0) -> nn.Sequential:
    torch.manual_seed(3)
    layer = nn.Linear(12, 3)
    with torch.no_grad():
        layer.weight.mul_(scale)
        layer.bias.copy_(-layer.weight.sum(1) / 2)  # undecided in the middle of the box
    return nn.Sequential(nn.Flatten(), *before, layer).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return 0.35 + 0.3 * torch.rand(COUNT, 3, 2, 2, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def labels(images: Tensor) -> Tensor:
    found = linear()(images).argmax(1)
    found[::6] = (found[::6] + 1) % 3  # every sixth is misclassified
    return found


@pytest.fixture(scope="module")
def distances(images: Tensor, labels: Tensor) -> np.ndarray:
    """Exact distances to the decision boundary of `linear`, from NumPy; 0 where misclassified."""
    layer = linear()[-1]
    weight, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
    exact = []
    for x, label in zip(images.double().numpy().reshape(COUNT, -1), labels.tolist(), strict=True):
        logits = weight @ x + bias
        others = [j for j in range(3) if j != label]
        exact.append(min((logits[label] - logits[j]) / math.dist(weight[label], weight[j]) for j in others))
    return np.maximum(exact, 0.0)


@pytest.fixture(scope="module")
def bracket(images: Tensor, labels: Tensor) -> Bracket:
    return evaluate(linear(), images, labels, EPSILONS)


def test_a_linear_model_is_bracketed_to_its_exact_distances(bracket: Bracket, distances: np.ndarray) -> None:
    rows = bracket.samples
    assert list(rows) == ["index", "label", "prediction", "certified_radius", "adversarial_norm", "attack"]
    assert np.allclose(rows["certified_radius"], distances, rtol=1e-6, atol=0)
    assert (rows["certified_radius"] <= distances).all()
    attacked = (distances > 0) & (distances <= EPSILONS[-1])
    norms = rows["adversarial_norm"].to_numpy()
    assert attacked.sum() > 10
    # Every fifth decimal is float32's: the adversarial's own margin is judged in the model's arithmetic.
    assert (norms[attacked] >= distances[attacked] * (1 - 1e-4)).all()
    assert np.median(norms[attacked] / distances[attacked]) < 1.01
    assert (norms[distances == 0] == 0).all()
    assert (rows["attack"][distances == 0] == "clean").all()
    assert bracket.why_not_certified is None
    assert bracket.alarms == []
    assert bracket.accuracy.k == (distances > 0).sum() == COUNT - COUNT // 6
    length = np.linalg.norm((bracket.adversarials - images_of(bracket)).flatten(1).double(), axis=1)
    assert np.allclose(length[attacked], norms[attacked], rtol=1e-5)


def images_of(bracket: Bracket) -> Tensor:
    return 0.35 + 0.3 * torch.rand(COUNT, 3, 2, 2, generator=torch.Generator().manual_seed(4))


def wilson(k: int, n: int) -> tuple[float, float]:
    """The roots of the score test's quadratic (p - k/n)^2 = z^2 p (1 - p)/n."""
    z2 = 1.959963984540054**2
    low, high = np.roots([1 + z2 / n, -(2 * k / n + z2 / n), (k / n) ** 2])[::-1].real
    return float(low), float(high)


def test_the_summary_counts_the_rows(bracket: Bracket) -> None:
    assert bracket.summary["epsilon"].tolist() == EPSILONS
    for line in bracket.summary.to_dict("records"):
        counts = dict.fromkeys(("certified", "attacked", "undecided", "broken"), 0)
        for row in bracket.samples.to_dict("records"):
            right = row["prediction"] == row["label"]
            safe = right and row["certified_radius"] > line["epsilon"]
            hit = not right or row["adversarial_norm"] <= line["epsilon"]
            counts["certified"] += safe
            counts["broken"] += hit
            counts["attacked"] += right and not hit
            counts["undecided"] += not safe and not hit
        assert line["n"] == COUNT
        assert counts["certified"] + counts["undecided"] + counts["broken"] == COUNT
        for name, count in counts.items():
            assert line[name] == pytest.approx(count / COUNT, abs=1e-12)
            assert (line[f"{name}_low"], line[f"{name}_high"]) == pytest.approx(wilson(count, COUNT), abs=1e-9)


def test_the_gap_by_hand() -> None:
    rows = pd.DataFrame(
        {
            "label": [0, 0, 0, 0], "prediction": [0, 0, 0, 1], "certified_radius": [0.5, 0.2, 0.2, 0.0],
            "adversarial_norm": [np.inf, 0.5, 0.3, 0.0],
        }
    )  # fmt: skip
    counted = summarize(rows, [0.2, 0.3, 0.5])
    assert counted["certified"].tolist() == [0.25, 0.25, 0.0], "a radius of exactly ε certifies nothing at ε"
    assert counted["broken"].tolist() == [0.25, 0.5, 0.75], "a norm of exactly ε breaks at ε"
    assert counted["undecided"].tolist() == [0.5, 0.25, 0.25]
    assert counted["attacked"].tolist() == [0.75, 0.5, 0.25]


def test_an_unknown_layer_is_attacked_only_and_named(images: Tensor, labels: Tensor, bracket: Bracket) -> None:
    found = evaluate(linear(Odd()), images, labels, EPSILONS)
    assert found.certificate is None
    assert found.why_not_certified is not None
    assert "Odd" in found.why_not_certified
    assert "\n" not in found.why_not_certified
    assert found.samples["certified_radius"].isna().all()
    assert found.summary[["certified", "certified_low", "certified_high"]].isna().to_numpy().all()
    assert found.summary["undecided"].tolist() == found.summary["attacked"].tolist()
    # The same function without a certificate: the same verdicts, though nothing could be left out.
    assert found.summary["attacked"].tolist() == bracket.summary["attacked"].tolist()
    assert "Odd" in str(found)
    assert "–" in str(found)


def test_functions_and_unwanted_certificates(images: Tensor, labels: Tensor) -> None:
    model = linear()
    found = evaluate(lambda x: model(x), images[:4], labels[:4], [0.1], "deepfool")
    assert "not a torch.nn.Module" in str(found.why_not_certified)
    uncopied = linear()
    uncopied.lock = threading.Lock()  # type: ignore[assignment]
    found = evaluate(uncopied, images[:4], labels[:4], [0.1], "deepfool")
    assert "cannot be copied: TypeError" in str(found.why_not_certified)
    found = evaluate(model, images[:4], labels[:4], [0.1], "deepfool", certify=False)
    assert found.samples["certified_radius"].isna().all()


def test_a_certificate_of_the_callers_own_is_tested(images: Tensor, labels: Tensor, distances: np.ndarray) -> None:
    claimed = np.where(distances > 0, distances, 0.7)  # it also protects wrong predictions: no crossing
    places = np.arange(COUNT) + 100
    true = evaluate(linear(), images, labels, [0.5], radii=claimed * 0.999, indices=places)
    assert true.alarms == []
    assert true.certificate is None
    assert true.why_not_certified is None
    assert (true.samples["certified_radius"][distances == 0] == 0).all()
    wrong = evaluate(linear(), images, labels, [0.5], radii=claimed * 1.3, indices=places)
    assert [alarm["index"] for alarm in wrong.alarms] == places[distances > 0].tolist()
    assert all(alarm["confirmed_in_float64"] for alarm in wrong.alarms)
    assert all(alarm["adversarial_norm"] <= alarm["certified_radius"] for alarm in wrong.alarms)
    # Believed, not audited: an image whose radius is above ε is not attacked, and the mistake stays unseen.
    believed = evaluate(linear(), images, labels, [0.5], radii=claimed + 1, audit=False)
    assert believed.alarms == []
    assert len(evaluate(linear(), images, labels, [0.5], radii=claimed + 1).alarms) == (distances > 0).sum()
    opaque = linear()
    blind = evaluate(lambda x: opaque(x.float()), images, labels, [0.5], radii=claimed * 1.3)
    assert {alarm["confirmed_in_float64"] for alarm in blind.alarms} == {None}


def test_a_model_that_insists_on_float32_can_alarm(images: Tensor, labels: Tensor, distances: np.ndarray) -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = linear()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.float())

    found = evaluate(Single().eval(), images, labels, [0.5], radii=distances * 1.3)
    assert len(found.alarms) == (distances > 0).sum()
    assert {alarm["confirmed_in_float64"] for alarm in found.alarms} == {None}


def test_a_wrong_certificate_of_ours_is_an_alarm(
    images: Tensor, labels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = certificates.certify

    def boastful(*arguments: Any, **options: Any) -> certificates.Certificate:
        certificate = honest(*arguments, **options)
        certificate.radii[:] *= 1.1
        return certificate

    monkeypatch.setattr(certificates, "certify", boastful)
    found = evaluate(linear(), images, labels, EPSILONS, audit=True)
    assert len(found.alarms) > 10
    assert all(alarm["confirmed_in_float64"] for alarm in found.alarms)


def test_the_model_is_given_back_as_it_was(images: Tensor, labels: Tensor) -> None:
    model = linear(nn.BatchNorm1d(12))
    model.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = evaluate(model, images, labels, [0.05, 0.1])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    again = evaluate(model, images.numpy().astype(np.float64), labels.tolist(), [0.05, 0.1])
    assert again.samples.equals(first.samples), "arrays and lists are as good as tensors"


def test_eight_bit_adversarials_are_images_that_can_be_saved(labels: Tensor, images: Tensor) -> None:
    saved = (images * 255).round() / 255
    right = linear()(saved).argmax(1)
    plain = evaluate(linear(), saved, right, [0.05, 0.1])
    found = evaluate(linear(), saved, right, [0.05, 0.1], eight_bit=True)
    levels = found.adversarials.double() * 255
    assert torch.allclose(levels, levels.round(), atol=1e-4)
    assert not torch.allclose(plain.adversarials * 255, (plain.adversarials * 255).round(), atol=1e-4)
    assert (found.summary["broken"] > 0).any()
    assert (found.summary["broken"] <= plain.summary["broken"]).all()
    assert found.alarms == []


@pytest.mark.parametrize("executor", ["serial", "workers"])
def test_executors_and_folders_change_nothing(
    executor: str, images: Tensor, labels: Tensor, bracket: Bracket, tmp_path: Path
) -> None:
    where = {"folder": tmp_path / "shards"} if executor == "serial" else {"executor": executor, "workers": 2}
    found = evaluate(linear(), images, labels, EPSILONS, **where)
    assert found.summary.equals(bracket.summary)
    assert np.allclose(found.samples["adversarial_norm"], bracket.samples["adversarial_norm"], rtol=1e-5)


GOOD = torch.full((2, 3, 2, 2), 0.5)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "float labels": ({"labels": [0.5, 1.0]}, "labels must be integers"),
    "labels too short": ({"labels": [0]}, "labels must have shape (2,)"),
    "label out of range": ({"labels": [0, 3]}, "label 3 is out of range"),
    "negative label": ({"labels": [0, -1]}, "must not be negative"),
    "text labels": ({"labels": ["cat", "dog"]}, "labels must be integers"),
    "normalised images": ({"images": GOOD - 1}, "look normalised"),
    "images above 1": ({"images": GOOD * 510}, "divide by 255"),
    "uint8 images": ({"images": (GOOD * 255).to(torch.uint8)}, "divide 8-bit images by 255"),
    "NaN image": ({"images": GOOD * torch.nan}, "NaN"),
    "no batch": ({"images": GOOD[:0], "labels": []}, "nothing to attack"),
    "flat images": ({"images": GOOD.flatten(1)}, "(N, C, H, W)"),
    "images of another size": ({"images": torch.rand(2, 1, 5, 5)}, "the model fails on images of shape (1, 5, 5)"),
    "NaN model": ({"model": Failing(lambda x: x.flatten(1) * torch.nan)}, "NaN or infinite logits"),
    "one logit": ({"model": Failing(lambda x: x.sum((1, 2, 3)))}, "logits of shape"),
    "no tensor": ({"model": Failing(lambda x: [1, 2])}, "must return a tensor"),
    "class numbers": ({"model": Failing(lambda x: x.flatten(1).argmax(1))}, "floating point logits"),
    "no model": ({"model": "resnet"}, "callable"),
    "training mode": ({"model": linear().train()}, "model.eval()"),
    "duplicate epsilons": ({"epsilons": [0.1, 0.1]}, "more than once"),
    "negative epsilon": ({"epsilons": [-0.1, 0.1]}, "must not be negative"),
    "NaN epsilon": ({"epsilons": [0.1, math.nan]}, "finite"),
    "no epsilons": ({"epsilons": []}, "epsilons is empty"),
    "unsorted epsilons": ({"epsilons": [0.2, 0.1]}, "increasing"),
    "epsilons as text": ({"epsilons": ["a"]}, "list of numbers"),
    "unknown attack": ({"attacks": "standart"}, "unknown attack 'standart'"),
    "radii too short": ({"radii": [0.1]}, "certified_radii must have shape"),
    "NaN radius": ({"radii": [0.1, math.nan]}, "certified_radii holds NaN"),
    "batch size": ({"batch_size": 0}, "batch_size"),
    "device": ({"device": "gpu"}, "unknown device 'gpu'"),
    "indices": ({"indices": [1, 1]}, "distinct"),
    "seed": ({"seed": "1"}, "seed must be an integer"),
    "executor": ({"executor": "cloud"}, "unknown executor 'cloud'"),
    "folder without identity": ({"model": lambda x: x.flatten(1), "folder": "nowhere"}, "identity"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line(kind: str) -> None:
    changes, message = BAD[kind]
    arguments: dict[str, Any] = {"model": linear(), "images": GOOD, "labels": [0, 1], "epsilons": [0.1]} | changes
    with pytest.raises(UserError) as caught:
        evaluate(**arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_short_name_is_the_same_function() -> None:
    from robustflow import bracket

    assert robustflow.evaluate is bracket.evaluate
    assert set(robustflow.__all__) <= {*dir(robustflow), "Bracket", "evaluate"}
    with pytest.raises(AttributeError, match="no attribute 'evaluat'"):
        robustflow.evaluat  # noqa: B018


HAS_CIFAR = (Path(os.environ.get(data.ENVIRONMENT_VARIABLE) or "nowhere") / "cifar10.npz").exists()
COMMITTED = ROOT / "results" / "cifar10"


@pytest.mark.skipif(not HAS_CIFAR, reason="CIFAR-10 is not here: set ROBUSTFLOW_DATA to a directory with cifar10.npz")
@pytest.mark.skipif(not COMMITTED.exists(), reason="no committed results beside the tests (not a checkout)")
@pytest.mark.parametrize("name", ["sharp", "resnet"])
def test_a_committed_checkpoint_gives_its_committed_radii(name: str) -> None:
    experiment, _ = bench.read_directory(COMMITTED)
    images = bench.load_data(experiment, None)
    model = bench.load_model(experiment.model(name), images, COMMITTED / "models" / name)
    split = images.splits["test"].head(10)
    found = evaluate(model, split.images(), split.labels, [36 / 255], "deepfool")
    rows = read_rows(COMMITTED / "evaluations" / "cifar10-test" / f"{name}.csv")[:10]
    assert found.samples[["index", "label", "prediction"]].equals(rows[["index", "label", "prediction"]])
    assert np.allclose(found.samples["certified_radius"], rows["certified_radius"], rtol=0, atol=1e-6)
