"""The formulas of fields and methods by hand, what is refused and in which words, and what certificates make of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from robustflow import create_model
from robustflow.bounds import account
from robustflow.errors import UserError
from robustflow.fields import GradientField
from robustflow.layer_rules import layer_bounds
from robustflow.methods import METHODS, kept, largest_step, method_of
from robustflow.midpoint import LARGEST, implicit_midpoint
from robustflow.operators import Convolution, PatchConvolution
from robustflow.steps import EulerStep, Flow, Step
from robustflow.structured.activations import ACTIVATIONS, activation_of
from robustflow.structured.fields import (
    FreeField,
    GradientFlowField,
    HamiltonianField,
    MassField,
    ShearField,
    SphereField,
    StencilField,
)

X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def jacobian(step: nn.Module, x: Tensor) -> Tensor:
    found = torch.autograd.functional.jacobian(step, x[None])
    assert isinstance(found, Tensor)
    return found.reshape(x.numel(), x.numel())


# ------------------------------------------------------------------------------------------------ fields by hand
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_the_slope_of_its_integral(name: str) -> None:
    activation = activation_of(name)
    z = torch.linspace(-4, 4, 101, dtype=torch.float64).requires_grad_()
    (derivative,) = torch.autograd.grad(activation.integral(z).sum(), z)
    torch.testing.assert_close(derivative, activation.function(z).detach(), atol=1e-14, rtol=1e-14)
    (slope,) = torch.autograd.grad(activation.function(z).sum(), z)
    assert bool((slope >= 0).all())
    assert activation.slope == pytest.approx(float(slope.max()))


@pytest.mark.parametrize("activation", ["tanh", "leaky-relu"])
def test_gradient_fields_are_gradients(activation: str) -> None:
    x = X.clone().requires_grad_()
    for sign in (1, -1):
        field = GradientFlowField(4, 7, activation=activation, sign=sign, bounded=False).double()
        (expected,) = torch.autograd.grad(field.potential(x).sum(), x)
        torch.testing.assert_close(field(x), sign * expected)
    hamiltonian = HamiltonianField(4, 7, activation=activation).double()
    of_q, of_p = torch.autograd.grad(hamiltonian.energy(x).sum(), x)[0].chunk(2, dim=1)
    torch.testing.assert_close(hamiltonian(x), torch.cat((of_p, -of_q), dim=1))


def test_sphere_mass_shear_and_free_fields_by_their_formulas() -> None:
    sphere, mass = SphereField(4, 7).double(), MassField(4, 7, activation="sigmoid").double()
    shear, free = ShearField(4, first=1).double(), FreeField(4, 7, activation="relu").double()
    for x in X:
        u, w = sphere.outer(torch.tanh(sphere.inner(x))).chunk(2)
        skew = torch.outer(u, w) - torch.outer(w, u)
        torch.testing.assert_close(sphere(x[None])[0], skew @ x)
        a = mass.outer(torch.sigmoid(mass.inner(x))).view(4, 4)
        torch.testing.assert_close(mass(x[None])[0], (a - a.T) @ torch.ones(4, dtype=x.dtype))
        expected = (torch.tanh(shear.first(x[1:])), torch.tanh(shear.second(x[:1])))
        torch.testing.assert_close(shear(x[None])[0], torch.cat(expected))
        torch.testing.assert_close(free(x[None])[0], free.outer(torch.relu(free.inner(x))))


@pytest.mark.parametrize("power", [1, 2])
def test_a_stencil_is_a_circular_correlation(power: int) -> None:
    """By shifts of the image: (A ∗ U)(i, j) = Σ A(s, t) U(i + s, j + t)."""
    field, u = StencilField(1, 2, power=power, outer_bias=True).double(), torch.randn(3, 1, 8, 6).double()

    def shifts(kernel: Tensor, image: Tensor) -> Tensor:
        taps = [
            kernel[s + 2, t + 2] * torch.roll(image, (-s, -t), (1, 2)) for s in range(-2, 3) for t in range(-2, 3)
        ]
        return torch.stack(taps).sum(0)

    assert field.outer.bias is not None
    assert field.inner.bias is not None
    hidden = [
        torch.relu(shifts(k[0], u[:, 0]) + b) ** power
        for k, b in zip(field.inner.weight, field.inner.bias, strict=True)
    ]
    expected = sum(shifts(k, h) for k, h in zip(field.outer.weight[0], hidden, strict=True)) + field.outer.bias
    torch.testing.assert_close(field(u)[:, 0], expected)
    field.project = True
    flat = u.flatten(1)
    along = (expected.flatten(1) * flat).sum(1) / (flat * flat).sum(1)
    torch.testing.assert_close(field(u).flatten(1), expected.flatten(1) - along[:, None] * flat)
    assert bool(torch.isfinite(field(torch.zeros(1, 1, 8, 6).double())).all())
    assert sum(p.numel() for p in StencilField(1, 10, power=2, outer_bias=True).parameters()) == 511


def test_a_bounded_gradient_field_is_brought_back() -> None:
    field = GradientFlowField(4, 7, activation="tanh").double().requires_grad_(False)
    field.matrix.mul_(9)
    field.weights.copy_(torch.linspace(-1, 3, 7))
    field.constrain_()
    assert float(torch.linalg.matrix_norm(field.matrix, 2)) == pytest.approx(1)
    assert (float(field.weights.min()), float(field.weights.max())) == (0, 1)
    field.matrix.mul_(0.5)
    field.constrain_()
    assert float(torch.linalg.matrix_norm(field.matrix, 2)) == pytest.approx(0.5)


# ----------------------------------------------------------------------------------------------- methods by hand
def test_cayley_is_the_transform_of_the_dense_matrix() -> None:
    field, h = SphereField(4, 7).double(), 0.7
    for x in X:
        u, w = field.skew((x + 0.5 * h * field(x[None])[0])[None])
        s, eye = torch.outer(u[0], w[0]) - torch.outer(w[0], u[0]), torch.eye(4, dtype=x.dtype)
        expected = torch.linalg.solve(eye - 0.5 * h * s, (eye + 0.5 * h * s) @ x)
        torch.testing.assert_close(METHODS["cayley"].advance(field, x[None], h)[0], expected)


@pytest.mark.parametrize("method", ["norm-exact-euler", "norm-exact-heun", "cayley"])
def test_norm_exact_steps_in_float32_and_at_the_origin(method: str) -> None:
    step = Step(SphereField(4, 7), method, 0.5)
    with torch.no_grad():
        x = X.float()
        y = x
        for _ in range(100):
            y = step(y)
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1), rtol=1e-5, atol=0)
    origin = torch.zeros(1, 4, requires_grad=True)
    step(origin).sum().backward()
    assert torch.equal(step(origin), torch.zeros(1, 4))
    assert origin.grad is not None
    assert bool(torch.isfinite(origin.grad).all())


class Turn(nn.Module):
    """ẋ₁ = x₂, ẋ₂ = −x₁ as one field, times a rate."""

    def __init__(self, rate: float = 1.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return self.rate * torch.stack((x[:, 1], -x[:, 0]), dim=1)


def test_implicit_midpoint_is_the_cayley_transform_of_a_linear_field() -> None:
    x, h = X[:, :2], 1.3
    a, eye = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=x.dtype), torch.eye(2, dtype=x.dtype)
    expected = x @ torch.linalg.solve(eye - 0.5 * h * a, eye + 0.5 * h * a).T
    torch.testing.assert_close(implicit_midpoint(Turn(), x, h), expected, rtol=1e-14, atol=1e-14)


def test_implicit_midpoint_solves_stiff_and_nonsmooth_equations() -> None:
    """A nonexpansive field leaves one solution for every h, also where Newton's method meets kinks or flat tails."""
    for activation in ACTIVATIONS:
        field = GradientFlowField(4, 9, activation=activation).double()
        for h in (1.0, 50.0, 1e4):
            for scale in (1.0, 100.0, 1e-6):
                x = scale * X
                y = implicit_midpoint(field, x, h)
                residual = (x + h * field((x + y) / 2) - y).norm(dim=1)
                assert bool((residual <= 1e-12 * (x.norm(dim=1) + h * field(x).norm(dim=1))).all())


def test_implicit_midpoint_has_derivatives_of_its_solution() -> None:
    field = SphereField(3, 4).double()
    h = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    x = X[:2, :3].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, h: implicit_midpoint(field, x, h), (x, h))
    assert torch.autograd.gradgradcheck(lambda x, h: implicit_midpoint(field, x, h), (x, h), fast_mode=True)


def test_implicit_midpoint_says_what_it_cannot_solve() -> None:
    with pytest.raises(UserError, match=f"at most {LARGEST} unknowns, not 1600: use heun or rk4"):
        implicit_midpoint(StencilField(1, 2), torch.rand(1, 1, 40, 40), 0.1)
    with pytest.raises(UserError, match="use a smaller step size"):
        implicit_midpoint(lambda z: z * z + 1, torch.ones(1, 2, dtype=torch.float64), 2.0)  # z² − z + 2 = 0
    with pytest.raises(UserError, match="no single solution: use a smaller step size"):
        implicit_midpoint(lambda z: z, torch.ones(1, 2, dtype=torch.float64), 2.0)  # z = 1 + z


class Cycle(nn.Module):
    """ẋ₁ = f(x₂), ẋ₂ = g(x₃), ẋ₃ = h(x₁): divergence free, but neither split in two nor Hamiltonian."""

    properties = frozenset({"volume"})

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x.roll(-1, 1)) + 0.5 * x.roll(-1, 1)


def test_implicit_midpoint_does_not_keep_every_volume() -> None:
    assert kept(Cycle(), "implicit-midpoint") == frozenset()
    defect = [abs(float(torch.linalg.det(jacobian(Step(Cycle(), "implicit-midpoint", 0.5), x[:3]))) - 1) for x in X]
    assert max(defect) > 1e-3
    with pytest.raises(UserError, match=r"^a Cycle with rk4 is not volume-preserving, and with no other"):
        Step(Cycle(), "rk4", 0.5, keep="volume")


# ---------------------------------------------------------------------------- what is refused, and in which words
def test_a_pair_that_does_not_keep_what_is_asked_is_refused_with_what_would() -> None:
    hamiltonian = HamiltonianField(4, 8)
    good = "symplectic-euler, stoermer-verlet or implicit-midpoint"
    with pytest.raises(UserError) as caught:
        Step(hamiltonian, "explicit-euler", 0.1, keep="symplectic")
    assert str(caught.value) == f"a HamiltonianField with explicit-euler is not symplectic: use {good}"
    refused = [
        ("no-such", None, "unknown method 'no-such': one of explicit-euler, heun"),
        ("rk4", "energy", "unknown property 'energy': one of linear, norm"),
        ("rk4", "norm", "a HamiltonianField with rk4 is not norm-preserving, and with no other method: choose a field"),
        ("cayley", None, "cayley needs a field F"),
    ]
    for method, keep, words in refused:
        with pytest.raises(UserError, match=words):
            Step(hamiltonian, method, 0.1, keep=keep)  # type: ignore[arg-type]
    for build, words in (
        (lambda: GradientFlowField(3, 4, sign=0), "sign"),
        (lambda: HamiltonianField(3, 4), "even, not 3"),
        (lambda: ShearField(3, first=3), "0 < first < dim, not 3 of 3"),
        (lambda: ShearField(1), "two parts"),
        (lambda: StencilField(kernel_size=4), "odd"),
        (lambda: StencilField(power=3), "1 or 2, not 3"),
        (lambda: FreeField(3, 4, activation="gelu"), "unknown activation 'gelu': one of relu"),
    ):
        with pytest.raises(UserError, match=words):
            build()
    assert method_of(METHODS["rk4"]) is METHODS["rk4"]


@pytest.mark.parametrize("method", ["explicit-euler", "heun", "rk4"])
def test_a_nonexpansive_step_is_held_where_it_does_not_expand(method: str) -> None:
    field = GradientFlowField(4, 7, activation="sigmoid").double()
    assert largest_step(field, method) == 8  # 2/L, L = ¼
    step = Step(field, method, 1.0, interval=(0.5, 100.0), keep="nonexpansive")
    assert step.kept == {"nonexpansive"}
    for given, held in ((-3.0, 0.5), (50.0, 8.0), (2.0, 2.0)):
        step.step_size.data.fill_(given)
        Flow(nn.Sequential(step)).constrain_()
        assert float(step.step_size.detach()) == held
    with pytest.raises(UserError, match=r"a size in \[0, 8\], not 8.1"):
        Step(field, method, 8.1, keep="nonexpansive")
    assert Step(field, method, 9.0, learned=False).kept == frozenset()
    assert Step(field, method, 1.0).kept == frozenset()  # training may move it
    assert Step(field, method, 8.0, learned=False).kept == {"nonexpansive"}
    # A kernel without a constraint has no such limit: any step may expand, but an implicit one.
    free = GradientField(Convolution(1, 4, 3), sign=-1)
    assert kept(free, method) == frozenset()
    with pytest.raises(UserError, match=r"is not nonexpansive: use implicit-midpoint$"):
        Step(free, method, 0.1, keep="nonexpansive")


@pytest.mark.parametrize("method", ["explicit-euler", "heun"])
def test_the_limit_of_a_nonexpansive_step_is_sharp(method: str) -> None:
    field = GradientFlowField(4, 4, activation="tanh").double()
    with torch.no_grad():
        field.matrix.copy_(torch.eye(4))  # F(x) = −tanh(x), with slope −1 at the origin
    for h, expected in ((2.0, 1.0), (2.1, 1.1 if method == "explicit-euler" else 1 - 2.1 + 2.1**2 / 2)):
        step = Step(field, method, h, learned=False)
        assert float(torch.linalg.matrix_norm(jacobian(step, 0 * X[0]), 2)) == pytest.approx(expected)


# -------------------------------------------------------------------------------------------- steps and certificates
def test_an_euler_step_is_the_step_of_explicit_euler() -> None:
    field = GradientField(PatchConvolution(1, 4, 2), slope=0.5)
    old, new = EulerStep(field, 0.7, interval=(0.0, 2.0)), Step(field, "explicit-euler", 0.7)
    x = torch.rand(5, 1, 4, 4)
    torch.testing.assert_close(old(x), new(x))  # in training one pass of its own
    assert torch.equal(old.eval()(x), new(x))
    assert torch.equal(old(x), x + old.step_size * field(x))
    assert list(old.state_dict()) == ["step_size", "field.bias", "field.operator.weight"]
    assert float(Step(SphereField(4, 2).double(), "heun", 0.1).step_size.detach()) == 0.1  # not float32's
    assert EulerStep(field, 2.0, keep="nonexpansive").kept == {"nonexpansive"}
    steps = [module for module in create_model("sharp", channels=(4,), layers=2).modules() if isinstance(module, Step)]
    assert steps
    assert all(type(step) is EulerStep for step in steps)


def test_the_rule_of_euler_steps_certifies_no_other_step() -> None:
    field = GradientField(PatchConvolution(1, 4, 2), slope=0.5)
    x = torch.rand(2, 1, 4, 4)
    assert account(nn.Sequential(EulerStep(field, 1.0)), (1, 4, 4)).lipschitz == pytest.approx(0.5)
    for method in ("explicit-euler", "heun"):
        for network in (Step(field, method, 1.0), Flow(Step(field, method, 1.0))):
            with pytest.raises(UserError, match="is a Step, for which there is no Lipschitz rule"):
                account(network, (1, 4, 4))
    # An EulerStep stays explicit Euler, whatever becomes of its attributes.
    step = EulerStep(field, 1.0)
    expected, step.method = step(x), METHODS["rk4"]
    assert torch.equal(step(x), expected)

    class Other(EulerStep):
        forward = Step.forward

    with pytest.raises(UserError, match="overrides what EulerStep computes"):
        layer_bounds(Other(field, 1.0), (1, 4, 4))


def test_a_flow_keeps_nothing_more_than_each_layer() -> None:
    shear, plane = Step(ShearField(2), "symplectic-euler", 0.1), Step(ShearField(4), "stoermer-verlet", 0.1)
    assert Flow(shear, Flow(shear)).kept == {"symplectic", "volume"}
    assert Flow(shear, plane).kept == {"volume"}
    assert Flow(shear, nn.Linear(2, 2)).kept == frozenset()
    assert "method=symplectic-euler" in repr(shear)
    assert math.isinf(largest_step(GradientFlowField(2, 3), "implicit-midpoint"))
