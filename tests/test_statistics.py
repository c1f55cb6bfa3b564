from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustflow.errors import UserError
from robustflow.statistics import Z95, Rate, paired_difference


def wilson(k: int, n: int) -> tuple[float, float]:
    """Wilson's closed form, written out a second time."""
    p, z = k / n, Z95
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return middle - reach, middle + reach


# Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3 (score without continuity correction).
@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_interval_is_the_published_one(k: int, n: int, low: float, high: float) -> None:
    rate = Rate(k, n)
    assert (round(rate.low, 4), round(rate.high, 4)) == (low, high)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@settings(deadline=None)
def test_interval_is_the_closed_form_and_holds_the_rate(counts: tuple[int, int]) -> None:
    rate = Rate(*counts)
    assert (rate.low, rate.high) == pytest.approx(wilson(*counts), abs=1e-9)
    assert 0.0 <= rate.low <= rate.value <= rate.high <= 1.0
    assert rate.low < rate.high


def test_ends_are_exact_and_not_of_zero_width() -> None:
    assert Rate(0, 50).low == 0.0
    assert Rate(0, 50).high > 0.05
    assert Rate(50, 50).high == 1.0
    assert Rate(50, 50).low < 0.95


@pytest.mark.parametrize(("k", "n"), [(0, 0), (-1, 10), (11, 10)])
def test_impossible_counts_are_refused(k: int, n: int) -> None:
    with pytest.raises(UserError):
        Rate(k, n)


def answers(both: int, only_a: int, only_b: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    a = [True] * both + [True] * only_a + [False] * only_b + [False] * neither
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return np.array(a), np.array(b)


def test_mcnemar_p_is_the_binomial_tail() -> None:
    result = paired_difference(*answers(40, 9, 2, 49))
    tail = sum(math.comb(11, i) for i in range(3)) / 2**11
    assert result.p_value == pytest.approx(2 * tail)
    assert (result.only_a, result.only_b, result.n) == (9, 2, 100)
    assert result.difference == pytest.approx(0.07)
    # Agresti and Min's interval by hand: 9.5 and 2.5 of 102.
    spread = Z95 * math.sqrt(12 - 49 / 102) / 102
    assert (result.low, result.high) == pytest.approx((7 / 102 - spread, 7 / 102 + spread), abs=1e-9)


def test_equal_answers_show_no_difference() -> None:
    result = paired_difference(*answers(5, 0, 0, 5))
    assert (result.difference, result.p_value) == (0.0, 1.0)
    assert result.low < 0 < result.high


@given(st.tuples(*[st.integers(0, 30)] * 4).filter(sum))
@settings(deadline=None)
def test_swapping_the_models_turns_the_sign(cells: tuple[int, int, int, int]) -> None:
    a, b = answers(*cells)
    one, other = paired_difference(a, b), paired_difference(b, a)
    assert (one.difference, one.low, one.high) == (-other.difference, -other.high, -other.low)
    assert one.p_value == other.p_value
    assert -1 <= one.low <= one.difference <= one.high <= 1


def test_interval_covers_the_true_difference_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    cells = rng.multinomial(400, [0.5, 0.12, 0.08, 0.3], size=800)
    inside = [(r := paired_difference(*answers(*row))).low <= 0.04 <= r.high for row in cells]
    assert 0.93 <= float(np.mean(inside)) <= 0.97


def test_unpaired_answers_are_refused() -> None:
    with pytest.raises(UserError, match="same images"):
        paired_difference([True], [True, False])
    with pytest.raises(UserError, match="booleans"):
        paired_difference(np.array([1, 0]), np.array([1, 1]))
    with pytest.raises(UserError, match="at least one"):
        paired_difference(np.array([], dtype=bool), np.array([], dtype=bool))
