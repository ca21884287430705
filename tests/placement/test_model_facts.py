"""Arithmetic on a model's sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from slipstream.placement.model_facts import ModelFacts

FACTS = ModelFacts(
    num_layers=2,
    hidden_size=16,
    vocab_size=100,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    parameters=9_600,
    active_parameters=8_000,
    windows=(None, None),
)


def test_attention_counts_scores_and_sums_over_what_does_not_grow() -> None:
    # Two layers of 4 heads of 8, twice; the head of 100 x 16 is for the tokens that are drawn.
    assert FACTS.attention_ratio() == pytest.approx(2 * (2 * 32) / (8_000 - 1_600))


def test_a_window_stops_growing() -> None:
    half = replace(FACTS, windows=(None, 10))
    assert half.attention_ratio() == pytest.approx(64 / (6_400 + 64 * 10))
    assert replace(FACTS, windows=(10, 10)).attention_ratio() == 0.0
