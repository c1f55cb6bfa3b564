"""Planted masks are found, honest networks are not accused; the attack without gradients keeps to its budget."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attacks import ATTACKS, AttackInputError, expected_passes, sweep
from attacks.foolbox_attacks import foolbox
from attacks.masking import dead_gradients, gradient_masking
from attacks.victim import Victim, margins

GRID = [0.3, 0.6, 1.0]
Model = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A small ordinary network on 8 x 8 images of two bars, and 25 images with their predictions."""
    torch.manual_seed(0)
    labels = torch.arange(400) % 4
    images = 0.3 + 0.1 * torch.rand(400, 1, 8, 8)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, 4 * (label // 2) : 4 * (label // 2) + 4, 4 * (label % 2) : 4 * (label % 2) + 4] += 0.3
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 4))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval(), images[:25], labels[:25]


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "rounded": lambda images: torch.round(images * 8) / 8,
    "saturated": lambda images: torch.sigmoid(400 * (images - 0.47)),
    "straight through a step": lambda images: (images > 0.47).float() + 0 * images,
}


@pytest.mark.parametrize("name", MASKS)
def test_masked_gradients_are_flagged(trained: tuple[nn.Module, Tensor, Tensor], name: str) -> None:
    model, images, _ = trained

    def masked(inputs: Tensor) -> Tensor:
        return model(MASKS[name](inputs))

    with torch.no_grad():
        labels = masked(images).argmax(dim=1)
    result = sweep(masked, images, labels, [*GRID, 2.0], "check")
    standard = sweep(masked, images, labels, [*GRID, 2.0])
    assert not standard.warnings
    leads = [line for line in result.warnings if line.startswith("masked gradients: hopskipjump breaks")]
    assert len(leads) == 1, result.warnings
    assert max(np.subtract(standard.robust_accuracy(), result.robust_accuracy())) > 0.1
    broken = torch.from_numpy(np.isfinite(result.samples["adversarial_norm"].to_numpy()))
    with torch.no_grad():
        assert (margins(masked(result.adversarials[broken]), labels[broken]) < 0).all()
    zero = [line for line in result.warnings if "zero or not finite on 25 of 25" in line]
    assert len(zero) == (name != "saturated")
    assert all("\n" not in line for line in result.warnings)


def test_a_mask_is_seen_beyond_the_radii_asked_for(trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, _ = trained

    def masked(inputs: Tensor) -> Tensor:
        return model(MASKS["saturated"](inputs))

    with torch.no_grad():
        labels = masked(images).argmax(dim=1)
    (line,) = sweep(masked, images, labels, [0.01], "check").warnings
    assert line.startswith("masked gradients: hopskipjump finds adversarials of ")
    assert "beyond the radii" in line
    # margin-pgd is bounded by epsilon: that it finds nothing beyond says nothing.
    assert sweep(masked, images, labels, [0.01], "margin-pgd,hopskipjump").warnings == []


def test_ordinary_and_certified_networks_are_not_accused(trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = trained
    assert sweep(model, images, labels, [0.01], "check").warnings == []
    ordinary = sweep(model, images, labels, GRID, "check")
    assert ordinary.warnings == []
    assert ordinary.forward_passes["hopskipjump"] > 500 * (np.asarray(ordinary.samples.adversarial_norm) > 0.6).sum()
    assert ordinary.forward_passes["gradients"] == 25
    torch.manual_seed(1)
    weight = torch.linalg.qr(torch.randn(64, 64))[0]
    head = torch.randn(4, 64) / 16

    def nonexpansive(inputs: Tensor) -> Tensor:  # logits as flat as a certified network's
        x = inputs.flatten(1) - 0.4
        return (x - torch.relu(x @ weight) @ weight.T) @ head.T

    predictions = nonexpansive(images).argmax(dim=1)
    assert sweep(nonexpansive, images, predictions, GRID, "check").warnings == []
    radii = np.full(25, 10.0)  # all certified: nothing is attacked, nothing is said
    silent = sweep(nonexpansive, images, predictions, GRID, "check", certified_radii=radii)
    assert silent.warnings == []
    assert sum(silent.forward_passes.values()) == 25


def test_the_warning_counts_what_only_the_attack_without_gradients_breaks_clearly() -> None:
    with_gradients = np.array([0.5, 0.5, np.inf, 0.21, 0.1, 0.0])
    norms = np.array([0.15, 0.15, 0.3, 0.199, 0.1, 0.0])
    attacked = np.array([True] * 5 + [False])
    (line,) = gradient_masking([0.1, 0.2, 0.4], with_gradients, norms, attacked)
    assert "breaks 3 of 5 images at epsilon 0.4" in line
    assert gradient_masking([0.1, 0.2], with_gradients, norms, attacked)[0].count("2 of 5 images at epsilon 0.2")
    assert gradient_masking([0.2], with_gradients[3:], norms[3:], attacked[3:]) == []  # a photo finish
    assert gradient_masking([0.2], with_gradients, norms, np.arange(6) == 0) == []  # one image is luck
    dead = np.array([True, True, False, False, False, False])
    assert "on 2 of 5" in gradient_masking([0.1], norms, norms, attacked, dead)[0]
    assert gradient_masking([0.1], norms, norms, attacked, np.arange(6) == 0) == []


def test_dead_gradients_are_zero_or_not_finite_ones() -> None:
    images = torch.full((3, 1, 1, 2), 0.25)
    images[1], images[2] = 0.0, 0.5

    def model(inputs: Tensor) -> Tensor:  # the root's slope is infinite at 0, the clamp's 0 above 0.4
        x = inputs.flatten(1)
        return torch.stack([x[:, 0].clamp_max(0.4).sqrt(), 0 * x[:, 1]], dim=1)

    assert dead_gradients(Victim(model), images, torch.zeros(3, dtype=torch.int64)).tolist() == [False, True, True]


def bright(images: Tensor) -> Tensor:
    """Class 1 where the first pixel is above 0.5, unless the last row is black: then the label never changes."""
    first = torch.where((images[:, 0, -1] < 1e-3).all(dim=1), 0.0, images[:, 0, 0, 0])
    return torch.stack([torch.full_like(first, 0.5), first], dim=1)


def test_one_image_without_a_start_does_not_sink_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """foolbox's HopSkipJump refuses all three images for the sake of one."""
    images, labels = torch.full((3, 1, 8, 8), 0.4), torch.zeros(3, dtype=torch.int64)
    starts = torch.full((3, 1, 8, 8), 0.9)
    starts[2, 0, -1] = 0.0

    class Module(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return bright(inputs)

    plain = foolbox.PyTorchModel(Module().eval(), bounds=(0, 1), device="cpu")
    criterion = foolbox.criteria.Misclassification(labels)
    with pytest.raises(ValueError, match=r"1.0 of 3 starting_points are not adversarial"):
        foolbox.attacks.HopSkipJumpAttack(steps=1).run(plain, images, criterion, starting_points=starts)

    def noise_with_a_black_row(clean: Tensor, random: torch.Generator) -> Tensor:
        rows = starts[:1].clone().repeat(4, 1, 1, 1)
        if clean[0, 0, 4, 4] != 0.4:
            rows[:, :, -1] = 0.0
        return rows

    monkeypatch.setattr("attacks.decision.noisy", noise_with_a_black_row)
    images[2, 0, 4, 4] = 0.3
    norms = sweep(bright, images, labels, [0.2], "hopskipjump").samples["adversarial_norm"].to_numpy()
    assert (norms[:2] < 0.13).all()  # the boundary is 0.1 away
    assert np.isinf(norms[2])


def test_the_budget_is_kept_and_neither_the_batch_nor_the_order_matters(
    trained: tuple[nn.Module, Tensor, Tensor],
) -> None:
    model, images, labels = trained
    images, labels = images[:6], labels[:6]
    together = sweep(model, images, labels, [2.0], "hopskipjump")
    ratio = together.samples["adversarial_norm"] / sweep(model, images, labels, [2.0]).samples["adversarial_norm"]
    assert 0.99 < ratio.min() <= ratio.max() < 1.5
    assert 900 < together.forward_passes["hopskipjump"] / 6 <= ATTACKS["hopskipjump"].passes()
    assert sum(together.forward_passes.values()) <= 6 * expected_passes("hopskipjump", [2.0])
    alone = sweep(model, images[4:].flip(0), labels[4:].flip(0), [2.0], "hopskipjump", indices=[5, 4])
    np.testing.assert_allclose(
        alone.samples["adversarial_norm"].to_numpy()[::-1], together.samples["adversarial_norm"].to_numpy()[4:],
        rtol=1e-5,
    )


def test_a_model_without_gradients_is_told_in_one_line_and_can_be_attacked_without(
    trained: tuple[nn.Module, Tensor, Tensor],
) -> None:
    model, images, labels = trained

    def no_gradient(inputs: Tensor) -> Tensor:
        return model(inputs).detach()

    for attacks in ("ddn", "margin-pgd", "check"):
        with pytest.raises(AttackInputError, match=r"no gradient.*hopskipjump") as caught:
            sweep(no_gradient, images[:3], labels[:3], GRID, attacks)
        assert "\n" not in str(caught.value)
    result = sweep(no_gradient, images[:3], labels[:3], [2.0], "hopskipjump")
    assert np.isfinite(result.samples["adversarial_norm"]).all()
