"""The trial of both ways: the slowest rank counts, all come to the same, and nothing of it stays."""

from __future__ import annotations

import threading
from typing import Any, cast

import pytest
import torch

from slipstream.comm.collectives import Collectives
from slipstream.comm.local_groups import local_group, run_ranks
from slipstream.comm.overlap import Parts
from slipstream.runtime.models.expert_ranks import ALWAYS, NEVER, ExpertRanks, Route
from slipstream.runtime.worker import expert_trial
from slipstream.runtime.worker.expert_trial import SIZES, most_gathered

HIDDEN, EXPERTS = 4, 6


class Pace(threading.local):
    """A clock for each rank."""

    now_s = 0.0


class PacedExperts:
    """Experts that take as long as they are told to."""

    def __init__(self, group: Collectives, pace: Pace, exchanged_s: float, per_gathered_token_s: float) -> None:
        self.group, self.groups = group, (group,)
        self.most_gathered = NEVER
        self.load_E = torch.zeros(EXPERTS, dtype=torch.int64)
        self.tried: list[tuple[int, int]] = []
        self._pace = pace
        self._exchanged_s, self._per_gathered_token_s = exchanged_s, per_gathered_token_s

    def mix(self, x_TH: torch.Tensor, route: Route) -> Parts:
        tokens = len(x_TH)
        weights_TA, experts_TA = route(x_TH)
        assert weights_TA.shape == experts_TA.shape == (tokens, 2)
        self.load_E += 1
        self.tried.append((tokens, self.most_gathered))
        gathered = tokens <= self.most_gathered
        self._pace.now_s += self._per_gathered_token_s * tokens if gathered else self._exchanged_s
        yield from ()
        return x_TH


class Tokens:
    """What the trial asks of made-up tokens."""

    def hidden(self, tokens: int) -> torch.Tensor:
        return torch.zeros((tokens, HIDDEN))

    def route(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = len(x_TH)
        return torch.ones((tokens, 2)), torch.zeros((tokens, 2), dtype=torch.int64)


@pytest.mark.parametrize(
    ("paces", "most"),
    [
        # Gathering costs a second a token, exchanging twenty, on the slower of two ranks.
        ([(20.0, 1.0), (5.0, 0.1)], 16),
        ([(5.0, 0.1), (20.0, 1.0)], 16),
        ([(20.0, 100.0), (20.0, 0.1)], NEVER),
        ([(20.0, 0.001), (20.0, 0.001)], SIZES[-1]),
    ],
)
def test_the_slowest_rank_counts(paces: list[tuple[float, float]], most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pace = Pace()
    monkeypatch.setattr(expert_trial, "monotonic_clock", lambda: pace.now_s)
    made: dict[int, PacedExperts] = {}

    def body(group: Collectives) -> int:
        made[group.rank] = PacedExperts(group, pace, *paces[group.rank])
        return most_gathered(cast(ExpertRanks, made[group.rank]), cast(Any, Tokens()))

    assert run_ranks(local_group(2), body) == [most, most]
    for experts in made.values():
        assert experts.load_E.sum() == 0, "what was tried is not counted as load"
        sizes = [tokens for tokens, _ in experts.tried]
        tried = [size for size in SIZES if size in sizes]
        assert tried[:-1] == [size for size in SIZES if size <= most][: len(tried) - 1], "no larger than it has to"
        assert {way for _, way in experts.tried} == {NEVER, ALWAYS}
