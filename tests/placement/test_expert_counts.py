"""Counts fade and refuse what cannot be a count."""

from __future__ import annotations

import math
from typing import Any

import pytest

from slipstream.placement.expert_counts import DecayedCounts, count_together


def test_a_step_weighs_half_after_the_half_life() -> None:
    counts = DecayedCounts(1, 2, half_life_steps=3)
    counts.observe([[8, 0]])
    for _ in range(3):
        counts.observe([[0, 0]])
    assert counts.counts[0] == pytest.approx((4, 0))
    counts.observe([[0, 5]], steps=3)
    assert counts.counts[0] == pytest.approx((2, 5))
    assert counts.steps == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"counts": [[1, 2]]}, "counts must be 2 rows of 2"),
        ({"counts": [[1, 2], [3]]}, "counts must be 2 rows of 2"),
        ({"counts": [[1, 2], [3, -1]]}, "counts must be finite and not negative"),
        ({"counts": [[1, 2], [3, math.nan]]}, "counts must be finite and not negative"),
        ({"counts": [[1, 2], [3, math.inf]]}, "counts must be finite and not negative"),
        ({"counts": [[1, 2], [3, 4]], "steps": 0}, "steps must be at least 1, got 0"),
    ],
)
def test_what_is_no_count_is_refused_and_leaves_nothing(arguments: dict[str, Any], message: str) -> None:
    counts = DecayedCounts(2, 2, half_life_steps=10)
    with pytest.raises(ValueError, match=message):
        counts.observe(**arguments)
    assert counts.counts == ((0.0, 0.0), (0.0, 0.0))
    assert counts.steps == 0


def test_tables_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        DecayedCounts(0, 1, half_life_steps=1)
    with pytest.raises(ValueError, match="half_life_steps must be positive, got 0"):
        DecayedCounts(1, 1, half_life_steps=0)


def test_pairs_are_counted_both_ways() -> None:
    assert count_together([(0, 1, 2), (1, 2), (2,)], 3) == [[0, 1, 1], [1, 0, 2], [1, 2, 0]]
    with pytest.raises(ValueError, match="choices must be among 3 experts"):
        count_together([(0, 3)], 3)
