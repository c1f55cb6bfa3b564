"""The linear maps against their dense matrices: what is applied, what is transposed, what is constrained."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import prod

import numpy as np
import pytest
import scipy.linalg
import scipy.signal
import torch
from torch import Tensor

from robustflow.errors import UserError
from robustflow.operators import Convolution, PatchConvolution, UnitRowLinear

CONVOLUTIONS = [(1, 1, 1, 4, 4), (2, 3, 3, 5, 4), (3, 2, 5, 3, 6), (1, 2, 7, 2, 2), (4, 4, 3, 1, 1)]
PATCHES = [
    (1, 4, 2, 0, 4, 6),
    (2, 8, 2, 1, 4, 4),
    (3, 5, 2, 1, 6, 4),
    (1, 9, 3, 1, 6, 6),
    (1, 6, 2, 1, 4, 4),
    (2, 3, 1, 0, 3, 2),
]


def dense(linear: Callable[[Tensor], Tensor], *shape: int) -> Tensor:
    """The matrix of a linear map of images, column by column."""
    size = prod(shape)
    with torch.no_grad():
        return linear(torch.eye(size, dtype=torch.float64).view(size, *shape)).reshape(size, -1).T


@pytest.mark.parametrize(("before", "after", "kernel", "height", "width"), CONVOLUTIONS)
def test_adjoint_of_a_convolution_is_the_transpose(
    before: int, after: int, kernel: int, height: int, width: int
) -> None:
    layer = Convolution(before, after, kernel).double()
    forward, adjoint = dense(layer, before, height, width), dense(layer.adjoint, after, height, width)
    torch.testing.assert_close(adjoint, forward.T)
    x, y = torch.randn(before * height * width).double(), torch.randn(after * height * width).double()
    torch.testing.assert_close((forward @ x) @ y, x @ (adjoint @ y))


@pytest.mark.parametrize(("before", "after", "kernel", "height", "width"), CONVOLUTIONS)
def test_convolution_is_the_zero_padded_one(before: int, after: int, kernel: int, height: int, width: int) -> None:
    layer = Convolution(before, after, kernel).double()
    x, bias = torch.randn(2, before, height, width).double(), torch.randn(after).double()
    weight = layer.weight.detach().numpy()
    expected = [
        [
            # mode="full", then the window that zero padding leaves: scipy's "same" centres on the larger array.
            sum(scipy.signal.correlate2d(image[i], weight[o, i], mode="full") for i in range(before))[
                kernel // 2 : kernel // 2 + height, kernel // 2 : kernel // 2 + width
            ]
            + float(bias[o])
            for o in range(after)
        ]
        for image in x.numpy()
    ]
    np.testing.assert_allclose(layer(x, bias).detach().numpy(), np.array(expected), atol=1e-12)


@pytest.mark.parametrize("image_size", [(4, 4), (5, 3), (2, 2), (8, 8)])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_exactly_constrained_convolution_has_norm_at_most_one(kernel: int, image_size: tuple[int, int]) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        layer = Convolution(2, 3, kernel, image_size=image_size)
        with torch.no_grad():
            layer.weight.copy_(torch.randn_like(layer.weight) * 10.0 ** (seed - 1))
        layer.constrain_(exact=True)
        norm = torch.linalg.matrix_norm(dense(layer.double(), 2, *image_size), 2)
        assert norm <= 1 + 1e-6
        assert norm > 0.2, "the bound may be loose on tiny images, but not that loose"


def test_power_iteration_holds_the_norm_close_to_one_and_never_above_by_much() -> None:
    torch.manual_seed(0)
    layer = Convolution(3, 3, 3, image_size=(12, 12))
    with torch.no_grad():
        layer.weight.mul_(7.0)
    for _ in range(60):
        layer.constrain_()
    norm = float(torch.linalg.matrix_norm(dense(layer.double(), 3, 12, 12), 2))
    assert 0.8 < norm < 1.01


@pytest.mark.parametrize(("before", "after"), [(2, 5), (4, 4), (5, 2)])
def test_an_isometric_start_moves_every_singular_value_to_one(before: int, after: int) -> None:
    torch.manual_seed(0)
    layer = Convolution(before, after, 3, image_size=(4, 5))
    random = torch.linalg.svdvals(dense(layer.double(), before, 4, 5))
    layer.start_isometric_(spread=0.0)
    torch.testing.assert_close(torch.linalg.svdvals(dense(layer, before, 4, 5)), torch.ones_like(random))
    layer = Convolution(before, after, 3, image_size=(4, 5))
    layer.start_isometric_()
    assert bool((layer.weight != 0).all())  # pixels beside the middle are seen too
    layer.constrain_(exact=True)
    started = torch.linalg.svdvals(dense(layer.double(), before, 4, 5))
    assert random.square().mean() < 0.5 < 0.6 < started.square().mean() <= started.max() <= 1


def test_a_free_convolution_is_left_alone() -> None:
    layer = Convolution(2, 2, 3)
    before = layer.weight.detach().clone()
    layer.constrain_()
    layer.constrain_(exact=True)
    assert torch.equal(layer.weight, before)
    assert not dict(layer.named_buffers())


def test_where_power_iteration_stands_is_no_part_of_the_model() -> None:
    assert list(Convolution(2, 2, 3, image_size=(4, 4)).state_dict()) == ["weight"]


@pytest.mark.parametrize("kernel", [2, 4])
def test_an_even_kernel_is_refused(kernel: int) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*odd[^\n]*$"):
        Convolution(1, 1, kernel)


@pytest.mark.parametrize(("before", "after", "patch", "shift", "height", "width"), PATCHES)
def test_patches_against_loops_over_pixels(
    before: int, after: int, patch: int, shift: int, height: int, width: int
) -> None:
    layer = PatchConvolution(before, after, patch, shift).double()
    x, bias = torch.randn(before, height, width).double(), torch.randn(after).double()
    weight = layer.weight.detach().reshape(after, before, patch, patch)
    expected = torch.zeros(after, height // patch, width // patch, dtype=torch.float64)
    for o in range(after):
        for i in range(height // patch):
            for j in range(width // patch):
                value = float(bias[o])
                for c in range(before):
                    for di in range(patch):
                        for dj in range(patch):
                            row, column = (i * patch + di + shift) % height, (j * patch + dj + shift) % width
                            value += float(weight[o, c, di, dj] * x[c, row, column])
                expected[o, i, j] = value
    torch.testing.assert_close(layer(x[None], bias)[0].detach(), expected)


@pytest.mark.parametrize(("before", "after", "patch", "shift", "height", "width"), PATCHES)
def test_patches_are_a_dense_matrix_with_all_singular_values_one(
    before: int, after: int, patch: int, shift: int, height: int, width: int
) -> None:
    layer = PatchConvolution(before, after, patch, shift).double()
    layer.constrain_(exact=True)
    forward = dense(layer, before, height, width)
    adjoint = dense(layer.adjoint, after, height // patch, width // patch)
    torch.testing.assert_close(adjoint, forward.T)
    values = torch.linalg.svdvals(forward)
    torch.testing.assert_close(values, torch.ones_like(values), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("before", "after", "patch", "shift", "height", "width"), PATCHES)
def test_as_a_convolution_and_as_a_matrix_product_patches_are_the_same_map(
    before: int, after: int, patch: int, shift: int, height: int, width: int
) -> None:
    """float32 takes one way, float64 and bfloat16 under autocast the other."""
    layer = PatchConvolution(before, after, patch, shift)
    x, bias = torch.randn(2, before, height, width), torch.randn(after)
    single = layer(x, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = layer(x, bias)
        back = layer.adjoint(half)
    double = PatchConvolution(before, after, patch, shift).double()
    double.load_state_dict(layer.state_dict())
    torch.testing.assert_close(double(x.double(), bias.double()), single.double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(double.adjoint(single.double()), layer.adjoint(single).double(), atol=1e-5, rtol=1e-5)
    assert half.dtype == back.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), single, atol=0.05, rtol=0.02)
    torch.testing.assert_close(back.float(), layer.adjoint(single), atol=0.1, rtol=0.05)


def test_a_step_of_training_on_a_large_matrix_needs_no_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step moves every singular value a little; the sum of these moves grows with the matrix and means nothing."""
    layer = PatchConvolution(64, 256, 2)
    layer.constrain_(exact=True)
    direction = torch.linalg.qr(torch.randn(256, 256)).Q
    monkeypatch.setattr(torch.linalg, "svd", lambda *_, **__: pytest.fail("an SVD near the constraint set"))
    with torch.no_grad():
        layer.weight.add_(direction, alpha=0.04)
    layer.constrain_()
    assert (torch.linalg.svdvals(layer.weight.detach()) - 1).abs().max() < 5e-3


@pytest.mark.parametrize(("before", "after"), [(2, 8), (3, 4), (1, 9)])
@pytest.mark.parametrize("scale", [0.3, 5.0])
def test_exact_projection_is_the_polar_factor(before: int, after: int, scale: float) -> None:
    """Square, wide and tall; the nearest orthonormal matrix, whatever the distance."""
    torch.manual_seed(1)
    layer = PatchConvolution(before, after, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight) * scale)
    expected, _ = scipy.linalg.polar(layer.weight.detach().double().numpy(), side="left")
    layer.constrain_(exact=True)
    stored = layer.weight.detach().double()
    np.testing.assert_allclose(stored.numpy(), expected, atol=1e-6)
    gram = stored.T @ stored if after > 4 * before else stored @ stored.T
    assert (gram - torch.eye(len(gram))).abs().max() < 1e-6


@pytest.mark.parametrize(("before", "after"), [(2, 8), (3, 4), (1, 9)])
def test_one_polar_iteration_near_the_constraint_set(before: int, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Close by, no SVD is needed, and every step squares the error."""
    layer = PatchConvolution(before, after, 2).double()
    layer.constrain_(exact=True)
    monkeypatch.setattr(torch.linalg, "svd", lambda *_, **__: pytest.fail("an SVD near the constraint set"))
    with torch.no_grad():
        layer.weight.add_(torch.randn_like(layer.weight) * 0.02)
    error = [float((torch.linalg.svdvals(layer.weight.detach()) - 1).abs().max())]
    for _ in range(3):
        layer.constrain_()
        error.append(float((torch.linalg.svdvals(layer.weight.detach()) - 1).abs().max()))
    assert error[0] > 1e-3
    assert all(after <= 2 * before**2 + 1e-14 for before, after in pairwise(error))


def test_far_from_the_constraint_set_the_projection_is_exact_at_once() -> None:
    layer = PatchConvolution(2, 8, 2).double()
    with torch.no_grad():
        layer.weight.mul_(2.5)  # there 3/2 W - 1/2 W W'W would move away
    layer.constrain_()
    assert (torch.linalg.svdvals(layer.weight.detach()) - 1).abs().max() < 1e-12


@pytest.mark.parametrize("exact", [False, True])
def test_a_diverged_matrix_stays_for_the_training_to_report(exact: bool) -> None:
    layer = PatchConvolution(1, 4, 2)
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    layer.constrain_(exact=exact)
    assert layer.weight.isnan().any()


def test_unit_rows() -> None:
    head = UnitRowLinear(7, 3)
    assert not head.bias.any()
    with torch.no_grad():
        head.weight.copy_(torch.randn(3, 7) * torch.tensor([[1e-3], [1.0], [1e3]]))
        directions = head.weight.detach().clone()
    head.constrain_()
    for row, direction in zip(head.weight.detach(), directions, strict=True):
        torch.testing.assert_close(row, direction / direction.pow(2).sum().sqrt())
