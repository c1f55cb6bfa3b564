"""Wrong formulas, planted one at a time: each has to be caught by a check that the true formula passes.

The checks are those of the other test files (where they run against the true code).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustflow import bounds, certificates, layer_rules, norms, peers, rounding, spectra, step_rules
from robustflow.layer_rules import LayerBound
from robustflow.operators import Convolution
from robustflow.peers import AOLConvolution, CayleyConvolution, SLLStep, absolute_gram


def _tests_of(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"mutated_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


norm_tests, bound_tests = _tests_of("test_norms"), _tests_of("test_bounds")
layer_tests, step_tests = _tests_of("test_layer_rules"), _tests_of("test_step_rules")
radius_tests, falsifier_tests = _tests_of("test_certificates"), _tests_of("test_falsifier")
rounding_tests, peer_tests = _tests_of("test_rounding"), _tests_of("test_peers")


@pytest.fixture(autouse=True)
def _forget_norms() -> Iterator[None]:
    """Bounds are remembered by weight and arguments, not by formula: forget those of the true and of the wrong one."""
    caches = (norms.conv2d_norm, norms.conv2d_norm_any_size, norms.conv2d_smallest_singular_value, norms.linear_norm)
    for cache in caches:
        cache.cache_clear()  # type: ignore[attr-defined]
    yield
    for cache in caches:
        cache.cache_clear()  # type: ignore[attr-defined]


@contextmanager
def wrong_rule(kind: type[nn.Module], rule: Callable[..., list[LayerBound]]) -> Iterator[None]:
    right = layer_rules._rules.dispatch(kind)
    layer_rules.register(kind)(rule)
    try:
        yield
    finally:
        layer_rules.register(kind)(right)


def caught_by(*checks: Callable[[], Any]) -> None:
    for check in checks:
        with pytest.raises(AssertionError):
            check()


def test_power_iteration_for_a_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    def estimate(weight: Tensor, size: Any, *, padding: Any = 0, stride: Any = 1, **_: Any) -> float:
        return norms.power_iteration_norm_estimate(weight, size, padding=padding, stride=stride, iterations=10)

    monkeypatch.setattr(norms, "conv2d_norm", estimate)
    caught_by(norm_tests.check_random_convolutions, falsifier_tests.check_falsifier_agrees)


def test_symbol_at_the_size_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    size = property(lambda axis: axis.stride * math.ceil(axis.n / axis.stride))
    monkeypatch.setattr(spectra.Axis, "torus", size)
    caught_by(norm_tests.check_three_pixels)


def test_missing_division_by_std(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets(module: nn.Module) -> Tensor:
        return torch.ones(2 if len(getattr(module, "std", [])) == 2 else 1, dtype=torch.float64)

    monkeypatch.setattr(bounds, "affine_scale", forgets)
    caught_by(bound_tests.check_normalisation_counts, radius_tests.check_normalised_radius)


def test_step_size_without_its_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    right = step_rules._step
    monkeypatch.setattr(step_rules, "_step", lambda h, field, shape, keep: right(abs(h), field, shape, keep))
    caught_by(step_tests.check_steps, step_tests.check_exact_step, falsifier_tests.check_falsifier_agrees)


def test_orthogonality_under_zero_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_rules, "smallest_singular_value", lambda operator, shape: 1.0)
    caught_by(step_tests.check_steps)


def test_smallest_singular_value_of_the_torus(monkeypatch: pytest.MonkeyPatch) -> None:
    right = norms.conv2d_smallest_singular_value

    def on_the_torus(weight: Tensor, size: Any, *, padding_mode: str = "zeros") -> float:
        return right(weight, size, padding_mode="circular")

    monkeypatch.setattr(norms, "conv2d_smallest_singular_value", on_the_torus)
    caught_by(step_tests.check_steps, norm_tests.test_smallest_singular_value_where_it_matters)


def test_mixed_paddings(monkeypatch: pytest.MonkeyPatch) -> None:
    def circular_adjoint(self: Convolution, y: Tensor) -> Tensor:
        kernel = self.weight.flip(2, 3).transpose(0, 1)
        return F.conv2d(F.pad(y, (self.padding,) * 4, mode="circular"), kernel)

    monkeypatch.setattr(Convolution, "adjoint", circular_adjoint)
    caught_by(step_tests.check_adjoint_padding)


def test_overlapping_pool_counted_once() -> None:
    with wrong_rule(nn.MaxPool2d, lambda module, shape, name: [LayerBound(name, "MaxPool2d", "1", 1.0)]):
        caught_by(layer_tests.check_overlapping_pool)


def test_groups_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    right = norms.conv2d_norm

    def product(weight: Tensor, size: Any, *, groups: int = 1, **options: Any) -> float:
        return math.prod(right(part.clone(), size, **options) for part in weight.chunk(groups))

    monkeypatch.setattr(norms, "conv2d_norm", product)
    caught_by(norm_tests.check_groups)


def test_dropped_root_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows further apart than they are long: ‖w_y − w_j‖ up to √2·‖W‖, dropped."""
    right = certificates._Head.__init__

    def without(self: Any, head: nn.Linear) -> None:
        right(self, head)
        self.distances = self.distances / math.sqrt(2)

    monkeypatch.setattr(certificates._Head, "__init__", without)
    caught_by(
        radius_tests.check_exact_radii,
        lambda: radius_tests.check_planted_adversary(two_classes_on_a_line),
    )


def test_dropped_root_of_two_passes_when_right() -> None:
    assert radius_tests.check_planted_adversary(two_classes_on_a_line) < 1.01


def test_a_pair_of_classes_by_the_length_of_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """‖w_y‖ instead of ‖w_y − w_j‖: opposite rows are twice as far apart as they are long."""
    right = certificates._Head.__init__

    def one_row(self: Any, head: nn.Linear) -> None:
        right(self, head)
        self.distances = self.lengths[:, None].expand_as(self.distances)

    monkeypatch.setattr(certificates._Head, "__init__", one_row)
    caught_by(radius_tests.check_exact_radii, lambda: radius_tests.check_planted_adversary(two_classes_on_a_line))


def test_only_the_second_largest_logit_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nearest class is the one with the smallest quotient of margin and ‖w_y − w_j‖, not the runner-up."""

    def runner_up(self: Any, z: Tensor, error: Tensor, label: Any, lipschitz: float) -> tuple[Tensor, Tensor]:
        first, second = F.linear(z, self.weight, self.bias).topk(2)[1].T
        margin = (z * (self.weight[first] - self.weight[second])).sum(1) + self.bias[first] - self.bias[second]
        return first, margin / (lipschitz * self.distances[first, second])

    monkeypatch.setattr(certificates._Head, "radii", runner_up)
    caught_by(radius_tests.check_exact_radii)


@pytest.mark.parametrize(
    "condition",
    [
        lambda h_c, h_e, slope, largest: 0 <= h_e <= h_c and h_c * largest**2 <= 1,
        lambda h_c, h_e, slope, largest: 0 <= h_e <= slope * h_c,
        lambda h_c, h_e, slope, largest: 0 <= h_e <= slope * h_c and h_c * largest <= 2,
    ],
    ids=["h_E ≤ h_C", "without h_C σ² ≤ 1", "h_C σ ≤ 2"],
)
def test_a_pair_along_one_kernel_under_a_wrong_condition(
    condition: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_rules, "pair_condition", condition)
    caught_by(step_tests.check_shared_pair)


def two_classes_on_a_line(seed: int) -> tuple[nn.Module, tuple[int, int, int]]:
    """A network whose radii are exact, so that no wrong factor hides in the slack of a bound."""
    torch.manual_seed(seed)
    return nn.Sequential(PatchedIdentity(), nn.Flatten(), nn.Linear(4, 2)), (1, 2, 2)


class PatchedIdentity(nn.Identity):
    """Adds nothing; a subclass without code of its own keeps its base's rule."""


def test_residual_without_its_shortcut() -> None:
    from robustflow.baselines import Residual

    def body_only(module: Residual, shape: tuple[int, ...], name: str) -> list[LayerBound]:
        return layer_rules.layer_bounds(module.body, shape, f"{name}.body")

    with wrong_rule(Residual, body_only):
        caught_by(bound_tests.test_residual_adds_its_branches)


def test_a_layer_used_twice_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "flat_children", lambda module, name: list(module.named_children()))
    caught_by(bound_tests.test_a_layer_used_twice_counts_twice)


def test_rounding_inside_a_step_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "_inner_error", lambda inner, hidden, size, bias: 0.0)
    caught_by(rounding_tests.check_long_sums_inside_a_step)


def test_aol_without_its_rescaling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AOLConvolution, "_kernel", lambda self: self.weight)
    caught_by(peer_tests.check_aol)


def test_aol_with_the_row_sums_of_the_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: AOLConvolution) -> Tensor:
        rows = absolute_gram(self.weight.transpose(0, 1)).sum(1)
        return self.weight * rows.rsqrt()[: self.in_channels, None, None].mean()

    monkeypatch.setattr(AOLConvolution, "_kernel", wrong)
    caught_by(peer_tests.check_aol)


def test_sll_that_forgets_to_divide_by_q(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: SLLStep) -> tuple[Tensor, Tensor]:
        t = absolute_gram(self.weight.transpose(0, 1)) @ self.log_q.exp()
        return self.weight * t.rsqrt().view(-1, 1, 1, 1), self.bias * t.rsqrt()

    monkeypatch.setattr(SLLStep, "_kernel", wrong)
    caught_by(peer_tests.check_sll)


def test_row_sums_at_one_displacement_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(kernel: Tensor) -> Tensor:
        rows = kernel.transpose(0, 1).flatten(1)
        return (rows @ rows.T).abs()

    monkeypatch.setattr(peers, "absolute_gram", wrong)
    caught_by(peer_tests.check_aol, peer_tests.check_sll)


def test_cayley_with_zero_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The orthogonal map of a larger torus, cut down to the image: it never expands, and is not orthogonal."""
    right = CayleyConvolution.forward

    def cut(self: CayleyConvolution, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        return right(self, F.pad(x, (0, 2, 0, 2)))[..., :height, :width]

    monkeypatch.setattr(CayleyConvolution, "forward", cut)
    caught_by(peer_tests.check_cayley)


def test_cayley_with_a_transpose_for_an_adjoint(monkeypatch: pytest.MonkeyPatch) -> None:
    right = CayleyConvolution._skew

    def transposed(self: CayleyConvolution, height: int, width: int) -> Tensor:
        skew = right(self, height, width)
        return torch.complex(skew.real, skew.imag - 2 * skew.imag.triu(1))

    monkeypatch.setattr(CayleyConvolution, "_skew", transposed)
    caught_by(peer_tests.check_cayley)


def test_cayley_that_forgets_the_middle_frequency_of_even_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    right = CayleyConvolution._kernel

    def forgets(self: CayleyConvolution, height: int, width: int) -> Tensor:
        kernel = right(self, height, width).view(height, width // 2 + 1, self.channels, self.channels).clone()
        if width % 2 == 0:
            kernel[:, -1] = torch.eye(self.channels) / 2
        return kernel.flatten(0, 1)

    monkeypatch.setattr(CayleyConvolution, "_kernel", forgets)
    caught_by(peer_tests.check_cayley)
