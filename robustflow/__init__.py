"""robustflow: classifiers whose robustness is proved, attacked and compared on the same images.

An image's way through the package, which is also the order of its imports:

data → (operators → fields → steps → regimes → networks) → training → checkpoints
     → (norms → bounds → certificates) and the package `attacks`, which meet in evaluation
     → results → summary → tables, plots, report

`evaluate` is the short way for a model of your own: certificate and attacks in one call (`robustflow.bracket`).
`robustflow.config` is what a run depends on, `robustflow.bench` the stages of a run, `robustflow.cli` the command line.
"""

from typing import TYPE_CHECKING, Any

from robustflow.bounds import account
from robustflow.certificates import Certificate, certify
from robustflow.errors import UserError
from robustflow.models import TrainedClassifier, list_trained, load_model
from robustflow.networks import Classifier, create_model, list_models

if TYPE_CHECKING:
    from robustflow.bracket import Bracket, evaluate

__version__ = "0.1.0"

__all__ = [
    "Bracket", "Certificate", "Classifier", "TrainedClassifier", "UserError",
    "account", "certify", "create_model", "evaluate", "list_models", "list_trained", "load_model",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # Only on demand: attacks bring foolbox with them, which building and certifying a network do not need.
    if name in ("Bracket", "evaluate"):
        from robustflow import bracket

        return getattr(bracket, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
