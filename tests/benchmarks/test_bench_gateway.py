"""The arithmetic of ``bench_gateway``."""

from __future__ import annotations

import numpy as np

from slipstream.benchmarks.bench_gateway import added_latency_s

STEP_S = 0.066


def test_added_latency_is_what_was_added() -> None:
    generator = np.random.default_rng(0)
    for first_step in range(1_000, 1_500):
        added_s = generator.uniform(0, 0.05) + generator.exponential(0.01, 64)
        arrivals_s = (first_step + np.arange(64)) * STEP_S + added_s
        np.testing.assert_allclose(added_latency_s(arrivals_s, STEP_S), added_s, atol=1e-9)


def test_all_after_a_step_that_was_missed_counts_as_late() -> None:
    added_s = np.array([0.001] * 5 + [STEP_S + 0.001] * 5)
    arrivals_s = (1_000.0 + np.arange(10.0)) * STEP_S + added_s
    np.testing.assert_allclose(added_latency_s(arrivals_s, STEP_S), added_s, atol=1e-9)
