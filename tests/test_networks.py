"""Composition: what is normalised, averaged, counted; any size that fits, and one line for those that do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robustflow import config, create_model, list_models
from robustflow.baselines import Residual
from robustflow.errors import UserError
from robustflow.networks import RESNET, Classifier, Normalize, multiply_adds, parameter_count
from robustflow.operators import Convolution, PatchConvolution
from robustflow.peers import AOLConvolution, CayleyConvolution, SLLStep
from robustflow.regimes import ANY_HIDDEN, REGIMES

PAPER_FIVE = ("unconstrained", "naive", "nonexpansive", "prescribed", "flexible")


PEERS = ("cpl", "sll", "aol", "cayley")


def test_models_are_the_paper_s_five_ours_the_peers_and_the_modern_baseline() -> None:
    assert set(list_models()) == {*PAPER_FIVE, "sharp", "shared", *PEERS, "resnet"}
    assert all(list_models().values())


def test_normalisation_by_hand_and_inside_the_model() -> None:
    x = torch.rand(2, 3, 4, 4)
    mean, std = (0.1, 0.2, 0.3), (0.5, 2.0, 0.25)
    expected = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    torch.testing.assert_close(Normalize(mean, std)(x), expected)
    torch.manual_seed(0)
    plain = create_model("sharp", input_shape=(3, 4, 4), channels=(4,), layers=2).eval()
    inside = create_model("sharp", input_shape=(3, 4, 4), channels=(4,), layers=2, mean=mean, std=std).eval()
    inside.load_state_dict(
        {**plain.state_dict(), "features.0.mean": torch.tensor(mean), "features.0.std": torch.tensor(std)}
    )
    torch.testing.assert_close(inside(x), plain(expected))
    assert not torch.allclose(inside(x), plain(x))


def test_mirror_averages_the_features_in_evaluation_only() -> None:
    torch.manual_seed(0)
    model = create_model("nonexpansive", input_shape=(1, 8, 8), channels=(4,), layers=2, mirror=True)
    x = torch.rand(3, 1, 8, 8)
    both = (model.features(x) + model.features(torch.flip(x, (3,)))) / 2
    model.eval()
    torch.testing.assert_close(model(x), both @ model.head.weight.T + model.head.bias)
    torch.testing.assert_close(model(x), model(torch.flip(x, (3,))))
    model.train()
    torch.testing.assert_close(model(x), model.head(model.features(x)))
    assert not torch.allclose(model(x), model(torch.flip(x, (3,))))


def counted(model: nn.Module, input_shape: tuple[int, int, int]) -> int:
    """Multiply-adds from the shapes that really pass through: every application of every linear map.

    Of a Cayley convolution the counter sees one complex matrix for each frequency of half a torus, not its FFT.
    """
    total = 0

    def peer(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        height, width = output.shape[2:]
        if isinstance(layer, CayleyConvolution):
            total += height * (width // 2 + 1) * layer.channels**2
        else:
            total += (2 if isinstance(layer, SLLStep) else 1) * height * width * layer.weight.numel()

    def conv(layer: Convolution | PatchConvolution, pixels: int) -> None:
        nonlocal total
        total += pixels * layer.weight.numel()

    originals = (Convolution.forward, Convolution.adjoint, PatchConvolution.forward, PatchConvolution.adjoint)

    def forward(self, x, bias=None):  # type: ignore[no-untyped-def]
        y = originals[0 if isinstance(self, Convolution) else 2](self, x, bias)
        conv(self, y.shape[2] * y.shape[3])
        return y

    def adjoint(self, y):  # type: ignore[no-untyped-def]
        conv(self, y.shape[2] * y.shape[3])
        return originals[1 if isinstance(self, Convolution) else 3](self, y)

    with pytest.MonkeyPatch.context() as patch:
        for kind in (Convolution, PatchConvolution):
            patch.setattr(kind, "forward", forward)
            patch.setattr(kind, "adjoint", adjoint)
        hooks = [
            module.register_forward_hook(peer)
            for module in model.modules()
            if isinstance(module, (AOLConvolution, CayleyConvolution, SLLStep))
        ]
        with torch.no_grad():
            model.eval()(torch.zeros(1, *input_shape))
        for hook in hooks:
            hook.remove()
    return total + model.head.weight.numel()  # type: ignore[union-attr]


def test_multiply_adds_by_hand() -> None:
    """1 lift of 8·8 pixels · 9 · 1 · 2, two steps of a convolution and its transpose, 8·8 · 9 · 2 · 2 each; a head."""
    model = create_model("nonexpansive", input_shape=(1, 8, 8), classes=3, channels=(2,), layers=2)
    expected = 64 * 9 * 2 + 2 * 2 * 64 * 9 * 4 + 2 * 16 * 3
    assert multiply_adds(model) == expected
    assert counted(model, (1, 8, 8)) == expected
    # A patch lift sees 4 numbers for each of 4·4 patches; its steps work on 2 × 2 patches of those.
    patches = create_model(
        "nonexpansive", input_shape=(1, 8, 8), classes=3, channels=(2,), layers=2, kernel="patch", lift="patch"
    )
    assert multiply_adds(patches) == 16 * 4 * 2 + 2 * 2 * 4 * (2 * 4) ** 2 + 2 * 16 * 3
    mirrored = create_model(
        "nonexpansive", input_shape=(1, 8, 8), classes=3, channels=(2,), layers=2, mirror=True
    ).train()
    assert multiply_adds(mirrored) == 2 * (expected - 96) + 96
    assert mirrored.training


@pytest.mark.parametrize("regime", list(REGIMES))
def test_multiply_adds_of_every_regime(regime: str) -> None:
    model = create_model(regime, input_shape=(3, 8, 8), channels=(2, 4), layers=2)
    assert multiply_adds(model) == counted(model, (3, 8, 8))
    if regime in ANY_HIDDEN:
        half = create_model(regime, input_shape=(3, 8, 8), channels=(2, 4), layers=2, hidden_ratio=0.5)
        assert multiply_adds(half) == counted(half, (3, 8, 8)) < multiply_adds(model)


def test_parameters_at_the_paper_s_size_by_hand() -> None:
    """3 blocks of 32/64/128 channels: 3 × 3 lift without bias, 4 layers of 3 × 3 kernels with bias and a step size."""
    lifts = 9 * (3 * 32 + 32 * 64 + 64 * 128)
    head = 128 * 4 * 4 * 10 + 10
    for regime, kernels in (("unconstrained", 2), ("nonexpansive", 1)):
        layers = sum(4 * (kernels * 9 * c * c + c + 1) for c in (32, 64, 128))
        assert parameter_count(create_model(regime)) == lifts + layers + head
    paper = {model.name: model for model in config.read("cifar10/paper").models}
    assert {model.regime for model in paper.values()} >= set(PAPER_FIVE)
    for model in paper.values():
        network = model.network
        assert (network.channels, network.layers, network.kernel_size) == ((32, 64, 128), 4, 3), model.name


@given(
    regime=st.sampled_from([*REGIMES, RESNET]),
    blocks=st.lists(st.integers(1, 5), min_size=1, max_size=2),
    layers=st.integers(0, 2).map(lambda half: 2 * half),
    kernel=st.sampled_from(["convolution", "patch"]),
    lift=st.sampled_from(["convolution", "patch"]),
    kernel_size=st.sampled_from([1, 3, 5]),
    dense=st.sampled_from([0, 5]),
    size=st.sampled_from([(8, 8), (8, 16), (16, 8)]),
    colours=st.sampled_from([1, 3]),
    classes=st.integers(2, 5),
    mirror=st.booleans(),
    ratio=st.sampled_from([1.0, 0.5, 0.3, 0.01]),
)
@settings(max_examples=60, deadline=None)
def test_any_size_that_fits(
    regime: str, blocks: list[int], layers: int, kernel: str, lift: str, kernel_size: int, dense: int,
    size: tuple[int, int], colours: int, classes: int, mirror: bool, ratio: float,
) -> None:  # fmt: skip
    free = regime in ("unconstrained", RESNET)
    if free:
        kernel, lift, dense = "convolution", "convolution", 0
    dense = dense if size[0] == size[1] else 0
    if regime in ("aol", "cayley"):  # MaxMin pairs channels
        blocks, dense = [2 * channels for channels in blocks], 2 * dense
    model = create_model(
        regime, input_shape=(colours, *size), classes=classes, channels=blocks, layers=layers, kernel=kernel, lift=lift,
        kernel_size=kernel_size, dense=dense, dense_layers=2 if dense else 0, mirror=mirror,
        hidden_ratio=ratio if regime in ANY_HIDDEN else 1.0,
    ).eval()  # fmt: skip
    with torch.no_grad():
        logits = model(torch.rand(3, colours, *size))
    assert logits.shape == (3, classes)
    assert logits.isfinite().all()
    if not free:
        torch.testing.assert_close(model.head.weight.norm(dim=1), torch.ones(classes))


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("sharq", {}, "unknown model 'sharq'.*sharp"),
    ("sharp", {"layers": 3}, "even"),
    ("prescribed", {"dense": 4, "dense_layers": 1}, "even"),
    ("sharp", {"input_shape": (1, 6, 6), "channels": (2, 2)}, "halved"),
    ("naive", {"input_shape": (1, 7, 8)}, "halved"),
    ("nonexpansive", {"kernel_size": 4}, "odd"),
    ("nonexpansive", {"kernel": "dense"}, "kernel"),
    ("nonexpansive", {"lift": "dense"}, "lift"),
    ("flexible", {"patch": 3}, "3×3 patches"),
    ("flexible", {"input_shape": (1, 8, 16), "dense": 3}, "square"),
    ("unconstrained", {"kernel": "patch"}, "free convolutions"),
    ("unconstrained", {"dense": 3}, "free convolutions"),
    ("aol", {"channels": (3,)}, "even, not 3"),
    ("cayley", {"dense": 5, "dense_layers": 2}, "even, not 5"),
    ("sll", {"kernel_size": 2}, "odd"),
    ("sharp", {"hidden_ratio": 0.5}, "for cpl, naive, nonexpansive, sll, not for sharp: leave it out"),
    (RESNET, {"hidden_ratio": 0.5}, "not for resnet"),
    ("nonexpansive", {"hidden_ratio": 0.0}, r"in \(0, 1\], not 0"),
    ("nonexpansive", {"hidden_ratio": 1.5}, r"in \(0, 1\], not 1.5"),
    (RESNET, {"channels": (2, 2, 2, 2, 2)}, "too many"),
]


@pytest.mark.parametrize(("regime", "options", "message"), BAD)
def test_what_does_not_fit_is_one_line(regime: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        create_model(regime, **({"input_shape": (1, 8, 8), "channels": (2,), "layers": 2} | options))
    assert "\n" not in str(caught.value)


def test_residual_and_resnet() -> None:
    body = nn.Sequential(nn.Linear(3, 3))
    x = torch.randn(2, 3)
    torch.testing.assert_close(Residual(body)(x), x + body(x))
    shortcut = nn.Linear(3, 3)
    torch.testing.assert_close(Residual(body, shortcut)(x), shortcut(x) + body(x))
    model = create_model(RESNET, channels=(4, 8, 16))
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == 1 + 2 * 3
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_constrain_reaches_every_layer_once_weights_have_moved() -> None:
    model = create_model("sharp", input_shape=(1, 8, 8), channels=(4,), layers=2, lift="patch", kernel="patch")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.constrain_(exact=True)
    matrices = model.orthonormal_weights()
    assert len(matrices) == 3
    for matrix in matrices:
        values = torch.linalg.svdvals(matrix.detach().double())
        assert (values - 1).abs().max() < 1e-6
    assert isinstance(model, Classifier)
    torch.testing.assert_close(model.head.weight.norm(dim=1), torch.ones(10))


def test_the_unconstrained_networks_are_never_constrained() -> None:
    for regime in ("unconstrained", RESNET):
        model = create_model(regime, input_shape=(1, 8, 8), channels=(2, 3), layers=2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3.0)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.constrain_(exact=True)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("regime", ["naive", "nonexpansive", "prescribed", "flexible", "sharp", "shared"])
def test_images_reach_the_head_of_the_paper_s_network(regime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    images = torch.nn.functional.interpolate(torch.rand(32, 3, 4, 4), size=(32, 32), mode="bilinear")

    def kept() -> float:
        model = create_model(regime, channels=(16, 32, 64), mean=(0.5, 0.5, 0.5))
        with torch.no_grad():
            before, after = (torch.pdist(x.flatten(1)).mean() for x in (images, model.features(images)))
        return float(after / before)

    started = kept()
    monkeypatch.setattr(Convolution, "start_isometric_", lambda self: None)  # random kernels of norm 1
    assert started > 3 * kept()
