"""The sweep against exact distances, foolbox itself, and itself without leaving anything out."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils import parametrize

from attacks import ATTACKS, Attack, Problem, register, resolve, sweep
from attacks.foolbox_attacks import MarginPGD, foolbox, uniform_ball
from attacks.victim import Victim, margins

GRID = [0.0, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8]


class Nonexpansive(nn.Module):
    """Blocks x - A'relu(A x + b) with the spectral norm of A at most 1, then a linear head: every difference of two
    logits is Lipschitz with the length of the difference of their rows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        for layer in self.inner:
            parametrize.register_parametrization(layer, "weight", SpectralNorm())
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        for layer in self.inner:
            x = x - torch.relu(layer(x)) @ layer.weight
        return self.head(x)


class SpectralNorm(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / torch.linalg.matrix_norm(weight, 2)


@cache
def digits() -> tuple[Nonexpansive, Tensor, Tensor, np.ndarray]:
    """A small certified network, 150 of its test images, labels and certified radii."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    labels = torch.from_numpy(data.target).long()
    torch.manual_seed(0)
    model = Nonexpansive()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        logits = model(images[:1500])
        gaps = logits.gather(1, labels[:1500, None]) - logits
        loss = (0.5 - gaps).clamp_min(0).scatter(1, labels[:1500, None], 0.0).sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    images, labels = images[1500:1650], labels[1500:1650]
    with torch.no_grad():
        weight = model.head.weight.double()
        lengths = (weight[:, None] - weight[None]).norm(dim=2)
        logits = model(images).double()
    gaps = (logits.gather(1, labels[:, None]) - logits) / lengths[labels]
    radii = gaps.scatter(1, labels[:, None], torch.inf).amin(dim=1).clamp_min(0)
    return model, images, labels, radii.numpy()


def broken(result: Any) -> np.ndarray:
    return result.samples["adversarial_norm"].to_numpy()[:, None] <= np.asarray(result.epsilons)[None, :]


@pytest.mark.parametrize(
    ("attacks", "scale"), [("standard", 1e-3), ("standard", 1.0), ("standard", 1e3), ("strong", 1.0)]
)
def test_on_linear_models_the_norm_found_is_the_exact_distance(scale: float, attacks: str) -> None:
    torch.manual_seed(1)
    count = 100 if attacks == "standard" else 20
    images = 0.5 + 0.2 * (torch.rand(count, 3, 8, 8) - 0.5)
    weight = torch.randn(10, 192) / 192**0.5
    logits = (images.flatten(1).double() - 0.5) @ weight.double().T
    labels = logits.argmax(dim=1)
    gaps = logits.gather(1, labels[:, None]) - logits
    lengths = (weight.double()[labels][:, None] - weight.double()[None]).norm(dim=2)
    exact = (gaps / lengths).scatter(1, labels[:, None], torch.inf).amin(dim=1).numpy()
    grid = np.linspace(0, 0.12, 7)
    result = sweep(lambda x: scale * ((x.flatten(1) - 0.5) @ weight.T), images, labels, list(grid), attacks)
    ratio = result.samples["adversarial_norm"].to_numpy() / exact
    assert np.median(ratio) <= 1.01
    assert ratio.max() <= 1.01
    assert ratio.min() >= 1 - 1e-4


def test_a_certified_network_gets_the_same_verdicts_at_any_scale_of_its_logits() -> None:
    model, images, labels, radii = digits()
    accuracies = []
    for scale in (1.0, 1e3, 1e-3):
        with torch.no_grad():
            model.head.weight *= scale
            model.head.bias *= scale
        accuracies.append(sweep(model, images, labels, GRID, audit=True, certified_radii=radii).robust_accuracy())
        with torch.no_grad():
            model.head.weight /= scale
            model.head.bias /= scale
    assert np.ptp(accuracies, axis=0).max() <= 0.01
    weak = sweep(lambda x: 0.1 * model(x), images, labels, GRID, "paper")
    assert max(np.subtract(weak.robust_accuracy(), accuracies[0])) > 0.05  # the published attack misses these
    assert len(weak.warnings) == 1
    assert "flat logits: " in weak.warnings[0]
    assert not sweep(model, images, labels, GRID).warnings


def test_saturated_logits_are_warned_about() -> None:
    model, images, labels, _ = digits()
    result = sweep(lambda x: 1e3 * model(x), images[:20], labels[:20], [0.1], "paper")
    assert "saturated" in result.warnings[0]


def test_no_adversarial_lies_inside_a_true_certificate_and_an_overstated_one_is_refuted() -> None:
    model, images, labels, radii = digits()
    result = sweep(model, images, labels, GRID, certified_radii=radii, audit=True)
    norms = result.samples["adversarial_norm"].to_numpy()
    right = result.samples["prediction"].to_numpy() == labels.numpy()
    assert (norms[right] > radii[right]).all()
    assert (norms[right] <= 3 * radii[right] + 0.1).mean() > 0.9
    false = sweep(model, images, labels, GRID, certified_radii=20 * radii)
    assert false.forward_passes["deepfool"] < 0.9 * result.forward_passes["deepfool"]  # without audit it is believed
    audited = sweep(model, images, labels, GRID, certified_radii=20 * radii, audit=True).samples["adversarial_norm"]
    assert (audited.to_numpy()[right] <= 20 * radii[right]).mean() > 0.9


@pytest.fixture
def restarting() -> Iterator[str]:
    register(MarginPGD("restarting", steps=5, rel_stepsize=0.5, restarts=2))
    yield "restarting"
    ATTACKS.pop("restarting")


@pytest.mark.parametrize("attacks", ["standard", "paper", "restarting,ddn"])
def test_leaving_out_the_decided_changes_no_verdict(attacks: str, restarting: str) -> None:
    model, images, labels, radii = digits()
    images, labels, radii = images[:60], labels[:60], radii[:60]
    grid = GRID[1:6]
    together = broken(sweep(model, images, labels, grid, attacks, certified_radii=radii))
    audited = broken(sweep(model, images, labels, grid, attacks, certified_radii=radii, audit=True))
    alone = np.concatenate([broken(sweep(model, images, labels, [e], attacks)) for e in grid], axis=1)
    np.testing.assert_array_equal(together, audited)
    found = np.stack([
        sweep(model, images, labels, [e], attacks).samples["adversarial_norm"].to_numpy() for e in grid
    ])
    monotone = found.min(axis=0)[:, None] <= np.asarray(grid)[None, :]  # what one epsilon finds decides the larger
    assert (together >= alone).all()
    assert (together != monotone).mean() <= 0.005
    for rows in (slice(0, 25), slice(25, 60)):
        part = sweep(model, images[rows], labels[rows], grid, attacks, indices=np.arange(60)[rows], batch_size=7)
        np.testing.assert_array_equal(broken(part), together[rows])


def test_paper_is_foolbox_at_every_epsilon() -> None:
    """foolbox's own L2PGD from the same starts, at each epsilon, on every image; then monotonicity and nothing else."""
    model, images, labels, _ = digits()
    images, labels, grid = images[:80], labels[:80], [0.3, 0.6, 1.0, 1.5, 2.0]
    result = sweep(model, images, labels, grid, "paper", batch_size=13)
    victim = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    verdicts, norms = [], []
    logits = model(images).detach().double()
    for epsilon in grid:
        problem = Problem(Victim(model), images, labels, logits, torch.arange(80), images, torch.zeros(80), epsilon)
        start = uniform_ball(problem)

        class Same(foolbox.attacks.L2ProjectedGradientDescentAttack):
            def get_random_start(self, x0: Any, epsilon: float, start: Tensor = start) -> Any:
                return x0 + epsilon * type(x0)(start)

        _, clipped, success = Same(steps=10)(victim, images, labels, epsilons=epsilon)
        verdicts.append(success.numpy())
        norms.append(np.where(success.numpy(), (clipped - images).flatten(1).norm(dim=1).numpy(), np.inf))
    model.zero_grad(set_to_none=True)
    wrong = (logits.argmax(dim=1) != labels).numpy()
    smallest = np.where(wrong, 0, np.min(norms, axis=0))
    expected = np.stack([np.any(verdicts[: k + 1], axis=0) | wrong | (smallest <= e) for k, e in enumerate(grid)], 1)
    assert 0.1 < expected[:, -1].mean() < 1
    assert (broken(result) != expected).mean() <= 0.005


def test_the_decided_are_not_attacked() -> None:
    seen: list[tuple[float | None, list[int]]] = []

    @register
    class Spy(Attack):
        name, kind, loss, cost, good_at = "spy", "fixed-epsilon", "none", 0, "tests"

        def propose(self, problem: Problem) -> Tensor:
            seen.append((problem.epsilon, problem.indices.tolist()))
            return problem.images + 1.0

    try:
        images = torch.full((4, 1, 1, 1), 0.1)  # the boundary is 0.25 away; the last is misclassified
        sweep(lambda x: torch.stack([torch.full_like(x[:, 0, 0, 0], 0.35), x[:, 0, 0, 0]], dim=1), images,
              torch.tensor([0, 0, 0, 1]), [0.0, 0.1, 0.3, 0.5], "spy", certified_radii=[0.05, 0.2, 0.9, 0.0],
              indices=[10, 11, 12, 13])
    finally:
        ATTACKS.pop("spy")
    assert seen == [(0.1, [10]), (0.3, [10, 11])]


def test_result_rows_and_images_agree() -> None:
    model, images, labels, _ = digits()
    progress: list[tuple[str, int, int]] = []
    result = sweep(model, images, labels, GRID, indices=torch.arange(500, 650), batch_size=64,
                   progress=lambda *step: progress.append(step))
    frame = result.samples
    assert list(frame.columns) == ["index", "label", "prediction", "adversarial_norm", "attack"]
    assert frame["index"].tolist() == list(range(500, 650))
    norms = frame["adversarial_norm"].to_numpy()
    clean = (frame["prediction"] != frame["label"]).to_numpy()
    assert (norms[clean] == 0).all()
    assert (frame["attack"][clean] == "clean").all()
    assert (norms[~clean] > 0).all()
    assert ((frame["attack"] == "") == np.isinf(norms)).all()
    found = np.isfinite(norms) & ~clean
    assert result.adversarials.dtype == torch.float32
    assert result.adversarials.min() >= 0
    assert result.adversarials.max() <= 1
    np.testing.assert_array_equal((result.adversarials - images).double().flatten(1).norm(dim=1).numpy()[found],
                                  norms[found])
    with torch.no_grad():
        assert (margins(model(result.adversarials), labels).numpy()[found] < 0).all()
    assert torch.equal(result.adversarials[~torch.from_numpy(found)], images[~torch.from_numpy(found)])
    assert set(result.forward_passes) == set(result.seconds) == {
        "clean", "deepfool", "ddn", "margin-pgd", "targeted-pgd"}
    assert result.forward_passes["clean"] == 150
    assert all(0 < done <= total for _, done, total in progress)
    assert frame.equals(sweep(model, images, labels, GRID, indices=torch.arange(500, 650), batch_size=64).samples)


def test_only_epsilon_zero_is_clean_accuracy_without_an_attack() -> None:
    model, images, labels, _ = digits()
    result = sweep(model, images, labels, [0.0])
    assert result.robust_accuracy() == [float((model(images).argmax(dim=1) == labels).double().mean())]
    assert sum(result.forward_passes.values()) == 150


def test_a_float64_model_is_attacked_in_float64() -> None:
    model, images, labels, _ = digits()
    double = Nonexpansive()
    double.load_state_dict(model.state_dict())
    double = double.double().eval()
    result = sweep(double, images[:30], labels[:30], GRID)
    np.testing.assert_allclose(
        result.robust_accuracy(), sweep(model, images[:30], labels[:30], GRID).robust_accuracy(), atol=0.034)


def test_names_resolve() -> None:
    assert [a.name for a in resolve("paper")[0]] == ["l2pgd"]
    assert [a.name for a in resolve(" ddn , paper,ddn")[0]] == ["ddn", "l2pgd"]
