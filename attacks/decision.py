"""An attack that sees only which class wins: the check that an attack's failure is not its gradients' fault."""

from __future__ import annotations

import contextlib
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from attacks.contract import Attack, Problem
from attacks.foolbox_attacks import ep, foolbox, generator
from attacks.victim import l2_norms, margins

STARTS = 64  # of the budget, spent on noise of growing size where no adversarial is known yet


class _Spent(Exception):
    """The image's forward passes are used up."""


class _OneImage(nn.Module):
    """The model around one image, which remembers the nearest misclassified image it was ever asked about.

    So neither foolbox's failures (it gives up a whole batch where one start is bad or a step loses the boundary) nor
    the end of the budget lose what was found.
    """

    def __init__(self, problem: Problem, row: int, budget: int) -> None:
        super().__init__()
        self._problem, self.left = (problem,), budget
        self.clean, self.label = problem.images[row : row + 1], problem.labels[row : row + 1]
        self.nearest, self.distance = self.clean.clone(), math.inf
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        (problem,) = self._problem
        if len(images) > self.left:
            raise _Spent
        self.left -= len(images)
        logits = problem.model(images)
        distances = torch.where(margins(logits, self.label.expand(len(images))) < 0, l2_norms(images - self.clean),
                                torch.inf)
        closest = int(distances.argmin())
        if float(distances[closest]) < self.distance:
            self.nearest, self.distance = images[closest : closest + 1].clone(), float(distances[closest])
        return logits


class _Broken(foolbox.criteria.Criterion):
    """Another class strictly above the label's, for any number of copies of one image (foolbox's takes one)."""

    def __init__(self, label: Tensor) -> None:
        super().__init__()
        self.label = label

    def __repr__(self) -> str:
        return f"_Broken({int(self.label)})"

    def __call__(self, perturbed: Any, outputs: Any) -> Any:
        logits = outputs.raw
        return ep.astensor(margins(logits, self.label.expand(len(logits))) < 0)


class _HopSkipJump(foolbox.attacks.HopSkipJumpAttack):
    """foolbox's, with the probes of a step in one batch, drawn from the image's own generator.

    The probes' radius is a fixed share of the distance: foolbox's, the distance over the dimension, is below what a
    model that rounds its input can see, and there every probe gets the same answer.
    """

    def __init__(self, random: torch.Generator, reach: float, **options: Any) -> None:
        super().__init__(**options)
        self.random, self.reach = random, reach

    def select_delta(self, originals: Any, distances: Any, step: int) -> Any:
        return self.reach * distances

    def approximate_gradients(self, is_adversarial: Any, x_advs: Any, steps: int, delta: Any) -> Any:
        point, radius = x_advs.raw, float(delta.raw)
        probes = torch.randn((steps, *point.shape[1:]), generator=self.random).to(point)
        probes = (point + radius * probes / probes.flatten(1).norm(dim=1)[:, None, None, None]).clamp(0, 1)
        answers = torch.where(is_adversarial(ep.astensor(probes)).raw, 1.0, -1.0).to(point)
        if answers.mean().abs() < 1:
            answers = answers - answers.mean()
        direction = (answers[:, None, None, None] * (probes - point)).mean(dim=0, keepdim=True)
        return ep.astensor(direction / direction.norm().clamp_min(1e-12))


class HopSkipJump(Attack):
    """HopSkipJump (Chen et al., 2019, arXiv:1904.02144) on each image by itself, with ``cost`` forward passes each.

    It starts at the known adversarial or, without one, at the nearest misclassified of noisy copies of the image.
    """

    kind: Literal["minimum-norm", "fixed-epsilon"] = "minimum-norm"
    loss, gradient_free = "none: the predicted class", True
    good_at = "finding out that gradients are masked; far from the smallest norms otherwise"

    def __init__(self, name: str, *, budget: int, probes: int = 40, reach: float = 0.1) -> None:
        self.name, self.cost, self.probes, self.reach = name, budget, probes, reach

    def propose(self, problem: Problem) -> Tensor:
        return torch.cat([self._attack(problem, row) for row in range(len(problem.images))])

    def _attack(self, problem: Problem, row: int) -> Tensor:
        random = generator(problem.seed, int(problem.indices[row]), 1.0)
        model = _OneImage(problem, row, self.cost)
        model(problem.best[row : row + 1] if torch.isfinite(problem.best_norm[row]) else noisy(model.clean, random))
        if not math.isfinite(model.distance):
            return model.clean
        attack = _HopSkipJump(random, self.reach, initial_gradient_eval_steps=self.probes, gamma=self._precision(model))
        victim = foolbox.PyTorchModel(model, bounds=(0, 1), device=model.clean.device)
        with contextlib.suppress(_Spent, AssertionError):  # the latter is foolbox's, of a step that lost the boundary
            attack.run(victim, model.clean, _Broken(model.label), starting_points=model.nearest)
        return model.nearest

    @staticmethod
    def _precision(model: _OneImage) -> float:
        """The gamma with which foolbox halves the way to the boundary 10 times, whatever the dimension."""
        return 1e-3 * model.clean[0].numel() ** 1.5


def noisy(clean: Tensor, random: torch.Generator) -> Tensor:
    """STARTS images around one, from slightly to wholly noise, half of it in blocks of pixels, and its negative.

    Shape: clean (1, C, H, W) -> (STARTS, C, H, W) in [0, 1].
    """
    channels, height, width = clean.shape[1:]
    half = (STARTS - 1) // 2
    coarse = torch.randn((STARTS - 1 - half, channels, -(-height // 4), -(-width // 4)), generator=random)
    fine = torch.randn((half, channels, height, width), generator=random)
    noise = torch.cat([fine, interpolate(coarse, size=(height, width))]).to(clean)
    sizes = torch.cat([torch.logspace(-1.5, 0.5, half), torch.logspace(-1.5, 0.5, len(coarse))]).to(clean)
    return torch.cat([clean + sizes[:, None, None, None] * noise, 1 - clean]).clamp(0, 1)
