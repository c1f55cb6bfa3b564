"""Radii against exact distances, planted adversaries, and arithmetic with more digits."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustflow.baselines import Residual
from robustflow.certificates import Certificate, certify
from robustflow.errors import UserError
from robustflow.fields import GradientField
from robustflow.networks import Classifier, Normalize, create_model, list_models
from robustflow.operators import PatchConvolution
from robustflow.steps import EulerStep

F64 = torch.float64


def linear_classifier(weight: list[list[float]], bias: list[float] | None = None) -> nn.Sequential:
    net = nn.Sequential(nn.Flatten(), nn.Linear(len(weight[0]), len(weight), dtype=F64))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor(weight, dtype=F64))
        net[1].bias.copy_(torch.tensor(bias or [0.0] * len(weight), dtype=F64))
    return net


def image(*pixels: float) -> Tensor:
    return torch.tensor(pixels, dtype=F64).view(1, 1, 1, -1)


def radius(net: nn.Module, x: Tensor, label: int) -> float:
    return float(certify(net, x, torch.tensor([label])).radii[0])


def check_radius(found: float, exact: float) -> None:
    assert found <= exact, f"certified {found}, the decision boundary is at {exact}"
    assert found >= exact * (1 - 1e-7), f"certified only {found} of {exact}"


def check_exact_radii() -> None:
    """Linear networks whose distance to the decision boundary is a rational number."""
    # Rows differ by (3, 4): ‖·‖ = 5, margin 3/2 + 1.
    check_radius(radius(linear_classifier([[3.0, 4.0], [0.0, 0.0]]), image(0.5, 0.25), 0), 0.5)
    # Opposite rows: the pair's distance is 2‖w‖, the boundary at margin/2‖w‖ = 1/4.
    check_radius(radius(linear_classifier([[0.6, 0.8], [-0.6, -0.8]]), image(0.0, 0.3125), 0), 0.25)
    # Three classes, the nearest is not the runner-up: margins 1 over 10 and 1/2 over 1.
    net = linear_classifier([[0.0, 0.0], [10.0, 0.0], [0.0, 1.0]], [1.0, 0.0, 0.5])
    check_radius(radius(net, image(0.0, 0.0), 0), 0.1)


def check_normalised_radius() -> None:
    """The same behind (x − mean)/std, std 1/4: four times nearer."""
    linear = linear_classifier([[3.0, 4.0], [0.0, 0.0]])
    net = nn.Sequential(Normalize([0.5], [0.25]), nn.Flatten(), linear[1])
    # (0.6 − 0.5)·4·3 + (0.7 − 0.5)·4·4 = 4.4 over 4·5; in float32, 0.5 and 0.25 are exact
    check_radius(radius(net, image(0.6, 0.7), 0), 0.22)


def check_planted_adversary(
    build: Callable[[int], tuple[nn.Module, tuple[int, int, int]]], seeds: Sequence[int] = range(6)
) -> float:
    """No flip that a walk along the gradient finds lies within a radius. Returns the closest flip, in radii."""
    closest = math.inf
    for seed in seeds:
        net, shape = build(seed)
        net = copy.deepcopy(net).double().eval()
        x = torch.rand(240 // len(seeds), *shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
        with torch.no_grad():
            labels = net(x).argmax(1)
        radii = torch.from_numpy(certify(net, x, labels).radii)
        for i in range(len(x)):
            adversary = nearest_flip(net, x[i], int(labels[i]))
            if adversary is not None:
                distance = float((adversary - x[i]).norm())
                assert radii[i] < distance, f"certified {float(radii[i])}, flipped at {distance}"
                closest = min(closest, distance / max(float(radii[i]), 1e-12))
    return closest


def nearest_flip(net: nn.Module, x: Tensor, label: int) -> Tensor | None:
    """Follow the gradient of the smallest margin until the label flips, then bisect back to the boundary."""
    point = x.clone()
    for _ in range(60):
        v = point.clone().requires_grad_()
        with torch.enable_grad():
            logits = net(v[None])[0]
            others = torch.cat([logits[:label], logits[label + 1 :]])
            margin = logits[label] - others.max()
            (gradient,) = torch.autograd.grad(margin, v)
        if margin < 0:
            break
        step = float(margin.detach() / gradient.square().sum().clamp_min(1e-12))
        point = point - 1.05 * step * gradient - 1e-9 * gradient.sign()
    else:
        return None
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        with torch.no_grad():
            flipped = int(net((x + middle * (point - x))[None]).argmax()) != label
        low, high = (low, middle) if flipped else (middle, high)
    return x + high * (point - x)


def small_network(seed: int) -> tuple[nn.Module, tuple[int, int, int]]:
    torch.manual_seed(seed)
    convolution = nn.Conv2d(1, 3, 3, padding=1)
    net: nn.Module = nn.Sequential(
        Normalize([0.4], [0.3]), convolution, nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.Linear(12, 4)
    )
    if seed % 2:
        body = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.LeakyReLU(0.2))
        net = nn.Sequential(Residual(body), nn.AvgPool2d(2), nn.Flatten(), nn.Sequential(nn.Tanh(), nn.Linear(4, 3)))
    return net, (1, 4, 4)


def regime_network(seed: int) -> tuple[nn.Module, tuple[int, int, int]]:
    torch.manual_seed(seed)
    regime = list(list_models())[seed]
    model = create_model(
        regime, input_shape=(1, 4, 4), channels=(2,), layers=2, classes=3, mean=[0.5], std=[0.25], mirror=seed % 2 == 0
    )
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, GradientField):
                module.bias.normal_()
    model.constrain_(exact=True)
    return model, (1, 4, 4)


def test_exact_radii() -> None:
    check_exact_radii()


def test_normalised_radius() -> None:
    check_normalised_radius()


@pytest.mark.parametrize(("build", "seeds"), [(small_network, range(6)), (regime_network, range(len(list_models())))])
def test_planted_adversaries_lie_outside(build: Callable[[int], Any], seeds: Sequence[int]) -> None:
    assert 1 < check_planted_adversary(build, seeds) < 10  # it does find adversaries close to what is certified


def test_random_rational_linear_networks() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        weight = rng.integers(-4, 5, (3, 4))
        x, y = rng.integers(0, 9, 4), 0
        logits = [Fraction(int(w @ x), 8) for w in weight]
        squares = [int(((weight[0] - w) ** 2).sum()) for w in weight]
        net = linear_classifier(weight.astype(float).tolist())
        found = radius(net, image(*(x / 8)), y)
        margins = [logits[0] - value for value in logits[1:]]
        if min(margins) <= 0:
            assert found == 0
            continue
        exact = min(m**2 / s for m, s in zip(margins, squares[1:], strict=True))  # squared: rational
        assert Fraction(found) ** 2 <= exact
        assert found >= math.sqrt(exact) * (1 - 1e-7)


def test_known_distance_behind_a_step() -> None:
    """Head e₁ − e₂ after a contractive step whose activations stay on: the flip is at a distance that is known."""
    operator = PatchConvolution(1, 4, 2).double()
    operator.weight.data = torch.eye(4, dtype=F64)
    step = EulerStep(GradientField(operator, slope=0.5), 0.5).double()
    head = nn.Linear(4, 2, bias=False, dtype=F64)
    head.weight.data = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0]], dtype=F64)
    net = nn.Sequential(step, nn.Flatten(), head)
    x = torch.tensor([0.8, 0.4, 0.5, 0.5], dtype=F64).view(1, 1, 2, 2)
    distance = 0.4 / math.sqrt(2)  # inside the positive orthant the step is ½x: the margin is ½(x₁ − x₂)
    found = radius(net, x, 0)
    # L = max(1 − ½·½, ½ − 1) = ¾, the margin ½·0.4.
    assert found == pytest.approx(0.2 / (0.75 * math.sqrt(2)), rel=1e-7)
    assert found < distance


def test_ties_misclassification_and_overflow_give_zero() -> None:
    net = linear_classifier([[1.0, 0.0], [0.0, 1.0]])
    assert radius(net, image(0.5, 0.5), 0) == 0
    assert radius(net, image(0.5, 0.5), 1) == 0
    assert radius(net, image(0.6, 0.5), 1) == 0
    assert radius(linear_classifier([[1e308, 1e308], [0.0, 0.0]]), image(1.0, 1.0), 0) == 0
    twin = linear_classifier([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert radius(twin, image(0.5, 0.5), 0) == 0  # equal rows, equal logits
    shifted = linear_classifier([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]], [0.25, 0.0, 0.0])
    check_radius(radius(shifted, image(0.5, 0.5), 0), 0.75)  # the equal row never overtakes


def test_a_margin_that_rounding_can_make_up_is_not_certified() -> None:
    # Exactly 0 in real arithmetic; in floating point whatever the order of summation makes of it.
    x = image(1.0, 1.0, 1.0, 1.0)
    for big in (1e16, 3e16, 1e15 + 0.3):
        for last in (1.0, 0.25, 0.0):
            net = linear_classifier([[big, last, -big, 0.1], [0.0, 0.0, 0.0, 0.0]])
            assert radius(net, x, 0) == 0


def test_a_network_that_ignores_its_input_is_certified_everywhere() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        net[1].weight.zero_()
        net[2].weight.copy_(torch.eye(2))
        net[2].bias.copy_(torch.tensor([5.0, 0.0]))
    assert radius(net, image(0.5, 0.5), 0) == math.inf


def deep_network(factor: float = 1.0) -> nn.Sequential:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        net[1].weight.div_(factor)
        net[1].bias.div_(factor)
        net[3].weight.mul_(factor)
    return net


def test_metamorphic() -> None:
    x = torch.rand(30, 1, 2, 2, dtype=F64)
    net = deep_network()
    labels = net(x).argmax(1)
    radii = certify(net, x, labels).radii
    assert (radii > 0).any()
    np.testing.assert_allclose(certify(deep_network(8.0), x, labels).radii, radii, rtol=1e-9)
    order = torch.tensor([2, 0, 1])
    permuted = copy.deepcopy(net)
    permuted[5].weight.data, permuted[5].bias.data = net[5].weight[order].detach(), net[5].bias[order].detach()
    np.testing.assert_allclose(certify(permuted, x, order.argsort()[labels]).radii, radii, rtol=1e-12)
    np.testing.assert_array_equal(certify(net, x, labels, batch_size=7).predictions, labels)
    np.testing.assert_allclose(certify(net, x, labels, batch_size=7).radii, radii, rtol=1e-12)
    with torch.no_grad():
        net[3].weight.mul_(2)
    assert certify(net, x, labels).lipschitz == pytest.approx(2 * certify(deep_network(), x, labels).lipschitz)


def test_the_model_is_left_alone() -> None:
    net = deep_network().float().train()
    before = copy.deepcopy(net.state_dict())
    certify(net, torch.rand(2, 1, 2, 2), torch.tensor([0, 1]))
    assert net.training
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in net.parameters())
    assert len(net) == 6
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_classifier_and_the_same_sequential_agree() -> None:
    model, shape = regime_network(3)
    assert isinstance(model, Classifier)
    model.eval()
    plain = nn.Sequential(model.features, model.head)
    x = torch.rand(20, *shape)
    labels = model(x).argmax(1)
    one, two = certify(model, x, labels), certify(plain, x, labels)
    np.testing.assert_array_equal(one.radii, two.radii)
    assert one.lipschitz == two.lipschitz
    assert one.account.layers[0].layer.startswith("features.0")
    assert "real-arithmetic network" in one.certified_object
    assert one.radii.dtype == np.float64
    assert one.radii.shape == one.predictions.shape == (20,)


def test_mirror_average() -> None:
    model, shape = regime_network(4)
    assert isinstance(model, Classifier)
    model.eval()
    assert model.mirror
    x = torch.rand(20, *shape)
    certificate = certify(model, x, model(x).argmax(1))
    np.testing.assert_array_equal(certificate.predictions, model(x).argmax(1))
    assert "mirror" in certificate.certified_object
    assert certificate.account.layers[-1].layer == "mirror"
    mirrored = certify(model, x.flip(-1), model(x).argmax(1))
    np.testing.assert_allclose(mirrored.radii, certificate.radii, rtol=1e-9)
    # Radii belong to the averaged features, not to one view's: redo them by hand.
    logits = model.head((model.features(x) + model.features(x.flip(-1))) / 2).detach().double()
    rows = model.head.weight.detach().double()
    for i, label in enumerate(logits.argmax(1)):
        quotients = [(logits[i, label] - logits[i, j]) / (rows[label] - rows[j]).norm() for j in range(3) if j != label]
        assert certificate.radii[i] * certificate.lipschitz == pytest.approx(float(min(quotients)), abs=1e-5)
    with pytest.raises(UserError, match="eval"):
        certify(model.train(), x, torch.zeros(20, dtype=torch.long))


def test_certified_accuracy_is_strict() -> None:
    certificate = certify(linear_classifier([[1.0, 0.0], [0.0, 0.0]]), image(0.5, 0.5), torch.tensor([0]))
    r = float(certificate.radii[0])
    assert certificate.certified_accuracy([0, r * 0.99, r, 1]).tolist() == [1, 1, 0, 0]
    for grid in ([math.nan], [-0.1]):
        with pytest.raises(UserError, match="ε"):
            certificate.certified_accuracy(grid)
    assert isinstance(certificate, Certificate)
