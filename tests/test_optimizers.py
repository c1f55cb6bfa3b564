"""Orthogonalised momentum against torch's own, and against the singular value decomposition."""

from __future__ import annotations

import pytest
import torch

from robustflow.optimizers import Muon, orthogonalized

SHAPES = [(8, 8), (24, 10), (10, 24)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_vectors_stay_and_singular_values_come_near_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    seen = u.T @ orthogonalized(matrix, dtype) @ v.T
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert (seen - torch.diag(seen.diag())).abs().max() < tolerance
    assert seen.diag().min() > 0.3
    assert seen.diag().max() < 1.3


def test_the_momentum_of_dead_units_leaves_no_denormal_numbers() -> None:
    """Rows and columns that decayed to 1e-40 once made a step of training take three times as long."""
    torch.manual_seed(0)
    matrix = torch.randn(24, 24)
    alive = orthogonalized(matrix[4:, 6:], torch.float32)
    matrix[:4] = 1e-40
    matrix[:, :6] = 1e-40
    found = orthogonalized(matrix, torch.float32)
    torch.testing.assert_close(found[4:, 6:], alive)
    assert (found[:4] == 0).all()
    assert (found[:, :6] == 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_those_of_torch(shape: tuple[int, int]) -> None:
    """torch's runs Newton–Schulz in bfloat16; so does ours when asked to."""
    torch.manual_seed(0)
    start, target = torch.randn(shape), torch.randn(shape)
    ends = []
    for make in (
        lambda weights: Muon(weights, 0.1, 0.9, torch.bfloat16),
        lambda weights: torch.optim.Muon(weights, lr=0.1, momentum=0.9, weight_decay=0.0, ns_steps=4),
    ):
        weight = torch.nn.Parameter(start.clone())
        optimizer = make([weight])
        for _ in range(10):
            optimizer.zero_grad()
            (weight - target).square().sum().backward()
            optimizer.step()
        ends.append(weight.detach())
    torch.testing.assert_close(*ends, rtol=0.02, atol=0.02)


def test_a_weight_without_a_gradient_stays() -> None:
    weight = torch.nn.Parameter(torch.eye(3))
    Muon([weight], 0.1, 0.9, torch.float32).step()
    assert torch.equal(weight.detach(), torch.eye(3))
