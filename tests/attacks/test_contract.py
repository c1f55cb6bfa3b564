"""An attack can miss an adversarial; whatever it proposes, it cannot claim one."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import attacks
from attacks import ATTACKS, Attack, AttackInputError, Problem, Victim, register, sweep
from attacks.shrink import shrink
from attacks.victim import l2_norms, margins

EPSILON = 0.1


def threshold(images: Tensor) -> Tensor:
    """Two classes: class 1 where the first pixel is above 0.55. The exact distance from a grey image is 0.05."""
    return torch.stack([torch.full((len(images),), 0.55, dtype=images.dtype), images[:, 0, 0, 0]], dim=1)


def problem(epsilon: float | None = EPSILON, count: int = 3, model=threshold) -> Problem:
    images = torch.full((count, 1, 4, 4), 0.5)
    victim = Victim(model)
    return Problem(
        model=victim, images=images, labels=torch.zeros(count, dtype=torch.int64), logits=victim(images).double(),
        indices=torch.arange(count), best=images.clone(), best_norm=torch.full((count,), torch.inf).double(),
        epsilon=epsilon,
    )


class Proposes(Attack):
    """An attack that proposes what the test says."""

    name, kind, loss, cost, good_at = "proposes", "fixed-epsilon", "none", 0, "tests"

    def __init__(self, *proposals: Tensor) -> None:
        self.proposals = proposals

    def propose(self, problem: Problem) -> Sequence[Tensor]:
        return self.proposals


def moved(size: float, count: int = 3) -> Tensor:
    images = torch.full((count, 1, 4, 4), 0.5)
    images[:, 0, 0, 0] += size
    return images


def test_a_true_adversarial_counts_and_is_shrunk_to_the_boundary() -> None:
    images, norms = Proposes(moved(0.09)).run(problem())
    assert ((norms >= 0.05) & (norms <= 0.0505)).all()
    assert torch.equal(norms, l2_norms(images - 0.5))
    assert (threshold(images).argmax(dim=1) == 1).all()


@pytest.mark.parametrize("epsilon", [0.06, 1 / 3, 0.1, 1e-1 + 1e-9])
def test_what_lies_outside_of_the_ball_or_the_box_is_pulled_back_strictly(epsilon: float) -> None:
    attack = Proposes(moved(5.0))
    attack.shrinks = False
    images, norms = attack.run(problem(epsilon))
    assert (norms <= epsilon).all()
    assert (norms > 0.999 * epsilon).all()
    assert (l2_norms(images - 0.5) <= epsilon).all()
    assert images.min() >= 0
    assert images.max() <= 1


def test_a_minimum_norm_proposal_is_clipped_to_the_box() -> None:
    attack = Proposes(moved(5.0))
    attack.shrinks = False
    images, norms = attack.run(problem(None))
    assert images.max() == 1
    torch.testing.assert_close(norms, torch.full((3,), 0.5).double())


def test_random_far_proposals_never_leave_the_ball_by_rounding() -> None:
    torch.manual_seed(0)
    clean = torch.rand(200, 3, 8, 8)
    for epsilon in (1e-3, 0.01, 36 / 255, 0.5):
        inside = Attack._admit(clean + torch.randn(200, 3, 8, 8), clean, epsilon)
        assert (l2_norms(inside - clean) <= epsilon).all()
        assert inside.min() >= 0
        assert inside.max() <= 1


@pytest.mark.parametrize(
    "proposal",
    [
        moved(0.0),
        moved(0.04),
        moved(-0.09),
        torch.full((3, 1, 4, 4), torch.nan),
        torch.full((3, 1, 4, 4), torch.inf),
        moved(0.09).index_fill(2, torch.tensor([3]), torch.nan),
    ],
    ids=["clean", "too little", "wrong way", "nan", "inf", "one row nan"],
)
@pytest.mark.parametrize("epsilon", [EPSILON, None])
def test_what_is_no_adversarial_is_never_counted(proposal: Tensor, epsilon: float | None) -> None:
    images, norms = Proposes(proposal).run(problem(epsilon))
    assert torch.isinf(norms).all()
    assert torch.equal(images, torch.full((3, 1, 4, 4), 0.5))


def test_out_of_the_ball_only_is_not_counted() -> None:
    assert torch.isinf(Proposes(moved(0.4)).run(problem(0.04))[1]).all()


def test_a_tie_is_not_a_success() -> None:
    attack = Proposes(moved(0.05))
    assert torch.isinf(attack.run(problem(model=lambda x: threshold(x).clamp_max(0.55)))[1]).all()


def test_the_smallest_of_several_proposals_and_of_what_was_known_is_kept() -> None:
    attack = Proposes(moved(0.08), moved(0.06), moved(0.07))
    attack.shrinks = False
    norms = attack.run(problem())[1]
    torch.testing.assert_close(norms, torch.full((3,), 0.06).double(), rtol=1e-5, atol=0)
    known = problem()
    known.best_norm.fill_(0.055)
    known.best[:] = moved(0.055)
    images, norms = attack.run(known)
    assert (norms == 0.055).all()
    assert torch.equal(images, moved(0.055))


def test_an_attack_that_scribbles_on_its_input_claims_nothing() -> None:
    class Scribbler(Proposes):
        def propose(self, problem: Problem) -> Tensor:
            problem.images.add_(0.2)
            problem.best.add_(0.2)
            return problem.images + 0.05

    given = problem()
    images, norms = Scribbler().run(given)
    assert torch.isinf(norms).all()  # + 0.25 everywhere, pulled into the ball, is + 0.025: no adversarial
    assert (images == 0.5).all()


def test_nan_logits_are_an_error_and_never_a_success() -> None:
    def nan_when_moved(images: Tensor) -> Tensor:
        return torch.where((images == 0.5).flatten(1).all(dim=1)[:, None], threshold(images), torch.nan)

    with pytest.raises(AttackInputError, match="NaN"):
        Proposes(moved(0.09)).run(problem(model=nan_when_moved))


def test_another_shape_is_a_programming_error() -> None:
    with pytest.raises(TypeError, match="shape"):
        Proposes(torch.rand(3, 1, 2, 2)).run(problem())


def test_shrink_ends_at_a_verified_point_close_behind_a_curved_boundary() -> None:
    """Class 1 outside of the ball of radius r around grey: the exact distance is r in every direction."""
    torch.manual_seed(0)
    clean = torch.full((20, 1, 4, 4), 0.5)
    direction = torch.randn(20, 1, 4, 4)
    found = clean + 0.45 * direction / l2_norms(direction)[:, None, None, None].float()
    labels = torch.zeros(20, dtype=torch.int64)
    for radius in (0.05, 0.1, 0.2, 0.3, 0.44):

        def curved(images: Tensor, radius: float = radius) -> Tensor:
            size = (images - 0.5).flatten(1).norm(dim=1)
            return torch.stack([torch.zeros_like(size), size**3 - radius**3], dim=1)

        start, end = margins(curved(clean).double(), labels), margins(curved(found).double(), labels)
        images, norms = shrink(Victim(curved), clean, found, labels, start, end, rounds=12)
        assert (margins(curved(images), labels) < 0).all()
        assert (norms / radius).max() < 1.01
        assert (norms / radius).min() >= 1.0 - 1e-6


def test_users_add_an_attack_in_a_few_lines() -> None:
    @register
    class Blackout(Attack):
        name, kind, loss, cost = "blackout", "minimum-norm", "none", 0
        good_at = "networks afraid of the dark"

        def propose(self, problem: Problem) -> Tensor:
            return torch.zeros_like(problem.images)

    try:
        assert "blackout" in [row["name"] for row in attacks.describe()]
        grey = torch.full((2, 1, 1, 1), 0.6)
        result = sweep(threshold, grey, torch.tensor([1, 0]), [1.0], "blackout")
        assert result.samples["attack"].tolist() == ["blackout", "clean"]
        assert 0.05 < result.samples["adversarial_norm"][0] < 0.0505
        with pytest.raises(AttackInputError, match="taken"):
            register(Blackout)
    finally:
        ATTACKS.pop("blackout")


def test_a_wrong_declaration_is_refused() -> None:
    attack = Proposes()
    attack.name, attack.kind = "odd", "sometimes"  # type: ignore[assignment]
    with pytest.raises(AttackInputError, match="kind"):
        register(attack)
    del attack.kind
    attack.name, attack.cost = "odd", "cheap"  # type: ignore[assignment]
    with pytest.raises(AttackInputError, match="cost"):
        register(attack)


def test_expected_passes_are_what_a_sample_can_cost_at_most() -> None:
    def linear(images: Tensor) -> Tensor:
        calls.append(len(images))
        return images.flatten(1)[:, :4] @ (torch.eye(4) + 0.3 * torch.eye(4).roll(1, 0))

    images = 0.4 + 0.2 * torch.rand(10, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    calls: list[int] = []
    for eight_bit in (False, True):
        if eight_bit:
            images = (images * 255).round() / 255
        labels = linear(images).argmax(dim=1)
        for names in ("standard", "paper", "fmn", "margin-pgd-long", "ddn,targeted-pgd"):
            for grid in ([0.0, 1e-4, 2e-4], [0.0, 0.01, 0.02, 0.05]):
                calls.clear()
                result = sweep(linear, images, labels, grid, names, eight_bit=eight_bit)
                bound = attacks.expected_passes(names, grid, eight_bit=eight_bit)
                assert sum(calls) == sum(result.forward_passes.values())
                assert sum(calls) <= 10 * bound, names
                if grid[1] == 1e-4 and names == "paper":
                    assert sum(calls) > 0.9 * 10 * bound
    assert attacks.expected_passes("ddn", [0.0, 0.1]) == attacks.expected_passes("ddn", [0.1, 0.2])
    one, two = (attacks.expected_passes("margin-pgd", grid) for grid in ([0.1], [0.1, 0.2]))
    assert two - 1 == 2 * (one - 1)
    for wrong in ("nothing", ""):
        with pytest.raises(AttackInputError):
            attacks.expected_passes(wrong, [0.1])
    with pytest.raises(AttackInputError, match="more than once"):
        attacks.expected_passes("ddn", [0.1, 0.1])


def test_frozen_restores_the_parameters_even_after_an_error() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.Linear(2, 2)).eval()
    model[2].weight.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]

    def fails() -> None:
        with Victim(model).frozen():
            assert not any(p.requires_grad for p in model.parameters())
            raise RuntimeError("from inside")

    with pytest.raises(RuntimeError, match="from inside"):
        fails()
    assert [p.requires_grad for p in model.parameters()] == before


def test_attacks_never_imports_robustflow() -> None:
    files = list(Path(attacks.__file__).parent.rglob("*.py"))
    assert len(files) > 5
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [str(node.value)] if isinstance(node, ast.Constant) and isinstance(node.value, str) and (
                "import_module" in file.read_text()) else []
            assert not any(name.split(".")[0] == "robustflow" for name in names), file
