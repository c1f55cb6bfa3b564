"""Rounding errors against the same layers with more digits."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from robustflow.baselines import Residual
from robustflow.certificates import certify
from robustflow.fields import GradientField
from robustflow.layer_rules import LayerBound, register
from robustflow.networks import Normalize
from robustflow.operators import Convolution, PatchConvolution
from robustflow.rounding import FALLBACK, Plan, Rounding, forward_with_error, register_rounding
from robustflow.steps import AveragedStep, EulerStep

F64 = torch.float64


def more_digits(module: nn.Module, x: np.ndarray) -> np.ndarray:
    """The same layers in 80-bit arithmetic, on a vector."""
    if isinstance(module, nn.Sequential):
        for layer in module:
            x = more_digits(layer, x)
        return x
    if isinstance(module, nn.Linear):
        return module.weight.detach().numpy().astype(np.longdouble) @ x + module.bias.detach().numpy()
    if isinstance(module, nn.LeakyReLU):
        return np.where(x > 0, x, np.longdouble(module.negative_slope) * x)
    if isinstance(module, EulerStep):
        weight = module.field.operator.weight.detach().numpy().astype(np.longdouble)
        h = weight @ x + module.field.bias.detach().numpy()
        v = weight.T @ np.where(h > 0, h, np.longdouble(module.field.slope) * h)
        return x + np.longdouble(float(module.step_size.detach())) * module.field.sign * v
    if isinstance(module, AveragedStep):
        weight = module.field.operator.weight.detach().numpy().astype(np.longdouble)
        h = weight @ x + module.field.bias.detach().numpy()
        return (x - weight.T @ np.where(h > 0, h, np.longdouble(module.field.slope) * h)) / 2
    assert isinstance(module, (nn.Flatten, nn.Unflatten))
    return x


@pytest.mark.skipif(np.finfo(np.longdouble).eps >= np.finfo(np.float64).eps, reason="no extended precision here")
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e-3])
def test_rounding_errors_stay_below_their_bound(scale: float) -> None:
    torch.manual_seed(0)
    steps = [EulerStep(GradientField(PatchConvolution(1, 4, 2), slope=0.3, sign=s), 0.7) for s in (1, -1)]
    averaged = AveragedStep(GradientField(PatchConvolution(1, 6, 2), slope=0.3))
    for step in (*steps, averaged):
        torch.nn.init.normal_(step.field.bias)
        step.field.operator.weight.data.mul_(scale)
    layers = [nn.Flatten(), nn.Linear(4, 30), nn.LeakyReLU(0.1), nn.Linear(30, 50), nn.LeakyReLU(0.3), nn.Linear(50, 9)]
    net = nn.Sequential(*steps, averaged, *layers).double()
    x = torch.rand(50, 1, 2, 2, dtype=F64)
    out, error = forward_with_error(net, x, torch.zeros(50, dtype=F64))
    assert torch.allclose(out, net(x))
    for i in range(50):
        exact = more_digits(net, x[i].flatten().numpy().astype(np.longdouble))
        off = float(np.linalg.norm((out[i].detach().numpy() - exact).astype(np.float64)))
        assert off <= float(error[i])
    assert float((error / out.norm(dim=1)).max()) < 1e-10 if scale == 1 else True


def test_softplus_jump_is_counted_as_an_error() -> None:
    x = torch.tensor([[19.9999, 20.0001]], dtype=F64)
    out, error = forward_with_error(nn.Softplus(), x, torch.zeros(1, dtype=F64))
    exact = np.logaddexp(0, x.numpy().astype(np.longdouble))
    assert 1e-9 < float(np.linalg.norm((out.numpy() - exact).astype(float))) <= float(error)


def test_errors_of_many_kinds_of_layer_stay_small() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        Normalize([0.5], [0.25]),
        nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"),
        nn.BatchNorm2d(4).eval(),
        Residual(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.SiLU())),
        nn.ConvTranspose2d(4, 2, 2, stride=2),
        nn.AvgPool2d(2),
        Convolution(2, 3, 3),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 5),
    ).double()
    x = torch.rand(3, 1, 4, 4, dtype=F64)
    out, error = forward_with_error(net, x, torch.zeros(3, dtype=F64))
    assert torch.allclose(out, net(x))
    assert (error < 1e-11).all()
    # In float32 the same network is further off than float64 could be: the bound, scaled to float32, covers that.
    single = (net.float()(x.float()).double() - out).norm(dim=1)
    assert (single <= error * 2.0**29 * 4).all()
    assert (single > error).all()


def check_long_sums_inside_a_step() -> None:
    """16,384 equal products in one sum drift far, and the outer map has one: the inner error is nearly all of it."""
    count, h = 2**14, 2.0**20
    step = EulerStep(GradientField(PatchConvolution(count, 1, 1), sign=1), h).double()
    torch.nn.init.constant_(step.field.operator.weight, 0.1)
    x = torch.full((1, count, 1, 1), 0.1, dtype=F64)
    out, error = forward_with_error(step, x, torch.zeros(1, dtype=F64))
    tenth = Fraction(0.1)
    exact = tenth + Fraction(h) * tenth * count * tenth**2
    off = float(sum((Fraction(value) - exact) ** 2 for value in out.flatten().tolist())) ** 0.5
    assert 0 < off <= float(error)


def test_long_sums_inside_a_step() -> None:
    check_long_sums_inside_a_step()


def test_a_plan_is_only_a_memory() -> None:
    """The second batch costs no norm and gets the same bounds; another shape is another entry."""
    torch.manual_seed(0)
    net = nn.Sequential(
        Convolution(1, 2, 3), Residual(nn.Sequential(nn.Conv2d(2, 2, 1), nn.Tanh())), nn.Flatten()
    ).double()
    x, zero, plan = torch.rand(3, 1, 4, 4, dtype=F64), torch.zeros(3, dtype=F64), Plan()
    first = forward_with_error(net, x, zero, plan)[1]
    known = len(plan.known)
    assert torch.equal(forward_with_error(net, x, zero, plan)[1], first)
    assert len(plan.known) == known
    assert torch.equal(forward_with_error(net, x, zero)[1], first)
    wide = torch.rand(3, 1, 5, 5, dtype=F64)
    assert torch.equal(forward_with_error(net, wide, zero, plan)[1], forward_with_error(net, wide, zero)[1])
    assert plan.assumed() == []


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


class Tripled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * x


register(Doubled)(lambda module, shape, name: [LayerBound(name, "Doubled", "2", 2.0)])
register(Tripled)(lambda module, shape, name: [LayerBound(name, "Tripled", "3", 3.0)])
register_rounding(Tripled)(lambda module, shape, constant: Rounding(out=2.0**-53))


def test_rounding_that_is_assumed_is_said_to_be() -> None:
    """A user's layer with a Lipschitz rule alone: its error is assumed, and every certificate says so."""
    x = torch.rand(2, 4, dtype=F64)
    plan = Plan()
    _, error = forward_with_error(Doubled(), x, torch.zeros(2, dtype=F64), plan)
    assert error.tolist() == pytest.approx((4 * FALLBACK * x.norm(dim=1)).tolist())
    assert plan.assumed() == ["Doubled"]
    head = nn.Linear(4, 2)
    labels = head(x.float()).argmax(1)
    assumed = certify(nn.Sequential(Doubled(), head), x, labels).certified_object
    assert "assumed, not proved: Doubled" in assumed
    assert "assumed" not in certify(nn.Sequential(Tripled(), head), x, labels).certified_object
    assert "assumed" not in certify(nn.Sequential(nn.Linear(4, 4), head), x, labels).certified_object
