"""AutoAttack's parts against exact distances and against the library run as its authors run it."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import attacks
from attacks import ATTACKS, SETS, AttackInputError, expected_passes, sweep
from attacks.autoattack import AutoAttackPart
from attacks.victim import margins

pytest.importorskip("pyautoattack", reason="needs the extra robustflow[autoattack]")

PARTS = SETS["autoattack"].attacks
SIZE = 3 * 8 * 8
LINEAR = torch.randn(10, SIZE, generator=torch.Generator().manual_seed(3)) / SIZE**0.5


def linear(images: Tensor, classes: int = 10) -> Tensor:
    return (images.flatten(1) - 0.5) @ LINEAR[:classes].to(images).T


def grey(count: int, seed: int = 0) -> Tensor:
    return 0.5 + 0.3 * (torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) - 0.5)


def exact(images: Tensor, classes: int = 10) -> tuple[Tensor, np.ndarray]:
    """Predicted labels, and distances to the nearest boundary of the linear model."""
    logits, weight = linear(images.double(), classes), LINEAR[:classes].double()
    labels = logits.argmax(dim=1)
    gaps = logits.gather(1, labels[:, None]) - logits
    lengths = (weight[labels][:, None] - weight[None]).norm(dim=2)
    return labels, (gaps / lengths).scatter(1, labels[:, None], torch.inf).amin(dim=1).numpy()


@cache
def network() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(SIZE, 60), nn.ReLU(), nn.Linear(60, 10)).eval()
    images = grey(40, seed=5)
    with torch.no_grad():
        return model, images, model(images).argmax(dim=1)


SHORT = {"apgd-ce": 20, "apgd-t": 20, "fab-t": 10, "square": 60}  # steps; 100, 100, 100 and 5000 in earnest


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, steps in SHORT.items():
        monkeypatch.setattr(ATTACKS[name], "steps", steps)
        monkeypatch.setattr(ATTACKS[name], "targets", 3)


@pytest.mark.parametrize("classes", [10, 5, 3, 2])
def test_on_linear_models_the_verdicts_are_those_of_the_exact_distance(
    classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = grey(20)
    labels, distance = exact(images, classes)
    epsilon = float(np.median(distance))
    for name in ("apgd-t", "fab-t"):
        if name == "fab-t":
            monkeypatch.setattr(ATTACKS[name], "steps", 20)
        result = sweep(lambda x: linear(x, classes), images, labels, [0.98 * epsilon, 1.02 * epsilon], name)
        norms = result.samples["adversarial_norm"].to_numpy()
        assert (norms >= distance * (1 - 1e-4)).all()
        for radius in result.epsilons:  # all but what lies within 2 % of the boundary
            assert (norms <= radius)[distance < 0.98 * radius].all(), name
            assert not (norms <= radius)[distance > radius].any()


def test_each_part_is_the_library_s_own(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same robust accuracy, part by part on every image, as pyautoattack's version "standard"."""
    from pyautoattack import AutoAttack

    monkeypatch.setattr("logging.Logger.warning", lambda *args: None)
    model, images, labels = network()
    whole = sweep(model, images, labels, [2.0])
    epsilon = float(whole.samples["adversarial_norm"].median())
    reference = AutoAttack(model, norm="L2", eps=epsilon, seed=0, device="cpu")
    reference.square.n_queries = SHORT["square"]
    for part, name in ((reference.apgd, "apgd-ce"), (reference.apgd_targeted, "apgd-t"), (reference.fab, "fab-t")):
        part.n_iter = part.n_iter_orig = SHORT[name]
        part.n_target_classes = 3
    for part in (reference.apgd, reference.apgd_targeted):  # the library derives these from the steps when it is built
        part.n_iter_2, part.n_iter_min, part.size_decr = (max(int(s * 20), 1) for s in (0.22, 0.06, 0.03))
    verdicts = reference.run_standard_evaluation_individual(images, labels)
    model.zero_grad(set_to_none=True)
    broken = np.zeros(len(images), dtype=bool)
    for name in PARTS:
        theirs = (model(verdicts[name][0]).argmax(dim=1) != labels).numpy()
        ours = np.isfinite(sweep(model, images, labels, [epsilon], name).samples["adversarial_norm"].to_numpy())
        if name in ("apgd-t", "fab-t"):
            assert (theirs != ours).sum() <= 1, name
        else:  # another random start: as many images, give or take
            assert abs(int(theirs.sum()) - int(ours.sum())) <= 4, name
        assert ours.any()
        broken |= theirs
    together = sweep(model, images, labels, [epsilon], "autoattack")
    assert abs(together.robust_accuracy()[0] - (~broken).mean()) <= 0.026
    assert abs(together.robust_accuracy()[0] - whole.samples["adversarial_norm"].gt(epsilon).mean()) <= 0.026


def test_parts_run_on_what_is_open_and_square_last(short: None) -> None:
    model, images, labels = network()
    grid = [0.1, 0.3]
    result = sweep(model, images, labels, grid, "autoattack")
    assert set(result.forward_passes) == {"clean", "gradients", *PARTS}
    ran = result.forward_passes
    alone = {name: sweep(model, images, labels, grid, name).forward_passes[name] for name in ("apgd-t", "fab-t")}
    assert all(ran[name] < alone[name] for name in alone)
    assert set(result.samples["attack"]) <= {*PARTS, ""}
    assert not [line for line in result.warnings if "masked" in line]
    assert sum(ran.values()) <= len(images) * expected_passes("autoattack", grid)
    broken = torch.from_numpy(np.isfinite(result.samples["adversarial_norm"].to_numpy()))
    assert (margins(model(result.adversarials[broken]).detach(), labels[broken]) < 0).all()


def test_square_unmasks_a_model_whose_gradients_are_zero(short: None) -> None:
    model, images, _ = network()

    def rounded(inputs: Tensor) -> Tensor:
        return model(torch.round(inputs * 8) / 8)

    labels = rounded(images).argmax(dim=1)
    result = sweep(rounded, images[:20], labels[:20], [1.0], "apgd-t,square")
    assert any(line.startswith("masked gradients: square breaks") for line in result.warnings)


@pytest.mark.parametrize("name", PARTS)
def test_a_verdict_depends_neither_on_the_batch_nor_on_the_caller_s_random_state(name: str, short: None) -> None:
    model, images, labels = network()
    images, labels = images[:9], labels[:9]
    grid = [0.2, 1.5]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    whole = sweep(model, images, labels, grid, name)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    parts = [
        sweep(model, images[rows], labels[rows], grid, name, indices=np.arange(9)[rows], batch_size=3)
        for rows in (slice(0, 5), slice(5, 9))
    ]
    assert np.isfinite(whole.samples["adversarial_norm"]).any()
    torch.testing.assert_close(torch.cat([part.adversarials for part in parts]), whole.adversarials, atol=1e-3, rtol=0)
    again = sweep(model, images, labels, grid, name, seed=1)  # another seed, another path
    assert torch.equal(again.adversarials, whole.adversarials) == (name == "fab-t")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_printed_and_the_model_s_logits_are_left_alone(
    dtype: torch.dtype, short: None, capfd: pytest.CaptureFixture[str]
) -> None:
    def view(images: Tensor) -> Tensor:  # logits that are a view of the image: writing to them would spoil it
        return images.to(dtype).flatten(1)[:, :3]

    images = grey(6)[:, :, :, :7]
    labels = view(images).argmax(dim=1)
    result = sweep(view, images, labels, [0.05, 0.4], "autoattack")
    assert np.isfinite(result.samples["adversarial_norm"]).all()
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


@pytest.mark.parametrize("name", PARTS)
def test_the_declared_cost_bounds_the_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    part = ATTACKS[name]
    assert isinstance(part, AutoAttackPart)
    if name == "square":  # the queries are most of it, and slow
        monkeypatch.setattr(part, "cost", part.cost - part.steps + 60)
        monkeypatch.setattr(part, "steps", 60)
    if name == "fab-t":  # so are its projections
        monkeypatch.setattr(part, "cost", 9 * (2 * 20 + 3) + 1)
        monkeypatch.setattr(part, "steps", 20)
    images = grey(3)
    labels, distance = exact(images)
    for epsilon in (distance.min() / 2, distance.max() / 2):  # nothing broken, and some
        used = sweep(linear, images, labels, [float(epsilon)], name).forward_passes[name] / 3
        assert used <= part.passes()
        assert used > 0.9 * part.passes() or epsilon > distance.min()


def test_square_says_that_it_needs_5_pixels_and_the_others_do_without() -> None:
    images = torch.full((2, 1, 2, 3), 0.5)
    images[:, 0, 0, 0] = 0.6
    labels = torch.zeros(2, dtype=torch.int64)

    def model(x: Tensor) -> Tensor:
        return x.flatten(1)[:, :2]

    with pytest.raises(AttackInputError, match="5 x 5 pixels, got 2 x 3") as caught:
        sweep(model, images, labels, [0.01], "square")
    assert "\n" not in str(caught.value)
    assert sweep(model, images, labels, [0.01, 0.2], "apgd-ce,apgd-t,fab-t").robust_accuracy() == [1.0, 0.0]


def test_without_the_package_one_line_says_what_to_install() -> None:
    code = """
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "pyautoattack" else real(name, package)
import attacks
attacks.resolve("standard"), attacks.resolve("strong"), attacks.resolve("check")
print([row["needs"] for row in attacks.describe() if row["name"] in ("apgd-t", "ddn")])
try:
    attacks.resolve("ddn,autoattack")
except attacks.AttackInputError as error:
    print(error)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(attacks.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    listed, error = done.stdout.splitlines()
    assert listed == "['', \"pip install 'robustflow[autoattack]'\"]"
    assert error == "attack apgd-ce is not installed: pip install 'robustflow[autoattack]'"
