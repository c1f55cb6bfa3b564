"""robustflow: classifiers whose robustness is proved, attacked and compared on the same images.

An image's way through the package, which is also the order of its imports:

data → (operators → fields → steps → regimes → networks) → training → checkpoints
     → (norms → bounds → certificates) and the package `attacks`, which meet in evaluation
     → results → summary → tables, plots, report

`robustflow.config` is what a run depends on, `robustflow.bench` the stages of a run, `robustflow.cli` the command line.
"""

from robustflow.bounds import account
from robustflow.certificates import Certificate, certify
from robustflow.errors import UserError
from robustflow.networks import Classifier, create_model, list_models

__version__ = "0.1.0"

__all__ = ["Certificate", "Classifier", "UserError", "account", "certify", "create_model", "list_models"]
