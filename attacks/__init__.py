"""L2 attacks on image classifiers under one contract; a model is a callable from images in [0, 1] to logits.

``sweep(model, images, labels, epsilons)`` is the way in; ``Attack`` and ``register`` add an attack; ``describe``
lists what there is. The package knows nothing of the networks it attacks.
"""

from attacks.contract import ATTACKS, Attack, Problem, register
from attacks.sets import SETS, AttackSet, describe, expected_passes, resolve
from attacks.shards import sharded_sweep
from attacks.sweep import SweepResult, sweep
from attacks.victim import AttackInputError, Victim

__all__ = [
    "ATTACKS", "SETS", "Attack", "AttackInputError", "AttackSet", "Problem", "SweepResult", "Victim", "describe",
    "expected_passes", "register", "resolve", "sharded_sweep", "sweep",
]
