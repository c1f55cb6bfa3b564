"""One sweep against plain calls of the same foolbox attacks, on the same images and radii in one run.

A plain call attacks every image at every ε: it knows neither what another attack has broken nor what is certified. Its
attacks are those of the set `standard`, with foolbox's own classes and the same steps; its PGDs climb the margin, too,
because with foolbox's cross-entropy they would lose to any other attack on these networks.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

import attacks
from attacks.foolbox_attacks import ep, foolbox
from attacks.victim import l2_norms, margins
from robustflow.certificates import certify
from robustflow.measurements import targets
from robustflow.measurements.attack_counts import rates, robust
from robustflow.measurements.family import Record, Request
from robustflow.measurements.targets import EPSILONS, PassCounter, Target
from robustflow.networks import Classifier
from robustflow.statistics import paired_difference

IMAGES, BATCH = 200, 250
TARGETS = 3
TOLERANCE = 1e-5  # of the norm, in float32


class PlainPGD(foolbox.attacks.L2ProjectedGradientDescentAttack):
    """foolbox's L2PGD with nothing but its loss replaced, as its documentation invites: the margin."""

    def __init__(self, steps: int) -> None:
        super().__init__(rel_stepsize=0.5, steps=steps, random_start=False)

    def get_loss_fn(self, model: Any, labels: Any) -> Any:
        return lambda inputs: ep.astensor(-margins(model(inputs).raw, labels.raw).sum())


class TargetedPlainPGD(PlainPGD):
    """The same towards given classes: foolbox descends its loss then, here own − target."""

    def __init__(self, steps: int, own: Tensor) -> None:
        super().__init__(steps)
        self.own = own

    def get_loss_fn(self, model: Any, labels: Any) -> Any:
        def loss(inputs: Any) -> Any:
            logits = model(inputs).raw
            pair = logits.gather(1, torch.stack([self.own, labels.raw], dim=1))
            return ep.astensor((pair[:, 0] - pair[:, 1]).sum())

        return loss


def _calls(model: Classifier, labels: Tensor, images: Tensor) -> Iterator[tuple[str, Any, Any]]:
    """(name, attack, criterion) of every plain call, the settings those of the set `standard`."""
    wrong = foolbox.criteria.Misclassification(labels)
    yield "deepfool", foolbox.attacks.L2DeepFoolAttack(steps=6, candidates=4, overshoot=0.01), wrong
    yield "ddn", foolbox.attacks.DDNAttack(init_epsilon=1.0, steps=40, gamma=0.05), wrong
    yield "margin-pgd", PlainPGD(15), wrong
    with torch.no_grad():
        ranking = model(images).scatter(1, labels[:, None], -torch.inf).argsort(dim=1, descending=True, stable=True)
    for rank in range(min(TARGETS, ranking.shape[1] - 1)):
        aim = foolbox.criteria.TargetedMisclassification(ranking[:, rank])
        yield "targeted-pgd", TargetedPlainPGD(10, labels), aim


def plain(model: Classifier, images: Tensor, labels: Tensor, epsilons: list[float]) -> tuple[np.ndarray, Record]:
    """(images broken at each ε, (N, E), as foolbox says; passes and seconds of each attack), nothing left out.

    ``refused``: foolbox's successes that are none when looked at again: inside ball and box, and misclassified.
    """
    adapter = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    nothing = torch.zeros(len(epsilons), len(images), dtype=torch.bool)
    passes: dict[str, int] = {}
    seconds: dict[str, float] = {}
    by_attack: dict[str, Tensor] = {}
    refused = 0
    for place in tqdm(range(0, len(images), BATCH), desc="plain foolbox", unit="batch", disable=None):
        batch, own = images[place : place + BATCH], labels[place : place + BATCH]
        torch.manual_seed(0)  # foolbox draws from the global generator where a gradient is zero
        for name, attack, criterion in _calls(model, own, batch):
            started = time.process_time()
            with PassCounter(model) as counter:
                _, clipped, success = attack(adapter, batch, criterion, epsilons=epsilons)
            seconds[name] = seconds.get(name, 0.0) + time.process_time() - started
            passes[name] = passes.get(name, 0) + counter.passes
            by_attack.setdefault(name, nothing.clone())[:, place : place + BATCH] |= success
            refused += sum(
                int((reported & ~_holds(model, batch, own, found, epsilon)).sum())
                for found, reported, epsilon in zip(clipped, success, epsilons, strict=True)
            )
    together = torch.stack(list(by_attack.values())).any(dim=0)
    broken = {name: found.sum(dim=1).tolist() for name, found in by_attack.items()}
    cost = {"forward_passes": passes, "cpu_seconds": seconds, "wrong_or_broken": broken, "refused": refused}
    return together.T.numpy(), cost


@torch.no_grad()
def _holds(model: Classifier, images: Tensor, labels: Tensor, found: Tensor, epsilon: float) -> Tensor:
    inside = (found >= 0).flatten(1).all(1) & (found <= 1).flatten(1).all(1)
    near = l2_norms(found - images) <= epsilon * (1 + TOLERANCE)
    return inside & near & (model(found).argmax(1) != labels)


def foolbox_against_sweep(target: Target, epsilons: list[float], seed: int) -> Record:
    """Both ways on one model; the sweep's cost holds that of certifying where certified radii are of use."""
    count = min(IMAGES, len(target.labels))
    images, labels = target.images[:count], target.labels[:count]
    model = copy.deepcopy(target.model)  # plain calls fill the gradients of its parameters
    radii, certifying = None, 0.0
    if (target.radii[:count] > epsilons[0]).any():
        started = time.process_time()
        radii = certify(model, images, labels, batch_size=BATCH).radii
        certifying = time.process_time() - started
    started = time.process_time()
    with PassCounter(model) as counter:
        result = attacks.sweep(
            model, images, labels, epsilons, "standard", certified_radii=radii, batch_size=BATCH, seed=seed
        )
    swept = time.process_time() - started
    norms = result.samples["adversarial_norm"].to_numpy()
    said, cost = plain(model, images, labels, epsilons)
    plain_passes, plain_seconds = sum(cost["forward_passes"].values()), sum(cost["cpu_seconds"].values())
    passes = counter.passes + (0 if radii is None else count)
    differences = [
        {"epsilon": epsilon} | paired_difference(robust(norms, epsilon), ~said[:, place]).as_dict()
        for place, epsilon in enumerate(epsilons)
    ]
    return {
        "model": target.name,
        "n": count,
        "certified_left_out": radii is not None,
        "sweep": {
            "accuracy": rates(norms, epsilons),
            "forward_passes": passes,
            "cpu_seconds": swept + certifying,
            "of_which_certifying": certifying,
        },
        "plain": {
            "accuracy": [{"epsilon": row["epsilon"], "value": 1 - float(said[:, place].mean())}
                         for place, row in enumerate(differences)],
            "forward_passes": plain_passes,
            "cpu_seconds": plain_seconds,
            "by_attack": cost,
        },
        "sweep_minus_plain": differences,
        "times_fewer_passes": plain_passes / passes,
        "times_fewer_seconds": plain_seconds / (swept + certifying),
    }  # fmt: skip


def measure(request: Request) -> Record:
    """One certified model and the ResNet, each a file once it is done."""
    experiment, models = targets.read(request, "foolbox")
    epsilons = targets.grid(experiment)
    rows = [
        targets.kept(
            request.unfinished("foolbox") / f"{target.name}.json",
            [target.identity, epsilons, experiment.seed, IMAGES, BATCH, TARGETS],
            partial(foolbox_against_sweep, target, epsilons, experiment.seed),
        )
        for target in targets.certified_and_not(models, EPSILONS[0])
    ]
    return targets.origin(request, experiment) | {"epsilons": epsilons, "batch": BATCH, "models": rows}
