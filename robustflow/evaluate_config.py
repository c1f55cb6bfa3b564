"""What an experiment says about its evaluation: splits, numbers of images, radii, attacks."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from robustflow.strict import Strict


def _radius(value: Any) -> Any:
    """An ε may be written as a fraction of grey levels, "36/255"."""
    if isinstance(value, str):
        try:
            return float(Fraction(value.replace(" ", "")))
        except (ValueError, ZeroDivisionError, OverflowError):
            raise ValueError(f"a number or a fraction such as '36/255', not {value!r}") from None
    return value


Radius = Annotated[float, BeforeValidator(_radius), Field(ge=0, allow_inf_nan=False)]


def _counts(value: Any) -> Any:
    """Refused here and not by the types, whose message would be about one half of the union."""
    counts = value.values() if isinstance(value, dict) else [] if value is None else [value]
    if any(isinstance(count, bool) or not isinstance(count, int) or count < 1 for count in counts):
        raise ValueError("a whole number of images, at least 1, or one for each split: { test = 200 }")
    return value


Images = Annotated[int | dict[str, int] | None, BeforeValidator(_counts)]
SplitName = Literal["validation", "test"]


class EvaluateConfig(Strict):
    """On which images a model is certified and attacked, and how. ``attacked``: of the splits; None, all of them.

    ``images``: the first so many of every split, or a number for each split that is not to be taken whole.
    """

    splits: tuple[SplitName, ...] = ("test",)
    attacked: tuple[SplitName, ...] | None = None
    images: Images = None
    epsilons: tuple[Radius, ...] = Field(min_length=1)
    attacks: tuple[str, ...] = Field(default=("standard",), min_length=1)
    batch_size: int = Field(250, ge=1)
    audit: bool = False
    eight_bit: bool = Field(False, description="only adversarials whose pixels are multiples of 1/255 count")
    examples: int = Field(8, ge=0)

    @field_validator("splits", "attacked", "epsilons", "attacks", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("images")
    @classmethod
    def _of_the_splits(cls, value: Images, info: ValidationInfo) -> Images:
        splits = info.data.get("splits")
        if splits is not None and isinstance(value, dict) and not set(value) <= set(splits):
            raise ValueError(f"a number for what is in splits, {', '.join(splits) or 'nothing'}, or one for all")
        return value

    def images_of(self, split: str) -> int | None:
        """How many of this split's images, from the first on; None: all of them."""
        return self.images.get(split) if isinstance(self.images, dict) else self.images

    @field_validator("attacked")
    @classmethod
    def _among_the_splits(cls, value: tuple[str, ...] | None, info: ValidationInfo) -> tuple[str, ...] | None:
        splits = info.data.get("splits")
        if splits is not None and not set(value or ()) <= set(splits):
            raise ValueError(f"only what is in splits, {', '.join(splits) or 'nothing'}, can be attacked")
        return value

    @field_validator("epsilons")
    @classmethod
    def _increasing(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(later <= earlier for earlier, later in pairwise(value)):
            raise ValueError("the radii must increase, without duplicates")
        return value

    @property
    def attacked_splits(self) -> tuple[str, ...]:
        """The splits that are certified and attacked, in the order of ``splits``; the others are certified only."""
        return tuple(split for split in self.splits if self.attacked is None or split in self.attacked)
