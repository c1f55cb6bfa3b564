"""Rules of single layers against dense matrices and slopes, and what the registry refuses."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from robustflow import norms
from robustflow.bounds import LayerBound, account, layer_bounds, register
from robustflow.errors import UserError
from robustflow.fields import GradientField
from robustflow.networks import Normalize
from robustflow.operators import Convolution, PatchConvolution
from robustflow.steps import EulerStep

F64 = torch.float64
HOLDS = 1 + 1e-10


def jacobian_norm(module: nn.Module, x: Tensor) -> float:
    """‖J‖₂ at one point, from the full Jacobian."""
    with torch.enable_grad():
        jacobian = torch.autograd.functional.jacobian(lambda v: module(v[None])[0].flatten(), x)
    return float(torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()), 2))


def matrix_norm(module: nn.Module, shape: tuple[int, ...]) -> float:
    return jacobian_norm(module, torch.zeros(shape, dtype=F64))


def bound_of(module: nn.Module, shape: tuple[int, ...]) -> float:
    return account(module, shape).lipschitz


def check_overlapping_pool() -> None:
    """A pixel that nine windows see can move nine outputs: √9, attained."""
    for pool, shape, windows in [
        (nn.MaxPool2d(3, 1, 1), (1, 5, 5), 9),
        (nn.MaxPool2d(3, 2), (1, 7, 7), 4),
        (nn.MaxPool2d((3, 2), (1, 2)), (1, 6, 6), 3),
        (nn.MaxPool2d(2), (1, 4, 4), 1),
        (nn.MaxPool2d(3, 2, 1, dilation=2), (1, 9, 9), 1),
        (nn.MaxPool2d(2, 2, 1, ceil_mode=True), (1, 5, 5), 1),
    ]:
        found = 0.0
        for pixel in range(math.prod(shape)):
            x = torch.zeros(math.prod(shape), dtype=F64)
            x[pixel] = 1
            found = max(found, float(pool(x.view(1, *shape)).sum()) ** 0.5)
        claimed = bound_of(pool, shape)
        assert found <= claimed * HOLDS, f"{pool}: an impulse reaches {found}, claimed {claimed}"
        if windows in (9, 3) or pool.dilation == 1:
            assert claimed == pytest.approx(math.sqrt(windows)) == pytest.approx(found)


def test_overlapping_pool() -> None:
    check_overlapping_pool()


@pytest.mark.parametrize(
    ("layer", "shape", "slack"),
    [
        (nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=True), (2, 7, 6), 1.6),
        (nn.Conv2d(4, 4, 3, padding="same", groups=2), (4, 4, 4), 1.6),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (2, 5, 5), 1 + 1e-8),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (4, 4, 3), 1.6),
        (nn.Linear(7, 5), (7,), 1 + 1e-8),
        (nn.AvgPool2d(2), (1, 4, 4), 1 + 1e-8),
        (nn.AvgPool2d(3, 2, 1), (1, 5, 6), 1 + 1e-8),
        (nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), (1, 6, 5), 1 + 1e-8),
        (nn.AvgPool2d(3, 1, 1, divisor_override=-2), (1, 4, 4), 1 + 1e-8),
        (nn.AdaptiveAvgPool2d((3, 2)), (1, 7, 5), 1 + 1e-8),
        (nn.AdaptiveAvgPool2d(1), (2, 4, 4), 1 + 1e-8),
        (nn.AdaptiveAvgPool2d(5), (1, 3, 3), 1 + 1e-8),
        (nn.PixelShuffle(2), (4, 2, 2), 1 + 1e-8),
        (nn.PixelUnshuffle(2), (1, 4, 4), 1 + 1e-8),
        (nn.ZeroPad2d(2), (1, 3, 3), 1 + 1e-8),
        (nn.Flatten(), (2, 2, 2), 1 + 1e-8),
        (nn.Dropout(0.9).eval(), (4,), 1 + 1e-8),
        (nn.BatchNorm2d(3).eval(), (3, 2, 2), 1 + 1e-8),
        (nn.BatchNorm1d(3, affine=False).eval(), (3,), 1 + 1e-8),
        (Normalize([0.1, 0.2], [0.5, 0.3]), (2, 2, 2), 1 + 1e-8),
        (Convolution(2, 3, 5), (2, 4, 6), 1.6),
        (PatchConvolution(2, 3, 2, shift=1), (2, 4, 4), 1 + 1e-8),
        (PatchConvolution(1, 3, 2), (1, 5, 5), 1 + 1e-8),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_linear_layers(layer: nn.Module, shape: tuple[int, ...], slack: float) -> None:
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).double()
    if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
        layer.running_var.copy_(torch.tensor([0.1, 1.0, 2.0]))
        if layer.weight is not None:
            layer.weight.data = torch.tensor([0.5, -3.0, 1.0], dtype=F64)
    true, bound = matrix_norm(layer, shape), bound_of(layer, shape)
    assert true <= bound * HOLDS
    assert bound <= slack * true


@pytest.mark.parametrize(
    "layer",
    [
        nn.ReLU(),
        nn.ReLU6(),
        nn.Hardtanh(-2, 3),
        nn.LeakyReLU(0.1),
        nn.LeakyReLU(-1.5),
        nn.PReLU(init=1.25),
        nn.Tanh(),
        nn.Sigmoid(),
        nn.Softplus(),
        nn.Softplus(beta=3),
        nn.ELU(1.5),
        nn.GELU(),
        nn.SiLU(),
    ],
    ids=str,
)
def test_elementwise_layers(layer: nn.Module) -> None:
    # Softplus is compared below the threshold from which torch replaces it by the identity, with a jump of 2e-9.
    grid = torch.linspace(-12, 6, 40001, dtype=F64)
    with torch.no_grad():
        steepest = float((layer.double()(grid).diff() / grid.diff()).abs().max())
    claimed = bound_of(layer, (3,))
    assert steepest <= claimed * (1 + 1e-9)
    assert claimed <= steepest * 1.003


# ------------------------------------------------------------------------------------------------------------- refusals
class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * x


class OtherConvolution(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 5 * super().forward(x)


class OtherInside(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, 5 * weight, bias)


class OtherSequential(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class OtherField(GradientField):
    def forward(self, x: Tensor) -> Tensor:
        return 9 * super().forward(x)


def hooked() -> nn.Module:
    layer = nn.ReLU()
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    return layer


def patched() -> nn.Module:
    layer = nn.ReLU()
    layer.forward = lambda x: 2 * x  # type: ignore[method-assign]
    return layer


def poisoned(value: float) -> nn.Module:
    layer = nn.Conv2d(1, 1, 1)
    torch.nn.init.constant_(layer.weight, value)
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Unknown, r"0\.1 is a Unknown.*register"),
        (lambda: nn.LayerNorm(2), "LayerNorm"),
        (lambda: nn.Softmax(-1), "Softmax"),
        (lambda: OtherConvolution(1, 1, 1), r"0\.1 \(OtherConvolution\) overrides"),
        (lambda: OtherInside(1, 1, 1), "overrides"),
        (lambda: OtherSequential(nn.ReLU()), "overrides"),
        (lambda: EulerStep(OtherField(PatchConvolution(1, 4, 2)), 1.0), "overrides"),
        (lambda: EulerStep(Unknown(), 1.0), "Unknown has no Lipschitz rule"),  # type: ignore[arg-type]
        (hooked, "hooks"),
        (patched, "overrides"),
        (lambda: nn.BatchNorm2d(1), r"0\.1: BatchNorm2d.*eval"),
        (lambda: nn.BatchNorm2d(1, track_running_stats=False).eval(), "eval"),
        (lambda: nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)), r"0\.1\.1"),
        (lambda: nn.Dropout(0.5), "training mode"),
        (lambda: poisoned(math.nan), r"0\.1\.weight holds NaN"),
        (lambda: poisoned(math.inf), "infinite"),
        (lambda: nn.Conv2d(1, 1, 1).half(), r"0\.1\.weight is float16"),
        (lambda: nn.Conv2d(1, 1, 1).bfloat16(), "bfloat16"),
        (lambda: nn.GELU(approximate="tanh"), "approximate"),
        (lambda: nn.MaxPool2d(2, return_indices=True), "indices"),
        (lambda: nn.Flatten(0), "batch"),
        (lambda: nn.Conv2d(7, 1, 1), r"0\.1 \(Conv2d\) does not take"),
        (lambda: Normalize([0.0], [0.0]), "standard deviation"),
    ],
)
def test_refusals_name_the_layer(make: Callable[[], nn.Module], message: str) -> None:
    net = nn.Sequential(nn.Sequential(nn.Identity(), make()))
    with pytest.raises(UserError, match=message):
        account(net, (1, 2, 2))


def test_registered_rules_are_used_and_not_folded_away() -> None:
    class Tripled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * super().forward(x)

    @register(Tripled)
    def _(module: Tripled, shape: tuple[int, ...], name: str) -> list[LayerBound]:
        return [LayerBound(name, "Tripled", "3σ", 3 * norms.conv2d_norm(module.weight, shape[1:]))]

    net = nn.Sequential(Normalize([0.0], [0.5]), Tripled(1, 1, 1, bias=False))
    torch.nn.init.constant_(net[1].weight, 1.0)
    assert bound_of(net, (1, 2, 2)) == pytest.approx(6)


def test_a_rule_that_returns_nonsense_is_refused() -> None:
    class Nonsense(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    register(Nonsense)(lambda module, shape, name: [LayerBound(name, "Nonsense", "", math.nan)])
    with pytest.raises(UserError, match="no Lipschitz bound"):
        layer_bounds(Nonsense(), (1,), "0")
