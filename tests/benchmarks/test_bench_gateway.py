"""The arithmetic of ``bench_gateway``."""

from __future__ import annotations

import numpy as np
import pytest

from slipstream.benchmarks.bench_gateway import added_latency_s


@pytest.mark.parametrize("spread_s", [0.001, 0.03, 0.05])
def test_added_latency_is_what_was_added(spread_s: float) -> None:
    generator = np.random.default_rng(0)
    step_s = 0.066
    # Streams begin at different steps; each has its place in a step, and each token its own delay.
    own_s = generator.uniform(0, spread_s, (500, 1)) + generator.exponential(0.002, (500, 64))
    steps = generator.integers(0, 5, (500, 1)) + np.arange(64)
    found_s = added_latency_s(own_s + 123.456 + steps * step_s, step_s)
    # What the fastest of all took is not seen: it is small where there are many.
    np.testing.assert_allclose(found_s, own_s, atol=1e-3)
    assert found_s.min() >= -1e-9


def test_one_stream_on_its_pace_is_never_late() -> None:
    arrivals_s = 5.0 + np.arange(10.0)[None] * 0.1
    np.testing.assert_allclose(added_latency_s(arrivals_s, 0.1), 0.0, atol=1e-9)
