"""Classifiers as one composition: normalise → (lift → steps → pool) × blocks → flatten → head.

To change what a layer is, open `robustflow.regimes`; to change how layers are put together, this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from robustflow.baselines import resnet_features
from robustflow.block_shape import BlockShape
from robustflow.errors import UserError
from robustflow.operators import Convolution, PatchConvolution, UnitRowLinear
from robustflow.regimes import ANY_HIDDEN, REGIMES, balance_signed_steps_
from robustflow.steps import EulerStep

RESNET = "resnet"


@runtime_checkable
class Constrained(Protocol):
    """A layer that can bring itself back to its constraint set."""

    def constrain_(self, *, exact: bool = False) -> None: ...


class Normalize(nn.Module):
    """(x − mean)/std for every channel. Part of the model, so that radii are in pixels of [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)


class Classifier(nn.Module):
    """Logits = head(features(x)) for images x in [0, 1], shape (B, C, H, W) → (B, classes).

    With ``mirror``, evaluation averages the features over the image and its mirror image. That is an average of
    isometric views, so the Lipschitz bound stays the same; training sees single views.
    """

    def __init__(
        self,
        features: nn.Sequential,
        head: nn.Linear,
        input_shape: tuple[int, int, int],
        *,
        regime: str,
        mirror: bool = False,
    ) -> None:
        super().__init__()
        self.features, self.head, self.input_shape = features, head, tuple(input_shape)
        self.regime, self.mirror = regime, mirror
        self.constrain_()

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        if self.mirror and not self.training:
            features = (features + self.features(x.flip(-1))) / 2
        return self.head(features)

    def constrain_(self, *, exact: bool = False) -> None:
        """Bring every weight and step size back to its regime's constraint set; ``exact`` once training is done."""
        if self.head.weight.is_meta:  # shapes only
            return
        for module in self.modules():
            if module is not self and isinstance(module, Constrained):
                module.constrain_(exact=exact)
        if self.regime in REGIMES and REGIMES[self.regime].balanced:
            balance_signed_steps_(module for module in self.modules() if isinstance(module, EulerStep))

    def orthonormal_weights(self) -> list[nn.Parameter]:
        """The matrices that live on the Stiefel manifold; an optimizer may treat them on their own."""
        return [module.weight for module in self.modules() if isinstance(module, PatchConvolution)]


def list_models() -> dict[str, str]:
    """Every regime that `create_model` builds, with a line of description.

    >>> "sharp" in list_models()
    True
    """
    baseline = {RESNET: "modern residual network with batch normalisation: what one would pick without a certificate"}
    return {name: regime.description for name, regime in REGIMES.items()} | baseline


def create_model(
    regime: str,
    *,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    classes: int = 10,
    channels: Sequence[int] = (32, 64, 128),
    layers: int = 4,
    kernel: str = "convolution",
    kernel_size: int = 3,
    patch: int = 2,
    lift: str = "convolution",
    dense: int = 0,
    dense_layers: int = 0,
    hidden_ratio: float = 1.0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    mirror: bool = False,
) -> Classifier:
    """Build a classifier of one of the regimes in `list_models`.

    Args:
        regime: name of the regime, or ``"resnet"``.
        input_shape: (C, H, W) of the images.
        channels: one block for each entry. A block is a lift, ``layers`` dynamical layers and, with
            ``lift="convolution"``, a 2 × 2 max-pool (3 × 3 convolution of norm 1 → ReLU → layers → pool, as in the
            paper). ``lift="patch"`` is a single orthonormal map of 2 × 2 patches to ``channels`` that halves the image.
        layers: dynamical layers in a block; even for regimes that work in pairs.
        kernel: ``"convolution"`` (zero-padded, spectral norm 1) or ``"patch"`` (orthonormal on ``patch`` × ``patch``
            patches) wherever the regime leaves the choice.
        dense: features of an orthonormal projection of the whole last image; 0 flattens it instead.
        dense_layers: dynamical layers after that projection.
        hidden_ratio: hidden units of a step x − h Aᵀσ(Ax + b), the rows of A, for every dimension of x, in (0, 1]. At
            h = 2 each hidden unit folds a dimension: ½ is what MaxMin does after an orthogonal layer. Only for
            `robustflow.regimes.ANY_HIDDEN`.
        mean, std: input normalisation, one number a channel (default 0 and 1). Dividing by std multiplies the
            Lipschitz constant by 1/min(std).
        mirror: average over mirror images in evaluation.

    Raises:
        UserError: unknown regime, or sizes that do not fit.

    >>> model = create_model("sharp", input_shape=(1, 8, 8), channels=(8,), layers=2, lift="patch", kernel="patch")
    >>> model(torch.rand(5, 1, 8, 8)).shape
    torch.Size([5, 10])
    """
    if regime not in list_models():
        raise UserError(f"unknown model {regime!r}; known are: {', '.join(list_models())}")
    if not channels or min(channels) < 1:
        raise UserError(f"channels must name at least one block of at least one channel, not {tuple(channels)}")
    if dense_layers and not dense:
        raise UserError("dense_layers needs dense, the number of features that they work on")
    if any(given is not None and len(given) != input_shape[0] for given in (mean, std)) or min(std or (1.0,)) <= 0:
        raise UserError(f"mean and std need {input_shape[0]} numbers each, one a channel, std above 0")
    if not 0 < hidden_ratio <= 1:
        raise UserError(f"hidden_ratio must be in (0, 1], not {hidden_ratio:g}")
    if hidden_ratio != 1 and regime not in ANY_HIDDEN:
        raise UserError(
            f"hidden_ratio is for {', '.join(sorted(ANY_HIDDEN))}, not for {regime}: leave it out, or set it per model"
        )
    mean = mean if mean is not None else (0.0,) * input_shape[0]
    std = std if std is not None else (1.0,) * input_shape[0]
    normalize = Normalize(mean, std)
    if regime == RESNET:
        features, width = resnet_features(normalize, input_shape, channels)
        return Classifier(features, nn.Linear(width, classes), input_shape, regime=regime, mirror=mirror)
    for option, value in (("kernel", kernel), ("lift", lift)):
        if value not in ("convolution", "patch"):
            raise UserError(f"{option} must be 'convolution' or 'patch', not {value!r}")
    if layers % REGIMES[regime].layers_per_unit or dense_layers % REGIMES[regime].layers_per_unit:
        raise UserError(f"{regime} works in pairs: layers ({layers}) and dense_layers ({dense_layers}) must be even")

    constrained = REGIMES[regime].constrained
    if not constrained and (lift == "patch" or kernel == "patch" or dense):
        raise UserError(f"{regime} has free convolutions only: leave out lift, kernel and dense, or set them per model")
    stages: list[nn.Module] = [normalize]
    size = (input_shape[1], input_shape[2])
    for before, after in pairwise((input_shape[0], *channels)):
        if size[0] % 2 or size[1] % 2:
            raise UserError(
                f"an image of {size[0]}×{size[1]} cannot be halved: fewer blocks than {len(channels)}, please"
            )
        half = (size[0] // 2, size[1] // 2)
        if lift == "convolution":
            lifting = Convolution(before, after, kernel_size, image_size=size if constrained else None)
            if constrained:
                lifting.start_isometric_()
            stages += [lifting, nn.ReLU()]
            stages += _steps(regime, BlockShape(after, size, kernel, kernel_size, patch, hidden_ratio), layers)
            stages.append(nn.MaxPool2d(2))
        else:
            stages.append(PatchConvolution(before, after, 2))
            stages += _steps(regime, BlockShape(after, half, kernel, kernel_size, patch, hidden_ratio), layers)
        size = half
    width = channels[-1] * size[0] * size[1]
    if dense:
        if size[0] != size[1]:
            raise UserError(f"a dense part needs a square last image, not {size[0]}×{size[1]}")
        stages.append(PatchConvolution(channels[-1], dense, size[0]))
        stages += _steps(regime, BlockShape(dense, (1, 1), "patch", patch=1, hidden_ratio=hidden_ratio), dense_layers)
        width = dense
    stages.append(nn.Flatten())
    head = UnitRowLinear(width, classes) if constrained else nn.Linear(width, classes)
    return Classifier(nn.Sequential(*stages), head, input_shape, regime=regime, mirror=mirror)


def _steps(regime: str, shape: BlockShape, layers: int) -> list[nn.Module]:
    chosen = REGIMES[regime]
    return [chosen.build(shape, index) for index in range(layers // chosen.layers_per_unit)]


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def multiply_adds(model: Classifier) -> int:
    """Multiplications paired with an addition in a forward pass, for one image more, as torch's counter sees them.

    What a pass costs whatever its batch (`robustflow.peers` make kernels from weights) is not in it, nor is an FFT.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    totals = []
    for images in (1, 2):
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(images, *model.input_shape, device=device))
        totals.append(counter.get_total_flops())
    model.train(was_training)
    return (totals[1] - totals[0]) // 2
