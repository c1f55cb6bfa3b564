"""Other people's layers in training: under autocast, with the optimizers that all models share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from robustflow import account, create_model, losses
from robustflow.config import TrainConfig
from robustflow.networks import multiply_adds
from robustflow.optimizers import build_optimizers
from robustflow.peers import AOLConvolution, CayleyConvolution, SLLStep

PEERS = ("cpl", "sll", "aol", "cayley")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("regime", PEERS)
def test_a_few_steps_on_digits_lower_the_loss(regime: str, precision: str) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images[:200] / 16, dtype=torch.float32)[:, None]
    labels = torch.tensor(digits.target[:200])
    torch.manual_seed(0)
    model = create_model(
        regime, input_shape=(1, 8, 8), channels=(16,), layers=2, lift="patch", dense=32, dense_layers=1
    )
    optimizers = build_optimizers(model, TrainConfig(epochs=1))
    loss = losses.offset_cross_entropy(0.1, 0.25)
    history = []
    for _ in range(15):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(images)
        value = loss(logits.float(), labels, model.head.weight, 0.0)
        history.append(float(value.detach()))
        for optimizer in optimizers:
            optimizer.zero_grad()
        value.backward()
        for optimizer in optimizers:
            optimizer.step()
        model.constrain_()
    assert history[-1] < 0.75 * history[0], history
    model.constrain_(exact=True)
    assert account(model.eval().features, (1, 8, 8)).lipschitz <= 1 + 1e-6


@pytest.mark.parametrize("make", [lambda: AOLConvolution(8, 8), lambda: SLLStep(8), lambda: CayleyConvolution(8)])
def test_autocast_leaves_the_parametrisation_alone(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    layer = make()
    size = (4, 4) if isinstance(layer, CayleyConvolution) else ()
    plain = layer._kernel(*size)
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer._kernel(*size)
        assert layer(torch.rand(1, 8, 4, 4).bfloat16()).isfinite().all()
    for one, other in zip(*((k,) if isinstance(k, Tensor) else k for k in (plain, inside)), strict=True):
        assert torch.equal(one, other)


def test_multiply_adds_leave_out_what_a_batch_pays_once() -> None:
    """One dense lift of 4·4 patches of 4 numbers; a 3 × 3 convolution on 4 · 4 pixels; the head. No row sums."""
    model = create_model("aol", input_shape=(1, 8, 8), classes=3, channels=(2,), layers=1, lift="patch")
    assert multiply_adds(model) == 16 * 4 * 2 + 16 * 9 * 4 + 32 * 3
