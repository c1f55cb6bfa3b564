"""What every regime promises, against Jacobians, brute-force products and adversarial step sizes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robustflow import checkpoints, create_model
from robustflow.bounds import account
from robustflow.fields import GradientField, TwoKernelField, leaky_relu
from robustflow.networks import Classifier
from robustflow.operators import PatchConvolution
from robustflow.regimes import (
    ANY_HIDDEN,
    REGIMES,
    Pair,
    SharedKernelPair,
    balance_signed_steps_,
    nominal_constant,
    prescribed_contraction,
    sharp_contraction,
)
from robustflow.steps import AveragedStep, EulerStep

CONSTRAINED = [name for name, regime in REGIMES.items() if regime.constrained]
CASES = [(name, kernel) for name in CONSTRAINED for kernel in ("convolution", "patch")]
CASES.append(("unconstrained", "convolution"))
CASES += [(f"{name}, half", kernel) for name in sorted(ANY_HIDDEN) for kernel in ("convolution", "patch")]


def small(regime: str, kernel: str, *, seed: int = 0, size: int = 8, layers: int = 4) -> Classifier:
    """``regime``: its name; with ", half" there are half as many hidden units as dimensions."""
    torch.manual_seed(seed)
    name, _, half = regime.partition(", ")
    return create_model(
        name, input_shape=(1, size, size), classes=3, channels=(4, 8) if half else (2, 4), layers=layers, kernel=kernel,
        lift=kernel, hidden_ratio=0.5 if half else 1.0,
    )  # fmt: skip


def shaken(regime: str, kernel: str, seed: int, *, scale: float = 0.5) -> Classifier:
    """After random updates of everything that an optimizer may move, and the constraint."""
    model = small(regime, kernel, seed=seed)
    with torch.no_grad():
        for _ in range(3):
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * scale)
            model.constrain_()
    model.constrain_(exact=True)
    return model.eval()


def jacobian(function: nn.Module, x: Tensor) -> Tensor:
    return torch.func.jacrev(lambda z: function(z[None])[0].flatten())(x).flatten(1)


@pytest.mark.parametrize(("regime", "kernel"), CASES)
def test_jacobians_and_pairs_stay_below_the_claimed_bound(regime: str, kernel: str) -> None:
    for seed in range(2):
        model = shaken(regime, kernel, seed, scale=0.5 if regime != "unconstrained" else 0.05)
        claimed = account(model.features, model.input_shape).lipschitz
        if regime != "unconstrained":
            assert claimed <= 1 + 1e-5
        exact = model.double()
        with torch.no_grad():
            for x in torch.rand(4, 1, 8, 8).double() * torch.tensor([0.2, 1, 3, 20]).view(4, 1, 1, 1):
                assert torch.linalg.matrix_norm(jacobian(exact.features, x), 2) <= claimed
            x, y = torch.randn(64, 1, 8, 8).double(), torch.randn(64, 1, 8, 8).double()
            y[32:] = x[32:] + 1e-3 * y[32:]
            stretch = (exact.features(x) - exact.features(y)).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
            assert float(stretch.max()) <= claimed


@pytest.mark.parametrize("kernel", ["convolution", "patch"])
@pytest.mark.parametrize("regime", CONSTRAINED)
def test_step_sizes_keep_their_regime_s_inequality(regime: str, kernel: str) -> None:
    for seed in range(3):
        model = shaken(regime, kernel, seed)
        if regime in ("prescribed", "sharp"):
            pairs = [module for module in model.modules() if isinstance(module, Pair)]
            assert len(pairs) == 4
            for expansive, contractive in pairs:
                assert (expansive.field.sign, contractive.field.sign) == (1, -1)
                up, down = expansive.step_size.item(), contractive.step_size.item()
                inside = math.sqrt(1 - down + down**2) if regime == "prescribed" else max(1 - down / 2, down - 1)
                assert up >= 0
                assert inside * (1 + up) <= 1
        elif regime == "nonexpansive":
            sizes = [module.step_size.item() for module in model.modules() if isinstance(module, EulerStep)]
            assert len(sizes) == 8
            assert all(0 <= size <= 2 for size in sizes)
        elif regime == "flexible":
            sizes = [module.step_size.item() for module in model.modules() if isinstance(module, EulerStep)]
            assert len(sizes) == 8
            assert math.prod(max(1 - h / 2, h - 1) if h >= 0 else 1 - h for h in sizes) <= 1
        elif regime == "shared":
            pairs = [module for module in model.modules() if isinstance(module, SharedKernelPair)]
            assert len(pairs) == 4
            for expansive, contractive in pairs:
                assert (expansive.field.sign, contractive.field.sign) == (1, -1)
                assert expansive.field.operator is contractive.field.operator
                up, down = expansive.step_size.item(), contractive.step_size.item()
                assert 0 <= up <= down / 2
                assert down < 1
        elif regime == "cpl":
            sizes = [module.step_size.item() for module in model.modules() if isinstance(module, EulerStep)]
            assert sizes == [2.0] * 8
        else:
            assert not any(isinstance(module, EulerStep) for module in model.modules())


@pytest.mark.parametrize("contraction", [prescribed_contraction, sharp_contraction])
@given(
    up=st.floats(-1e6, 1e6, width=32),
    down=st.floats(-1e6, 1e6, width=32),
)
@example(up=1.0, down=4 / 3)
@example(up=1.0, down=1.2)
@example(up=1e6, down=0.0)
@settings(max_examples=60, deadline=None)
def test_a_pair_keeps_its_inequality_whatever_it_is_set_to(contraction, up: float, down: float) -> None:
    pair = Pair(
        EulerStep(GradientField(PatchConvolution(1, 4, 2), slope=0.5, sign=1), up),
        EulerStep(GradientField(PatchConvolution(1, 4, 2), slope=0.5, sign=-1), down),
        contraction,
    )
    h, expansion = pair[1].step_size.item(), pair[0].step_size.item()
    assert expansion >= 0
    assert h >= 0
    inside = math.sqrt(1 - h + h * h) if contraction is prescribed_contraction else max(1 - h / 2, h - 1)
    assert inside * (1 + expansion) <= 1


def test_a_pair_leaves_admissible_step_sizes_alone_and_uses_what_room_there_is() -> None:
    def pair(up: float, down: float) -> Pair:
        fields = [GradientField(PatchConvolution(1, 4, 2), slope=0.5, sign=sign) for sign in (1, -1)]
        return Pair(EulerStep(fields[0], up), EulerStep(fields[1], down), sharp_contraction)

    assert [step.step_size.item() for step in pair(0.25, 1.0)] == [0.25, 1.0]
    assert pair(5.0, 1.0)[0].step_size.item() == pytest.approx(1.0, abs=1e-5)  # 1/(1 - 1/2) - 1
    assert pair(5.0, 4 / 3)[0].step_size.item() == pytest.approx(2.0, abs=1e-5)  # 1/(1/3) - 1


def flexible(sizes: list[float]) -> list[EulerStep]:
    return [EulerStep(GradientField(PatchConvolution(1, 4, 2), slope=0.5, sign=-1), size) for size in sizes]


def constant(h: float) -> float:
    return max(1 - h / 2, h - 1) if h >= 0 else 1 - h


SIZES = st.one_of(st.floats(-3, 3, width=32), st.sampled_from([0.0, -1e9, 1e9, 2.0, -2.0]))


@given(st.lists(SIZES, max_size=7))
@example([-1.0, -2.0, -0.5])
@example([0.0, 0.0])
@example([1e30, -1e30])
@example([2.0, 2.0, -1e-3])
@example([0.0, -1e-7])
@settings(max_examples=80, deadline=None)
def test_the_product_of_signed_steps_is_at_most_one(sizes: list[float]) -> None:
    steps = flexible(sizes)
    balance_signed_steps_(steps)
    after = [step.step_size.item() for step in steps]
    assert math.prod(constant(h) for h in after) <= 1
    for old, new in zip(sizes, after, strict=True):
        clamped = min(max(old, -2.0), 2.0)
        assert new == clamped if old >= 0 else clamped - 1e-6 <= new <= 0  # contracting steps as they were


@pytest.mark.parametrize("sizes", [[1.0, -2.0], [4 / 3, -1.0, 4 / 3, -2.0, -2.0, -1.5], [0.5, -0.4, -0.1]])
def test_balancing_takes_no_more_than_it_must(sizes: list[float]) -> None:
    assert math.prod(constant(h) for h in sizes) > 1
    steps = flexible(sizes)
    balance_signed_steps_(steps)
    after = [step.step_size.item() for step in steps]
    assert math.prod(constant(h) for h in after) == pytest.approx(1, abs=1e-5)
    shrunk = [new / old for old, new in zip(sizes, after, strict=True) if old < 0]
    assert max(shrunk) - min(shrunk) < 1e-6, "one factor for all"
    feasible = flexible([1.0, -0.5, 0.3])
    balance_signed_steps_(feasible)
    assert [step.step_size.item() for step in feasible] == pytest.approx([1.0, -0.5, 0.3])


def test_contraction_formulas_against_matrices() -> None:
    """I - hA'DA with slopes D in [1/2, 1] and A orthogonal: the sharp constant is attained, the paper's lies above."""
    torch.manual_seed(0)
    for h in (0.0, 0.3, 0.5, 1.0, 4 / 3, 1.9, 3.0):
        largest = 0.0
        for trial in range(40):
            a = torch.linalg.qr(torch.randn(4, 4).double())[0]
            d = torch.full((4,), 0.5 if trial % 2 else 1.0) if trial < 4 else 0.5 + 0.5 * torch.rand(4)
            step = torch.eye(4) - h * a.T @ torch.diag(d.double()) @ a
            largest = max(largest, float(torch.linalg.matrix_norm(step, 2)))
        assert sharp_contraction(h) == pytest.approx(largest, abs=1e-9)
        assert prescribed_contraction(h) >= sharp_contraction(h) - 1e-12
        assert prescribed_contraction(h) == pytest.approx(math.sqrt(1 - h + h**2))


@pytest.mark.parametrize(("regime", "kernel"), [case for case in CASES if case != ("shared", "convolution")])
def test_nominal_constant_is_the_product_of_all_gradient_steps(regime: str, kernel: str) -> None:
    model = shaken(regime, kernel, 1)
    product = 1.0
    for module in model.modules():
        if isinstance(module, EulerStep) and isinstance(module.field, GradientField):
            h, a = module.step_size.item() * -module.field.sign, module.field.slope
            eigenvalues = [1 - h * slope for slope in torch.linspace(a, 1, 50).tolist()]
            product *= max(abs(value) for value in eigenvalues)
    assert nominal_constant(model) == pytest.approx(product, rel=1e-9)


def test_nominal_constants_at_the_start() -> None:
    """A pair of the paper's contracts by (1 - 1/4)·2/√3 = 0.866, a sharp pair by 1, at the start."""
    assert nominal_constant(small("prescribed", "patch", layers=2)) == pytest.approx(math.sqrt(0.75) ** 2, rel=1e-5)
    assert nominal_constant(small("sharp", "patch", layers=2)) == pytest.approx(1, rel=1e-5)
    assert nominal_constant(small("naive", "patch")) == 1


@pytest.mark.parametrize(("regime", "kernel"), CASES)
def test_gradients_reach_every_parameter(regime: str, kernel: str) -> None:
    torch.manual_seed(3)
    model = small(regime, kernel).train()
    nn.functional.cross_entropy(model(torch.randn(16, 1, 8, 8)), torch.arange(16) % 3).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
    fixed = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert bool(fixed) == (regime.partition(", ")[0] in ("prescribed", "unconstrained", "cpl"))
    assert all(name.endswith("step_size") for name in fixed)


@pytest.mark.parametrize(("regime", "kernel"), CASES)
def test_saved_and_loaded_it_is_the_same_network(regime: str, kernel: str, tmp_path: Path) -> None:
    model = shaken(regime, kernel, 4)
    checkpoints.write_tensors(tmp_path / "model.safetensors", model.state_dict())
    other = small(regime, kernel, seed=99).eval()
    x = torch.rand(5, 1, 8, 8)
    assert not torch.equal(model(x), other(x))
    checkpoints.load_weights(other, tmp_path / "model.safetensors")
    assert torch.equal(model(x), other(x))
    assert account(other, (1, 8, 8)).lipschitz == account(model, (1, 8, 8)).lipschitz


def test_half_as_many_hidden_units_can_sort_pairs_as_maxmin_does() -> None:
    """x − 2 Aᵀ ReLU(Ax) with rows (e₁ − e₂)/√2, (e₃ − e₄)/√2: (x₁, x₂) is put in ascending order, and (x₃, x₄)."""
    model = create_model("nonexpansive", input_shape=(1, 2, 2), channels=(4,), layers=1, lift="patch", kernel="patch",
                         patch=1, hidden_ratio=0.5).double()  # fmt: skip
    step = next(module for module in model.modules() if isinstance(module, EulerStep))
    assert step.field.operator.weight.shape == (2, 4)
    with torch.no_grad():
        step.field.operator.weight.copy_(torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]]) / math.sqrt(2))
    x = torch.randn(50, 4, 1, 1).double()
    torch.testing.assert_close(step(x).view(50, 2, 2), x.view(50, 2, 2).sort(2).values)


def test_steps_and_fields_by_hand() -> None:
    torch.manual_seed(0)
    inner, outer = PatchConvolution(1, 4, 2).double(), PatchConvolution(1, 4, 2).double()
    a, b = inner.weight.detach(), outer.weight.detach()
    x, bias = torch.randn(1, 1, 2, 2).double(), torch.randn(4).double()

    def activation(z: Tensor, slope: float) -> Tensor:
        return torch.where(z > 0, z, slope * z)

    for sign, slope in ((-1, 0.0), (1, 0.5)):
        field = GradientField(inner, slope=slope, sign=sign).double()
        field.bias.data.copy_(bias)
        expected = sign * a.T @ activation(a @ x.flatten() + bias, slope)
        torch.testing.assert_close(field(x).flatten().detach(), expected)
        step = EulerStep(field, 0.7).double()
        step.step_size.data.fill_(0.7)
        torch.testing.assert_close(step(x).flatten().detach(), x.flatten() + 0.7 * expected)
    two = TwoKernelField(inner, outer, slope=0.5).double()
    two.bias.data.copy_(bias)
    expected = b.T @ activation(a @ x.flatten() + bias, 0.5)
    torch.testing.assert_close(two(x).flatten().detach(), expected)
    torch.testing.assert_close(AveragedStep(two)(x).flatten().detach(), (x.flatten() + expected) / 2)
    assert torch.equal(leaky_relu(torch.tensor([-2.0, 3.0]), 0), torch.tensor([0.0, 3.0]))
    with pytest.raises(ValueError, match="slope"):
        GradientField(inner, slope=1.0)
    with pytest.raises(ValueError, match="sign"):
        GradientField(inner, sign=0)


@pytest.mark.parametrize(("kernel", "pair"), [("convolution", 1.0), ("patch", 0.75)])
def test_a_shared_pair_is_scaled_by_what_the_account_says(kernel: str, pair: float) -> None:
    model = small("shared", kernel).eval()
    model.constrain_(exact=True)
    claimed = account(model.features, model.input_shape).lipschitz
    assert nominal_constant(model) == pytest.approx(pair**4, rel=1e-4)
    assert claimed == pytest.approx(pair**4, rel=1e-4)
