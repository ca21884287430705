"""Rates of recent steps: what a prompt and a token take, whatever stands beside them."""

from __future__ import annotations

import numpy as np
import pytest

from slipstream.runtime.engine.rates import StepRates
from slipstream.runtime.messages import StepPlan


def plan(*counts: int) -> StepPlan:
    rows, none = len(counts), np.empty(0, dtype=np.int32)
    return StepPlan(
        step=1,
        admitted=(),
        slots=np.arange(rows, dtype=np.int32),
        sequence_ids=np.arange(rows, dtype=np.int64),
        starts=np.zeros(rows, dtype=np.int32),
        counts=np.array(counts, dtype=np.int32),
        samples=np.ones(rows, dtype=np.bool_),
        block_slots=none,
        block_indices=none,
        block_ids=none,
        copy_sources=none,
        copy_targets=none,
    )


def run(*steps: tuple[StepPlan, float]) -> StepRates:
    """Take in steps one after the other, with the time that each took."""
    rates, now_s = StepRates(), 100.0
    for each, spent_s in steps:
        rates.note(each, submitted_s=now_s, done_s=now_s + spent_s)
        now_s += spent_s
    return rates


def test_nothing_is_said_before_anything_was_measured() -> None:
    rates = StepRates()
    assert rates.prefill_tokens_per_s == 0.0 and rates.token_s == 0.0
    assert run((plan(1, 1), 0.01)).prefill_tokens_per_s == 0.0
    assert run((plan(100), 0.01)).token_s == 0.0


def test_prompts_and_decodes_are_measured_each_by_its_steps() -> None:
    rates = run((plan(1000), 0.5), (plan(1, 1, 1), 0.02), (plan(1, 999, 1), 0.5))
    assert rates.prefill_tokens_per_s == pytest.approx(2000, rel=0.01)
    assert rates.token_s == pytest.approx(0.26, rel=0.02)


def test_short_prompts_say_little_about_long_ones() -> None:
    # A step reads all weights, however few its tokens.
    short = [(plan(10), 0.05)] * 50
    assert run((plan(2000), 1.0), *short).prefill_tokens_per_s == pytest.approx(2000, rel=0.02)
    assert run(*short).prefill_tokens_per_s == pytest.approx(200, rel=0.01)


def test_what_is_recent_counts() -> None:
    rates = run(*[(plan(1024, 1), 1.0)] * 40, *[(plan(1024, 1), 0.5)] * 80)
    assert rates.prefill_tokens_per_s == pytest.approx(2048, rel=0.02)
    assert rates.token_s == pytest.approx(0.5, rel=0.1)


def test_steps_side_by_side_count_once_and_pauses_never() -> None:
    rates = StepRates()
    rates.note(plan(1), submitted_s=0.0, done_s=1.0)
    # Handed over while the one before computed, and long after everything was done.
    rates.note(plan(1), submitted_s=0.2, done_s=2.0)
    rates.note(plan(1), submitted_s=50.0, done_s=51.0)
    assert rates.token_s == pytest.approx(1.0)
