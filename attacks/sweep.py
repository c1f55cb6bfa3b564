"""All radii in one go: attack what is undecided, leave out the rest, keep the smallest adversarial of every image."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from attacks.contract import Attack, Problem, Progress
from attacks.grid import check_grid
from attacks.inputs import check_epsilons, check_images, check_indices, check_labels, check_radii, check_range
from attacks.masking import dead_gradients, gradient_masking
from attacks.sets import resolve
from attacks.victim import AttackInputError, Victim

FLAT, SATURATED = 0.5, 17.0  # median top-2 gaps outside of which the softmax's gradient is of little use in float32


@dataclass
class SweepResult:
    """What a sweep found.

    ``samples``: index, label, prediction, adversarial_norm (0 where misclassified, inf where none was found), attack
    ("clean" and "" there). ``adversarials``: (N, C, H, W) float32 on the CPU, the clean image where none was found.
    ``forward_passes`` and ``seconds``: per attack, verification included; "clean" is the clean prediction, "gradients"
    the look for masked gradients. ``warnings``: one line each; of the logits' scale, of masked gradients.
    """

    epsilons: list[float]
    samples: pd.DataFrame
    adversarials: Tensor
    forward_passes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def robust_accuracy(self) -> list[float]:
        """Share of images that are right and not broken at each epsilon: norm > epsilon, in the order of epsilons."""
        norms = self.samples["adversarial_norm"].to_numpy()
        return [float(((norms > epsilon) & (norms > 0)).mean()) for epsilon in self.epsilons]


def sweep(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    epsilons: Sequence[float],
    attacks: str = "standard",
    *,
    certified_radii: Any = None,
    audit: bool = False,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    seed: int = 0,
    indices: Sequence[int] | Tensor | np.ndarray | None = None,
    progress: Progress | None = None,
    eight_bit: bool = False,
) -> SweepResult:
    r"""Smallest adversarial :math:`\min \|x' - x\|_2` found of every image, enough to decide every epsilon.

    An image is *open* at epsilon while it is classified right, its certified radius is at most epsilon (with
    ``audit``: whatever its radius), and no adversarial of norm at most epsilon is known. Minimum-norm attacks run
    once on images open anywhere; fixed-epsilon attacks run from the smallest epsilon up on images open there.
    Nothing about an image depends on the others, so leaving out the decided changes no verdict. Attacks without
    gradients run last: where they break what the others could not, a warning says "masked gradients".
    With ``eight_bit`` only adversarials whose pixels are multiples of 1/255 count; the images must be on that grid.

    Shape: images (N, C, H, W) in [0, 1], labels (N,), certified_radii (N,) in pixels; epsilons increasing, in pixels.
    ``attacks`` is a set, a name, or a comma list. The model (in eval mode) stays where it is: ``device`` must be its.
    Errors: AttackInputError, one line, for input that cannot be attacked and for a model that returns NaN.

    >>> images, weight = torch.full((1, 1, 1, 2), 0.5), torch.tensor([[3.0, 4.0], [-3.0, -4.0]])
    >>> result = sweep(lambda x: (x.flatten(1) - 0.4) @ weight.T, images, torch.tensor([0]), [0.1, 0.2])
    >>> round(float(result.samples.adversarial_norm[0]), 3), result.robust_accuracy()
    (0.14, [1.0, 0.0])
    """
    images = check_images(images)
    count = len(images)
    labels, grid = check_labels(labels, count), check_epsilons(epsilons)
    radii, places = check_radii(certified_radii, count), check_indices(indices, count)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise AttackInputError(f"batch_size must be a positive integer, got {batch_size!r}")
    chosen, reach = resolve(attacks)
    if eight_bit:
        check_grid(images)
        reach = float("inf")  # a minimum norm that rounding made longer does not say that none is near
    options = _Options(torch.device(device), batch_size, int(seed), progress, eight_bit)
    state = _Sweep(Victim(model), images, labels, places, options)
    with state.victim.frozen():
        state.predict()
        state.allowed = state.right[:, None] & (grid > 0)[None, :]
        if not audit:
            state.allowed &= ~(radii[:, None] > grid[None, :])
        started_open = np.any(state.open(grid), axis=1)
        _run(state, [a for a in chosen if not a.gradient_free], grid, reach)
        gradient_norms = state.norms.copy()
        blind = [a for a in chosen if a.gradient_free]
        _run(state, blind, grid, reach)
        warnings = _softmax_warnings(state, chosen)
        if blind and len(blind) < len(chosen):
            dead = state.dead_gradients(started_open)
            names = " or ".join(attack.name for attack in blind)
            unbounded = any(a.kind == "minimum-norm" and not a.gradient_free for a in chosen)
            warnings += gradient_masking(grid, gradient_norms, state.norms, started_open, dead, names, unbounded)
    return state.result(grid, warnings)


def _run(state: _Sweep, chosen: list[Attack], grid: np.ndarray, reach: float) -> None:
    """Minimum-norm attacks once, then fixed-epsilon attacks, on what is open."""
    for attack in chosen:
        if attack.kind == "minimum-norm":
            state.attack(attack, np.any(state.open(grid), axis=1), None, attack.name)
    _fixed_epsilon(state, [a for a in chosen if a.kind == "fixed-epsilon"], grid, reach)


def _fixed_epsilon(state: _Sweep, chosen: list[Attack], grid: np.ndarray, reach: float) -> None:
    """From the smallest epsilon up; again where a new, smaller adversarial has brought an image into reach."""
    tried = np.zeros((len(chosen), len(state.norms), len(grid)), dtype=bool)
    ran = bool(chosen)
    while ran:
        ran = False
        for k, epsilon in enumerate(grid):
            if epsilon == 0:
                continue
            for a, attack in enumerate(chosen):
                near = ~(np.isfinite(state.norms) & (state.norms > reach * epsilon))
                active = state.open(grid)[:, k] & near & ~tried[a, :, k]
                tried[a, active, k] = True
                ran |= bool(active.any())
                state.attack(attack, active, float(epsilon), f"{attack.name} at {epsilon:.4g}")


@dataclass(frozen=True)
class _Options:
    device: torch.device
    batch_size: int
    seed: int
    progress: Progress | None
    eight_bit: bool


class _Sweep:
    """What is known of every image so far."""

    def __init__(
        self, victim: Victim, images: Tensor, labels: Tensor, places: np.ndarray, options: _Options
    ) -> None:
        self.victim, self.images, self.labels, self.places = victim, images.cpu(), labels.cpu(), places
        self.options = options
        count = len(images)
        self.norms = np.full(count, np.inf)
        self.names = np.full(count, "", dtype=object)
        self.adversarials = self.images.clone()
        self.logits: Tensor
        self.right: np.ndarray
        self.allowed: np.ndarray  # (N, epsilons): worth attacking before anything is found
        self.passes: dict[str, int] = {}
        self.seconds: dict[str, float] = {}

    def open(self, grid: np.ndarray) -> np.ndarray:
        """(N, epsilons): allowed, and no adversarial of norm at most epsilon known."""
        return self.allowed & (self.norms[:, None] > grid[None, :])

    def predict(self) -> None:
        """Clean logits; misclassified images are decided."""
        started, before = time.perf_counter(), self.victim.passes
        device, size = self.options.device, self.options.batch_size
        parts = [self.victim.verified_logits(part.to(device)).cpu() for part in self.images.split(size)]
        self.logits = torch.cat(parts)
        check_range(self.labels, self.logits.shape[1])
        self.right = (self.logits.argmax(dim=1) == self.labels).numpy()
        self.norms[~self.right], self.names[~self.right] = 0.0, "clean"
        self.passes["clean"] = self.victim.passes - before
        self.seconds["clean"] = time.perf_counter() - started

    def dead_gradients(self, active: np.ndarray) -> np.ndarray:
        """Of the active images, those where the margin's gradient is zero or not finite."""
        started, before, device = time.perf_counter(), self.victim.passes, self.options.device
        dead = np.zeros_like(active)
        rows = torch.from_numpy(active.nonzero()[0])
        for batch in rows.split(self.options.batch_size) if len(rows) else ():
            found = dead_gradients(self.victim, self.images[batch].to(device), self.labels[batch].to(device))
            dead[batch.numpy()] = found.cpu().numpy()
        self.passes["gradients"] = self.victim.passes - before
        self.seconds["gradients"] = time.perf_counter() - started
        return dead

    def attack(self, attack: Attack, active: np.ndarray, epsilon: float | None, description: str) -> None:
        """Run one attack on the active images and keep what is smaller."""
        started, before = time.perf_counter(), self.victim.passes
        rows, options, device = active.nonzero()[0], self.options, self.options.device
        for first in range(0, len(rows), options.batch_size):
            batch = rows[first : first + options.batch_size]
            problem = Problem(
                model=self.victim, images=self.images[batch].to(device), labels=self.labels[batch].to(device),
                logits=self.logits[batch].to(device), indices=torch.from_numpy(self.places[batch]),
                best=self.adversarials[batch].to(device), best_norm=torch.from_numpy(self.norms[batch]).to(device),
                epsilon=epsilon, seed=options.seed, eight_bit=options.eight_bit,
            )
            found, norms = attack.run(problem)
            better = norms.cpu().numpy() < self.norms[batch]
            self.adversarials[batch[better]] = found.cpu()[torch.from_numpy(better)]
            self.norms[batch[better]], self.names[batch[better]] = norms.cpu().numpy()[better], attack.name
            if options.progress is not None:
                options.progress(description, first + len(batch), len(rows))
        self.passes[attack.name] = self.passes.get(attack.name, 0) + self.victim.passes - before
        self.seconds[attack.name] = self.seconds.get(attack.name, 0.0) + time.perf_counter() - started

    def result(self, grid: np.ndarray, warnings: list[str]) -> SweepResult:
        samples = pd.DataFrame({
            "index": self.places, "label": self.labels.numpy(), "prediction": self.logits.argmax(dim=1).numpy(),
            "adversarial_norm": self.norms, "attack": self.names.astype(str),
        })
        return SweepResult(grid.tolist(), samples, self.adversarials, self.passes, self.seconds, warnings)


def _softmax_warnings(state: _Sweep, chosen: list[Attack]) -> list[str]:
    """One line if an attack climbs the cross-entropy of logits for which the softmax has no usable gradient."""
    names = [attack.name for attack in chosen if attack.softmax]
    if not names or not state.right.any():
        return []
    top = state.logits[torch.from_numpy(state.right)].topk(2, dim=1).values
    gap = float((top[:, 0] - top[:, 1]).median())
    tail = f"(median gap of the two largest logits: {gap:.3g}); believe the set 'standard' instead"
    if gap < FLAT:
        return [f"flat logits: the gradient of {', '.join(names)} (cross-entropy) is nearly the same for all classes"
                f" and misses adversarials {tail}"]
    if gap > SATURATED:
        return [f"saturated logits: the gradient of {', '.join(names)} (cross-entropy) vanishes in float32 {tail}"]
    return []
