"""Radii against a complete verifier: the distance to the nearest adversarial, found over all activation patterns.

Within a pattern a network is affine, so the nearest point of another class is the projection on a polyhedron. Patterns
are enumerated unit by unit, depth first; a branch whose polyhedron is further away than the best adversarial is cut.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from torch import Tensor, nn

import attacks
from robustflow.bounds import flat_children
from robustflow.certificates import certify
from robustflow.fields import GradientField
from robustflow.networks import Classifier, Normalize, create_model
from robustflow.operators import PatchConvolution
from robustflow.steps import EulerStep

F64 = torch.float64


@dataclass
class Stage:
    """z ↦ [z +] back·s(A z + b), s a leaky ReLU of the given slope; slope 1 is no activation at all."""

    a: np.ndarray
    b: np.ndarray
    back: np.ndarray
    keep: bool
    slope: float


def matrix_of(layer: nn.Module, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(A, b) of an affine layer, by applying it to a basis."""
    size = math.prod(shape)
    with torch.no_grad():
        offset = layer(torch.zeros(1, *shape, dtype=F64)).flatten(1)
        columns = layer(torch.eye(size, dtype=F64).view(-1, *shape)).flatten(1) - offset
    return columns.numpy().T, offset.numpy()[0]


def stages_of(net: nn.Module, shape: tuple[int, ...]) -> list[Stage]:
    net = copy.deepcopy(net).double().eval()
    layers = [layer for _, layer in flat_children(net.features if isinstance(net, Classifier) else net, "")]  # type: ignore[arg-type]
    if isinstance(net, Classifier):
        layers.append(net.head)
    stages: list[Stage] = []
    x = torch.zeros(1, *shape, dtype=F64)
    for layer in layers:
        shape = tuple(x.shape[1:])
        if isinstance(layer, (nn.ReLU, nn.LeakyReLU)):
            stages[-1].slope = getattr(layer, "negative_slope", 0.0)
        elif isinstance(layer, EulerStep):
            assert isinstance(layer.field, GradientField)
            a, _ = matrix_of(layer.field.operator, shape)
            bias = layer.field.bias.detach().repeat_interleave(len(a) // len(layer.field.bias)).numpy()
            h = float(layer.step_size.detach()) * layer.field.sign
            stages.append(Stage(a, bias, h * a.T, True, layer.field.slope))
        else:
            assert isinstance(layer, (nn.Linear, nn.Flatten, Normalize, PatchConvolution, nn.Conv2d)), layer
            a, b = matrix_of(layer, shape)
            stages.append(Stage(a, b, np.eye(len(a)), False, 1.0))
        with torch.no_grad():
            x = layer(x)
    return stages


def nearest(rows: list[np.ndarray], least: list[float], dimension: int) -> np.ndarray | None:
    """The shortest d with rows·d ≥ least, or None: least distance programming as a non-negative least-squares problem.

    Lawson and Hanson, Solving Least Squares Problems, chapter 23.
    """
    if not rows or max(least) <= 0:
        return np.zeros(dimension)
    matrix = np.vstack([np.array(rows).T, np.array(least)])
    target = np.zeros(dimension + 1)
    target[-1] = 1
    solution, length = nnls(matrix, target)
    residual = matrix @ solution - target
    return None if length < 1e-9 else -residual[:-1] / residual[-1]


class Verifier:
    """Complete search for the nearest image (in [0, 1], or anywhere) that a network of stages classifies otherwise."""

    def __init__(self, stages: list[Stage], image: np.ndarray, label: int, box: bool) -> None:
        self.stages, self.image, self.label = stages, image, label
        self.best, self.found, self.nodes = math.inf, np.zeros_like(image), 0
        n = len(image)
        self.rows = [*np.eye(n), *-np.eye(n)] if box else []
        self.least = [*-image, *(image - 1)] if box else []
        self._stage(0, np.eye(n), image)

    def _closer(self) -> np.ndarray | None:
        self.nodes += 1
        found = nearest(self.rows, self.least, len(self.image))
        return found if found is not None and np.linalg.norm(found) < self.best else None

    def _stage(self, i: int, m: np.ndarray, c: np.ndarray) -> None:
        if i == len(self.stages):
            for other in range(len(c)):
                if other != self.label:
                    self._with(m[other] - m[self.label], c[self.label] - c[other], self._adversarial)
            return
        stage = self.stages[i]
        self._unit(i, m, c, stage.a @ m, stage.a @ c + stage.b, np.ones(len(stage.a)), 0)

    def _unit(
        self, i: int, m: np.ndarray, c: np.ndarray, p: np.ndarray, q: np.ndarray, slopes: np.ndarray, unit: int
    ) -> None:
        stage = self.stages[i]
        if stage.slope == 1 or unit == len(q):
            back = stage.back * slopes
            kept = (m, c) if stage.keep else (0.0, 0.0)
            self._stage(i + 1, kept[0] + back @ p, kept[1] + back @ q)
            return
        for on in (q[unit] >= 0, q[unit] < 0):  # first the side on which the image lies
            sign, chosen = (1 if on else -1), slopes.copy()
            chosen[unit] = 1.0 if on else stage.slope
            self._with(sign * p[unit], -sign * q[unit], lambda s=chosen: self._unit(i, m, c, p, q, s, unit + 1))

    def _with(self, row: np.ndarray, least: float, inside) -> None:  # type: ignore[no-untyped-def]
        self.rows.append(row)
        self.least.append(least)
        if self._closer() is not None:
            inside()
        self.rows.pop()
        self.least.pop()

    def _adversarial(self) -> None:
        found = self._closer()
        if found is not None:
            self.best, self.found = float(np.linalg.norm(found)), found


def plain(seed: int) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(seed)
    layers = [nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4), nn.LeakyReLU(0.2), nn.Linear(4, 3)]
    return nn.Sequential(Normalize([0.5], [0.5]), *layers), (1, 2, 2)


def convolutional(seed: int) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)), (1, 2, 3)


def classifier(seed: int) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(seed)
    regime = ["nonexpansive", "sharp", "prescribed", "flexible"][seed]
    model = create_model(
        regime, input_shape=(1, 2, 2), classes=3, channels=(4,), layers=2, patch=1, kernel="patch", lift="patch",
        mean=[0.5], std=[0.5],
    )  # fmt: skip
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, GradientField):
                module.bias.normal_(std=0.3)
    return model.eval(), (1, 2, 2)


CASES = [(plain, 0), (plain, 5), (convolutional, 1), (convolutional, 2), *((classifier, seed) for seed in range(4))]


def images_of(net: nn.Module, shape: tuple[int, ...], count: int = 8) -> tuple[Tensor, Tensor]:
    """Images of which at least two classes are predicted, so that there are adversarials nearby."""
    x = torch.rand(count, *shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits = net(x)
        # Half way between the classes: a bias that shares the images out.
        (net.head if isinstance(net, Classifier) else net[-1]).bias.sub_(logits.mean(0))
        return x, net(x).argmax(1)


@pytest.mark.parametrize(("build", "seed"), CASES)
def test_certified_below_exact_below_attacked(build, seed) -> None:  # type: ignore[no-untyped-def]
    net, shape = build(seed)
    net = net.eval()
    x, labels = images_of(net, shape)
    assert len(set(labels.tolist())) > 1
    radii = certify(net, x, labels).radii
    found = attacks.sweep(net, x, labels, [0.25, 1.0], "standard", certified_radii=radii)
    attacked = found.samples["adversarial_norm"].to_numpy()
    stages = stages_of(net, shape)
    exact, boxed = [], []
    for i, image in enumerate(x.double().flatten(1).numpy()):
        free, inside = (Verifier(stages, image, int(labels[i]), box) for box in (False, True))
        check_adversarial(net, x[i], free, int(labels[i]))
        exact.append(free.best)
        boxed.append(inside.best)
    assert (radii > 0).all()
    assert (radii <= np.array(exact)).all(), (radii, exact)
    assert (np.array(exact) <= np.array(boxed) * (1 + 1e-9)).all()
    # The attacked model is float32: its boundary is a little off.
    assert (np.array(boxed) <= attacked + 1e-5).all(), (boxed, attacked)
    # And none of it is vacuous: attacks come close to the exact distance, and certificates are not absurd.
    reached = np.isfinite(attacked) & np.isfinite(boxed)
    assert reached.sum() >= 4
    assert np.median(attacked[reached] / np.array(boxed)[reached]) < 1.1
    assert np.median(np.array(exact) / radii) < (1.5 if isinstance(net, Classifier) else 6.5)


def check_adversarial(net: nn.Module, image: Tensor, verifier: Verifier, label: int) -> None:
    """What the verifier found is an adversarial, and nothing closer is one (as far as samples can tell)."""
    exact = copy.deepcopy(net).double().eval()
    found = torch.from_numpy(verifier.found).view(image.shape)
    with torch.no_grad():
        logits = exact((image.double() + found)[None])[0]
        assert float(logits.max() - logits[label]) == pytest.approx(0, abs=1e-7)
        noise = torch.randn(2000, *image.shape, generator=torch.Generator().manual_seed(0), dtype=F64)
        noise *= (0.9999 * verifier.best / noise.flatten(1).norm(dim=1)).view(-1, *(1,) * image.ndim)
        close = found * torch.linspace(0, 0.9999, 50, dtype=F64).view(-1, *(1,) * image.ndim)
        assert (exact(image.double() + torch.cat([noise, close])).argmax(1) == label).all()


def test_the_verifier_knows_a_kink() -> None:
    """f = ReLU(x) − ReLU(x − 1) − 0.6 in one dimension: from x = 0.1 the other class begins at 0.6."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[1.0], [1.0]]))
        net[1].bias.copy_(torch.tensor([0.0, -1.0]))
        net[3].weight.copy_(torch.tensor([[0.0, 0.0], [1.0, -1.0]]))
        net[3].bias.copy_(torch.tensor([0.6, 0.0]))
    verifier = Verifier(stages_of(net, (1, 1, 1)), np.array([0.1]), 0, box=True)
    assert verifier.best == pytest.approx(0.5)
    # Where the slope is gone no adversarial is left: 0.6 becomes 1.1.
    with torch.no_grad():
        net[3].bias.copy_(torch.tensor([1.1, 0.0]))
    assert Verifier(stages_of(net, (1, 1, 1)), np.array([0.1]), 0, box=False).best == math.inf
