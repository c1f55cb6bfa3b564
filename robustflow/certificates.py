"""Certified radii: no perturbation shorter than r_i (L2, pixels of [0, 1]) changes the prediction on image i.

With features φ of Lipschitz constant L and a linear head, logits f = Wφ(x) + b, label y:
r = min_{j≠y} (f_y − f_j − δ_j) / (L·‖w_y − w_j‖), where δ_j bounds what float64 can have done to f_y − f_j
(`robustflow.rounding`). The margin f_y − f_j moves by at most ‖w_y − w_j‖·L·‖d‖ under a perturbation d, so the decision
stands for every ‖d‖ < r. This is the pairwise form of the margin bound of Tsuzuku et al., arXiv 1802.04034.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from robustflow import peer_rules  # noqa: F401 - registers the peers' rules
from robustflow.baking import baked_copy
from robustflow.bounds import Account, LayerBound, account
from robustflow.errors import UserError
from robustflow.layer_rules import PLAIN_DTYPES, refuse_inplace, require_code_of, runs_code_of
from robustflow.networks import Classifier
from robustflow.norms import INFLATION, UNIT, inflation
from robustflow.rounding import FALLBACK, Plan, forward_with_error, gamma, lengths

CERTIFIED_OBJECT = (
    "the real-arithmetic network with these stored weights{mirror}, L2 in pixels of [0, 1]; "
    "a float32 or GPU execution of it is not certified bit for bit{assumed}"
)


@dataclass(frozen=True)
class Certificate:
    """Radii of images, and what they rest on.

    ``lipschitz`` bounds the features, the part before the linear head; the head enters the radii pair by pair.
    ``radii``: (n,) float64, 0 where misclassified or tied; ``predictions``: (n,) int64; ``account``: layer by layer.
    """

    lipschitz: float
    radii: np.ndarray
    predictions: np.ndarray
    account: Account
    certified_object: str

    def certified_accuracy(self, epsilons: Sequence[float]) -> np.ndarray:
        """The share of images that are classified right with a radius above each ε (strictly).

        >>> certificate = Certificate(1.0, np.array([0.0, 0.2, 0.5]), np.zeros(3, int), Account(()), "")
        >>> certificate.certified_accuracy([0.0, 0.2]).round(3).tolist()
        [0.667, 0.333]
        """
        grid = np.asarray(epsilons, dtype=np.float64)
        if np.isnan(grid).any() or (grid < 0).any():
            raise UserError(f"an ε must be a number >= 0, got {list(epsilons)}")
        return (self.radii[None, :] > grid[:, None]).mean(axis=1)


@dataclass(frozen=True)
class _Network:
    features: nn.Sequential
    head: nn.Linear
    mirror: bool


def certify(
    module: nn.Module, images: Tensor | np.ndarray, labels: Tensor | np.ndarray | None = None, *, batch_size: int = 256
) -> Certificate:
    """Certified radii of ``images`` (n, …) in [0, 1] with ``labels`` (n,), for a classifier of known layers.

    Without labels the prediction itself is certified, be it right or wrong.

    The module is a `Classifier`, or an ``nn.Sequential`` that ends in an ``nn.Linear`` (the head). It is copied to
    float64 on the CPU, left as it is, and must be in evaluation mode where that makes a difference. A mirror average
    (`Classifier.mirror`) is certified as such: both views are isometric, their mean has the same Lipschitz constant.

    Raises:
        UserError: a layer without a rule (named), a head that is not linear, weights that are NaN or in half precision,
            images outside [0, 1] or of the wrong shape, labels out of range.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    >>> with torch.no_grad(): _ = net[1].weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    >>> certify(net, torch.tensor([[[[0.5, 0.25]]]]), torch.tensor([0])).radii.round(6).tolist()  # (1.5 + 1)/5
    [0.5]
    """
    network = _frozen(module)
    pixels, truth = _checked(images, labels, network, getattr(module, "input_shape", None))
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, not {batch_size}")
    audit = account(network.features, tuple(pixels.shape[1:]), "features" if isinstance(module, Classifier) else "")
    if network.mirror:
        audit = Account((*audit.layers, LayerBound("mirror", "average", "mean over two isometric views", 1.0)))
    head, plan = _Head(network.head), Plan()
    radii, predictions = [], []
    for start in range(0, len(pixels), batch_size):
        batch = slice(start, start + batch_size)
        # A copy: the first layer may work in place.
        z, error = _features(network, pixels[batch].to(torch.float64, copy=True), plan)
        prediction, radius = head.radii(z, error, None if truth is None else truth[batch], audit.lipschitz)
        predictions.append(prediction)
        radii.append(radius)
    mirror = ", features averaged over the image and its mirror image" if network.mirror else ""
    return Certificate(
        lipschitz=audit.lipschitz,
        radii=torch.cat(radii).numpy(),
        predictions=torch.cat(predictions).numpy(),
        account=audit,
        certified_object=CERTIFIED_OBJECT.format(mirror=mirror, assumed=_assumption(plan)),
    )


def _assumption(plan: Plan) -> str:
    kinds = plan.assumed()
    return f"; assumed, not proved: {', '.join(kinds)} round by at most {FALLBACK:g} relative" if kinds else ""


def float64_features(module: nn.Module) -> nn.Sequential:
    """The features of a classifier, or Sequential ending in a Linear, as `certify` sees them: float64, on the CPU."""
    return _frozen(module).features


def _features(network: _Network, x: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Features and a bound of their rounding error; in float64."""
    z, error = forward_with_error(network.features, x, torch.zeros(len(x), dtype=torch.float64), plan)
    if network.mirror:
        other, other_error = forward_with_error(network.features, x.flip(-1), torch.zeros_like(error), plan)
        z = (z + other) / 2
        error = ((error + other_error) / 2 + 2 * UNIT * lengths(z)) * (1 + INFLATION)
    if z.ndim != 2:
        raise UserError(f"the features before the head must be flat, not {tuple(z.shape[1:])}: add nn.Flatten()")
    if z.shape[1] != network.head.in_features:
        raise UserError(f"the head does not take {z.shape[1]} features, it has {network.head.in_features} inputs")
    return z, error


class _Head:
    """The linear head: logits, distances between its rows, and radii."""

    def __init__(self, head: nn.Linear) -> None:
        self.weight = head.weight.detach()
        self.bias = head.bias.detach() if head.bias is not None else torch.zeros(len(self.weight), dtype=torch.float64)
        # Row by row: the expanded form ‖a‖² + ‖b‖² − 2ab would cancel.
        distances = torch.stack([_row_lengths(self.weight - row) for row in self.weight])
        self.distances = distances * (1 + inflation(self.weight.shape[1]))
        self.lengths = _row_lengths(self.weight) * (1 + INFLATION)

    @torch.no_grad()
    def radii(self, z: Tensor, error: Tensor, label: Tensor | None, lipschitz: float) -> tuple[Tensor, Tensor]:
        """(predictions, radii), every quotient rounded down; 0 where the margin is not positive or not finite."""
        logits = torch.nn.functional.linear(z, self.weight, self.bias)
        label = logits.argmax(1) if label is None else label
        own = logits.gather(1, label[:, None])
        distances = self.distances[label]
        rows = torch.arange(len(label))
        sizes = self.lengths[label][:, None] + self.lengths
        products = lengths(z)[:, None] * sizes + self.bias.abs()[label][:, None] + self.bias.abs()
        doubt = distances * error[:, None] + gamma(self.weight.shape[1] + 4) * products
        margin = own - logits - doubt * (1 + INFLATION)
        # Rows that coincide never change order: 0/0 is settled by the margin's sign, positive/0 is infinite.
        stretch = lipschitz * distances
        up = torch.nextafter(stretch, torch.full_like(stretch, math.inf))
        quotient = margin / torch.where((distances > 0) & (lipschitz > 0), up, stretch)
        quotient = torch.where(margin > 0, quotient, 0.0)
        quotient = torch.where(torch.isfinite(margin) & ~quotient.isnan(), quotient, 0.0)
        quotient[rows, label] = math.inf
        radius = quotient.amin(1)
        right = torch.isfinite(logits).all(1) & torch.isfinite(error) & (logits.argmax(1) == label)
        radius = torch.where(right, radius * (1 - INFLATION), 0.0)
        # A network that cannot change its mind has an infinite radius, and keeps it.
        return logits.argmax(1), torch.where(radius < math.inf, radius.nextafter(torch.zeros_like(radius)), radius)


def _row_lengths(rows: Tensor) -> Tensor:
    """‖row‖₂, scaled first: a difference of 1e-200 must not vanish when it is squared."""
    largest = rows.abs().amax(1)
    return largest * torch.linalg.vector_norm(rows / torch.where(largest > 0, largest, 1.0)[:, None], dim=1)


def _frozen(module: nn.Module) -> _Network:
    """A float64 copy on the CPU, parametrised weights materialised as they are stored, cut into features and head."""
    for path, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point() and tensor.dtype not in PLAIN_DTYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{path} is {kind}: cast the model first (module.float()), then that is what is certified")
    try:
        frozen = baked_copy(module)
    except RuntimeError as error:
        raise UserError(
            f"the model cannot be copied ({str(error).splitlines()[0]}): detach its weights first"
        ) from None
    frozen = frozen.to("cpu", torch.float64).requires_grad_(False)
    if isinstance(frozen, Classifier):
        require_code_of(frozen, Classifier, "the classifier")
        if frozen.mirror and frozen.training:
            raise UserError("a mirror average happens in evaluation mode only: call .eval() first")
        if frozen.mirror:
            refuse_inplace(frozen.features, "features", "the mirror average")
        return _Network(frozen.features, _linear_head(frozen.head), frozen.mirror)
    if not isinstance(frozen, nn.Sequential):
        raise UserError(
            f"a {type(module).__name__} cannot be certified: give a robustflow Classifier, or an nn.Sequential that "
            "ends in an nn.Linear"
        )
    require_code_of(frozen, nn.Sequential, f"the network ({type(module).__name__})")
    parent = frozen
    while len(parent) and isinstance(parent[-1], nn.Sequential) and runs_code_of(parent[-1], nn.Sequential):
        parent = parent[-1]
    if not len(parent):
        raise UserError("the network ends in an empty Sequential: it must end in an nn.Linear, the head")
    head = _linear_head(parent[-1])
    del parent[-1]
    return _Network(frozen, head, mirror=False)


def _linear_head(head: nn.Module) -> nn.Linear:
    if not isinstance(head, nn.Linear):
        raise UserError(f"the head is a {type(head).__name__}, not linear: end the network in an nn.Linear")
    require_code_of(head, nn.Linear, "the head")
    if not all(
        bool(torch.isfinite(parameter).all()) for parameter in (head.weight, head.bias) if parameter is not None
    ):
        raise UserError("the head holds NaN or infinite weights: train or load the model again")
    if head.out_features < 2:
        raise UserError("a head with a single class decides nothing: there is no radius")
    return head


def _checked(
    images: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | None,
    network: _Network,
    input_shape: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor | None]:
    """Images (any floating dtype) and int64 labels, if given, on the CPU, or a UserError."""
    pixels = torch.as_tensor(images).detach().cpu()
    if pixels.ndim < 2 or len(pixels) == 0:
        raise UserError(f"images must be a batch (n, channels, height, width) with n >= 1, not {tuple(pixels.shape)}")
    if input_shape is not None and tuple(pixels.shape[1:]) != tuple(input_shape):
        raise UserError(f"images have shape {tuple(pixels.shape[1:])}, the network takes {tuple(input_shape)}")
    if not pixels.is_floating_point() or pixels.dtype not in PLAIN_DTYPES:
        raise UserError(f"images must be float32 or float64 in [0, 1], not {pixels.dtype} (uint8: divide by 255)")
    # Written so that NaN fails, too.
    if not all(bool(((part >= 0) & (part <= 1)).all()) for part in pixels.split(1024)):
        raise UserError("images must lie in [0, 1], without NaN: scale them before certifying")
    if labels is None:
        return pixels, None
    truth = torch.as_tensor(labels).detach().cpu()
    if truth.shape != (len(pixels),) or truth.is_floating_point() or truth.dtype == torch.bool:
        raise UserError(
            f"labels must be {len(pixels)} integers, one an image, not {tuple(truth.shape)} of {truth.dtype}"
        )
    classes, truth = network.head.out_features, truth.long()
    if not bool(((truth >= 0) & (truth < classes)).all()):
        raise UserError(f"a label lies outside 0..{classes - 1}: {int(truth.min())} to {int(truth.max())} given")
    return pixels, truth


__all__ = ["Certificate", "certify", "float64_features"]
