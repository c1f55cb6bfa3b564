"""Every known fault of foolbox 3.3.4: shown on foolbox itself, gone here. A test that stops failing on foolbox's side
says that the workaround may go."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import attacks
from attacks import ATTACKS, Problem, Victim, sweep
from attacks.foolbox_attacks import (
    FoolboxAttack,
    PublishedPGD,
    _BestIteratePGD,
    _ProjectedFMN,
    _proposals,
    foolbox,
    foolbox_model,
    generator,
    uniform_ball,
)

LINEAR = torch.randn(10, 48, generator=torch.Generator().manual_seed(3)) / 48**0.5


def linear(images: Tensor) -> Tensor:
    return (images.flatten(1) - 0.5) @ LINEAR.to(images).T


def exact(images: Tensor, labels: Tensor) -> Tensor:
    """Distance to the nearest boundary of the linear model where the box does not bind."""
    logits, weight = linear(images.double()), LINEAR.double()
    gaps = logits.gather(1, labels[:, None]) - logits
    lengths = (weight[labels][:, None] - weight[None]).norm(dim=2)
    return (gaps / lengths).scatter(1, labels[:, None], torch.inf).amin(dim=1)


def make_problem(model: Any = linear, epsilon: float | None = None, count: int = 60, seed: int = 0) -> Problem:
    images = 0.5 + 0.3 * (torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) - 0.5)
    victim = Victim(model)
    logits = victim(images).detach().double()
    return Problem(
        model=victim, images=images, labels=logits.argmax(dim=1), logits=logits, indices=torch.arange(count),
        best=images.clone(), best_norm=torch.full((count,), torch.inf).double(), epsilon=epsilon,
    )


def plain(problem: Problem) -> Any:
    """foolbox's own model, without any workaround."""

    class Module(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return problem.model(images)

    return foolbox.PyTorchModel(Module().eval(), bounds=(0, 1), device="cpu")


def criterion(problem: Problem) -> Any:
    return foolbox.criteria.Misclassification(problem.labels)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "GIT_PYTHON_REFRESH"}
    environment |= {"PATH": "/nonexistent", "PYTHONPATH": str(Path(attacks.__file__).parents[1])}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_import_without_git() -> None:
    assert "git" in run_python("import foolbox").stderr
    ours = run_python("import warnings; warnings.simplefilter('error'); import attacks")
    assert ours.returncode == 0, ours.stderr


def test_nan_images_of_newtonfool_are_masked() -> None:
    def dead(images: Tensor) -> Tensor:  # a zero gradient, by which NewtonFool divides
        return linear(images).detach() + 0 * linear(images)

    problem = make_problem(dead)
    raw = foolbox.attacks.NewtonFoolAttack(steps=2).run(plain(problem), problem.images.clone(), criterion(problem))
    assert torch.isnan(raw).any()
    attack = FoolboxAttack("newtonfool", lambda problem: foolbox.attacks.NewtonFoolAttack(steps=2), rescale=False,
                           kind="minimum-norm", loss="softmax", cost=2, good_at="showing the fault")
    assert all(torch.isfinite(proposal).all() for proposal in attack.propose(problem))
    images, norms = attack.run(problem)
    assert torch.isfinite(images).all()
    assert not torch.isnan(norms).any()
    assert torch.equal(_proposals(problem, raw), torch.where(torch.isnan(raw), problem.images, raw))


def test_black_images_of_a_failed_cw_are_masked() -> None:
    def robust_but_for_black(images: Tensor) -> Tensor:  # only a nearly black image has class 1, and no gradient leads
        total = images.flatten(1).sum(dim=1)
        return torch.stack([torch.ones_like(total), 2.0 * (total < 1e-3)], dim=1) + 0 * total[:, None]

    problem = make_problem(robust_but_for_black)
    make = lambda: foolbox.attacks.L2CarliniWagnerAttack(binary_search_steps=1, steps=3)  # noqa: E731
    raw = make().run(plain(problem), problem.images, criterion(problem))
    assert (raw == 0).all()
    attack = FoolboxAttack("cw-short", lambda problem: make(), kind="minimum-norm", loss="margin", cost=3, good_at="-")
    assert torch.isinf(attack.run(problem)[1]).all()


def test_parameters_gather_no_gradient_and_stay_trainable() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10)).eval()
    problem = make_problem()
    labels = model(problem.images).argmax(dim=1)
    foolbox.attacks.L2PGD(steps=1)(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), problem.images, labels,
                                   epsilons=0.1)
    assert model[1].weight.grad is not None
    model.zero_grad(set_to_none=True)
    sweep(model, problem.images, labels, [0.01, 0.1])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_training_mode_and_device_are_not_left_to_foolbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert str(foolbox.models.pytorch.get_device(None)) == "cuda:0"
    assert foolbox_model(make_problem()).device == torch.device("cpu")


def test_pgd_keeps_its_best_iterate() -> None:
    """Class 1 is a thin shell around grey, which a long step crosses: the last iterate is outside of it."""

    def shell(images: Tensor) -> Tensor:
        value = images.flatten(1)[:, 0]
        return torch.stack([torch.zeros_like(value), 0.01 - (value - 0.6).abs()], dim=1)

    problem = make_problem(shell, epsilon=0.3, count=4)
    problem.images.fill_(0.5)
    problem.images[:, 0, 0, 0] = 0.525  # the shell is 0.59 to 0.61, the steps are 0.08: in, out, in, out
    problem.images[3, 0, 0, 0] = 0.1  # out of reach: the others are not the whole batch
    problem.labels.fill_(0)
    options: dict[str, Any] = {"steps": 4, "rel_stepsize": 0.08 / 0.3, "decay": False}

    class Margin(foolbox.attacks.L2ProjectedGradientDescentAttack):
        def get_loss_fn(self, model: Any, labels: Any) -> Any:
            return lambda inputs: (model(inputs)[:, 1] - model(inputs)[:, 0]).sum()

    last = Margin(steps=4, rel_stepsize=0.08 / 0.3, random_start=False)
    raw = last.run(plain(problem), problem.images, criterion(problem), epsilon=0.3)
    ours = FoolboxAttack("best", lambda problem: _BestIteratePGD(**options), kind="fixed-epsilon", loss="margin",
                         cost=5, good_at="-", rescale=False)
    assert (shell(raw).argmax(dim=1) == 0).all()  # it was there, and left
    norms = ours.run(problem)[1]
    assert torch.isfinite(norms).tolist() == [True, True, True, False]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_margin_and_rescaled_attacks_do_not_depend_on_the_unit_of_the_logits(scale: float) -> None:
    problem = make_problem(lambda images: scale * linear(images))
    truth = exact(problem.images, problem.labels)
    ratio = ATTACKS["ddn"].run(problem)[1] / truth
    assert ratio.median() < 1.01
    raw = foolbox.attacks.DDNAttack(steps=40).run(plain(problem), problem.images, criterion(problem))
    unscaled = (raw - problem.images).flatten(1).norm(dim=1) / truth
    if scale != 1.0:
        assert not (unscaled.median() < 1.01)


def test_fmn_projects() -> None:
    problem = make_problem()
    truth = exact(problem.images, problem.labels)
    raw = foolbox.attacks.L2FMNAttack(steps=100).run(plain(problem), problem.images, criterion(problem))
    assert ((raw - problem.images).flatten(1).norm(dim=1) / truth).median() > 1.5
    attack = FoolboxAttack("fmn-short", lambda problem: _ProjectedFMN(steps=100), kind="minimum-norm", loss="margin",
                           cost=100, good_at="-", shrinks=False)
    norms = attack.run(problem)[1]
    assert (norms / truth).median() < 1.01


def test_dead_gradients_are_revived_image_by_image() -> None:
    """DDN replaces a zero gradient by noise drawn for the whole batch: an image's result depends on its neighbours."""

    def masked(images: Tensor) -> Tensor:
        return linear((images * 20).round() / 20)

    def norms_of(rows: slice, attack: Any) -> Tensor:
        whole = make_problem(masked)
        part = Problem(
            model=whole.model, images=whole.images[rows], labels=whole.labels[rows], logits=whole.logits[rows],
            indices=whole.indices[rows], best=whole.best[rows], best_norm=whole.best_norm[rows], epsilon=None,
        )
        return attack(part)

    def raw(problem: Problem) -> Tensor:
        torch.manual_seed(0)
        found = foolbox.attacks.DDNAttack(steps=20).run(plain(problem), problem.images, criterion(problem))
        return (found - problem.images).flatten(1).norm(dim=1)

    assert not torch.allclose(norms_of(slice(0, 60), raw)[30:], norms_of(slice(30, 60), raw))
    ours = lambda problem: ATTACKS["ddn"].run(problem)[1]  # noqa: E731
    torch.testing.assert_close(norms_of(slice(0, 60), ours)[30:], norms_of(slice(30, 60), ours))


def test_the_random_start_is_foolbox_s_distribution_and_each_image_s_own() -> None:
    problem = make_problem(epsilon=0.25, count=400)
    ours = uniform_ball(problem).flatten(1)
    size = ours.shape[1]
    assert (ours.norm(dim=1) <= 1).all()
    torch.testing.assert_close((ours.norm(dim=1) ** size).mean(), torch.tensor(0.5), atol=0.06, rtol=0)  # uniform ball
    torch.testing.assert_close(ours.mean(dim=0), torch.zeros(size), atol=0.03, rtol=0)
    again = PublishedPGD(problem, steps=10)
    assert again.rel_stepsize == foolbox.attacks.L2PGD().rel_stepsize == 0.025
    assert again.random_start
    assert again.steps == 10
    assert len({tuple(torch.randn(2, generator=generator(s, i, e)).tolist())
                for s in (0, 1) for i in (0, 7) for e in (0.1, 0.2)}) == 8


def test_the_published_pgd_is_foolbox_s_step_for_step() -> None:
    """From the same start foolbox's own class gives the same image."""
    problem = make_problem(epsilon=0.1)
    start = uniform_ball(problem)

    class Same(foolbox.attacks.L2ProjectedGradientDescentAttack):
        def get_random_start(self, x0: Any, epsilon: float) -> Any:
            return x0 + epsilon * type(x0)(start)

    expected = Same(steps=10).run(plain(problem), problem.images, criterion(problem), epsilon=0.1)
    (ours,) = ATTACKS["l2pgd"].propose(problem)
    torch.testing.assert_close(ours, expected)


def test_the_caller_s_random_state_is_left_alone() -> None:
    problem = make_problem()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    sweep(linear, problem.images, problem.labels, [0.01, 0.1], "standard,l2pgd")
    assert torch.equal(torch.get_rng_state(), state)


def test_cw_does_not_stop_an_image_because_of_its_neighbours() -> None:
    """With abort_early foolbox ends a search when the summed loss stalls; a huge neighbour decides the sum."""

    def two_scales(images: Tensor) -> Tensor:  # the first image's logits are a million times the others'
        return linear(images) * torch.where(images[:, 0, 0, 0] > 0.9, 1e6, 1.0)[:, None]

    whole = make_problem(two_scales, count=12)
    whole.images[0, 0, 0, 0] = 0.95
    logits = two_scales(whole.images).double()
    whole = replace(whole, logits=logits, labels=logits.argmax(dim=1))
    rest = Problem(
        model=whole.model, images=whole.images[1:], labels=whole.labels[1:], logits=logits[1:],
        indices=whole.indices[1:], best=whole.best[1:], best_norm=whole.best_norm[1:],
    )
    shared = {"binary_search_steps": 2, "steps": 60, "stepsize": 0.01, "initial_const": 0.01}

    def raw(problem: Problem, abort_early: bool) -> Tensor:
        attack = foolbox.attacks.L2CarliniWagnerAttack(abort_early=abort_early, **shared)
        return attack.run(plain(problem), problem.images, criterion(problem))

    assert not torch.allclose(raw(whole, True)[1:], raw(rest, True), atol=1e-4)
    assert torch.allclose(raw(whole, False)[1:], raw(rest, False), atol=1e-4)
    built: Any = ATTACKS["cw"]
    assert built.make(rest).abort_early is False


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_every_attack_finds_most_of_a_linear_model_s_adversarials(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "square":
        pytest.skip("these images are smaller than 5 x 5 pixels: tests/attacks/test_autoattack.py")
    if ATTACKS[name].missing():
        pytest.skip(ATTACKS[name].missing())
    if name == "fab-t":  # a hundred steps towards nine classes take long
        monkeypatch.setattr(ATTACKS[name], "steps", 20)
    problem = make_problem()
    truth = exact(problem.images, problem.labels)
    result = sweep(linear, problem.images, problem.labels, [float(truth.quantile(0.9)) * 6], name)
    norms = result.samples["adversarial_norm"].to_numpy()
    assert np.isfinite(norms).mean() > 0.8
    assert (norms >= truth.numpy() * (1 - 1e-4)).all()
