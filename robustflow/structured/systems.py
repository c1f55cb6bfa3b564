"""What a system is: an equation with its data, its networks, what is measured of them and what is drawn.

A system only proposes; the training, the files, the tables and the report are the same for all (`task`, `bench`,
`summary`, `report`), and none of those knows a system by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from matplotlib.figure import Figure
from pydantic import ValidationError
from torch import Tensor, nn

from robustflow.errors import UserError
from robustflow.strict import Strict, first_line

Split = Literal["train", "validation", "test"]
Options = TypeVar("Options", bound=Strict)


@dataclass(frozen=True)
class Data:
    """Examples of a system: a start and what follows it.

    Shape:
        inputs: (N, *state).
        targets: (N, K, *out), the K successive states after each input; K = 1 is a map or a regression.
    """

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        assert len(self.inputs) == len(self.targets), "as many starts as sequences"

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class Measured:
    """One trained model, measured.

    ``figures`` is what tables compare, under names with units; ``series`` is what plots need, below 300 kB a model.
    A figure that could not be had (a solution that blew up) may be inf or NaN.
    """

    figures: Mapping[str, float]
    series: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Reference:
    """A value to stand beside ours: ``figure`` as in `Measured.figures`, and who says so.

    ``text`` says what was measured there, where it is not the same thing; ``model`` is the one of our models that it
    is to be compared with, where it is not one for all.
    """

    figure: str
    value: float
    source: str
    text: str = ""
    model: str | None = None


class Drawing(NamedTuple):
    """A plot: the stem of its file, the caption in the report, the figure (drawn in `robustflow.style.house_style`)."""

    file: str
    caption: str
    figure: Figure


class NoOptions(Strict):
    """The data options of a system that has none."""


class System:
    """One problem. Subclasses give the attributes and all methods but `prepared` and `draw`, which may stay.

    name: how configs call it. title: a heading. equations: one line. property: what the structured model keeps, as it
    is to be read after "keeps". step: δt of one application of a model, 0 for a regression. options: what [data] of a
    config may say besides the numbers of examples. headlines: (figure, model) for a page over several systems. defect:
    the figure that is 0 where the property is kept, and the models that keep it, for the same page.
    """

    name: str
    title: str
    equations: str
    property: str
    step: float = 0.0
    references: tuple[Reference, ...] = ()
    options: type[Strict] = NoOptions
    headlines: tuple[tuple[str, str], ...] = ()
    defect: tuple[str, tuple[str, ...]] | None = None

    def data(self, split: Split, seed: int, size: int, options: Mapping[str, Any]) -> Data:
        """``size`` examples of a split, the same for the same arguments; "test" is the same for every seed.

        ``options`` are the checked values of `options`, all keys there: ``self.options(**options)`` is typed.
        """
        raise NotImplementedError

    def build(self, network: Mapping[str, Any], data: Data) -> nn.Module:
        """An untrained model for training data: state → state after one step (or input → output of a regression).

        It is called after the seed was set, and may choose what depends on data (a scale) from ``data``, which is never
        the test split; what is chosen so has to be in the state_dict. Every module of the model with a method
        ``constrain_(exact: bool = False)`` has it called after every step of the training, and once with ``exact=True``
        at its end. It is called with the dtype of the training as torch's default.

        Raises:
            UserError: unknown options, or a field with a method that does not keep its property.
        """
        raise NotImplementedError

    def prepared(self) -> dict[str, nn.Module]:
        """Models that need no training (an exact representation by hand), measured beside the trained ones.

        It is called with float64 as torch's default.
        """
        return {}

    def measure(self, model: nn.Module, test: Data) -> Measured:
        """Everything that is reported of a model, in float64; the model comes in float64 and evaluation mode."""
        raise NotImplementedError

    def draw(self, measured: Mapping[str, Sequence[Measured]]) -> list[Drawing]:
        """The system's plots: model → one `Measured` a seed (one in all for a prepared model), in the config's order.

        ``series`` come back as they were stored. The same arguments give the same bytes: no dates, no random numbers.
        """
        return []


def checked(kind: type[Options], raw: Mapping[str, Any], where: str) -> Options:
    """Options of plain data as a typed object.

    Raises:
        UserError: an unknown key or a wrong value, in one line that begins with ``where``.

    >>> checked(NoOptions, {"grid": 3}, "heat network")
    Traceback (most recent call last):
    robustflow.errors.UserError: heat network: unknown key 'grid'
    """
    try:  # as JSON: a list may stand for a tuple, as TOML writes it
        return kind.model_validate_json(json.dumps(dict(raw), default=str))
    except ValidationError as error:
        raise UserError(f"{where}: {first_line(error)}") from None
