"""foolbox 3.3.4, with every known fault of it worked around in this one file.

| fault of foolbox | here |
|---|---|
| importing it fails where there is no git program, and warns with newer scipy | environment and filter at import |
| PyTorchModel picks cuda:0 by itself and warns | explicit device, an adapter in eval mode |
| gradients fill every parameter's ``.grad`` | :meth:`Victim.frozen` around the attacks, gradient of the input only |
| failed samples come back as NaN (NewtonFool) or black images (CW) | masked by :func:`_proposals` |
| PGD returns its last iterate | :class:`_BestIteratePGD` keeps the best feasible one |
| cross-entropy meets flat or saturated logits | margin losses, :class:`_Rescaled` logits |
| a zero gradient is replaced by noise from the global generator, drawn for the whole batch | per-image noise |
| FMN's L2 projection does nothing (``norms / norms``) | :class:`_ProjectedFMN` |
| CW's ``abort_early`` stops all samples by their summed loss | always off |
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from attacks.contract import Attack, Problem, margins

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    import eagerpy as ep
    import foolbox
    from foolbox.attacks.gradient_descent_base import GDOptimizer, Optimizer

SHARPNESS = 8.0  # the clean top-2 gap after rescaling: softmax is neither flat (< 1) nor saturated (> 17 in float32)


def generator(seed: int, index: int, *tags: float) -> torch.Generator:
    """A CPU generator that depends on (seed, image index, tags) and on nothing else."""
    words = [seed & 0xFFFFFFFFFFFFFFFF, int(index), *(int(np.float64(tag).view(np.uint64)) for tag in tags)]
    return torch.Generator().manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1))


class _Adapter(nn.Module):
    """The victim as the eval-mode module that foolbox asks for, of which foolbox moves and sees nothing."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self._problem = (problem,)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        (problem,) = self._problem
        if images.requires_grad and len(images) == len(problem.images):
            images = images.view_as(images)
            images.register_hook(self._revive)
        return problem.model(images)

    def _revive(self, gradient: Tensor) -> Tensor:
        """Rows with a zero gradient get a fixed random direction of their own image's."""
        (problem,) = self._problem
        dead = (gradient.flatten(1).norm(dim=1) == 0).nonzero()[:, 0]
        if len(dead) == 0:
            return gradient
        gradient = gradient.clone()
        for row in dead.tolist():
            noise = torch.randn(gradient.shape[1:], generator=generator(problem.seed, int(problem.indices[row])))
            gradient[row] = noise.to(gradient) * 1e-12
        return gradient


class _Rescaled(_Adapter):
    r"""Logits of image i times :math:`s / g_i`, :math:`g_i` its clean top-2 gap: verdicts are free of the logits' unit.

    The gap is guarded relatively (1e-4 of the spread of the image's logits), so ties neither divide by zero nor
    bring the unit back.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        top = problem.logits.topk(2, dim=1).values
        spread = problem.logits.amax(dim=1) - problem.logits.amin(dim=1)
        gap = torch.maximum(top[:, 0] - top[:, 1], 1e-4 * spread)
        self._scale = torch.where(gap > 0, SHARPNESS / gap, torch.ones_like(gap))[:, None]

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return logits * self._scale.to(logits)


def foolbox_model(problem: Problem, rescale: bool = True) -> foolbox.PyTorchModel:
    """The problem's model for foolbox, with bounds (0, 1), on the images' device."""
    adapter = _Rescaled(problem) if rescale else _Adapter(problem)
    return foolbox.PyTorchModel(adapter, bounds=(0, 1), device=problem.images.device)


def _proposals(problem: Problem, raw: Tensor) -> Tensor:
    """foolbox's raw output with NaN images and its all-zero sign of failure replaced by the clean image."""
    failed = ~torch.isfinite(raw).flatten(1).all(dim=1) | (raw == 0).flatten(1).all(dim=1)
    return torch.where(failed[:, None, None, None], problem.images, raw)


class FoolboxAttack(Attack):
    """Any L2 attack of foolbox under the contract; ``make(problem)`` builds it, so it can start from what is known.

    >>> from attacks import register, ATTACKS
    >>> _ = register(FoolboxAttack("fgm-example", lambda problem: foolbox.attacks.L2FastGradientAttack(),
    ...     kind="fixed-epsilon", loss="cross-entropy", cost=1, good_at="a first look"))
    >>> _ = ATTACKS.pop("fgm-example")
    """

    def __init__(
        self,
        name: str,
        make: Callable[[Problem], Any],
        *,
        kind: Literal["minimum-norm", "fixed-epsilon"],
        loss: str,
        cost: int,
        good_at: str,
        rescale: bool = True,
        shrinks: bool = True,
        softmax: bool = False,
    ) -> None:
        self.name, self.kind, self.loss, self.cost, self.good_at = name, kind, loss, cost, good_at
        self.make, self.rescale, self.shrinks, self.softmax = make, rescale, shrinks, softmax

    def propose(self, problem: Problem) -> Sequence[Tensor]:
        attack = self.make(problem)
        model = foolbox_model(problem, self.rescale)
        extra = {} if problem.epsilon is None else {"epsilon": problem.epsilon}
        devices = [problem.images.device] if problem.images.is_cuda else []
        with torch.random.fork_rng(devices=devices):  # what foolbox draws by itself leaves the caller's state alone
            torch.manual_seed(problem.seed)
            try:
                raw = attack.run(model, problem.images, foolbox.criteria.Misclassification(problem.labels), **extra)
            except _AllBroken:
                return [_proposals(problem, attack.best)]
        kept = [attack.best] if isinstance(attack, _BestIteratePGD) else []
        return [_proposals(problem, image) for image in (raw, *kept)]


class _AllBroken(Exception):
    """Every image of the batch is misclassified inside the ball: nothing is left to climb for."""


class PublishedPGD(foolbox.attacks.L2ProjectedGradientDescentAttack):
    """foolbox's L2PGD to the letter, its uniform random start drawn image by image instead of for the batch."""

    def __init__(self, problem: Problem, **options: Any) -> None:
        super().__init__(**options)
        self._problem = problem

    def get_random_start(self, x0: Any, epsilon: float) -> Any:
        return ep.astensor(x0.raw + epsilon * uniform_ball(self._problem))


def uniform_ball(problem: Problem, *tags: float) -> Tensor:
    """Points uniform in the unit L2 ball, one an image, from (seed, index, epsilon, tags): the first n coordinates
    of a uniform point on the sphere of dimension n + 2 (Voelker et al., 2017), as foolbox draws them."""
    shape, size = problem.images.shape, problem.images[0].numel()
    rows = []
    for index in problem.indices.tolist():
        normal = torch.randn(size + 2, generator=generator(problem.seed, index, problem.epsilon or 0.0, *tags))
        rows.append(normal[:size] / normal.norm())
    return torch.stack(rows).reshape(shape).to(problem.images)


class _Decay(Optimizer):
    """Step k of n has length stepsize * (1 + cos(pi k / n)) / 2, at least a fiftieth of the first."""

    def __init__(self, x: Any, stepsize: float, steps: int) -> None:
        self.stepsize, self.steps, self.done = stepsize, steps, 0

    def __call__(self, gradient: Any) -> Any:
        share = max(0.02, (1 + math.cos(math.pi * self.done / self.steps)) / 2)
        self.done += 1
        return self.stepsize * share * gradient


class _BestIteratePGD(foolbox.attacks.L2ProjectedGradientDescentAttack):
    r"""PGD on a margin, :math:`\max_{j \ne y} f_j - f_y` or :math:`f_t - f_y`, that keeps its best iterate.

    ``start`` is an image to begin at (the clean one if None); ``targets`` (N,) names t.
    """

    def __init__(
        self, *, steps: int, rel_stepsize: float, start: Tensor | None = None, targets: Tensor | None = None,
        decay: bool = True,
    ) -> None:
        super().__init__(steps=steps, rel_stepsize=rel_stepsize, random_start=start is not None)
        self.start, self.targets, self.decay = start, targets, decay
        self.best: Tensor
        self._best_margin: Tensor | None = None

    def get_random_start(self, x0: Any, epsilon: float) -> Any:
        return self.project(ep.astensor(self.start), x0, epsilon)

    def get_optimizer(self, x: Any, stepsize: float) -> Any:
        return _Decay(x, stepsize, self.steps) if self.decay else GDOptimizer(x, stepsize)

    def get_loss_fn(self, model: Any, labels: Any) -> Any:
        own = labels.raw

        def loss(inputs: Any) -> Any:
            logits = model(inputs).raw
            margin = margins(logits, own)
            self._keep(inputs.raw.detach(), margin.detach())
            if self.targets is None:
                return ep.astensor(-margin.sum())
            columns = torch.stack([self.targets, own], dim=1)
            chosen = logits.gather(1, columns)
            return ep.astensor((chosen[:, 0] - chosen[:, 1]).sum())

        return loss

    def _keep(self, images: Tensor, margin: Tensor) -> None:
        """Remember, image by image, the iterate with the smallest margin; the clean image is iterate 0."""
        if self._best_margin is None:
            self.best, self._best_margin = images.clone(), margin
        else:
            better = margin < self._best_margin
            self.best[better], self._best_margin = images[better], torch.minimum(margin, self._best_margin)
        if (self._best_margin < 0).all():
            raise _AllBroken


class MarginPGD(Attack):
    """Margin PGD from the known adversarial pulled into the ball (if any), else from the clean image, then restarts."""

    kind: Literal["minimum-norm", "fixed-epsilon"] = "fixed-epsilon"

    def __init__(self, name: str, *, steps: int, rel_stepsize: float, restarts: int = 0, warm: bool = True) -> None:
        self.name, self.loss, self.cost = name, "margin", (1 + restarts) * (steps + 1)
        self.good_at = "networks with flat or saturated softmax; certified networks at a given epsilon"
        self.proposals = 2 * (1 + restarts)
        self.steps, self.rel_stepsize, self.restarts, self.warm = steps, rel_stepsize, restarts, warm

    def propose(self, problem: Problem) -> list[Tensor]:
        assert problem.epsilon is not None
        starts: list[Tensor | None] = [problem.best if self.warm else None]
        starts += [
            (problem.images + problem.epsilon * uniform_ball(problem, restart)).clamp(0, 1)
            for restart in range(1, self.restarts + 1)
        ]
        proposals: list[Tensor] = []
        for start in starts:
            proposals += self.climb(problem, start, None)
        return proposals

    def climb(self, problem: Problem, start: Tensor | None, targets: Tensor | None) -> Sequence[Tensor]:
        def make(_: Problem) -> _BestIteratePGD:
            return _BestIteratePGD(steps=self.steps, rel_stepsize=self.rel_stepsize, start=start, targets=targets)

        inner = FoolboxAttack(self.name, make, kind=self.kind, loss=self.loss, cost=self.cost, good_at=self.good_at)
        return inner.propose(problem)


class TargetedPGD(MarginPGD):
    """Margin PGD from the clean image towards each of the most likely other classes in turn."""

    def __init__(self, name: str, *, steps: int, rel_stepsize: float, targets: int) -> None:
        super().__init__(name, steps=steps, rel_stepsize=rel_stepsize)
        self.targets, self.cost, self.loss = targets, targets * (steps + 1), "targeted margin"
        self.proposals = 2 * targets
        self.good_at = "images whose nearest other class is not the one with the second largest logit"

    def propose(self, problem: Problem) -> list[Tensor]:
        own = problem.labels[:, None]
        ranking = problem.logits.scatter(1, own, -torch.inf).argsort(dim=1, descending=True, stable=True)
        proposals: list[Tensor] = []
        for rank in range(min(self.targets, ranking.shape[1] - 1)):
            proposals += self.climb(problem, None, ranking[:, rank])
        return proposals


class _ProjectedFMN(foolbox.attacks.L2FMNAttack):
    r"""FMN whose projection projects: :math:`x_0 + (x - x_0) \min(1, 1.001 \varepsilon / \|x - x_0\|)`.

    The thousandth is ours: FMN's estimate of the distance lands exactly on a linear boundary, which is not behind it.
    """

    def project(self, x: Any, x0: Any, epsilon: Any) -> Any:
        delta = x.raw - x0.raw
        norms = delta.flatten(1).norm(dim=1).clamp_min(1e-12)
        factor = (1.001 * epsilon.raw / norms).clamp_max(1.0)
        return ep.astensor(x0.raw + delta * factor[:, None, None, None])


def ddn(problem: Problem, steps: int, gamma: float) -> foolbox.attacks.DDNAttack:
    """DDN that starts its norm search, image by image, at the best norm known (foolbox: at 1 for all)."""
    known = torch.isfinite(problem.best_norm)
    radius = torch.where(known, problem.best_norm, torch.ones_like(problem.best_norm)).to(problem.images.dtype)
    start: Any = ep.astensor(radius)  # declared a float, used as init_epsilon * ones(N)
    return foolbox.attacks.DDNAttack(init_epsilon=start, steps=steps, gamma=gamma)
