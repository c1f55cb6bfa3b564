"""Every field with every method: the declared order, everything it keeps and nothing else, gradients, save and load.

One parametrised test sends all pairs through. The truth is SciPy for the order, Jacobians by automatic differentiation
for what a step keeps, and finite differences for its derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from robustflow.errors import UserError
from robustflow.fields import GradientField, TwoKernelField
from robustflow.methods import METHODS, PROPERTIES, Property, fits, kept, largest_step, properties_of
from robustflow.operators import PatchConvolution
from robustflow.steps import Flow, Step
from robustflow.structured.fields import (
    FreeField,
    GradientFlowField,
    HamiltonianField,
    MassField,
    ShearField,
    SphereField,
    StencilField,
)
from robustflow.structured.volumes import TorusShearField

IMAGE = (1, 4, 2)
ROUND_OFF = 1e-13  # of one layer
VIOLATION = 1e-9  # what is not kept is missed by more, at the step sizes below


@dataclass(frozen=True)
class Case:
    """How a field is built, and the shape of a state.

    Where F has kinks a method has its order only between them: ``lift`` shifts the arguments of all ReLUs for that.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    lift: float = 0.0
    span: float = 1.0  # of the order's test: no longer than a few times the field takes to settle


def patches() -> PatchConvolution:
    return PatchConvolution(1, 4, 2)


CASES = {
    "gradient, down": Case(lambda: GradientFlowField(3, 8, activation="tanh", sign=-1), (3,)),
    "gradient, down, ReLU": Case(lambda: GradientFlowField(3, 8, activation="relu", sign=-1), (3,), lift=5.0),
    "gradient, up": Case(lambda: GradientFlowField(3, 8, activation="sigmoid", sign=1), (3,)),
    "gradient, free": Case(lambda: GradientFlowField(3, 8, activation="tanh", sign=1, bounded=False), (3,)),
    "sphere": Case(lambda: SphereField(4, 8), (4,)),
    "mass": Case(lambda: MassField(3, 8), (3,)),
    "Hamiltonian": Case(lambda: HamiltonianField(4, 8), (4,)),
    "Hamiltonian, ReLU": Case(lambda: HamiltonianField(2, 8, activation="relu"), (2,), lift=8.0),
    "shear, odd": Case(lambda: ShearField(5, first=2), (5,)),
    "shear, even": Case(lambda: ShearField(6, first=2, activation="sigmoid"), (6,)),
    "shear, plane": Case(lambda: ShearField(2), (2,)),
    "shear, torus": Case(lambda: TorusShearField(5, 6), (5,)),
    "free": Case(lambda: FreeField(4, 8), (4,)),
    "stencil": Case(lambda: StencilField(1, 2, kernel_size=3), IMAGE, lift=8.0),
    "stencil, quadratic": Case(lambda: StencilField(1, 2, kernel_size=3, power=2, outer_bias=True), IMAGE, lift=2.0),
    "stencil, projected": Case(lambda: StencilField(1, 2, kernel_size=3, project=True), IMAGE, lift=8.0, span=0.1),
    "image, down": Case(lambda: GradientField(patches(), slope=0.5, sign=-1), IMAGE, lift=8.0),
    "image, up": Case(lambda: GradientField(patches(), slope=0.5, sign=1), IMAGE, lift=8.0),
    "image, two kernels": Case(lambda: TwoKernelField(patches(), patches()), IMAGE, lift=8.0),
}


def built(case: Case, *, seed: int = 0) -> nn.Module:
    """The field in float64, after an update of all its weights and the constraint."""
    torch.manual_seed(seed)
    field = case.build().double()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for module in field.modules():
        constrain = getattr(module, "constrain_", None)
        if constrain is not None:
            constrain(exact=True)
    return field


def states(case: Case, count: int) -> Tensor:
    return torch.randn(count, *case.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def jacobians(step: nn.Module, x: Tensor) -> Tensor:
    """∂step(x)/∂x of every state, (B, n, n): states do not see each other, so their Jacobians are those of a sum."""
    found = torch.autograd.functional.jacobian(lambda z: step(z).flatten(1).sum(0), x)
    assert isinstance(found, Tensor)
    return found.flatten(2).transpose(0, 1)


def steps_of(step: nn.Module, x: Tensor, count: int) -> Tensor:
    with torch.no_grad():
        for _ in range(count):
            x = step(x)
    return x


# ------------------------------------------------------------------------------------------------ what a step keeps
def mass_drift(step: nn.Module, x: Tensor, count: int) -> float:
    return float((steps_of(step, x, count) - x).flatten(1).sum(1).abs().max())


def norm_drift(step: nn.Module, x: Tensor, count: int) -> float:
    before, after = x.flatten(1).norm(dim=1), steps_of(step, x, count).flatten(1).norm(dim=1)
    return float((after / before - 1).abs().max())


def symplectic_defect(step: nn.Module, x: Tensor) -> float:
    """max ‖JᵀΩJ − Ω‖; infinite in odd dimensions."""
    n = x[0].numel()
    if n % 2:
        return float("inf")
    omega = torch.zeros(n, n, dtype=x.dtype)
    omega[: n // 2, n // 2 :] = torch.eye(n // 2)
    omega[n // 2 :, : n // 2] = -torch.eye(n // 2)
    j = jacobians(step, x)
    return float(torch.linalg.matrix_norm(j.mT @ omega @ j - omega).max())


def volume_defect(step: nn.Module, x: Tensor) -> float:
    return float((torch.linalg.det(jacobians(step, x)) - 1).abs().max())


def expansion(step: nn.Module, x: Tensor) -> float:
    return float(torch.linalg.matrix_norm(jacobians(step, x), 2).max()) - 1


def defects(field: nn.Module, method: str, case: Case) -> dict[str, float]:
    """By how much a step misses each of the properties."""
    step, x = Step(field, method, 0.5, learned=False), states(case, 40)
    # A nonexpansive field has to stand the largest step that is allowed (the midpoint rule allows all).
    largest = min(largest_step(field, method), 20.0)
    return {
        "linear": mass_drift(step, x[:2], 3),
        "norm": norm_drift(step, x[:2], 3),
        "symplectic": symplectic_defect(step, x[:4]),
        "volume": volume_defect(step, x[:4]),
        "nonexpansive": expansion(Step(field, method, largest, learned=False) if largest > 0 else step, x),
    }


def check_what_it_keeps(field: nn.Module, method: str, case: Case) -> None:
    measured, claimed = defects(field, method, case), kept(field, method)
    assert {name for name, defect in measured.items() if defect <= ROUND_OFF} == claimed, measured
    assert {name for name, defect in measured.items() if not defect > VIOLATION} == claimed, measured
    if "linear" in claimed:
        assert mass_drift(Step(field, method, 0.05), states(case, 2), 1000) <= 1e-12
    if "norm" in claimed:
        assert norm_drift(Step(field, method, 0.05), states(case, 2), 100) <= ROUND_OFF
    for name in PROPERTIES:
        if name in claimed:
            size = min(0.5, largest_step(field, method)) if name == "nonexpansive" else 0.5
            assert name in Step(field, method, size, keep=name).kept
        else:
            with pytest.raises(UserError, match=f"with {method} is not"):
                Step(field, method, 0.5, keep=name)


# ------------------------------------------------------------------------------------ order, derivatives, persistence
def check_order(field: nn.Module, method: str, case: Case) -> None:
    """The slope of log error against log h at T = ``span``, the reference by SciPy's DOP853."""
    with torch.no_grad():
        for name, parameter in field.named_parameters():
            if "bias" in name:
                parameter.add_(case.lift)
    start = 0.3 * states(case, 1)

    def right(_: float, y: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return field(torch.from_numpy(y).view_as(start)).flatten().numpy()

    solved = solve_ivp(right, (0.0, case.span), start.flatten().numpy(), method="DOP853", rtol=1e-13, atol=1e-13)
    exact = torch.from_numpy(solved.y[:, -1]).view_as(start)
    counts = [8, 16, 32, 64]
    errors = [float((steps_of(Step(field, method, case.span / n), start, n) - exact).norm()) for n in counts]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope - METHODS[method].order) <= 0.15, (slope, errors)


def check_gradients(field: nn.Module, method: str, case: Case) -> None:
    step = Step(field, method, 0.3)
    names = [name for name, _ in step.named_parameters()]

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(step, dict(zip(names, weights, strict=True)), (x,))

    inputs = (states(case, 2).requires_grad_(), *(p.detach().clone().requires_grad_() for p in step.parameters()))
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    step(states(case, 2)).square().sum().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in step.parameters() if p.requires_grad)


def check_save_and_load(field: nn.Module, method: str, case: Case, path: Path) -> None:
    step = Step(field, method, 0.1)
    save_file(step.state_dict(), path)
    other = Step(built(case, seed=5), method, 0.3)
    x = states(case, 3)
    assert not torch.equal(other(x), step(x))
    other.load_state_dict(load_file(path))
    assert torch.equal(other(x), step(x))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_every_field_with_every_method(name: str, method: str, tmp_path: Path) -> None:
    case = CASES[name]
    if not fits(built(case), method):
        for keep in (None, *PROPERTIES):
            with pytest.raises(UserError, match=f"^{method} needs a field"):
                Step(built(case), method, 0.1, keep=keep)
        return
    check_what_it_keeps(built(case), method, case)
    check_order(built(case), method, case)
    check_gradients(built(case), method, case)
    check_save_and_load(built(case), method, case, tmp_path / "step.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_a_network_keeps_what_all_its_layers_keep(name: str) -> None:
    """30 layers of different weights and step sizes, one after another with every method."""
    case = CASES[name]
    for method in METHODS:
        if method == "implicit-midpoint" or not fits(built(case), method):
            continue
        keep = kept(built(case), method)
        hold: Property | None = "nonexpansive" if "nonexpansive" in keep else None
        fields = [built(case, seed=seed) for seed in range(30)]
        network = Flow(*(Step(field, method, 0.1 + 0.005 * i) for i, field in enumerate(fields)))
        held = Flow(*(Step(field, method, 0.1, keep=hold) for field in fields))
        assert network.kept == keep - {"nonexpansive"}  # its step sizes may be learned, and are not held
        assert held.kept == keep
        x = states(case, 3)
        grown = float(torch.linalg.matrix_norm(jacobians(network, x), 2).max())
        bound = 1e-14 * max(1.0, grown**2)
        assert "linear" not in keep or mass_drift(network, x, 1) <= 1e-13
        assert "norm" not in keep or norm_drift(network, x, 1) <= 1e-13
        assert "symplectic" not in keep or symplectic_defect(network, x) <= bound
        assert "volume" not in keep or volume_defect(network, x) <= bound
        assert "nonexpansive" not in keep or grown <= 1 + 1e-14


def test_fields_declare_what_their_names_promise() -> None:
    """The cases above would pass with a field that declares nothing."""
    declared = {name: set(properties_of(built(case))) for name, case in CASES.items()}
    assert {name: properties for name, properties in declared.items() if properties} == {
        "gradient, down": {"nonexpansive"},
        "gradient, down, ReLU": {"nonexpansive"},
        "sphere": {"norm"},
        "mass": {"linear"},
        "Hamiltonian": {"symplectic", "volume"},
        "Hamiltonian, ReLU": {"symplectic", "volume"},
        "shear, odd": {"volume"},
        "shear, even": {"volume"},
        "shear, plane": {"symplectic", "volume"},
        "shear, torus": {"volume"},
        "stencil, projected": {"norm"},
        "image, down": {"nonexpansive"},
    }
    euler = Step(built(CASES["Hamiltonian"]), "explicit-euler", 0.5)
    assert symplectic_defect(euler, states(CASES["Hamiltonian"], 4)) > 1e-3
