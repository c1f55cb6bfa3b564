"""Norm bounds against dense singular values: never below, and not far above."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robustflow import norms
from robustflow.errors import UserError
from robustflow.spectra import largest_norm, symbols

F64 = torch.float64
QUICK = settings(max_examples=120, deadline=None, database=None, derandomize=True)


def dense_matrix(module: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The matrix of a linear (or affine) map: its columns are what it makes of the unit vectors."""
    size = math.prod(shape)
    with torch.no_grad():
        units = torch.eye(size, dtype=F64).view(size, *shape)
        return (module(units) - module(torch.zeros(1, *shape, dtype=F64))).flatten(1).T


def dense_norm(module: nn.Module, shape: tuple[int, ...]) -> float:
    return float(torch.linalg.matrix_norm(dense_matrix(module, shape), 2))


def convolution(weight: Tensor, **options: Any) -> nn.Conv2d:
    groups = options.get("groups", 1)
    layer = nn.Conv2d(weight.shape[1] * groups, len(weight), tuple(weight.shape[2:]), bias=False, dtype=F64, **options)
    layer.weight.data = weight
    return layer


def check_convolution(weight: Tensor, size: tuple[int, int], slack: float | None = None, **options: Any) -> None:
    """The bound holds, and is at most ``slack`` times the norm."""
    bound = norms.conv2d_norm(weight, size, **options)
    true = dense_norm(convolution(weight, **options), (weight.shape[1] * options.get("groups", 1), *size))
    assert bound >= true * (1 - 1e-12), f"bound {bound} below the norm {true}"
    assert slack is None or bound <= slack * true, f"bound {bound} loose against {true}"


def check_three_pixels() -> None:
    """[−1, 2, −1] on three pixels: 2 + √2, where the symbol at size three says 3."""
    weight = torch.tensor([[[[-1.0, 2.0, -1.0]]]], dtype=F64)
    check_convolution(weight, (1, 3), 4 / (2 + math.sqrt(2)) + 1e-6, padding=(0, 1))


def check_groups() -> None:
    """Groups act on different channels: their largest norm, neither their product nor their sum."""
    weight = torch.tensor([0.5, 0.25, 0.125, 3.0], dtype=F64).view(4, 1, 1, 1)
    check_convolution(weight, (2, 2), 1 + 1e-8, groups=4)
    check_convolution(weight[:3], (2, 2), 1 + 1e-8, groups=3)


def check_random_convolutions() -> None:
    generator = torch.Generator().manual_seed(1)
    for k, size, options in [
        (3, (5, 7), {"padding": 1}),
        (3, (4, 4), {"padding": 1, "padding_mode": "circular"}),
        (5, (6, 3), {"padding": 2}),
        (3, (7, 6), {"padding": 1, "stride": 2}),
        (2, (6, 6), {"stride": 2}),
        (3, (6, 6), {"padding": 2, "dilation": 2}),
    ]:
        check_convolution(torch.randn(2, 2, k, k, generator=generator, dtype=F64), size, **options)


def check_tight() -> None:
    """At the paper's image size the bound costs less than a percent."""
    torch.manual_seed(0)
    check_convolution(torch.randn(1, 1, 3, 3, dtype=F64), (32, 32), 1.01, padding=1)


def check_smallest_singular_value(weight: Tensor, size: tuple[int, int], mode: str = "zeros") -> float:
    claimed = norms.conv2d_smallest_singular_value(weight, size, padding_mode=mode)
    layer = convolution(weight, padding=weight.shape[2] // 2, padding_mode=mode)
    matrix = dense_matrix(layer, (weight.shape[1], *size))
    least = float(torch.linalg.svdvals(matrix)[-1]) if matrix.shape[0] >= matrix.shape[1] else 0.0
    assert claimed <= least * (1 + 1e-12) + 1e-13, f"claims {claimed}, is {least}"
    return claimed


@st.composite
def geometries(draw: st.DrawFn) -> tuple[Tensor, tuple[int, int], dict[str, Any]]:
    groups = draw(st.sampled_from([1, 1, 2]))
    size = (draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    kernel = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    dilation = (draw(st.integers(1, 3)), draw(st.integers(1, 2)))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    mode = draw(st.sampled_from(["zeros", "zeros", "circular", "reflect", "replicate"]))
    padding = []
    for n, k, r in zip(size, kernel, reach, strict=True):
        most = {"zeros": k + 1, "circular": n, "reflect": n - 1, "replicate": k}[mode]
        assume(n + 2 * most >= r)  # the kernel has to fit
        padding.append(draw(st.integers(max(0, -(-(r - n) // 2)), most)))
    options = {
        "stride": (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        "padding": tuple(padding),
        "dilation": dilation,
        "groups": groups,
        "padding_mode": mode,
    }
    shape = (groups * draw(st.integers(1, 2)), draw(st.integers(1, 2)), *kernel)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(shape, generator=generator, dtype=F64)
    if draw(st.booleans()):
        weight = weight.sign()
    return weight, size, options


@given(geometries())
@QUICK
def test_bound_holds_for_every_geometry(case: tuple[Tensor, tuple[int, int], dict[str, Any]]) -> None:
    weight, size, options = case
    check_convolution(weight, size, **options)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 2), st.integers(0, 2**31))
@QUICK
def test_transposed_convolution_has_the_norm_of_its_convolution(s: int, k: int, n: int, groups: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer = nn.ConvTranspose2d(2 * groups, groups, k, stride=s, padding=0, groups=groups, bias=False, dtype=F64)
    output = layer(torch.zeros(1, 2 * groups, n, n, dtype=F64)).shape[2:]
    bound = norms.conv2d_norm(layer.weight.detach(), tuple(output), stride=s, groups=groups)
    assert bound >= dense_norm(layer, (2 * groups, n, n)) * (1 - 1e-12)


def test_three_pixels() -> None:
    check_three_pixels()


def test_groups() -> None:
    check_groups()


def test_random_convolutions() -> None:
    check_random_convolutions()


def test_tight_at_the_papers_size() -> None:
    check_tight()


def test_known_kernels() -> None:
    box, sign = torch.ones(1, 1, 3, 3, dtype=F64), torch.tensor([[1.0, -1, 1], [-1, 1, -1], [1, -1, 1]], dtype=F64)
    # The 1-D box on n pixels is 1 + 2cos(π/(n + 1)) (Toeplitz, tridiagonal); in two dimensions its square.
    true = (1 + 2 * math.cos(math.pi / 13)) ** 2
    for kernel in (box, sign.view(1, 1, 3, 3)):
        bound = norms.conv2d_norm(kernel, 12, padding=1)
        assert true <= bound <= 9 * (1 + 1e-8)
    shift = torch.zeros(1, 1, 3, 3, dtype=F64)
    shift[0, 0, 0, 2] = 1
    assert norms.conv2d_norm(shift, 6, padding=1) == pytest.approx(1, abs=1e-8)
    orthogonal = torch.linalg.qr(torch.randn(4, 4, dtype=F64)).Q.view(4, 4, 1, 1)
    assert norms.conv2d_norm(orthogonal, 5) == pytest.approx(1, abs=1e-8)
    rank_one = torch.einsum("o,i,h,w->oihw", *(torch.tensor(v, dtype=F64) for v in ([3, 4], [5, 12], [1.0], [1.0])))
    assert norms.conv2d_norm(rank_one, 5) == pytest.approx(5 * 13, rel=1e-8)


@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e-200, 1e200, 1e-323])
def test_bound_scales_with_the_weight(scale: float) -> None:
    weight = torch.tensor([[[[1.0, 2.0], [0.0, 1.0]]]], dtype=F64)
    once, scaled = norms.conv2d_norm(weight, 4, padding=1), norms.conv2d_norm(weight * scale, 4, padding=1)
    assert scaled == pytest.approx(once * scale, rel=1e-12, abs=1e-322)
    assert scaled > 0
    matrix = torch.tensor([[3 * scale, 4 * scale]], dtype=F64)
    assert norms.linear_norm(matrix) >= 5 * scale * (1 - 1e-12)


def test_circular_padding_of_constant_size_is_exact() -> None:
    torch.manual_seed(0)
    for k, n in [(3, (5, 4)), (5, (3, 7)), (5, (2, 2))]:
        weight = torch.randn(2, 3, k, k, dtype=F64)
        check_convolution(weight, n, 1 + 1e-8, padding=k // 2, padding_mode="circular")


def test_patches_are_exact() -> None:
    assert norms.conv2d_norm(torch.zeros(2, 2, 3, 3), 4, padding=1) == 0
    weight = torch.randn(5, 2, 2, 2, dtype=F64)
    true = float(torch.linalg.matrix_norm(weight.flatten(1), 2))
    assert norms.conv2d_norm(weight, 6, stride=2) == pytest.approx(true, rel=1e-8)


def test_paddings_on_two_sides_may_differ() -> None:
    weight = torch.randn(1, 1, 4, 4, dtype=F64)
    layer = nn.Sequential(nn.ZeroPad2d((2, 1, 1, 2)), convolution(weight))
    true = dense_norm(layer, (1, 5, 5))
    assert true * (1 - 1e-12) <= norms.conv2d_norm(weight, 5, padding=((1, 2), (2, 1))) <= 1.3 * true
    assert norms.conv2d_norm(weight, 5, padding="same") >= dense_norm(convolution(weight), (1, 5, 5))


def test_screening_by_cholesky_finds_the_largest_of_all() -> None:
    torch.manual_seed(3)
    for weight in (
        torch.randn(6, 4, 3, 3, dtype=F64),
        torch.linalg.qr(torch.randn(5, 5, dtype=F64)).Q[..., None, None],
    ):
        everything = torch.cat(list(symbols(weight, (9, 8))))
        assert largest_norm(symbols(weight, (9, 8))) == pytest.approx(
            float(torch.linalg.svdvals(everything).max()), rel=1e-9
        )


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 2), st.integers(0, 2**31))
@settings(QUICK, max_examples=40)
def test_bound_for_any_size(k_h: int, k_w: int, dilation: int, seed: int) -> None:
    weight = torch.randn(2, 2, k_h, k_w, generator=torch.Generator().manual_seed(seed), dtype=F64)
    bound = norms.conv2d_norm_any_size(weight, dilation=dilation)
    fine = norms.conv2d_norm(weight, 61, padding_mode="circular", padding=0)
    assert fine * (1 - 1e-9) <= bound <= 1.02 * fine
    coarse = norms.conv2d_norm_any_size(weight, grid=1)
    assert coarse >= fine * (1 - 1e-9)
    for stride in (1, 2):
        bound = norms.conv2d_norm_any_size(weight, dilation=dilation, stride=stride)
        options: dict[str, Any] = {"padding": 3, "dilation": dilation, "stride": stride}
        assert bound >= dense_norm(convolution(weight, **options), (2, 5, 4)) * (1 - 1e-12)


@given(st.floats(0, 0.4), st.integers(1, 6), st.integers(1, 6), st.integers(1, 2), st.integers(0, 2**31))
@settings(QUICK, max_examples=60)
def test_smallest_singular_value_is_a_lower_bound(noise: float, h: int, w: int, channels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = noise * torch.randn(channels, channels, 3, 3, generator=generator, dtype=F64)
    weight[:, :, 1, 1] += torch.eye(channels)
    check_smallest_singular_value(weight, (h, w))
    check_smallest_singular_value(weight, (h, w), "circular")


def test_smallest_singular_value_where_it_matters() -> None:
    near = torch.zeros(1, 1, 3, 3, dtype=F64)
    near[0, 0, 1, 1], near[0, 0, 0, 1] = 1, 0.25
    assert check_smallest_singular_value(near, (6, 6)) > 0.5
    shift = torch.zeros(1, 1, 3, 3, dtype=F64)
    shift[0, 0, 0, 1] = 1  # orthogonal on a torus, and loses a row of every zero-padded image
    assert check_smallest_singular_value(shift, (6, 6)) == 0
    assert check_smallest_singular_value(shift, (6, 6), "circular") == pytest.approx(1, abs=1e-8)
    wide = torch.cat([near, 0 * near], dim=1)  # the second channel is lost
    assert check_smallest_singular_value(wide, (4, 4)) == 0
    # One row of pixels, both borders at once: σ_min = 1/3, where max instead of sum would claim √5/3.
    both = torch.zeros(1, 1, 3, 3, dtype=F64)
    both[0, 0, :, 1] = torch.tensor([2.0, -1.0, 2.0]) / 3
    assert check_smallest_singular_value(both, (1, 5)) == 0


def test_matrices() -> None:
    torch.manual_seed(0)
    for shape in [(3, 5), (5, 3), (4, 4), (1, 7)]:
        matrix = torch.randn(shape, dtype=F64)
        lower, upper = norms.singular_value_bounds(matrix)
        values = torch.linalg.svdvals(matrix)
        assert values[0] <= upper <= values[0] * (1 + 1e-8)
        least = float(values[-1]) if shape[0] >= shape[1] else 0.0
        assert least - 1e-8 * upper <= lower <= least
    assert norms.singular_value_bounds(torch.ones(3, 2))[0] <= 1e-12  # rank 1


def test_absolute_norm_bounds_the_map_with_absolute_weights() -> None:
    weight = torch.randn(4, 2, 3, 3, dtype=F64)
    for groups in (1, 2):
        true = dense_norm(convolution(weight.abs(), padding=1, groups=groups), (2 * groups, 5, 5))
        assert norms.absolute_norm(weight, groups) >= true


def test_a_changed_weight_is_seen() -> None:
    weight = torch.tensor([[[[-1.0, 2.0, -1.0]]]])
    before = norms.conv2d_norm(weight, (1, 4), padding=(0, 1))
    assert norms.conv2d_norm(weight, (1, 5), padding=(0, 1)) > before
    weight[0, 0, 0, 1] = 3
    assert norms.conv2d_norm(weight, (1, 4), padding=(0, 1)) > before


def test_power_iteration_estimates_from_below() -> None:
    weight = torch.randn(2, 2, 3, 3, dtype=F64)
    true = dense_norm(convolution(weight, padding=1), (2, 6, 6))
    estimate = norms.power_iteration_norm_estimate(weight, 6, padding=1, iterations=200)
    assert 0.9 * true < estimate <= true * (1 + 1e-12)


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (torch.full((1, 1, 3, 3), math.nan), {}, "NaN"),
        (torch.full((1, 1, 3, 3), math.inf), {}, "infinite"),
        (torch.ones(1, 1, 7, 7), {}, "does not fit"),
        (torch.ones(3, 1, 1, 1), {"groups": 2}, "groups"),
        (torch.ones(3, 1, 1, 1), {"padding_mode": "mirror"}, "padding_mode"),
        (torch.ones(3, 1), {}, "four dimensions"),
        (torch.ones(0, 1, 1, 1), {}, "no entries"),
    ],
)
def test_refusals(weight: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        norms.conv2d_norm(weight, 4, **options)
