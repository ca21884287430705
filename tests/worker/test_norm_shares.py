"""When norms are put in shares: only where sums say that it could pay, and only from where passes are faster."""

from __future__ import annotations

import pytest
import torch

from slipstream.comm.local_groups import local_group
from slipstream.comm.reduce_norm import NormCost
from slipstream.runtime.config import EngineOptions
from slipstream.runtime.worker import norm_shares
from slipstream.runtime.worker.norm_shares import fewest_in_shares
from slipstream.sdk.errors import ConfigError
from slipstream.tests.fakes.scripted_work import HandClock


class Passes:
    """Passes on a clock of their own; in shares they take ``gains`` times as long."""

    def __init__(self, clock: HandClock, gains: dict[int, float]) -> None:
        self.tried: set[tuple[int, bool]] = set()
        self._clock = clock
        self._gains = gains

    def run(self, tokens: int, in_shares: bool) -> None:
        self.tried.add((tokens, in_shares))
        self._clock.advance(tokens * (self._gains[tokens] if in_shares else 1.0))


def measure(passes: Passes, *, most_tokens: int = 4096) -> int | None:
    (group,) = local_group(1)
    return fewest_in_shares(
        group,
        passes.run,
        hidden_size=8,
        dtype=torch.float32,
        most_tokens=most_tokens,
        device=torch.device("cpu"),
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> HandClock:
    clock = HandClock()
    monkeypatch.setattr(norm_shares, "monotonic_clock", clock)
    return clock


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ({64: 0.9, 256: 0.9, 1024: 0.9}, 64),
        ({64: 1.1, 256: 0.9, 1024: 0.9}, 256),
        ({64: 0.5, 256: 0.99, 1024: 0.9}, 1024),
        ({64: 0.5, 256: 0.5, 1024: 1.0}, None),
    ],
)
def test_it_is_done_from_where_passes_gain(
    gains: dict[int, float], expected: int | None, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NormCost, "sharding_wins", lambda self, tokens: True)
    assert measure(Passes(clock, gains)) == expected


def test_what_cannot_pay_is_not_tried(clock: HandClock) -> None:
    # On the test's clock sums and norms take no time: nothing is to be gained.
    passes = Passes(clock, {})
    assert measure(passes) is None
    assert not passes.tried


def test_the_option_is_a_boolean_or_left_unsaid() -> None:
    with pytest.raises(ConfigError, match="sharded_norm: must be true, false or None, got 'yes'"):
        EngineOptions(model="model", sharded_norm="yes")  # type: ignore[arg-type]


def test_no_more_tokens_are_tried_than_a_step_may_have(clock: HandClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NormCost, "sharding_wins", lambda self, tokens: True)
    passes = Passes(clock, {64: 0.9, 100: 0.9})
    assert measure(passes, most_tokens=100) == 64
    assert {tokens for tokens, _ in passes.tried} == {64, 100}
