"""Rates with their intervals: every percentage in a report is k of n, and says how far chance could move it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest
from statsmodels.stats.proportion import proportion_confint

from robustflow.errors import UserError

Z95 = 1.959963984540054  # the 97.5 % point of the normal distribution


@dataclass(frozen=True)
class Rate:
    """k of n images, with the 95 % Wilson score interval.

    The interval is every proportion p that a score test at 5 % does not reject:
    (k/n + z²/2n ± z √(k(n−k)/n³ + z²/4n²)) / (1 + z²/n), z = 1.96 (Wilson, JASA 22, 1927). Unlike ±1.96 standard errors
    it does not collapse at k = 0 or k = n, where robust accuracies often are.

    Raises UserError where n < 1 or k is not in 0..n.

    >>> rate = Rate(81, 263)
    >>> round(rate.value, 3), round(rate.low, 4), round(rate.high, 4)
    (0.308, 0.2553, 0.3662)
    >>> Rate(0, 10).low, round(Rate(0, 10).high, 4)
    (0.0, 0.2775)
    """

    k: int
    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UserError(f"a rate needs at least one image, got n = {self.n}")
        if not 0 <= self.k <= self.n:
            raise UserError(f"a rate counts 0 to n images, got k = {self.k} of n = {self.n}")

    @property
    def value(self) -> float:
        return self.k / self.n

    @property
    def low(self) -> float:
        return self._interval()[0]

    @property
    def high(self) -> float:
        return self._interval()[1]

    def _interval(self) -> tuple[float, float]:
        low, high = proportion_confint(self.k, self.n, alpha=0.05, method="wilson")
        # At the ends the interval reaches the end exactly; rounding errors would put it a hair inside. Ten decimals are
        # kept so that another build of the library gives the same bytes in summary.json.
        return (
            0.0 if self.k == 0 else round(float(low), 10),
            1.0 if self.k == self.n else round(float(high), 10),
        )

    def as_dict(self) -> dict[str, float | int]:
        low, high = self._interval()
        return {"k": self.k, "n": self.n, "value": self.value, "low": low, "high": high}


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of a minus accuracy of b on the same n images (see paired_difference)."""

    n: int
    only_a: int
    only_b: int
    difference: float
    low: float
    high: float
    p_value: float

    def as_dict(self) -> dict[str, float | int]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


Answers = Sequence[bool] | np.ndarray


def paired_difference(a_correct: Answers, b_correct: Answers) -> PairedDifference:
    """Compare two classifiers on the same images: difference of accuracies, its 95 % interval, McNemar's exact p-value.

    With only_a images that a alone gets right and only_b that b alone does, difference = (only_a − only_b)/n. Under "no
    difference" only_a is Binomial(only_a + only_b, ½), whose two-sided tail is the p-value (McNemar 1947, exact form).
    The interval adds half an image to each cell of the 2×2 table (Agresti and Min, Statistics in Medicine 24, 2005).

    a_correct, b_correct: (n,) booleans in the same order of images. Raises UserError where they are empty or differ in
    length.

    >>> paired_difference([True] * 8 + [False] * 2, [False] * 8 + [False] * 2).p_value
    0.0078125
    """
    a, b = np.asarray(a_correct), np.asarray(b_correct)
    if a.ndim != 1 or a.shape != b.shape:
        raise UserError(f"a paired comparison needs the same images for both, got shapes {a.shape} and {b.shape}")
    if a.dtype != bool or b.dtype != bool:
        raise UserError(f"a paired comparison takes booleans (correct or not), got {a.dtype} and {b.dtype}")
    if a.size == 0:
        raise UserError("a paired comparison needs at least one image, got none")
    n, only_a, only_b = a.size, int((a & ~b).sum()), int((b & ~a).sum())
    split = only_a + only_b
    p_value = float(binomtest(only_a, split, 0.5).pvalue) if split else 1.0
    centre = (only_a - only_b) / (n + 2)
    spread = Z95 * math.sqrt((split + 1) - (only_a - only_b) ** 2 / (n + 2)) / (n + 2)
    difference = (only_a - only_b) / n
    return PairedDifference(
        n=n,
        only_a=only_a,
        only_b=only_b,
        difference=difference,
        # The shift towards 0 must not push the observed difference itself out of its interval.
        low=round(max(-1.0, min(centre - spread, difference)), 10),
        high=round(min(1.0, max(centre + spread, difference)), 10),
        p_value=float(f"{min(p_value, 1.0):.10g}"),
    )
