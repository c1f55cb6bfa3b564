"""Lipschitz rules of this project's own layers: operators, steps, and channel-wise affine maps.

An activation with slopes in [a, 1] acts on the difference of two points as a diagonal matrix D, aI ≤ D ≤ I, whether it
is differentiable or not. The Jacobian I − hAᵀDA of a contractive step is symmetric with eigenvalues in
[1 − hσ₁², 1 − h·a·σ_min²], hence Lip = max(1 − h·a·σ_min², hσ₁² − 1); an expansive step has 1 + hσ₁².
"""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor, nn

from robustflow import norms
from robustflow.errors import UserError
from robustflow.fields import GradientField, TwoKernelField
from robustflow.layer_rules import LayerBound, Shape, register, require_code_of, runs_code_of, scale_kernel, scaled_norm
from robustflow.networks import Normalize
from robustflow.operators import Convolution, PatchConvolution
from robustflow.spectra import pair
from robustflow.steps import AveragedStep, EulerStep


# ----------------------------------------------------------------------------------------------------------- operators
@scaled_norm.register
def _(module: Convolution, shape: Shape, before: Tensor | None, after: Tensor | None) -> tuple[str, float]:
    weight = scale_kernel(module.weight, before, after, 1)
    return "max σ(F(ω)) on the padded torus", norms.conv2d_norm(weight, tuple(shape[1:]), padding=module.padding)


@scaled_norm.register
def _(module: PatchConvolution, shape: Shape, before: Tensor | None, after: Tensor | None) -> tuple[str, float]:
    kernel = module.weight.view(module.out_channels, module.in_channels, module.patch, module.patch)
    return "σ(W) of the patch matrix, dense SVD", norms.linear_norm(scale_kernel(kernel, before, after, 1).flatten(1))


def _linear(module: nn.Module, shape: Shape, name: str) -> list[LayerBound]:
    formula, bound = scaled_norm(module, shape, None, None)
    return [LayerBound(name, type(module).__name__, formula, bound)]


register(Convolution)(_linear)
register(PatchConvolution)(_linear)


def largest_singular_value(operator: Convolution | PatchConvolution, shape: Shape) -> float:
    """σ₁ of an operator on inputs of ``shape``, from above."""
    kind = PatchConvolution if isinstance(operator, PatchConvolution) else Convolution
    require_code_of(operator, kind, f"the operator {type(operator).__name__}")
    return scaled_norm(operator, shape, None, None)[1]


def smallest_singular_value(operator: Convolution | PatchConvolution, shape: Shape) -> float:
    """σ_min of an operator on its whole domain, from below: 0 where nothing better is proved."""
    if isinstance(operator, PatchConvolution):
        # Pixels that no patch covers (a size that is no multiple of the patch) are lost: σ_min = 0.
        covered = shape[1] % operator.patch == 0 and shape[2] % operator.patch == 0
        return norms.singular_value_bounds(operator.weight)[0] if covered else 0.0
    # Of a map that keeps the image's size: with another padding borders may be lost.
    keeps_size = pair(operator.padding) == (operator.weight.shape[2] // 2, operator.weight.shape[3] // 2)
    return norms.conv2d_smallest_singular_value(operator.weight, tuple(shape[1:])) if keeps_size else 0.0


# --------------------------------------------------------------------------------------------------------------- steps
def contractive_constant(h: float, slope: float, smallest: float, largest: float) -> float:
    """max(1 − h·a·σ_min², h·σ₁² − 1): the exact constant of x − hAᵀσ(Ax + b), h ≥ 0.

    >>> contractive_constant(1.5, 0.5, 1.0, 1.0)
    0.5
    """
    return max(1 - h * slope * smallest**2, h * largest**2 - 1)


def _check_numbers(field: GradientField | TwoKernelField) -> None:
    """Slope and sign are attributes, which may have been changed since the field was built."""
    kind, sign = type(field).__name__, getattr(field, "sign", 1)
    if not 0 <= field.slope <= 1:
        raise UserError(f"a {kind} has the slope {field.slope}, which has no Lipschitz rule: set it to one in [0, 1]")
    if sign not in (-1, 1):
        raise UserError(f"a {kind} has the sign {sign}, which has no Lipschitz rule: set it to -1 or 1")


def _step(h: float, field: nn.Module, shape: Shape, keep: float) -> tuple[str, float]:
    """(formula, bound) of keep·x + h·F(x) for ``keep`` > 0 and a step size of either sign."""
    for kind in (GradientField, TwoKernelField):
        if isinstance(field, kind):
            require_code_of(field, kind, f"the field {type(field).__name__}")
            _check_numbers(field)
    if isinstance(field, GradientField):
        largest = largest_singular_value(field.operator, shape)
        signed = h * field.sign / keep
        if signed >= 0:
            constant = 1 + signed * largest**2
            formula = f"1 + hσ² with h = {signed:.6g}, σ ≤ {largest:.9g}"
        else:
            smallest = smallest_singular_value(field.operator, shape) if field.slope > 0 else 0.0
            constant = contractive_constant(-signed, field.slope, smallest, largest)
            formula = (
                f"max(1 − haσ_min², hσ² − 1) with h = {-signed:.6g}, a = {field.slope:.6g}, "
                f"σ_min ≥ {smallest:.9g}, σ ≤ {largest:.9g}"
            )
        rounding = 16 * norms.UNIT * (1 + abs(signed) * largest**2)
    elif isinstance(field, TwoKernelField):
        inner, outer = largest_singular_value(field.inner, shape), largest_singular_value(field.outer, shape)
        constant = 1 + abs(h) / keep * inner * outer
        formula = f"1 + |h|·σ(A)·σ(B) with h = {h / keep:.6g}, σ(A) ≤ {inner:.9g}, σ(B) ≤ {outer:.9g}"
        rounding = 16 * norms.UNIT * constant
    else:
        raise UserError(f"{type(field).__name__} has no Lipschitz rule as a field: use GradientField or TwoKernelField")
    return formula if keep == 1 else f"{keep:g}·({formula})", norms.up(keep * (constant + rounding))


@register(EulerStep)
def _euler(module: EulerStep, shape: Shape, name: str) -> list[LayerBound]:
    formula, bound = _step(float(module.step_size.detach()), module.field, shape, 1.0)
    return [LayerBound(name, "EulerStep", formula, bound)]


@register(AveragedStep)
def _averaged(module: AveragedStep, shape: Shape, name: str) -> list[LayerBound]:
    formula, bound = _step(0.5, module.field, shape, 0.5)
    return [LayerBound(name, "AveragedStep", formula, bound)]


def pair_condition(h_c: float, h_e: float, slope: float, largest: float) -> bool:
    """0 ≤ h_E ≤ a·h_C and h_C·σ² ≤ 1, where rounding cannot have made it true.

    >>> [pair_condition(1.0, h_e, 0.5, largest) for h_e, largest in ((0.49, 0.99), (0.51, 0.99), (0.49, 1.1))]
    [True, False, False]
    """
    return 0 <= h_e <= slope * h_c * (1 - 4 * norms.UNIT) and h_c * largest**2 * (1 + 4 * norms.UNIT) <= 1


def shared_kernel_pair(first: nn.Module, second: nn.Module, shape: Shape) -> str | None:
    """Why two steps with one and the same operator A are together 1-Lipschitz, if they are.

    x₁ = x − h_C Aᵀs(Ax + b), y = x₁ + h_E Aᵀr(Ax₁ + b'), s' ∈ [a, 1], r' ∈ [0, 1], is 1-Lipschitz in either order
    if h_C·σ(A)² ≤ 1 and 0 ≤ h_E ≤ a·h_C. On differences, with G = AAᵀ, q = Ax₁ and H = (D₁⁻¹ − h_C G)⁻¹ ≻ 0 (the
    case h_C·σ² = 1 by continuity): ‖x‖² − ‖x₁‖² = 2h_C qᵀHq + h_C² qᵀHGHq, ‖y‖² − ‖x₁‖² = 2h_E qᵀD₂q + h_E² qᵀD₂GD₂q.
    From qᵀHq = sup_z 2zᵀq − zᵀH⁻¹z at z = aD₂q, with D₁⁻¹ ≤ I/a and D₂² ≤ D₂: qᵀHq ≥ a qᵀD₂q + a²h_C qᵀD₂GD₂q. So
    the first difference is the larger. The other order has the transposed Jacobian, and the same norm. ∎
    """
    fields, sizes = [], []
    for step in (first, second):
        if not (isinstance(step, EulerStep) and isinstance(step.field, GradientField)):
            return None
        # Of a subclass with code of its own nothing is known here, whatever rule it has.
        if not (runs_code_of(step, EulerStep) and runs_code_of(step.field, GradientField)):
            return None
        if any(part._forward_hooks or part._forward_pre_hooks for part in (step, step.field)):
            return None
        fields.append(step.field)
        sizes.append(float(step.step_size.detach()) * step.field.sign)
    if fields[0].operator is not fields[1].operator:
        return None
    contractive = 0 if sizes[0] <= sizes[1] else 1
    h_c, h_e, slope = -sizes[contractive], sizes[1 - contractive], fields[contractive].slope
    largest = largest_singular_value(fields[0].operator, shape)
    if pair_condition(h_c, h_e, slope, largest):
        sizes_text = f"h_C = {h_c:.6g}, h_E = {h_e:.6g}, a = {slope:.6g}"
        return f"shared kernel (proof: robustflow.step_rules): h_C σ² ≤ 1 and h_E ≤ a·h_C with {sizes_text}"
    return None


# --------------------------------------------------------------------------------------------- channel-wise affine maps
@singledispatch
def affine_scale(module: nn.Module) -> Tensor | None:
    """|scale| of every channel where the module is x ↦ scale·x + shift, else None."""
    return None


@affine_scale.register
def _(module: Normalize) -> Tensor:
    if bool((module.std <= 0).any()):
        raise UserError("Normalize has a standard deviation that is not positive: there is no Lipschitz bound")
    return 1 / module.std.detach().to("cpu", torch.float64) * (1 + 4 * norms.UNIT)


@affine_scale.register(nn.BatchNorm1d)
@affine_scale.register(nn.BatchNorm2d)
def _(module: nn.BatchNorm1d | nn.BatchNorm2d) -> Tensor:
    if module.training or module.running_var is None:
        raise UserError(
            f"{type(module).__name__} normalises by the batch it sees, which has no Lipschitz constant: "
            "call .eval(), and track running statistics"
        )
    gain = torch.ones(module.num_features) if module.weight is None else module.weight
    variance = module.running_var.detach().to("cpu", torch.float64)
    if bool((variance < 0).any()):
        raise UserError(f"{type(module).__name__} has a negative running variance: load the model again")
    return gain.detach().to("cpu", torch.float64).abs() / (variance + module.eps).sqrt() * (1 + 8 * norms.UNIT)


def _affine(module: nn.Module, shape: Shape, name: str) -> list[LayerBound]:
    try:
        scale = affine_scale(module)
    except UserError as error:
        raise UserError(f"{name or 'the module'}: {error}") from None
    assert scale is not None
    formula = "1/min(std)" if isinstance(module, Normalize) else "max |γ|/√(var + ε)"
    return [LayerBound(name, type(module).__name__, formula, norms.up(float(scale.max())))]


for _kind in (Normalize, nn.BatchNorm1d, nn.BatchNorm2d):
    register(_kind)(_affine)
