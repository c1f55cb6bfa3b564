"""The contract of every attack: a subclass proposes images, the base decides what counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, final

import torch
from torch import Tensor

from attacks.grid import LADDER, on_grid
from attacks.shrink import ROUNDS, shrink
from attacks.victim import AttackInputError, Victim, l2_norms, margins

# Rounding a pixel of [0, 1] to float32 moves it by at most this, and so an image of n pixels by sqrt(n) times this:
# projecting that much further inside makes the norm, measured in float64, at most epsilon without any tolerance.
HALF_ULP = 2.0**-25


@dataclass(frozen=True)
class Problem:
    """What an attack is given: a batch of rightly classified images.

    ``epsilon`` is None for a minimum-norm attack. ``best`` is the smallest adversarial known so far (the clean image
    where ``best_norm`` is inf). ``indices`` are the images' places in the dataset: randomness must come from
    (``seed``, index, epsilon) alone, so that an image's verdict does not depend on the batch it is attacked in.
    """

    model: Victim
    images: Tensor  # (N, C, H, W) float32 in [0, 1]
    labels: Tensor  # (N,) int64
    logits: Tensor  # (N, K) float64, of the clean images
    indices: Tensor  # (N,) int64, on the CPU
    best: Tensor  # (N, C, H, W)
    best_norm: Tensor  # (N,) float64
    epsilon: float | None = None
    seed: int = 0
    eight_bit: bool = False  # whether only adversarials on the grid of multiples of 1/255 count


class Attack(ABC):
    r"""An L2 attack on a classifier of images in :math:`[0, 1]`.

    A subclass declares what it is and implements :meth:`propose`. :meth:`run` clips every proposal to the box,
    projects it into the ball :math:`\|x' - x\|_2 \le \varepsilon` (fixed-epsilon attacks), checks it in a second
    forward pass (finite, in [0, 1], in the ball, another class strictly above the label's) and keeps the smallest.
    So a wrong attack can miss an adversarial but never claim one.

    >>> @register
    ... class Blackout(Attack):
    ...     name, kind, loss, cost = "blackout-example", "minimum-norm", "none", 0
    ...     good_at = "networks afraid of the dark"
    ...     def propose(self, problem):
    ...         return torch.zeros_like(problem.images)
    >>> _ = ATTACKS.pop("blackout-example")
    """

    name: str
    kind: Literal["minimum-norm", "fixed-epsilon"]
    loss: str
    cost: int  # forward passes a sample; of a fixed-epsilon attack: at each epsilon. Gradients not counted apart.
    good_at: str
    proposals: int = 1  # images proposed a sample, at most; verifying each is a pass, pulling it in a few more
    shrinks: bool = True  # whether a found adversarial is pulled along its segment towards the clean image
    gradient_free: bool = False  # whether it never asks for a gradient: runs last, and unmasks masked gradients
    softmax: bool = False  # whether it climbs the cross-entropy of the model's own logits, which flat logits defeat

    def missing(self) -> str:
        """What to install before it can run, as a command in a few words; empty if nothing is missing."""
        return ""

    @final
    def passes(self, eight_bit: bool = False) -> int:
        """Forward passes a sample at most, verification included; of a fixed-epsilon attack: at each epsilon."""
        pulls = ROUNDS if self.shrinks else 0
        rungs = 0 if not eight_bit else len(LADDER) + 1 if self.shrinks else 1
        return self.cost + self.proposals * (1 + pulls + rungs)

    @abstractmethod
    def propose(self, problem: Problem) -> Tensor | Sequence[Tensor]:
        """Candidate images, shape (N, C, H, W), or several such tensors. NaN or the clean image means: none."""

    @final
    def run(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Smallest verified adversarials (N, C, H, W) float32 and their norms (N,) float64 (inf: none, clean image).

        What ``problem.best`` already holds is kept where nothing smaller is found.
        Errors: TypeError if proposals have another shape; AttackInputError if the model returns NaN.
        """
        clean, labels = problem.images.clone(), problem.labels.clone()
        best, best_norm = problem.best.clone(), problem.best_norm.clone()
        proposals = self.propose(problem)
        for candidates in [proposals] if isinstance(proposals, Tensor) else proposals:
            if candidates.shape != clean.shape:
                raise TypeError(f"attack {self.name} proposed shape {tuple(candidates.shape)},"
                                f" expected {tuple(clean.shape)}")
            candidates = self._admit(candidates.detach(), clean, problem.epsilon)
            norms = l2_norms(candidates - clean)
            smaller = (norms > 0) & (norms < best_norm)
            if problem.epsilon is not None:
                smaller &= norms <= problem.epsilon
            rows = smaller.nonzero()[:, 0]
            if len(rows) == 0:
                continue
            found = margins(problem.model.verified_logits(candidates[rows]), labels[rows])
            rows, found = rows[found < 0], found[found < 0]
            images, norms = candidates[rows], norms[rows]
            if self.shrinks and len(rows):
                start = margins(problem.logits[rows], labels[rows])
                images, norms = shrink(problem.model, clean[rows], images, labels[rows], start, found)
            if problem.eight_bit and len(rows):
                images, norms = self._to_eight_bit(problem, clean[rows], candidates[rows], images, labels[rows])
                kept = norms < best_norm[rows]
                rows, images, norms = rows[kept], images[kept], norms[kept]
            best[rows], best_norm[rows] = images, norms
        return best, best_norm

    def _to_eight_bit(
        self, problem: Problem, clean: Tensor, found: Tensor, near: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The first that is still adversarial, after rounding to multiples of 1/255, of ever longer perturbations
        along the shrunk one (rounding undoes what lies just behind the boundary), and last of the one found."""
        best, norms = clean.clone(), torch.full((len(clean),), torch.inf, dtype=torch.float64, device=clean.device)
        rungs = [(near, rung) for rung in LADDER] if self.shrinks else []
        for images, rung in [*rungs, (found, 1.0)]:
            rows = torch.isinf(norms).nonzero()[:, 0]
            if len(rows) == 0:
                break
            base = clean[rows]
            longer = self._admit(base + rung * (images[rows] - base), base, problem.epsilon)
            rounded = on_grid(longer, base, problem.epsilon)
            size = l2_norms(rounded - base)
            broken = (margins(problem.model.verified_logits(rounded), labels[rows]) < 0) & (size > 0)
            if problem.epsilon is not None:
                broken &= size <= problem.epsilon
            best[rows[broken]], norms[rows[broken]] = rounded[broken], size[broken]
        return best, norms

    @staticmethod
    def _admit(candidates: Tensor, clean: Tensor, epsilon: float | None) -> Tensor:
        """Candidates clipped to the box and projected into the ball; the clean image where one is not finite."""
        candidates = candidates.to(device=clean.device, dtype=clean.dtype)
        finite = torch.isfinite(candidates).flatten(1).all(dim=1)
        candidates = torch.where(finite[:, None, None, None], candidates, clean).clamp(0.0, 1.0)
        if epsilon is None:
            return candidates
        delta = candidates.double() - clean.double()
        radius = max(epsilon - HALF_ULP * clean[0].numel() ** 0.5, epsilon / 2)
        factor = (radius / l2_norms(delta).clamp_min(1e-300)).clamp_max(1.0)
        inside = (clean.double() + factor[:, None, None, None] * delta).to(clean.dtype).clamp(0.0, 1.0)
        return torch.where((factor < 1.0)[:, None, None, None], inside, candidates)


ATTACKS: dict[str, Attack] = {}
AnyAttack = TypeVar("AnyAttack", bound="type[Attack] | Attack")


def register(attack: AnyAttack) -> AnyAttack:
    """Add an attack (an instance, or as a decorator a class without arguments) under its ``name``.

    Errors: AttackInputError if a declaration is missing or wrong or the name is taken or not usable in a list.
    """
    instance: Attack = attack() if isinstance(attack, type) else attack
    label = type(instance).__name__
    for field, kind in (("name", str), ("kind", str), ("loss", str), ("cost", int), ("good_at", str)):
        if not isinstance(getattr(instance, field, None), kind):
            raise AttackInputError(f"attack {label} must declare {field} as {kind.__name__}")
    if instance.kind not in ("minimum-norm", "fixed-epsilon"):
        raise AttackInputError(f"attack {label}: kind must be 'minimum-norm' or 'fixed-epsilon', got {instance.kind!r}")
    if instance.name in ATTACKS or not instance.name or instance.name != instance.name.strip() or "," in instance.name:
        raise AttackInputError(f"attack name {instance.name!r} is taken, empty, or holds a comma or outer spaces")
    ATTACKS[instance.name] = instance
    return attack


Progress = Callable[[str, int, int], None]
