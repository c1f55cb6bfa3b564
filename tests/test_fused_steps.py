"""The step that training runs, against the formula that certificates and attacks run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustflow import certify
from robustflow.fields import GradientField
from robustflow.fused_steps import patch_gradient_step
from robustflow.networks import create_model
from robustflow.operators import PatchConvolution
from robustflow.steps import EulerStep

CASES = [
    (channels, rows, patch, shift, slope, sign, size)
    for channels, rows in ((3, 12), (2, 5), (1, 9))
    for patch, shift in ((1, 0), (2, 0), (2, 1), (3, 1))
    for slope, sign in ((0.0, -1), (0.5, 1), (0.1, -1))
    for size in (0.0, 1.3, -0.4)
]


def make_step(case: tuple[int, int, int, int, float, int, float]) -> EulerStep:
    channels, rows, patch, shift, slope, sign, size = case
    torch.manual_seed(0)
    step = EulerStep(
        GradientField(PatchConvolution(channels, rows, patch=patch, shift=shift), slope=slope, sign=sign), size
    )
    torch.nn.init.normal_(step.field.bias)  # type: ignore[arg-type]
    return step


def outcome(step: EulerStep, x: Tensor, weights: Tensor) -> list[Tensor]:
    """The image and the gradients of ⟨image, weights⟩ by input and parameters."""
    x = x.clone().requires_grad_()
    image = step(x)
    return [image, *torch.autograd.grad((image * weights).sum(), [x, *step.parameters()])]


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_formula(case: tuple[int, int, int, int, float, int, float]) -> None:
    step = make_step(case).double()
    x, weights = (torch.randn(4, case[0], 6, 6, dtype=torch.float64) for _ in range(2))
    for layout in (torch.contiguous_format, torch.channels_last):
        fused = outcome(step.train(), x.to(memory_format=layout), weights)
        plain = outcome(step.eval(), x.to(memory_format=layout), weights)
        for ours, truth in zip(fused, plain, strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def test_gradients_are_finite_differences() -> None:
    torch.manual_seed(1)
    arguments = [torch.randn(shape, dtype=torch.float64) for shape in ((2, 2, 4, 4), (5, 8), (5,), ())]

    def step(x: Tensor, matrix: Tensor, bias: Tensor, size: Tensor) -> Tensor:
        return patch_gradient_step(x, matrix, bias, size, sign=-1, slope=0.3, patch=2, shift=1)

    assert torch.autograd.gradcheck(step, [argument.requires_grad_() for argument in arguments])


@pytest.mark.parametrize("learned", [True, False])
def test_under_autocast_it_is_as_close_as_the_formula(learned: bool) -> None:
    step = make_step((8, 32, 2, 1, 0.0, -1, 1.3)).requires_grad_()
    step.step_size.requires_grad_(learned)
    x = torch.randn(16, 8, 8, 8)
    exact = step.eval()(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused, plain = step.train()(x), step.eval()(x)
    assert fused.dtype == torch.bfloat16
    error, usual = ((found.float() - exact).norm() / exact.norm() for found in (fused, plain))
    assert error < 1.2 * usual
    fused.sum().backward()
    assert step.field.bias.grad is not None
    assert step.field.bias.grad.dtype == torch.float32
    assert (step.step_size.grad is not None) == learned


def test_evaluation_and_certificates_run_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object, **options: object) -> Tensor:
        raise AssertionError("the fused step is for training alone")

    torch.manual_seed(0)
    model = create_model("sharp", input_shape=(1, 8, 8), channels=(4,), layers=2, kernel="patch", lift="patch")
    monkeypatch.setattr("robustflow.steps.patch_gradient_step", refused)
    for mode in (True, False):
        assert certify(model.train(mode), torch.rand(2, 1, 8, 8)).radii.shape == (2,)
    jacobian = torch.func.jacrev(lambda x: model.train()(x[None])[0])(torch.rand(1, 8, 8))
    assert jacobian.shape == (10, 1, 8, 8)
    with pytest.raises(AssertionError, match="training alone"):
        model.train()(torch.rand(2, 1, 8, 8))


def test_a_subclass_of_the_field_is_not_replaced() -> None:
    class Doubled(GradientField):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    step = make_step((2, 8, 2, 0, 0.0, -1, 1.0))
    step.field = Doubled(PatchConvolution(2, 8, patch=2))
    x = torch.rand(3, 2, 4, 4)
    assert torch.equal(step.train()(x), step.eval()(x))
