"""The attacks that come with the package, and the sets they are used in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attacks.autoattack import PARTS
from attacks.contract import ATTACKS, Attack
from attacks.decision import HopSkipJump
from attacks.foolbox_attacks import (
    FoolboxAttack,
    MarginPGD,
    PublishedPGD,
    TargetedPGD,
    _ProjectedFMN,
    ddn,
    foolbox,  # from there, because importing foolbox needs care
)
from attacks.inputs import check_epsilons
from attacks.victim import AttackInputError

BUILT_IN: tuple[Attack, ...] = (
    FoolboxAttack(
        "l2pgd", lambda problem: PublishedPGD(problem, steps=10), kind="fixed-epsilon", loss="cross-entropy", cost=10,
        good_at="repeating published numbers; weak on flat and on saturated logits", rescale=False, shrinks=False,
        softmax=True,
    ),
    FoolboxAttack(
        "deepfool", lambda problem: foolbox.attacks.L2DeepFoolAttack(steps=6, candidates=4, overshoot=0.01),
        kind="minimum-norm", loss="linearised margins", cost=19, good_at="nearly linear networks, at the lowest cost",
    ),
    FoolboxAttack(
        "ddn", lambda problem: ddn(problem, steps=40, gamma=0.05), kind="minimum-norm", loss="rescaled cross-entropy",
        cost=40, good_at="small norms on any differentiable network",
    ),
    MarginPGD("margin-pgd", steps=15, rel_stepsize=0.5),
    TargetedPGD("targeted-pgd", steps=10, rel_stepsize=0.5, targets=3),
    FoolboxAttack(
        "deepfool-long", lambda problem: foolbox.attacks.L2DeepFoolAttack(steps=50, candidates=10, overshoot=0.02),
        kind="minimum-norm", loss="linearised margins", cost=451, good_at="nearly linear networks, many near classes",
    ),
    FoolboxAttack(
        "ddn-long", lambda problem: ddn(problem, steps=200, gamma=0.05), kind="minimum-norm",
        loss="rescaled cross-entropy", cost=200, good_at="the smallest norms",
    ),
    FoolboxAttack(
        "fmn", lambda problem: _ProjectedFMN(steps=200), kind="minimum-norm", loss="margin", cost=200,
        good_at="a second opinion on minimum norms, from another path",
    ),
    FoolboxAttack(
        "cw", lambda problem: foolbox.attacks.L2CarliniWagnerAttack(binary_search_steps=6, steps=100, stepsize=0.01,
                                                                 initial_const=0.01, abort_early=False),
        kind="minimum-norm", loss="margin and squared norm", cost=600, good_at="a slow, thorough second opinion",
    ),
    MarginPGD("margin-pgd-long", steps=100, rel_stepsize=0.5, restarts=3),
    TargetedPGD("targeted-pgd-long", steps=50, rel_stepsize=0.5, targets=9),
    *PARTS,
    HopSkipJump("hopskipjump", budget=1500),
)
for built_in in BUILT_IN:  # not register(): importing this file twice, as doctest does, is no clash of names
    ATTACKS.setdefault(built_in.name, built_in)


@dataclass(frozen=True)
class AttackSet:
    """Attacks in order. ``reach``: a fixed-epsilon attack is tried on an image at epsilon only where no adversarial
    is known or the smallest known one is at most ``reach`` times epsilon away. Like everything an image's verdict
    depends on, it looks at that image alone."""

    name: str
    attacks: tuple[str, ...]
    good_at: str
    reach: float = float("inf")


STANDARD = ("deepfool", "ddn", "margin-pgd", "targeted-pgd")
SETS: dict[str, AttackSet] = {
    entry.name: entry
    for entry in (
        AttackSet("paper", ("l2pgd",), "the published protocol: foolbox L2PGD, 10 steps, at every epsilon"),
        AttackSet("standard", STANDARD,
                  "the default: right on flat, on saturated and on ordinary logits", reach=1.5),
        AttackSet("strong", ("deepfool-long", "ddn-long", "fmn", "cw", "margin-pgd-long", "targeted-pgd-long"),
                  "more steps, restarts and methods, at about 30 times the cost of standard"),
        AttackSet("autoattack", tuple(part.name for part in PARTS),
                  "the accepted standard, for numbers to compare with others'; an optional extra"),
        AttackSet("check", (*STANDARD, "hopskipjump"),
                  "standard, then an attack without gradients on what it left: a warning if gradients are masked",
                  reach=1.5),
    )
}


def resolve(spec: str) -> tuple[list[Attack], float]:
    """The attacks of a set, of one attack's name, or of a comma list of both, and the reach to use.

    Errors: AttackInputError naming what exists if a name is unknown or the list is empty, or the command that
    installs what an attack needs.

    >>> [attack.name for attack in resolve("standard")[0]]
    ['deepfool', 'ddn', 'margin-pgd', 'targeted-pgd']
    """
    if not isinstance(spec, str) or not spec.strip():
        raise AttackInputError(f"attacks must be a set or a comma list of names, got {spec!r}; {_existing()}")
    names: list[str] = []
    for part in (part.strip() for part in spec.split(",")):
        if part not in SETS and part not in ATTACKS:
            raise AttackInputError(f"unknown attack {part!r}; {_existing()}")
        names += SETS[part].attacks if part in SETS else (part,)
    reach = SETS[spec.strip()].reach if spec.strip() in SETS else float("inf")
    chosen = [ATTACKS[name] for name in dict.fromkeys(names)]
    for attack in chosen:
        if attack.missing():
            raise AttackInputError(f"attack {attack.name} is not installed: {attack.missing()}")
    return chosen, reach


def expected_passes(attacks: str, epsilons: Sequence[float], *, eight_bit: bool = False) -> int:
    """Forward passes a sample at most, of a sweep with these attacks over these radii, as the attacks declare them.

    Minimum-norm attacks once, fixed-epsilon attacks at every positive radius, verification and the clean pass
    included. Most images cost less: what is decided is left out, and attacks stop where they succeed.
    Errors: AttackInputError as in :func:`resolve`, and for radii that are not an increasing list.

    >>> expected_passes("l2pgd", [0.0, 0.1, 0.2])
    23
    """
    chosen, _ = resolve(attacks)
    radii = int((check_epsilons(epsilons) > 0).sum())
    runs = [attack.passes(eight_bit) * (radii if attack.kind == "fixed-epsilon" else 1) for attack in chosen]
    # Two passes for the clean image: its prediction, and its gradient where a gradient-free attack is to be compared.
    return sum(runs) + 1 + int(any(attack.gradient_free for attack in chosen))


def _existing() -> str:
    return f"sets: {', '.join(SETS)}; attacks: {', '.join(ATTACKS)}"


def describe() -> list[dict[str, str | int]]:
    """One row an attack: name, kind, loss, cost (forward passes a sample; fixed-epsilon: at each epsilon), good_at,
    the sets that use it, and the command that installs what it needs where that is missing."""
    return [
        {
            "name": attack.name, "kind": attack.kind, "loss": attack.loss, "cost": attack.cost,
            "good_at": attack.good_at, "sets": ", ".join(s.name for s in SETS.values() if attack.name in s.attacks),
            "needs": attack.missing(),
        }
        for attack in ATTACKS.values()
    ]
