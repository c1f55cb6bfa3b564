"""Adversarials that fit an 8-bit file: on the grid, in the ball, misclassified; against all 8-bit neighbours."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from attacks import AttackInputError, sweep
from attacks.grid import on_grid
from attacks.victim import l2_norms, margins

LINEAR = torch.randn(10, 192, generator=torch.Generator().manual_seed(3)) / 192**0.5


def linear(images: Tensor) -> Tensor:
    return (images.flatten(1) - 0.5) @ LINEAR.T


def eight_bit_images(*shape: int) -> Tensor:
    return torch.randint(64, 192, shape, generator=torch.Generator().manual_seed(1)) / 255


def levels(images: Tensor) -> Tensor:
    return images.double() * 255


def test_rounding_stays_in_the_ball_and_the_box_with_as_few_truncated_pixels_as_that_takes() -> None:
    clean = torch.randint(0, 256, (300, 3, 4, 4), generator=torch.Generator().manual_seed(0)) / 255
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    moved = (clean + 0.01 * noise).clamp(0, 1)
    free = on_grid(moved, clean, None)
    torch.testing.assert_close(levels(free), levels(moved).round(), atol=1e-4, rtol=0)
    for share in (0.5, 0.9, 1.0):
        epsilon = float((l2_norms(moved - clean) * share).median())
        inside = clean + (moved - clean) * (epsilon / l2_norms(moved - clean)).clamp_max(1)[:, None, None, None].float()
        rounded = on_grid(inside, clean, epsilon)
        assert (l2_norms(rounded - clean) <= epsilon).all()
        assert (levels(rounded) - levels(rounded).round()).abs().max() < 1e-4
        assert rounded.min() >= 0
        assert rounded.max() <= 1
        assert ((rounded - clean).abs() <= (inside - clean).abs() + 0.5001 / 255).all()
        nearest = on_grid(inside, clean, None)
        pulled = rounded != nearest
        # Putting any one truncated pixel back would leave the ball, or nearly: nothing was truncated for nothing.
        size = (levels(rounded) - levels(clean)).round().flatten(1)
        back = (levels(nearest) - levels(clean)).round().flatten(1) ** 2 - size**2
        room = (255 * epsilon) ** 2 - (size**2).sum(dim=1)
        largest = torch.where(pulled.flatten(1), back, 0).amax(dim=1)
        assert (room[largest > 0] < largest[largest > 0] + 1e-3).all()
        assert pulled.any()


def test_what_is_found_is_on_the_grid_and_holds() -> None:
    images = eight_bit_images(40, 3, 8, 8)
    labels = linear(images).argmax(dim=1)
    grid = [0.03, 0.06, 0.12, 0.3]
    free = sweep(linear, images, labels, grid)
    for attacks in ("standard", "paper", "ddn", "margin-pgd"):
        result = sweep(linear, images, labels, grid, attacks, eight_bit=True)
        norms = torch.tensor(result.samples["adversarial_norm"].to_numpy())
        found = torch.isfinite(norms)
        assert found.double().mean() > 0.5
        adversarials = result.adversarials[found]
        assert (levels(adversarials) - levels(adversarials).round()).abs().max() < 1e-4
        assert torch.equal(l2_norms(adversarials - images[found]), norms[found])
        assert (margins(linear(adversarials).double(), labels[found]) < 0).all()
        assert all(low <= high for low, high in zip(free.robust_accuracy(), result.robust_accuracy(), strict=True))
    assert result.robust_accuracy()[-1] <= free.robust_accuracy()[-1] + 0.05  # a large ball has room for rounding
    off = levels(free.adversarials) - levels(free.adversarials).round()
    assert off.abs().max() > 0.1  # what the option changes


@pytest.mark.parametrize("attacks", ["ddn", "margin-pgd", "standard"])
def test_no_neighbour_on_the_grid_is_missed_by_much_and_none_is_invented(attacks: str) -> None:
    """Images of 3 pixels: all 8-bit images within 6 levels are tried; the smallest broken one is the truth."""
    weight = torch.tensor([[3.0, -1.0, 0.5], [-1.0, 2.0, 1.0], [0.0, -1.0, -2.0]])

    def model(images: Tensor) -> Tensor:
        return (images.flatten(1) - 0.5) @ weight.to(images).T

    images = (torch.randint(120, 136, (60, 1, 1, 3), generator=torch.Generator().manual_seed(2))) / 255
    labels = model(images).argmax(dim=1)
    steps = torch.tensor(list(itertools.product(range(-6, 7), repeat=3))) / 255
    exact = np.full(60, np.inf)
    for row in range(60):
        near = images[row].flatten() + steps
        broken = margins(model(near[:, None, None, :]).double(), labels[row].expand(len(near))) < -1e-6
        if broken.any():
            exact[row] = float(steps[broken].double().norm(dim=1).min())
    epsilon = 6 / 255
    result = sweep(model, images, labels, [epsilon / 2, epsilon], attacks, eight_bit=True)
    norms = result.samples["adversarial_norm"].to_numpy()
    reached = norms <= epsilon  # farther away, the 13 x 13 x 13 neighbours are not all there are
    assert (norms[reached] >= exact[reached] - 1e-6).all()
    there = exact < 0.8 * epsilon  # rounding 3 pixels is coarse: what is just inside the ball may be missed
    assert there.sum() > 20
    assert (norms[there] <= epsilon).mean() > (0.8 if attacks == "ddn" else 0.95)
    assert (norms[exact > epsilon] > epsilon).all()


def test_images_off_the_grid_are_refused_in_one_line() -> None:
    images = eight_bit_images(4, 3, 8, 8)
    labels = linear(images).argmax(dim=1)
    sweep(linear, images, labels, [0.01], "ddn", eight_bit=True)
    with pytest.raises(AttackInputError, match="multiples of 1/255") as caught:
        sweep(linear, images + 0.2 / 255, labels, [0.01], "ddn", eight_bit=True)
    assert "\n" not in str(caught.value)
