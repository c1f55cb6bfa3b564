"""The composition of layers into an account, against dense matrices and full Jacobians."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from robustflow.baselines import Residual
from robustflow.bounds import account
from robustflow.certificates import certify
from robustflow.errors import UserError
from robustflow.networks import Normalize, create_model, list_models
from robustflow.operators import Convolution, PatchConvolution

F64 = torch.float64
HOLDS = 1 + 1e-10


def jacobian_norm(module: nn.Module, x: Tensor) -> float:
    """‖J‖₂ at one point, from the full Jacobian."""
    with torch.enable_grad():
        jacobian = torch.autograd.functional.jacobian(lambda v: module(v[None])[0].flatten(), x)
    return float(torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()), 2))


def matrix_norm(module: nn.Module, shape: tuple[int, ...]) -> float:
    return jacobian_norm(module, torch.zeros(shape, dtype=F64))


def bound_of(module: nn.Module, shape: tuple[int, ...]) -> float:
    return account(module, shape).lipschitz


def check_normalisation_counts() -> None:
    """The input's normalisation multiplies: std 1/4 on one channel, on the other nothing."""
    convolution = nn.Conv2d(2, 3, 3, padding=1, dtype=F64)
    net = nn.Sequential(Normalize([0.5, 0.5], [0.25, 1.0]).double(), convolution)
    true, bound = matrix_norm(net, (2, 5, 5)), bound_of(net, (2, 5, 5))
    assert true <= bound * HOLDS, "1/std is missing"
    assert bound <= 1.5 * true


def test_normalisation_counts() -> None:
    check_normalisation_counts()


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)), (2, 4, 4)),
        (nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4)), (2, 4, 4)),
        (nn.Sequential(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 2, groups=2), nn.BatchNorm2d(2)), (4, 3, 3)),
        (nn.Sequential(Normalize([0, 0], [0.2, 1]), nn.Flatten(), nn.Linear(8, 3), nn.BatchNorm1d(3)), (2, 2, 2)),
        (nn.Sequential(Normalize([0, 0], [0.2, 1]), nn.PixelUnshuffle(2), nn.Conv2d(8, 2, 1)), (2, 4, 4)),
        (nn.Sequential(Normalize([0] * 4, [0.2, 1, 0.5, 2]), nn.PixelShuffle(2), nn.Conv2d(1, 2, 2)), (4, 2, 2)),
        (nn.Sequential(Normalize([0, 0], [0.2, 1]), PatchConvolution(2, 3, 2, 1)), (2, 4, 4)),
        (nn.Sequential(Normalize([0, 0], [0.2, 1]), nn.Sequential(nn.Identity(), Convolution(2, 3, 3))), (2, 4, 4)),
        (nn.Sequential(nn.BatchNorm2d(2), nn.LeakyReLU(1.0), nn.Conv2d(2, 3, 2)), (2, 3, 3)),
        (nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2)), (2, 3, 3)),
        (nn.Sequential(Normalize([0, 0], [0.1, 0.2]), Normalize([0, 0], [1, 0.9]), nn.Conv2d(2, 2, 1)), (2, 3, 3)),
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(2)), (2, 3)),
    ],
)
def test_folding_is_sound_and_never_looser(net: nn.Sequential, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net = copy.deepcopy(net).double().eval()
    for layer in net.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            layer.running_var.uniform_(0.05, 3)
            layer.weight.data.normal_()
    audit = account(net, shape)
    true = matrix_norm(net, shape)
    assert true <= audit.lipschitz * HOLDS
    separate, at = 1.0, torch.zeros(1, *shape, dtype=F64)
    for layer in net:
        separate *= bound_of(layer, tuple(at.shape[1:]))
        at = layer(at)
    assert audit.lipschitz <= separate * (1 + 1e-8)


def test_residual_adds_its_branches() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 1))
    block = Residual(body, nn.Conv2d(2, 3, 1)).double()
    audit = account(nn.Sequential(block), (2, 4, 4))
    assert audit.lipschitz == pytest.approx(bound_of(body, (2, 4, 4)) + bound_of(block.shortcut, (2, 4, 4)))
    assert jacobian_norm(block, torch.randn(2, 4, 4, dtype=F64)) <= audit.lipschitz
    assert [part.layer for part in audit.layers[0].parts] == ["0.shortcut", "0.body.0", "0.body.1", "0.body.2"]


@pytest.mark.parametrize("regime", list_models())
def test_networks_of_every_regime(regime: str) -> None:
    torch.manual_seed(0)
    model = create_model(regime, input_shape=(1, 4, 4), channels=(4,), layers=2, mean=[0.3], std=[0.5])
    model.constrain_(exact=True)
    model = model.double().eval()
    for point in torch.rand(4, 1, 4, 4, dtype=F64) * 3:
        assert jacobian_norm(model.features, point) <= bound_of(model.features, (1, 4, 4)) * HOLDS
        assert jacobian_norm(model, point) <= bound_of(model, (1, 4, 4)) * HOLDS


def test_a_torchvision_resnet_is_refused_by_name_and_certified_from_its_parts() -> None:
    """As the README says it."""
    from torchvision.models import resnet

    torch.manual_seed(0)
    net = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=3).double().eval()
    x = torch.rand(2, 3, 16, 16, dtype=F64)
    with pytest.raises(UserError, match="a ResNet cannot be certified"):
        certify(net, x)
    with pytest.raises(UserError, match=r"4\.0 is a BasicBlock"):
        certify(nn.Sequential(*list(net.children())[:-1], nn.Flatten(), net.fc), x)
    blocks: list[nn.Module] = []
    for b in (*net.layer1, *net.layer2, *net.layer3, *net.layer4):
        body = nn.Sequential(b.conv1, b.bn1, nn.ReLU(), b.conv2, b.bn2)
        blocks += [Residual(body, b.downsample), nn.ReLU()]
    same = nn.Sequential(net.conv1, net.bn1, nn.ReLU(), net.maxpool, *blocks, net.avgpool, nn.Flatten(), net.fc)
    assert torch.allclose(same(x), net(x))
    assert math.isfinite(certify(same, x).lipschitz)


def test_a_layer_used_twice_counts_twice() -> None:
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(3 * torch.eye(2))
    assert bound_of(nn.Sequential(layer, nn.Sequential(layer), layer), (2,)) == pytest.approx(27)


def test_account_multiplies_in_the_open() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Sigmoid(), nn.Linear(2, 2)))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(2) * 3)
        net[1][1].weight.copy_(torch.eye(2) * 8)
    audit = account(net, (2,))
    assert [bound.layer for bound in audit.layers] == ["0", "1.0", "1.1"]
    assert audit.products == pytest.approx([3, 0.75, 6])
    assert audit.lipschitz == audit.products[-1]
    text = audit.explain()
    for word in ("1.0", "Sigmoid", "0.25", "σ(W)", "Lipschitz bound: 6.0"):
        assert word in text
    assert audit.rows()[1]["kind"] == "Sigmoid"
    with torch.no_grad():
        net[0].weight.mul_(2)
    assert account(net, (2,)).lipschitz == pytest.approx(12)


def test_products_neither_vanish_nor_become_nan() -> None:
    tiny, huge = nn.Linear(1, 1).double(), nn.Linear(1, 1).double()
    with torch.no_grad():
        tiny.weight.fill_(1e-200)
        huge.weight.fill_(1e200)
    assert 0 < bound_of(nn.Sequential(tiny, tiny), (1,)) < 1e-300
    assert bound_of(nn.Sequential(huge, huge), (1,)) == math.inf
    with torch.no_grad():
        tiny.weight.zero_()
    assert bound_of(nn.Sequential(huge, huge, tiny), (1,)) == 0
