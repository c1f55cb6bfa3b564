"""AutoAttack's standard L2 protocol as four attacks under the contract (optional: package pyautoattack 0.2.0).

APGD on the cross-entropy, targeted APGD on the difference-of-logits ratio, targeted FAB, Square (Croce and Hein, 2020,
arXiv:2003.01690), with the library's own classes and the parameters of its version "standard". What differs:

- Each part runs on what is still open after the parts before it, at every epsilon; the report tells them apart.
- Random starts of APGD come from (seed, index, epsilon, target), image by image. Square draws one random sequence for
  the whole batch; here every image of a sweep gets the same one, from (seed, epsilon), so that an image's verdict does
  not depend on its batch. FAB with one restart draws nothing.
- With K < 10 classes there are K - 1 targets. With K < 4 the targeted ratio, whose unit comes from the third and
  fourth largest logit, does not exist: there its numerator alone is climbed.
- Adversarials are not shrunk: robust accuracy at epsilon is the protocol's, norms are near epsilon.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from attacks.contract import Attack, Problem
from attacks.foolbox_attacks import generator
from attacks.victim import AttackInputError

STEPS, TARGETS, QUERIES, SMALLEST = 100, 9, 5000, 5
SILENT = logging.Logger("pyautoattack")  # it warns of zero gradients, which the sweep does in its own words
SILENT.addHandler(logging.NullHandler())


class AutoAttackPart(Attack):
    """One part of AutoAttack. ``steps`` are its iterations (Square: queries), ``targets`` its target classes at most.

    Errors: AttackInputError from Square for images of less than 5 x 5 pixels, which it divides into 5 stripes.
    """

    kind: Literal["minimum-norm", "fixed-epsilon"] = "fixed-epsilon"
    shrinks = False

    def __init__(
        self, name: str, run: Callable[[AutoAttackPart, Problem], Tensor], *, loss: str, cost: int, good_at: str,
        steps: int, targets: int = 0, softmax: bool = False, gradient_free: bool = False,
    ) -> None:
        self.name, self.loss, self.cost, self.good_at, self.steps = name, loss, cost, good_at, steps
        self.targets, self.softmax, self.gradient_free, self._run = targets, softmax, gradient_free, run

    def missing(self) -> str:
        return "" if find_spec("pyautoattack") else "pip install 'robustflow[autoattack]'"

    def propose(self, problem: Problem) -> Tensor:
        with _contained(problem):
            return self._run(self, problem)


@contextlib.contextmanager
def _contained(problem: Problem) -> Iterator[None]:
    """Nothing is printed, and the caller's random state is left alone: the library sets the seed of every device."""
    devices = [problem.images.device] if problem.images.is_cuda else []
    with torch.random.fork_rng(devices=devices), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        yield


def _logits(problem: Problem) -> Callable[[Tensor], Tensor]:
    """The model in float32, in a tensor of its own: Square overwrites the logits it is given."""
    return lambda images: problem.model(images).float().clone()


def _options(problem: Problem) -> dict[str, Any]:
    return {"norm": "L2", "eps": problem.epsilon, "n_restarts": 1, "seed": 0, "device": problem.images.device,
            "verbose": False}


def _start(problem: Problem, rows: Tensor, target: int) -> Tensor:
    """Points uniform on the sphere of radius epsilon around the images of some rows, as APGD draws them."""
    assert problem.epsilon is not None
    images = problem.images[rows]
    noise = torch.stack([
        torch.randn(images.shape[1:], generator=generator(problem.seed, index, problem.epsilon, target))
        for index in problem.indices[rows.cpu()].tolist()
    ]).to(images)
    length = noise.flatten(1).norm(dim=1)[:, None, None, None]
    return images + problem.epsilon * noise / (length + 1e-12)


def _apgd_ce(part: AutoAttackPart, problem: Problem) -> Tensor:
    from pyautoattack.autopgd_base import APGDAttack

    attack = APGDAttack(_logits(problem), n_iter=part.steps, loss="ce", eot_iter=1, rho=0.75, logger=SILENT,
                        **_options(problem))
    attack.init_hyperparam(problem.images)
    everything = torch.arange(len(problem.images), device=problem.images.device)
    _, _, _, found = attack.attack_single_run(problem.images, problem.labels, x_init=_start(problem, everything, 0))
    return found


def _apgd_t(part: AutoAttackPart, problem: Problem) -> Tensor:
    from pyautoattack.autopgd_base import APGDAttack_targeted

    def ratio(logits: Tensor, labels: Tensor) -> Tensor:
        gap = logits.gather(1, attack.y_target[:, None])[:, 0] - logits.gather(1, labels[:, None])[:, 0]
        if logits.shape[1] < 4:
            return gap
        top = logits.sort(dim=1).values
        return gap / (top[:, -1] - 0.5 * (top[:, -3] + top[:, -4]) + 1e-12)

    attack = APGDAttack_targeted(_logits(problem), n_iter=part.steps, eot_iter=1, rho=0.75, logger=SILENT,
                                 **_options(problem))
    attack.init_hyperparam(problem.images)
    attack.dlr_loss_targeted = ratio
    ranking = problem.logits.scatter(1, problem.labels[:, None], -torch.inf).argsort(
        dim=1, descending=True, stable=True)
    found = problem.images.clone()
    rows = torch.arange(len(found), device=found.device)
    for rank in range(min(part.targets, ranking.shape[1] - 1)):
        if len(rows) == 0:
            break
        attack.y_target = ranking[rows, rank]
        start = _start(problem, rows, 1 + rank)
        _, right, _, tried = attack.attack_single_run(problem.images[rows], problem.labels[rows], x_init=start)
        found[rows[~right]] = tried[~right]
        rows = rows[right]
    return found


def _fab_t(part: AutoAttackPart, problem: Problem) -> Tensor:
    from pyautoattack.fab_pt import FABAttack_PT

    targets = min(part.targets, problem.logits.shape[1] - 1)
    attack = FABAttack_PT(_logits(problem), n_iter=part.steps, targeted=True, n_target_classes=targets,
                          **_options(problem))
    return attack.perturb(problem.images, problem.labels)


def _square(part: AutoAttackPart, problem: Problem) -> Tensor:
    from pyautoattack.square import SquareAttack

    if min(problem.images.shape[2:]) < SMALLEST:
        size = " x ".join(str(side) for side in problem.images.shape[2:])
        raise AttackInputError(f"attack {part.name} needs images of at least {SMALLEST} x {SMALLEST} pixels, got"
                               f" {size}; use the others: apgd-ce,apgd-t,fab-t")

    class Shared(SquareAttack):
        def random_choice(self, shape: Any) -> Tensor:
            return super().random_choice([1, *shape[1:]]).expand(*shape)

    attack = Shared(_logits(problem), p_init=0.8, n_queries=part.steps, resc_schedule=False, **_options(problem))
    attack.seed = generator(problem.seed, 0, problem.epsilon or 0.0).initial_seed()
    return attack.perturb(problem.images, problem.labels)


PARTS: tuple[AutoAttackPart, ...] = (
    AutoAttackPart("apgd-ce", _apgd_ce, loss="cross-entropy", cost=STEPS + 1, steps=STEPS, softmax=True,
                   good_at="ordinary networks, without a step size to choose"),
    AutoAttackPart("apgd-t", _apgd_t, loss="targeted logit ratio", cost=TARGETS * (STEPS + 1), steps=STEPS,
                   targets=TARGETS, good_at="any differentiable network, whatever the scale of its logits"),
    AutoAttackPart("fab-t", _fab_t, loss="linearised margins", cost=TARGETS * (2 * STEPS + 3) + 1, steps=STEPS,
                   targets=TARGETS, good_at="small norms where a gradient is too small for float32 to climb"),
    AutoAttackPart("square", _square, loss="margin", cost=QUERIES + 3, steps=QUERIES, gradient_free=True,
                   good_at="masked gradients: it asks for logits only"),
)
