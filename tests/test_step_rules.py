"""Steps against their full Jacobians, and the theorem on two steps with one kernel."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robustflow.bounds import account
from robustflow.fields import GradientField, TwoKernelField
from robustflow.operators import Convolution, PatchConvolution
from robustflow.step_rules import contractive_constant, smallest_singular_value
from robustflow.steps import AveragedStep, EulerStep

F64 = torch.float64
HOLDS = 1 + 1e-10


def jacobian_norm(module: nn.Module, x: Tensor) -> float:
    """‖J‖₂ at one point, from the full Jacobian."""
    with torch.enable_grad():
        jacobian = torch.autograd.functional.jacobian(lambda v: module(v[None])[0].flatten(), x)
    return float(torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()), 2))


def bound_of(module: nn.Module, shape: tuple[int, ...]) -> float:
    return account(module, shape).lipschitz


def operator(kind: str, seed: int = 0, channels: int = 2) -> Convolution | PatchConvolution:
    torch.manual_seed(seed)
    if kind == "shift":
        # Perfectly orthogonal inside the image, and blind to one of its border rows: σ_min = 0.
        shift = Convolution(1, 1, 3).double()
        with torch.no_grad():
            shift.weight.zero_()[0, 0, 0, 1] = 1
        return shift
    made: Convolution | PatchConvolution
    if kind == "patch":
        made = PatchConvolution(channels, 4 * channels, 2, shift=seed % 2).double()
    else:
        made = Convolution(channels, channels, 3, image_size=(4, 4)).double()
    made.constrain_(exact=True)
    return made


def euler(kind: str, h: float, slope: float, sign: int = -1, seed: int = 0) -> EulerStep:
    field = GradientField(operator(kind, seed), slope=slope, sign=sign)
    return EulerStep(field, h).double()


def check_steps() -> None:
    """No Jacobian of a step exceeds its bound: both signs of h and of the field, every operator."""
    for seed, kind in enumerate(["patch", "convolution", "shift", "patch"]):
        for h in (-1.3, -0.2, 0.0, 0.4, 1.0, 1.7, 2.6):
            for slope in (0.0, 0.5):
                for sign in (-1, 1):
                    step = euler(kind, h, slope, sign, seed)
                    shape = (step.field.operator.in_channels, 4, 4)
                    claimed = bound_of(step, shape)
                    for bias in (-50.0, 0.0, 50.0):  # all activations off, mixed, all on
                        torch.nn.init.constant_(step.field.bias, bias)
                        true = jacobian_norm(step, torch.randn(shape, dtype=F64))
                        assert true <= claimed * HOLDS, (kind, h, slope, sign, bias, true, claimed)


def check_exact_step() -> None:
    """Orthogonal A: the constant is attained with all activations on, or all off."""
    for h in (0.3, 1.0, 4 / 3, 1.8, -0.7):
        step = euler("patch", h, 0.5)
        claimed = bound_of(step, (2, 4, 4))
        attained = 0.0
        for bias in (-50.0, 50.0):
            torch.nn.init.constant_(step.field.bias, bias)
            attained = max(attained, jacobian_norm(step, torch.randn(2, 4, 4, dtype=F64)))
        assert claimed == pytest.approx(attained, rel=1e-6)
        assert claimed == pytest.approx(max(1 - h / 2, h - 1) if h >= 0 else 1 - h, rel=1e-6)


def check_adjoint_padding() -> None:
    """A gradient step has a symmetric Jacobian; with forward and adjoint padded differently it has not, and expands."""
    for seed in range(4):
        step = euler("convolution", 2.0, 0.0, seed=seed)
        torch.nn.init.constant_(step.field.bias, 50.0)
        true = jacobian_norm(step, torch.randn(2, 4, 4, dtype=F64))
        assert true <= bound_of(step, (2, 4, 4)) * HOLDS


def test_steps() -> None:
    check_steps()


def test_step_constant_is_attained() -> None:
    check_exact_step()


def test_adjoint_padding() -> None:
    check_adjoint_padding()


@given(st.floats(-3, 3), st.floats(0, 0.99), st.floats(0.1, 3), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None, database=None, derandomize=True)
def test_step_with_any_matrix(h: float, slope: float, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    step = EulerStep(GradientField(PatchConvolution(1, seed % 6 + 1, 2), slope=slope), h).double()
    with torch.no_grad():
        step.field.operator.weight.copy_(scale * torch.randn_like(step.field.operator.weight))
        step.field.bias.normal_()
    assert jacobian_norm(step, torch.randn(1, 2, 2, dtype=F64)) <= bound_of(step, (1, 2, 2)) * HOLDS


def test_two_kernel_and_averaged_steps() -> None:
    torch.manual_seed(0)
    fields = [
        TwoKernelField(operator("convolution"), operator("convolution", 1)),
        TwoKernelField(PatchConvolution(2, 3, 2), PatchConvolution(2, 3, 2)),
        GradientField(operator("patch"), slope=0.5),
        GradientField(operator("convolution"), slope=0.5, sign=1),
    ]
    for field in fields:
        for step in (EulerStep(field, -0.8), AveragedStep(field)):
            step = copy.deepcopy(step).double()
            for _ in range(5):
                torch.nn.init.normal_(step.field.bias)
                assert jacobian_norm(step, torch.randn(2, 4, 4, dtype=F64)) <= bound_of(step, (2, 4, 4)) * HOLDS
    # (x + F(x))/2 with F = −Aᵀσ(A·), A orthogonal, a = 1/2: eigenvalues (1 − [1/2, 1])/2.
    assert bound_of(AveragedStep(fields[2]).double(), (2, 4, 4)) == pytest.approx(0.25, rel=1e-6)


# ------------------------------------------------------------------------------------------------------- shared kernels
def pair_norm(a: Tensor, h_c: float, h_e: float, d1: Tensor, d2: Tensor) -> float:
    identity = torch.eye(a.shape[1], dtype=F64)
    contract = identity - h_c * a.T @ torch.diag(d1) @ a
    expand = identity + h_e * a.T @ torch.diag(d2) @ a
    return max(float(torch.linalg.matrix_norm(m, 2)) for m in (expand @ contract, contract @ expand))


@given(st.integers(1, 5), st.integers(1, 5), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**31))
@settings(max_examples=300, deadline=None, database=None, derandomize=True)
def test_shared_kernel_theorem(m: int, n: int, slope: float, size: float, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rank = seed % min(m, n) + 1
    a = torch.randn(m, rank, generator=generator, dtype=F64) @ torch.randn(rank, n, generator=generator, dtype=F64)
    a /= torch.linalg.matrix_norm(a, 2)
    d1, d2 = torch.rand(2, m, generator=generator, dtype=F64)
    if seed % 2:
        d1, d2 = d1.round(), d2.round()
    d1 = slope + (1 - slope) * d1
    assert pair_norm(a, size, share * slope * size, d1, d2) <= 1 + 1e-12


def test_shared_kernel_condition_is_needed() -> None:
    a = torch.tensor([[1e-3]], dtype=F64)
    assert pair_norm(a, 1.0, 0.51, torch.tensor([0.5]).double(), torch.tensor([1.0]).double()) > 1


@pytest.mark.parametrize("first", [0, 1])
def test_shared_kernel_pair_in_a_network(first: int) -> None:
    kernel = operator("convolution")
    contract = EulerStep(GradientField(kernel, slope=0.5), 0.9)
    expand = EulerStep(GradientField(kernel, slope=0.25, sign=1), 0.44)
    torch.nn.init.normal_(contract.field.bias)
    pair = nn.Sequential(*((contract, expand) if first == 0 else (expand, contract))).double()
    audit = account(pair, (2, 4, 4))
    assert audit.lipschitz == 1
    assert "shared kernel" in audit.layers[0].formula
    assert jacobian_norm(pair, torch.randn(2, 4, 4, dtype=F64)) <= HOLDS
    with torch.no_grad():
        expand.step_size.fill_(0.46)  # now h_E > a·h_C
    assert bound_of(pair, (2, 4, 4)) == pytest.approx(1.46, rel=1e-3)
    with torch.no_grad():
        expand.step_size.fill_(0.44)
    stranger = copy.deepcopy(pair)
    stranger[1].field.operator = copy.deepcopy(stranger[1].field.operator)
    assert len(account(stranger, (2, 4, 4)).layers) == 2


def check_shared_pair() -> None:
    """No Jacobian of two steps along one kernel exceeds what they are said to be worth together or apart."""
    matrix = torch.diag(torch.tensor([1.0, 0.7, 0.3, 0.1], dtype=F64))
    for scale, h_c, h_e in [(0.99, 1.0, 0.45), (0.99, 1.0, 0.9), (0.5, 0.6, 0.5), (2.0, 1.0, 0.5), (1.6, 0.9, 0.3)]:
        kernel = PatchConvolution(1, 4, 2)
        fields = [GradientField(kernel, slope=0.5, sign=sign) for sign in (-1, 1)]
        pair = nn.Sequential(EulerStep(fields[0], h_c), EulerStep(fields[1], h_e)).double()
        kernel.weight.data = scale * matrix
        for order in (pair, nn.Sequential(pair[1], pair[0])):
            claimed = bound_of(order, (1, 2, 2))
            for off, on in itertools.product((-50.0, 0.0, 50.0), repeat=2):
                torch.nn.init.constant_(fields[0].bias, off)
                torch.nn.init.constant_(fields[1].bias, on)
                true = jacobian_norm(order, torch.randn(1, 2, 2, dtype=F64))
                assert true <= claimed * HOLDS, (scale, h_c, h_e, off, on, true, claimed)


def test_shared_pairs() -> None:
    check_shared_pair()


def test_pixels_that_no_patch_covers_are_lost() -> None:
    patches = operator("patch")
    assert smallest_singular_value(patches, (2, 4, 4)) == pytest.approx(1, abs=1e-8)
    assert smallest_singular_value(patches, (2, 5, 4)) == 0


def test_shared_kernel_theorem_resists_a_search() -> None:
    """Ascent over A, both D, a and h on the edge of the condition stays at 1; a twentieth beyond, it passes 1."""
    for slack, broken in ((1.0, False), (1.05, True)):
        generator = torch.Generator().manual_seed(0)
        kernel, on, also, slope = (
            torch.randn(shape, generator=generator, dtype=F64).requires_grad_()
            for shape in ((30, 3, 2), (30, 3), (30, 3), (30, 1))
        )
        optimizer = torch.optim.Adam([kernel, on, also, slope], lr=0.1)
        largest = 0.0
        for step in range(60):
            a = kernel / torch.linalg.matrix_norm(kernel, 2)[:, None, None]
            low, h = torch.sigmoid(slope), 1.0 if step % 2 else 0.5
            d1, d2 = low + (1 - low) * torch.sigmoid(5 * on), torch.sigmoid(5 * also)
            contract = torch.eye(2, dtype=F64) - h * a.mT @ (d1[:, :, None] * a)
            expand = torch.eye(2, dtype=F64) + slack * h * low[:, :, None] * a.mT @ (d2[:, :, None] * a)
            norm = torch.linalg.matrix_norm(expand @ contract, 2)
            optimizer.zero_grad()
            (-norm.sum()).backward()
            optimizer.step()
            largest = max(largest, float(norm.detach().max()))
        assert (largest > 1 + 1e-5) is broken
        assert largest <= 1 + 1e-12 or broken


@given(st.floats(0, 2), st.floats(0, 0.99))
@settings(max_examples=200, deadline=None, database=None, derandomize=True)
def test_published_constant_is_never_tighter(h: float, slope: float) -> None:
    """√(1 − 2ah + h²) ≥ max(1 − ah, h − 1): where both are valid, taking the exact one takes the tighter."""
    assert contractive_constant(h, slope, 1.0, 1.0) <= math.sqrt(1 - 2 * slope * h + h * h) + 1e-12


def test_sub_steps_multiply() -> None:
    """A step cut into three with the same field: the account multiplies their exact constants."""
    step = euler("patch", 0.8 / 3, 0.5)
    flow = nn.Sequential(step, step, step)
    assert bound_of(flow, (2, 4, 4)) == pytest.approx((1 - 0.5 * 0.8 / 3) ** 3, rel=1e-6)
    assert bound_of(flow, (2, 4, 4)) < bound_of(euler("patch", 1.9, 0.5), (2, 4, 4))
    for bias in (-50.0, 0.0, 50.0):
        torch.nn.init.constant_(step.field.bias, bias)
        assert jacobian_norm(flow, torch.randn(2, 4, 4, dtype=F64)) <= bound_of(flow, (2, 4, 4)) * HOLDS
