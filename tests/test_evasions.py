"""Networks that once got a certificate that was wrong, each with the expansion that refutes it: refused, or bounded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from robustflow import norms, spectra
from robustflow.baking import baked_copy
from robustflow.baselines import Residual
from robustflow.bounds import account
from robustflow.certificates import certify
from robustflow.errors import UserError
from robustflow.falsifier import falsify, falsify_network
from robustflow.fields import GradientField, TwoKernelField
from robustflow.layer_rules import LayerBound, layer_bounds, register
from robustflow.networks import Classifier
from robustflow.operators import Convolution, PatchConvolution
from robustflow.peers import CayleyConvolution, SLLStep
from robustflow.rounding import Rounding, forward_with_error, register_rounding
from robustflow.step_rules import shared_kernel_pair, smallest_singular_value
from robustflow.steps import AveragedStep, EulerStep

F64 = torch.float64


def bound_of(module: nn.Module, shape: tuple[int, ...]) -> float:
    return account(module, shape).lipschitz


def identity_patches() -> PatchConvolution:
    patches = PatchConvolution(1, 4, 2).double()
    patches.weight.data = torch.eye(4, dtype=F64)
    return patches


# ---------------------------------------------------------------------------------------------- slopes, signs, paddings
@pytest.mark.parametrize("slope", [5.0, -0.1, 1.0, math.nan])
@pytest.mark.parametrize("kind", [GradientField, TwoKernelField])
def test_a_field_is_not_built_with_a_slope_outside_0_1(kind: type, slope: float) -> None:
    operators = [identity_patches() for _ in range(1 if kind is GradientField else 2)]
    with pytest.raises(ValueError, match="slope of a leaky ReLU"):
        kind(*operators, slope=slope)


@pytest.mark.parametrize(("name", "value"), [("slope", 5.0), ("slope", -0.1), ("slope", math.nan), ("sign", 3)])
@pytest.mark.parametrize("step", [lambda field: EulerStep(field, 0.9), AveragedStep])
def test_a_slope_or_a_sign_that_was_changed_is_refused(
    step: Callable[[nn.Module], nn.Module], name: str, value: float
) -> None:
    fields = [GradientField(identity_patches()), GradientField(identity_patches(), sign=1)]
    fields += [TwoKernelField(identity_patches(), identity_patches())] if name == "slope" else []  # type: ignore[list-item]
    for field in fields:
        setattr(field, name, value)
        with pytest.raises(UserError, match=f"{type(field).__name__} has .*{name}"):
            bound_of(step(field), (1, 2, 2))


def test_a_changed_padding_costs_the_smallest_singular_value() -> None:
    """A kernel that is 1 in its middle keeps everything; without padding it loses the border, which stays as it is."""
    convolution = Convolution(1, 1, 3).double()
    with torch.no_grad():
        convolution.weight.zero_()[0, 0, 1, 1] = 1
    step = EulerStep(GradientField(convolution, slope=0.5), 1.0).double()
    assert bound_of(step, (1, 6, 6)) == pytest.approx(0.5)
    for padding in (0, (0, 1), 2):
        convolution.padding = padding  # type: ignore[assignment]
        assert smallest_singular_value(convolution, (1, 6, 6)) == 0
    convolution.padding = 0
    found = falsify(step, torch.rand(2, 1, 6, 6), claimed=0.5)
    assert found.violated
    assert bound_of(step, (1, 6, 6)) >= found.observed - found.rounding


def test_a_changed_padding_of_an_sll_step_is_refused() -> None:
    step = SLLStep(2)
    step.padding = 3
    with pytest.raises(UserError, match="padding"):
        layer_bounds(step, (2, 4, 4))


def test_a_convolution_whose_forward_pads_otherwise_than_it_says_is_refused() -> None:
    """torch pads circularly by numbers that it keeps from construction."""
    layer = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular", bias=False)
    before = bound_of(layer, (1, 4, 4))
    assert before > 0
    for padding in ((0, 0), "valid", (2, 1)):
        layer.padding = padding
        with pytest.raises(UserError, match="padding"):
            bound_of(layer, (1, 4, 4))
    layer.padding = "same"
    assert bound_of(layer, (1, 4, 4)) == before


# ------------------------------------------------------------------------------------------------------------- in place
def test_an_activation_that_overwrites_what_the_other_branch_reads_is_refused() -> None:
    linear = nn.Linear(1, 1, bias=False, dtype=F64)
    linear.weight.data.fill_(0.1)
    steep = nn.LeakyReLU(5.0, inplace=True)
    for block in (
        Residual(nn.Sequential(steep, linear)),
        Residual(nn.Sequential(linear), nn.Sequential(nn.Identity(), steep)),
        Residual(nn.Sequential(Residual(nn.Sequential(linear)), steep)),
    ):
        with pytest.raises(UserError, match=r"LeakyReLU.*inplace=False"):
            bound_of(nn.Sequential(block), (1,))
    assert bound_of(Residual(nn.Sequential(nn.LeakyReLU(5.0), linear)), (1,)) == pytest.approx(1.5)
    assert bound_of(nn.Sequential(nn.Identity(), steep, linear), (1,)) == pytest.approx(0.5)


def test_the_second_view_of_a_mirror_average_sees_the_image_not_what_the_first_left() -> None:
    features = nn.Sequential(nn.LeakyReLU(5.0, inplace=True), nn.Flatten())
    model = Classifier(features, nn.Linear(4, 2), (1, 2, 2), regime="own", mirror=True).eval()
    for refused in (lambda: certify(model, torch.rand(2, 1, 2, 2)), lambda: account(model, (1, 2, 2))):
        with pytest.raises(UserError, match=r"LeakyReLU.*inplace=False"):
            refused()
    model.mirror = False
    certify(model, torch.rand(2, 1, 2, 2))


def test_images_are_left_as_they_are() -> None:
    net = nn.Sequential(nn.Hardtanh(0, 0.5, inplace=True), nn.Flatten(), nn.Linear(4, 2)).double()
    images = torch.rand(3, 1, 2, 2, dtype=F64)
    before = images.clone()
    certify(net, images)
    falsify_network(net, images, iterations=2)
    falsify(net[:2], images, iterations=2)
    assert torch.equal(images, before)


def test_the_rounding_of_an_activation_in_place_is_counted_on_its_input() -> None:
    x = torch.full((1, 3), -300.0, dtype=F64)
    zero = torch.zeros(1, dtype=F64)
    _, expected = forward_with_error(nn.SiLU(), x.clone(), zero)
    _, found = forward_with_error(nn.SiLU(inplace=True), x.clone(), zero)
    assert found.tolist() == expected.tolist()


# ------------------------------------------------------------------------------------------------ code that is not read
def double(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers).double()


class Repeated(nn.Sequential):
    def __iter__(self) -> Iterator[nn.Module]:
        return iter([*self._modules.values()] * 3)  # type: ignore[list-item]


class Shorter(nn.Sequential):
    def __len__(self) -> int:
        return 1


class Last(nn.Sequential):
    def __getitem__(self, index: Any) -> Any:
        return nn.Linear(2, 2)


class Elsewhere(Residual):
    def __getattr__(self, name: str) -> Any:
        return nn.Linear(2, 2) if name == "body" else super().__getattr__(name)


@pytest.mark.parametrize("kind", [Repeated, Shorter, Last])
def test_a_sequential_with_an_order_of_its_own_is_refused(kind: type[nn.Sequential]) -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(UserError, match=f"{kind.__name__}.*overrides"):
        bound_of(nn.Sequential(kind(layer)), (2,))
    with pytest.raises(UserError, match=f"{kind.__name__}.*overrides"):
        certify(kind(nn.Flatten(), layer), torch.rand(1, 1, 1, 2))


def test_a_block_that_answers_for_its_parts_is_refused() -> None:
    with pytest.raises(UserError, match=r"Elsewhere.*overrides"):
        bound_of(Elsewhere(nn.Sequential(nn.Identity())), (2,))


class Steeper(EulerStep):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


@register(Steeper)
def _(module: Steeper, shape: tuple[int, ...], name: str) -> list[LayerBound]:
    return [LayerBound(name, "Steeper", "3·2", 6.0)]


class SteeperField(GradientField):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


def test_a_step_with_code_of_its_own_is_no_half_of_a_pair() -> None:
    kernel = PatchConvolution(1, 2, 2)  # of four directions it sees two: a contractive step alone has the constant 1
    kernel.constrain_(exact=True)
    kernel.weight.data.mul_(1 - 1e-6)
    expand, contract = (EulerStep(GradientField(kernel, slope=0.5, sign=s), h) for s, h in ((1, 0.24), (-1, 0.5)))
    assert bound_of(double(expand, contract), (1, 2, 2)) == 1
    steeper = Steeper(GradientField(kernel, slope=0.5, sign=1), 0.25)
    for pair in (double(steeper, contract), double(contract, steeper)):
        assert falsify(pair, torch.rand(2, 1, 2, 2), claimed=1.0).violated
        assert bound_of(pair, (1, 2, 2)) > 4
    hooked = EulerStep(GradientField(kernel, slope=0.5, sign=1), 0.25)
    hooked.field.register_forward_hook(lambda module, inputs, output: 3 * output)
    other = EulerStep(SteeperField(kernel, slope=0.5, sign=1), 0.25)
    for step in (steeper, hooked, other):
        assert shared_kernel_pair(step, contract, (1, 2, 2)) is None
        assert shared_kernel_pair(contract, step, (1, 2, 2)) is None


class DoubledFlatten(nn.Flatten):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_flatten_with_code_of_its_own_has_a_length_of_its_own() -> None:
    register(DoubledFlatten)(lambda module, shape, name: [LayerBound(name, "DoubledFlatten", "2", 2.0)])
    register_rounding(DoubledFlatten)(lambda module, shape, constant: Rounding())
    x, zero = torch.rand(1, 1, 2, 2, dtype=F64), torch.zeros(1, dtype=F64)
    linear = nn.Linear(4, 3).double()
    before = nn.Tanh()  # measures the length of what it makes
    _, whole = forward_with_error(double(before, DoubledFlatten(), linear), x, zero)
    out, error = forward_with_error(before, x, zero)
    _, apart = forward_with_error(linear, 2 * out.flatten(1), 2 * error)
    assert float(whole) >= float(apart) * (1 - 1e-6)


# ----------------------------------------------------------------------------------------------------- parametrisations
def test_a_parametrised_weight_in_training_mode_is_refused() -> None:
    """Each reading of spectral_norm's weight in training mode is a power iteration: a copy's is not what is stored."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    images = torch.rand(2, 1, 2, 2)
    for part in (net, net.eval()[1].parametrizations.weight):
        part.train()
        with pytest.raises(UserError, match=r"training mode: call \.eval\(\)"):
            certify(net, images)
        with pytest.raises(UserError, match=r"training mode: call \.eval\(\)"):
            baked_copy(net)
        with pytest.raises(UserError, match=r"1 has .* training mode: call \.eval\(\)"):
            account(net, (1, 2, 2))
    certify(net.eval(), images)
    net.train()
    parametrize.remove_parametrizations(net[1], "weight")
    certify(net, images)  # nothing is parametrised: the mode makes no difference


# ------------------------------------------------------------------------------------------------------ NaN is no bound
def test_rounding_up_nan_gives_no_bound() -> None:
    assert norms.up(math.nan) == norms.up(1.0, math.nan) == norms.up(0.0, math.nan) == math.inf
    assert norms.up(0.0, math.inf) == norms.up(0.0) == 0
    assert norms.up(1.0) == math.nextafter(1.0, 2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_the_largest_norm_does_not_leave_out_what_is_not_finite(value: float, place: int) -> None:
    batch = torch.eye(2, dtype=torch.complex128).repeat(2, 1, 1)
    batch[place, 0, 1] = value
    for batches in ([batch], [torch.eye(2, dtype=torch.complex128)[None], batch], [batch, batch[:1] * 0]):
        assert spectra.largest_norm(iter(batches)) == math.inf


def test_the_smallest_singular_value_does_not_leave_out_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = torch.zeros(1, 1, 3, 3)
    kernel[0, 0, 1, 1] = 2
    right, calls = torch.linalg.svdvals, []

    def fails_once(matrix: Tensor) -> Tensor:
        calls.append(matrix)
        return right(matrix) * (math.nan if len(calls) == 2 else 1)

    norms.conv2d_smallest_singular_value.cache_clear()  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.linalg, "svdvals", fails_once)
    assert norms.conv2d_smallest_singular_value(kernel, 9) == 0
    norms.conv2d_smallest_singular_value.cache_clear()  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_activation_whose_number_is_not_finite_is_refused(value: float) -> None:
    for layer in (nn.LeakyReLU(value), nn.ELU(value), nn.Softplus(beta=value)):
        with pytest.raises(UserError, match=r"0 \(\w+\) has .*(nan|inf)"):
            bound_of(nn.Sequential(layer), (3,))
    slope: Any = torch.tensor(value)
    with pytest.raises(UserError, match="negative_slope"):
        bound_of(nn.LeakyReLU(slope), (3,))


def test_a_cayley_convolution_has_norm_1_in_real_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    from robustflow import peer_rules

    for measured, bound in ((0.9, 1.0), (math.nan, math.inf)):
        monkeypatch.setattr(peer_rules, "largest_norm", lambda batches, m=measured: m)
        assert layer_bounds(CayleyConvolution(2), (2, 4, 4))[0].bound == bound
