"""Other people's layers against dense matrices: what they promise, what the account says, what a mistake would do."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustflow import certify, create_model
from robustflow.errors import UserError
from robustflow.falsifier import falsify_network
from robustflow.layer_rules import layer_bounds
from robustflow.networks import Classifier
from robustflow.peers import AOLConvolution, CayleyConvolution, MaxMin, SLLStep, absolute_gram
from robustflow.rounding import Plan, forward_with_error

F64 = torch.float64
PEERS = ("cpl", "sll", "aol", "cayley")
SIZES = [(1, 1), (2, 2), (3, 3), (4, 4), (4, 5), (5, 4), (1, 6), (6, 7)]


def shaken(layer: nn.Module, seed: int, scale: float = 0.5) -> nn.Module:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return layer.double().requires_grad_(False)


def dense(layer: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
    """The matrix of an affine map, column by column."""
    basis = torch.eye(math.prod(shape), dtype=F64).view(-1, *shape)
    return (layer(basis) - layer(torch.zeros_like(basis))).flatten(1).T


def singular_values(layer: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
    return torch.linalg.svdvals(dense(layer, shape))


def jacobian_norms(layer: nn.Module, shape: tuple[int, ...], scales: tuple[float, ...] = (0.1, 1, 10)) -> Tensor:
    points = [torch.randn(shape, dtype=F64) * scale for scale in scales]
    jacobians = [torch.func.jacrev(lambda z: layer(z[None])[0].flatten())(x).flatten(1) for x in points]
    return torch.linalg.matrix_norm(torch.stack(jacobians), 2)


# ------------------------------------------------------------------------------------------------ the layers themselves
def check_aol() -> None:
    for seed, size in enumerate(SIZES):
        for made in (AOLConvolution(4, 6), AOLConvolution(6, 4, 5), AOLConvolution(4, 4, 1)):
            layer = shaken(made, seed)
            values = singular_values(layer, (made.in_channels, *size))
            (bound,) = layer_bounds(layer, (made.in_channels, *size), "x")
            assert float(values[0]) <= min(bound.bound, 1 + 1e-12), (size, float(values[0]))
            assert bound.bound <= 1 + 1e-8


def check_sll() -> None:
    """Jacobians of the step; and I − 2WᵀT⁻¹W, the largest that it can be, from dense matrices."""
    for seed, size in enumerate(SIZES):
        for made in (SLLStep(4), SLLStep(2, 5), SLLStep(6, 1), SLLStep(4, 3, 2), SLLStep(2, 1, 3)):
            layer = shaken(made, seed)
            shape = (made.channels, *size)
            (bound,) = layer_bounds(layer, shape, "x")
            assert 1 <= bound.bound <= 1 + 1e-8, (size, bound)
            assert float(jacobian_norms(layer, shape).max()) <= bound.bound
            kernel, _ = layer._kernel()
            values = singular_values(lambda x, k=kernel: F.conv2d(x, k, padding=k.shape[-1] // 2), shape)
            assert float(values[0]) <= 1 + 1e-12, (size, float(values[0]))


def check_cayley() -> None:
    for seed, size in enumerate(SIZES):
        for made in (CayleyConvolution(4), CayleyConvolution(2, 5), CayleyConvolution(3, 1)):
            layer = shaken(made, seed, scale=1.0)
            shape = (made.channels, *size)
            values = singular_values(layer, shape)
            assert float((values - 1).abs().max()) < 1e-12, (size, values)
            (bound,) = layer_bounds(layer, shape, "x")
            assert float(values[0]) <= bound.bound <= 1 + 1e-8


def check_falsifier() -> None:
    for seed, regime in enumerate(PEERS):
        model = random_network(regime, seed)
        for found in falsify_network(model, torch.rand(4, 2, 8, 8), iterations=8):
            assert not found.violated, (regime, found.layer, found.observed, found.claimed)


def random_network(regime: str, seed: int, **options: object) -> Classifier:
    torch.manual_seed(seed)
    shape = {"input_shape": (2, 8, 8), "channels": (4, 6), "layers": 2, "lift": "patch", "dense": 6, "dense_layers": 2}
    model = create_model(regime, **(shape | options))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.constrain_(exact=True)
    return model.eval()


def test_aol_convolutions_never_expand() -> None:
    check_aol()


def test_sll_steps_never_expand() -> None:
    check_sll()


def test_cayley_convolutions_are_orthogonal() -> None:
    check_cayley()


def test_no_claim_about_a_peer_is_refuted() -> None:
    check_falsifier()


@pytest.mark.parametrize("regime", ["cpl", "sll"])
def test_fewer_hidden_units_are_certified_and_not_refuted(regime: str) -> None:
    model, x = random_network(regime, 0, hidden_ratio=0.5), torch.rand(4, 2, 8, 8)
    assert (certify(model, x, model(x).argmax(1)).radii > 0).all()
    assert not any(found.violated for found in falsify_network(model, x, iterations=8))


def test_row_sums_against_a_dense_matrix() -> None:
    """Far from any border, a row of |KᵀK| of a big image, its pixels added up channel by channel."""
    torch.manual_seed(0)
    kernel, n = torch.randn(3, 2, 3, 3, dtype=F64), 7
    matrix = dense(lambda x: F.conv2d(x, kernel, padding=2), (2, n, n))
    gram = (matrix.T @ matrix).abs().view(2, n * n, 2, n * n)
    torch.testing.assert_close(absolute_gram(kernel), gram[:, n * n // 2].sum(2))


def test_published_formulas_with_dense_matrices() -> None:
    """AOL and SLL at one pixel, and CPL, are formulas on matrices: as they stand in the papers."""
    torch.manual_seed(0)
    x = torch.randn(5, 4, dtype=F64)
    aol = shaken(AOLConvolution(4, 6, 1), 0)
    p = aol.weight[:, :, 0, 0]
    d = torch.diag((p.T @ p).abs().sum(1) ** -0.5)
    torch.testing.assert_close(aol(x[:, :, None, None]).flatten(1), x @ (p @ d).T + aol.bias)
    sll = shaken(SLLStep(4, 1), 1)
    w, q = sll.weight[:, :, 0, 0].T, sll.log_q.exp()
    sums = [sum(abs(float((w.T @ w)[i, j])) * float(q[j] / q[i]) for j in range(4)) for i in range(4)]
    expected = x - 2 * torch.relu(x @ w + sll.bias) @ torch.diag(1 / torch.tensor(sums, dtype=F64)) @ w.T
    torch.testing.assert_close(sll(x[:, :, None, None]).flatten(1), expected)
    cpl = random_network("cpl", 2).double().requires_grad_(False).features[2]
    image = torch.randn(2, 4, 4, 4, dtype=F64)
    kernel = cpl.field.operator.weight
    hidden = torch.relu(F.conv2d(image, kernel, cpl.field.bias, padding=1))
    norm = float(singular_values(lambda z: F.conv2d(F.pad(z, (1, 1, 1, 1), "circular"), kernel), (4, 5, 5))[0])
    torch.testing.assert_close(cpl(image), image - 2 * F.conv_transpose2d(hidden, kernel, padding=1) / norm**2)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (4, 6), (5, 3), (2, 8)])
def test_cayley_against_the_transform_of_a_dense_circulant(height: int, width: int) -> None:
    layer = shaken(CayleyConvolution(2), 3)
    kernel = layer.weight * layer.gain / layer.weight.norm()

    def wrapped(x: Tensor) -> Tensor:
        rows = torch.cat([x[..., -1:, :], x, x[..., :1, :]], -2)
        return F.conv2d(torch.cat([rows[..., -1:], rows, rows[..., :1]], -1), kernel)

    w = dense(wrapped, (2, height, width))
    identity, skew = torch.eye(len(w), dtype=F64), w - w.T
    expected = (identity - skew) @ torch.linalg.inv(identity + skew)
    torch.testing.assert_close(dense(layer, (2, height, width)), expected)


def test_kernels_larger_than_the_image_wrap_around() -> None:
    layer = shaken(CayleyConvolution(2, 5), 0)
    kernel = layer.weight * layer.gain / layer.weight.norm()
    w = dense(lambda x: F.conv2d(x.repeat(1, 1, 5, 5)[..., :6, :6], kernel), (2, 2, 2))
    skew = w - w.T
    expected = torch.linalg.solve(torch.eye(8, dtype=F64) + skew, torch.eye(8, dtype=F64) - skew)
    torch.testing.assert_close(dense(layer, (2, 2, 2)), expected)


def test_maxmin() -> None:
    x = torch.randn(50, 6, 2, 2, dtype=F64)
    first, second = x[:, :3], x[:, 3:]
    torch.testing.assert_close(MaxMin()(x), torch.cat((first.maximum(second), first.minimum(second)), 1))
    jacobian = torch.func.jacrev(lambda z: MaxMin()(z[None])[0].flatten())(x[0]).flatten(1)
    assert torch.equal(jacobian.T @ jacobian, torch.eye(24, dtype=F64)), "a permutation loses no gradient"
    tied = torch.ones(1, 2, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(MaxMin()(tied), tied, torch.tensor([[3.0, 4.0]], dtype=F64))
    assert float(gradient.norm()) == 5
    for odd in (lambda: MaxMin()(torch.rand(1, 3)), lambda: create_model("aol", channels=(3,)),
                lambda: create_model("cayley", channels=(4,), lift="patch", dense=5, dense_layers=1)):  # fmt: skip
        with pytest.raises(UserError, match="even") as caught:
            odd()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [lambda k: AOLConvolution(2, 2, k), lambda k: SLLStep(2, k), CayleyConvolution])
def test_even_kernels_are_one_line(make: Callable[..., nn.Module]) -> None:
    with pytest.raises(UserError, match="odd kernel size"):
        make(4) if make is not CayleyConvolution else make(2, 4)


# ------------------------------------------------------------------------------------------------------ the certificate
def test_the_account_measures_what_is_applied() -> None:
    """AOL's own bound is 1; the account's is the norm of the kernel made, which a dense SVD confirms to 10 %."""
    layer = shaken(AOLConvolution(4, 4), 0)
    true = float(singular_values(layer, (4, 8, 8))[0])
    (bound,) = layer_bounds(layer, (4, 8, 8), "x")
    assert true <= bound.bound <= 1.1 * true < 0.9
    before = bound.bound
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] += 1
    assert layer_bounds(layer, (4, 8, 8), "x")[0].bound != before


@pytest.mark.parametrize("kind", [AOLConvolution, SLLStep, CayleyConvolution])
def test_a_layer_with_another_kernel_is_refused(kind: type[nn.Module]) -> None:
    class Other(kind):  # type: ignore[misc, valid-type]
        def _kernel(self, *shape: int) -> Tensor:
            return self.weight

    with pytest.raises(UserError, match="overrides"):
        layer_bounds(Other(4, 4, 3) if kind is AOLConvolution else Other(4), (4, 4, 4), "x")


def more_digits(layer: nn.Module, x: Tensor) -> np.ndarray:
    """The layer on one pixel in 80-bit arithmetic; there a circular convolution is the sum of its taps, a matrix."""
    long = {name: tensor.numpy().astype(np.longdouble) for name, tensor in layer.named_parameters()}
    v = x.flatten().numpy().astype(np.longdouble)
    if isinstance(layer, AOLConvolution):
        p = long["weight"][:, :, 0, 0]
        return p @ (v / np.sqrt(np.abs(p.T @ p).sum(1))) + long["bias"]
    if isinstance(layer, SLLStep):
        a, q = long["weight"][:, :, 0, 0], np.exp(long["log_q"])
        t = (np.abs(a @ a.T) * (q[None, :] / q[:, None])).sum(1)
        return v - 2 * a.T @ (np.maximum(a @ v + long["bias"], 0) / t)
    k = long["weight"]
    w = k.sum((2, 3)) * long["gain"] / np.sqrt((k**2).sum())
    skew, half = w - w.T, v.copy()
    for _ in range(4):  # refine a solution in float64
        rest = (v - half - skew @ half).astype(np.float64)
        half = half + np.linalg.solve((np.eye(len(v)) + skew).astype(np.float64), rest)
    return 2 * half - v + long["bias"]


@pytest.mark.skipif(np.finfo(np.longdouble).eps >= np.finfo(np.float64).eps, reason="no extended precision here")
@pytest.mark.parametrize("make", [lambda: AOLConvolution(6, 8, 1), lambda: SLLStep(8, 1), lambda: CayleyConvolution(8)])
def test_rounding_errors_stay_below_their_bound(make: Callable[[], nn.Module]) -> None:
    layer = shaken(make(), 5, scale=2.0)
    x = torch.randn(20, getattr(layer, "in_channels", 8), 1, 1, dtype=F64)
    plan = Plan()
    out, error = forward_with_error(layer, x, torch.zeros(20, dtype=F64), plan)
    assert plan.assumed() == []
    for i in range(20):
        off = float(np.linalg.norm((out[i].flatten().numpy() - more_digits(layer, x[i])).astype(np.float64)))
        assert 0 < off <= float(error[i]) < 1e-10


@pytest.mark.parametrize("regime", PEERS)
def test_certified_without_assumptions_and_attacked_in_vain(regime: str) -> None:
    """Gradient steps to the certified radius flip nothing: the decision stands."""
    model = random_network(regime, 7, mirror=True)
    x = torch.rand(12, 2, 8, 8)
    labels = model(x).argmax(1)
    certificate = certify(model, x, labels)
    assert "assumed" not in certificate.certified_object
    assert (certificate.radii > 0).all()
    assert certificate.lipschitz <= 1 + 1e-6
    exact = model.double().requires_grad_(False)
    radius = torch.from_numpy(certificate.radii).view(-1, 1, 1, 1)
    adversarial = x.double()
    for _ in range(20):
        adversarial.requires_grad_()
        loss = F.cross_entropy(exact(adversarial), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, adversarial)
        moved = (adversarial - x).detach() + 0.3 * radius * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        length = moved.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        adversarial = (x + moved * (radius / length).clamp_max(1)).detach()
        assert torch.equal(exact(adversarial).argmax(1), labels)
