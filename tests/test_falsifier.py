"""The falsifier finds what is false, and nothing else."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from robustflow import norms, step_rules
from robustflow.bounds import Account, account
from robustflow.errors import UserError
from robustflow.falsifier import falsify, falsify_network
from robustflow.fields import GradientField
from robustflow.networks import Normalize, create_model, list_models
from robustflow.operators import Convolution, PatchConvolution
from robustflow.steps import EulerStep

F64 = torch.float64


def check_falsifier_agrees() -> None:
    """No claim of the account is refuted, in any regime: of the network, of an entry or of a layer."""
    for seed, regime in enumerate(list_models()):
        torch.manual_seed(seed)
        model = create_model(regime, input_shape=(2, 8, 8), channels=(4, 6), layers=2, mean=[0.5] * 2, std=[0.25] * 2)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, GradientField):
                    module.bias.normal_(std=0.1)
        model.constrain_(exact=True)
        for found in falsify_network(model.eval(), torch.rand(4, 2, 8, 8), iterations=8):
            assert not found.violated, (regime, found.layer, found.observed, found.claimed)


def test_no_true_claim_is_refuted() -> None:
    check_falsifier_agrees()


def test_a_claim_just_below_the_norm_is_refuted() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 6).double()
    true = float(torch.linalg.matrix_norm(layer.weight.detach(), 2))
    for claimed, violated in [(0.999 * true, True), (1.001 * true, False), (true * (1 + 1e-9), False)]:
        found = falsify(layer, torch.rand(2, 6), claimed=claimed, iterations=60)
        assert found.violated is violated
        assert found.observed == pytest.approx(true, rel=1e-4)
        assert found.ratio == pytest.approx(true / claimed, rel=1e-4)
    change = (layer(found.x) - layer(found.y)).detach()
    assert float(change.norm() / (found.x - found.y).norm()) == pytest.approx(found.observed)


def test_the_published_bound_of_a_zero_padded_shift_is_refuted() -> None:
    """√(1 − 2ah + h²) at a = h = ½ says 0.866 of a step whose kernel shifts the image; the true constant is 1."""
    operator = Convolution(1, 1, 3).double()
    with torch.no_grad():
        operator.weight.zero_()[0, 0, 0, 1] = 1
    step = EulerStep(GradientField(operator, slope=0.5), 0.5).double()
    found = falsify(step, torch.rand(2, 1, 4, 4), claimed=math.sqrt(0.75))
    assert found.violated
    assert found.observed == pytest.approx(1, abs=1e-3)
    assert not falsify(step, torch.rand(2, 1, 4, 4)).violated


def test_a_forgotten_normalisation_is_refuted() -> None:
    net = nn.Sequential(Normalize([0.5], [0.25]), PatchConvolution(1, 4, 2))
    without = norms.linear_norm(net[1].weight.detach())
    assert falsify(net, torch.rand(2, 1, 4, 4), claimed=without).ratio == pytest.approx(4, rel=1e-3)


def test_an_expansion_that_only_some_points_show_is_found() -> None:
    """Off at the given points: the ascent and the random starts have to look elsewhere."""
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(2) * 3)
        net[0].bias.fill_(-1.5)
    found = falsify(net, torch.tensor([[0.1, 0.1], [0.2, 0.1]]), claimed=2.9, pairs=12, iterations=40)
    assert found.violated


def test_the_same_seed_finds_the_same_pair() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.MaxPool2d(3, 1))
    points = torch.rand(3, 1, 5, 5)
    one, two, other = (falsify(net, points, seed=seed, iterations=3) for seed in (1, 1, 2))
    assert torch.equal(one.x, two.x)
    assert one.as_dict() == two.as_dict()
    assert one.observed != other.observed


def test_a_map_that_loses_everything() -> None:
    layer = nn.Linear(3, 2)
    torch.nn.init.zeros_(layer.weight)
    found = falsify(layer, torch.rand(2, 3))
    assert found.observed == found.claimed == found.ratio == 0
    assert not found.violated


def test_network_then_layers() -> None:
    model = create_model("sharp", input_shape=(1, 4, 4), channels=(4,), layers=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = falsify_network(model.eval(), torch.rand(2, 1, 4, 4), iterations=3)
    # The normalisation is folded into the convolution, whose own claim is searched as well.
    assert [entry.layer for entry in found][:2] == ["features", "features.0 + features.1"]
    assert found[-1].layer == "features.1"
    assert "features.4" in [entry.layer for entry in found]  # a pool: it has a claim, if no weights
    assert len({entry.layer for entry in found}) == len(found)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(isinstance(entry.x, Tensor) and entry.x.dtype == F64 for entry in found)


def test_every_entry_of_an_account_is_searched() -> None:
    """What a certificate multiplies are entries, some of several layers: a false one of those is found, too."""
    torch.manual_seed(0)
    shared = create_model("shared", input_shape=(2, 4, 4), channels=(4,), layers=2, kernel="patch", lift="patch").eval()
    images = torch.rand(2, 2, 4, 4)
    audit = account(shared.features.double(), (2, 4, 4), "features")
    found = falsify_network(shared, images, iterations=4)
    assert {entry.layer for entry in audit.layers} <= {entry.layer for entry in found}
    assert found[0].claimed == audit.lipschitz
    for i, entry in enumerate(audit.layers):
        lowered = dataclasses.replace(entry, bound=entry.bound / 2)
        wrong = Account((*audit.layers[:i], lowered, *audit.layers[i + 1 :]))
        found = falsify_network(shared, images, audit=wrong, iterations=8)
        assert [entry.layer for entry in found[1:] if entry.violated] == [entry.layer]
        assert found[0].claimed == wrong.lipschitz


def test_a_false_claim_of_a_pair_along_one_kernel_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = PatchConvolution(1, 4, 2)
    with torch.no_grad():
        kernel.weight.copy_(torch.diag(torch.tensor([0.7, 0.5, 0.3, 0.1])))
    fields = [GradientField(kernel, slope=0.5, sign=sign) for sign in (1, -1)]
    for field, bias in zip(fields, (5.0, -5.0), strict=True):  # the expansive one on, the contractive one off
        torch.nn.init.constant_(field.bias, bias)
    pair = nn.Sequential(EulerStep(fields[0], 0.9), EulerStep(fields[1], 1.0))
    net = nn.Sequential(pair, nn.Flatten(), nn.Linear(4, 2))
    images = torch.rand(2, 1, 2, 2)
    assert not any(found.violated for found in falsify_network(net, images))
    monkeypatch.setattr(step_rules, "pair_condition", lambda h_c, h_e, slope, largest: h_e <= h_c)
    found = falsify_network(net, images)
    assert [entry.layer for entry in found if entry.violated] == ["features", "0.0 + 0.1"]


def test_refusals() -> None:
    for options in ({"pairs": 0}, {"iterations": 0}):
        with pytest.raises(UserError, match="at least one"):
            falsify(nn.ReLU(), torch.rand(2, 3), **options)
    with pytest.raises(UserError, match="at least one"):
        falsify(nn.ReLU(), torch.rand(0, 3))
    with pytest.raises(UserError, match="LayerNorm"):
        falsify(nn.LayerNorm(3), torch.rand(2, 3))
