"""A search for pairs of points that a network drives further apart than its certificate claims.

One such pair refutes the bound; finding none proves nothing, but the closest ratio observed/claimed says how tight the
bound is. Two stages, in float64: power iteration on the Jacobian at given and at random points
(v ← Jᵀ(f(x + tv) − f(x)), normalised), then ascent over both points of a pair of log‖f(x) − f(y)‖ − log‖x − y‖.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustflow.bounds import Account, LayerBound, Named, account, flat_children, lipschitz_of
from robustflow.certificates import float64_features
from robustflow.errors import UserError
from robustflow.networks import Classifier
from robustflow.rounding import forward_with_error

# Distances at which pairs start: the derivative, and steps across many kinks.
_SCALES = (1e-3, 0.1, 3.0)


@dataclass(frozen=True)
class Falsification:
    """The best pair found: ``observed`` = ‖f(x) − f(y)‖/‖x − y‖, of which float64 may have made up ``rounding``."""

    layer: str
    observed: float
    claimed: float
    rounding: float
    x: Tensor
    y: Tensor

    @property
    def ratio(self) -> float:
        """observed/claimed: above 1 the claim is refuted (if by more than rounding, see `violated`)."""
        if self.claimed > 0:
            return self.observed / self.claimed
        return math.inf if self.observed > self.rounding else 0.0

    @property
    def violated(self) -> bool:
        return self.observed - self.rounding > self.claimed

    def as_dict(self) -> dict[str, float]:
        return {"observed": self.observed, "claimed": self.claimed, "ratio": self.ratio}


def falsify(
    module: nn.Module,
    points: Tensor,
    *,
    claimed: float | None = None,
    pairs: int = 6,
    iterations: int = 20,
    seed: int = 0,
    layer: str = "",
) -> Falsification:
    """Search for a pair that refutes ‖f(x) − f(y)‖ ≤ claimed·‖x − y‖, L2; cost: 2·iterations forward-backward passes.

    Args:
        module: a map of known layers; it is copied to float64 on the CPU.
        points: (n, …) where to start; as many random points of the same spread are added.
        claimed: the constant to refute; default: the bound of `robustflow.bounds`.
        pairs: how many starts, spread over points and distances.

    >>> found = falsify(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.rand(2, 3))
    >>> 0.5 < found.ratio <= 1 and not found.violated
    True
    """
    if pairs < 1 or iterations < 1 or len(points) == 0:
        raise UserError("the falsifier needs at least one point, one pair and one iteration")
    frozen = copy.deepcopy(module).to("cpu", torch.float64).requires_grad_(False)

    def run(x: Tensor) -> Tensor:
        return frozen(x.clone())  # its first layer may work in place

    points = points.detach().to("cpu", torch.float64)
    claimed = lipschitz_of(frozen, tuple(points.shape[1:]), layer) if claimed is None else claimed
    generator = torch.Generator().manual_seed(seed)
    x, y = _starts(points, pairs, generator)
    best = _Best()
    with torch.enable_grad():
        for _ in range(iterations):
            x, y = _power_step(run, x, y, best, generator)
        x, y = best.x.clone().requires_grad_(), best.y.clone().requires_grad_()
        # A tenth of the pair's distance is far enough to cross kinks, near enough to keep what was found.
        reach = float((best.x - best.y).flatten(1).norm(dim=1).median())
        optimizer = torch.optim.Adam([x, y], lr=0.1 * max(reach, 1e-6) / math.sqrt(x[0].numel()))
        for _ in range(iterations):
            optimizer.zero_grad()
            ratio = _ratio(run(x) - run(y), x - y)
            best.update(x, y, ratio)
            (-ratio.clamp_min(1e-300).log().sum()).backward()
            optimizer.step()
        best.update(x, y, _ratio(run(x) - run(y), x - y))
    i = int(best.ratio.argmax())
    x, y = best.x[i : i + 1], best.y[i : i + 1]
    zero = torch.zeros(1, dtype=torch.float64)
    error = sum(float(forward_with_error(frozen, end.clone(), zero)[1]) for end in (x, y))
    # The differences x − y and f(x) − f(y) and their norms are rounded, too.
    distance = float(torch.linalg.vector_norm(x - y))
    observed = float(best.ratio[i])
    return Falsification(layer, observed, claimed, error / distance + 1e-12 * observed, x[0], y[0])


def falsify_network(
    module: nn.Module,
    images: Tensor,
    *,
    audit: Account | None = None,
    pairs: int = 6,
    iterations: int = 20,
    seed: int = 0,
) -> list[Falsification]:
    """`falsify` the features of a classifier as a whole (first), then every entry of their account and every layer.

    Layers are searched at the activations of images, entries of several layers (two steps along one kernel, folded
    maps) as a block.

    module: as `robustflow.certificates.certify` takes it; images: (n, C, H, W) in [0, 1], a handful is enough;
    audit: the claims, `Certificate.account`, if it is there already.
    """
    features, name = float64_features(module), "features" if isinstance(module, Classifier) else ""
    audit = account(features, tuple(images.shape[1:]), name) if audit is None else audit
    options: dict[str, Any] = {"pairs": pairs, "seed": seed}
    found = [falsify(features, images, claimed=audit.lipschitz, iterations=iterations, layer="features", **options)]
    layers = _layers(flat_children(features, name), images.detach().to("cpu", torch.float64)[:pairs])
    searched: list[tuple[str, float | None, nn.Sequential, Tensor]] = []
    searched += [(entry.layer, entry.bound, block, inputs) for entry, block, inputs in _entries(layers, audit)]
    alone = {path for path, *_ in searched}
    weighty = {path for path, layer, _ in layers if any(True for _ in layer.parameters())}
    searched += [(path, None, nn.Sequential(layer), x) for path, layer, x in layers if path in weighty - alone]
    # A single layer is far from its bound or close to it after a few steps. Layers in a joint entry are searched twice,
    # in as many steps together.
    twice = sum(len(weighty & set(path.split(" + "))) for path, *_ in searched)
    steps = max(1, iterations * len(weighty) // (2 * max(twice, 1)))
    for path, claimed, block, inputs in searched:
        found.append(falsify(block, inputs, claimed=claimed, iterations=steps, layer=path, **options))
    return found


def lower_estimates(
    model: nn.Module, images: Tensor, audit: Account, *, pairs: int = 6, iterations: int = 20, seed: int = 0
) -> dict[str, float]:
    """How much every entry of a classifier's account is seen to expand (never more than it truly does), "" the whole.

    model: a `Classifier`, and ``audit`` its `robustflow.bounds.account`; images: (n, C, H, W), a handful is enough.
    Bound over estimate is what a bound loses at most.
    """
    whole = copy.deepcopy(model).to("cpu", torch.float64).eval()
    x = images.detach().to("cpu", torch.float64)
    options: dict[str, Any] = {"pairs": pairs, "iterations": iterations, "seed": seed}
    reached = {"": falsify(whole, x, claimed=audit.lipschitz, **options).observed}
    children = [*flat_children(whole.features, "features"), ("head", whole.head)]  # type: ignore[arg-type]
    for entry, block, inputs in _entries(_layers(children, x), audit):  # type: ignore[arg-type]
        reached[entry.layer] = falsify(block, inputs, claimed=entry.bound, **options).observed
    return reached


@torch.no_grad()
def _layers(children: Iterable[Named], x: Tensor) -> list[tuple[str, nn.Module, Tensor]]:
    """Every layer with its name and what comes in."""
    found = []
    for name, layer in children:
        found.append((name, layer, x))
        x = layer(x.clone())
    return found


def _entries(
    layers: list[tuple[str, nn.Module, Tensor]], audit: Account
) -> Iterator[tuple[LayerBound, nn.Sequential, Tensor]]:
    """Every entry of an account that is made of these layers, as a block, with what comes in."""
    places = {name: place for place, (name, _, _) in enumerate(layers)}
    taken = {name: entry.layer for entry in audit.layers for name in entry.layer.split(" + ")}
    for entry in audit.layers:
        names = entry.layer.split(" + ")
        if not all(name in places for name in names):
            continue
        first, last = places[names[0]], places[names[-1]]
        # An entry of folded maps contains the rearrangements between them, not an activation that has its own entry.
        inside = [part for name, part, _ in layers[first : last + 1] if taken.get(name, entry.layer) == entry.layer]
        yield entry, nn.Sequential(*inside), layers[first][2]


class _Best:
    """The best pair of every start so far."""

    def __init__(self) -> None:
        self.x = self.y = self.ratio = torch.empty(0)

    def update(self, x: Tensor, y: Tensor, ratio: Tensor) -> None:
        x, y, ratio = x.detach(), y.detach(), ratio.detach().nan_to_num(0.0, 0.0, 0.0)
        if len(self.ratio) == 0:
            self.x, self.y, self.ratio = x.clone(), y.clone(), ratio.clone()
            return
        better = ratio > self.ratio
        self.x[better], self.y[better], self.ratio[better] = x[better], y[better], ratio[better]


def _starts(points: Tensor, pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    spread = float(points.std()) if points.numel() > 1 else 1.0
    noise = torch.randn(points.shape, generator=generator, dtype=torch.float64) * (spread or 1.0) + points.mean()
    both = torch.stack([points, noise], dim=1).flatten(0, 1)  # given and random ones in turn
    x = both[torch.arange(pairs) % len(both)]
    direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    scale = torch.tensor(_SCALES, dtype=torch.float64)[torch.arange(pairs) % len(_SCALES)]
    return x, x + _unit(direction) * _lift(scale, x)


def _power_step(
    module: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, best: _Best, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    y = y.detach().requires_grad_()
    change = module(y) - module(x).detach()
    best.update(x, y, _ratio(change, y - x))
    # Half the squared length of the change: its gradient in y is Jᵀ(f(y) − f(x)).
    (gradient,) = torch.autograd.grad(change.square().sum() / 2, y)
    # A dead start (all activations off) has no gradient: draw another direction.
    dead = _lift(gradient.flatten(1).norm(dim=1) == 0, gradient)
    fresh = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
    distance = (y.detach() - x).flatten(1).norm(dim=1)
    return x, x + _unit(torch.where(dead, fresh, gradient)) * _lift(distance, x)


def _ratio(change: Tensor, difference: Tensor) -> Tensor:
    return change.flatten(1).norm(dim=1) / difference.flatten(1).norm(dim=1)


def _unit(x: Tensor) -> Tensor:
    return x / _lift(x.flatten(1).norm(dim=1).clamp_min(1e-300), x)


def _lift(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (like.ndim - 1))


__all__ = ["Falsification", "falsify", "falsify_network", "lower_estimates"]
