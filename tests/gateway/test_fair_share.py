"""Who is let in next: shares of keys over random stories, bounds, and who gives way."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from slipstream.runtime.gateway.fair_share import FairShare, ShareLimits, Turn, TurnState


def share(
    running: int = 4, waiting: int = 100, per_key: int = 60, weights: dict[str, float] | None = None
) -> FairShare:
    limits = ShareLimits(max_running=running, max_waiting=waiting, max_waiting_per_key=per_key)
    return FairShare(limits, weights=weights)


def test_with_room_everybody_starts_at_once() -> None:
    fair = share()
    assert [fair.ask("a", tokens=10).state for _ in range(5)] == [TurnState.RUNNING] * 4 + [TurnState.WAITING]
    assert (fair.running, fair.waiting, fair.waiting_of("a")) == (4, 1, 1)


def test_a_key_that_floods_delays_itself() -> None:
    fair = share(running=1)
    first = fair.ask("flood", tokens=100)
    flood = [fair.ask("flood", tokens=100) for _ in range(50)]
    polite = fair.ask("polite", tokens=100)
    fair.leave(first)
    assert fair.take_changed() == [polite]
    fair.leave(polite)
    assert fair.take_changed() == [flood[0]]


@pytest.mark.parametrize("weights", [{}, {"a": 3.0}])
def test_shares_are_of_tokens_and_by_weight(weights: dict[str, float], seed: int) -> None:
    draw = random.Random(seed)
    fair = share(running=2, weights=weights)
    size = {"a": 1000, "b": 100}
    had: Counter[str] = Counter()
    running: list[Turn] = []
    for _ in range(3000):
        for key, tokens in size.items():
            while fair.waiting_of(key) < 5:
                turn = fair.ask(key, tokens=draw.uniform(0.5, 1.5) * tokens)
                running += [turn] if turn.state is TurnState.RUNNING else []
        done = running.pop(draw.randrange(len(running)))
        had[done.key] += int(done.tokens)
        fair.leave(done)
        running += fair.take_changed()
    assert had["a"] / had["b"] == pytest.approx(weights.get("a", 1.0), rel=0.1)


def test_what_it_cost_in_the_end_counts() -> None:
    fair = share(running=1)
    first = fair.ask("liar", tokens=1)
    waiting = [fair.ask("liar", tokens=1) for _ in range(2)] + [fair.ask("honest", tokens=50) for _ in range(2)]
    fair.leave(first, tokens=1000)
    order = []
    while changed := fair.take_changed():
        order += [turn.key for turn in changed]
        fair.leave(changed[0])
    assert order == ["honest", "honest", "liar", "liar"] and all(turn.state is TurnState.OVER for turn in waiting)


def test_queues_are_bounded_and_the_longest_gives_way() -> None:
    fair = share(running=1, waiting=10, per_key=8)
    fair.ask("a", tokens=1)
    mine = [fair.ask("a", tokens=1) for _ in range(9)]
    assert [turn.state for turn in mine] == [TurnState.WAITING] * 8 + [TurnState.REFUSED]
    assert "of this key" in mine[-1].problem
    others = [fair.ask("b", tokens=1) for _ in range(6)]
    # Two places were free; then the newest of a's give way, until both have about the same.
    assert [turn.state for turn in others] == [TurnState.WAITING] * 5 + [TurnState.REFUSED]
    assert fair.take_changed() == [mine[7], mine[6], mine[5]] and fair.waiting == 10
    assert all(turn.state is TurnState.REFUSED and turn.problem for turn in mine[5:8])


def test_a_large_request_is_not_passed_by_small_ones_and_one_too_large_is_refused() -> None:
    fair = share(running=4)
    small = [fair.ask("a", tokens=1) for _ in range(3)]
    large = fair.ask("b", tokens=4, prompts=4)
    after = fair.ask("a", tokens=1)
    assert fair.ask("c", tokens=1, prompts=5).state is TurnState.REFUSED
    for turn in small:
        fair.leave(turn)
    assert fair.take_changed() == [large]
    fair.leave(large)
    assert fair.take_changed() == [after]


def test_a_running_request_grows_while_there_is_room() -> None:
    fair = share(running=4)
    turn = fair.ask("a", tokens=1)
    assert fair.grow(turn, tokens=3, prompts=3) and fair.running == 3
    assert not fair.grow(turn, tokens=5, prompts=5) and fair.running == 3
    fair.leave(turn)
    assert fair.running == 0


def test_limits_and_weights_are_checked() -> None:
    with pytest.raises(ValueError, match="max_running"):
        ShareLimits(max_running=0, max_waiting=1, max_waiting_per_key=1)
    with pytest.raises(ValueError, match="max_waiting_per_key"):
        ShareLimits(max_running=1, max_waiting=1, max_waiting_per_key=2)
    with pytest.raises(ValueError, match="weight"):
        share(weights={"a": 0.0})


def test_every_request_ends_in_one_way_and_nothing_is_left(seed: int) -> None:
    draw = random.Random(seed)
    fair = share(running=5, waiting=12, per_key=6)
    alive: list[Turn] = []
    ended: Counter[TurnState] = Counter()
    for _ in range(4000):
        if draw.random() < 0.6:
            turn = fair.ask(draw.choice("abcdefgh"), tokens=draw.randint(1, 500), prompts=draw.randint(1, 3))
            if turn.state is TurnState.REFUSED:
                ended[turn.state] += 1
            else:
                alive.append(turn)
        elif alive:
            turn = alive.pop(draw.randrange(len(alive)))
            ended[turn.state] += 1
            fair.leave(turn, tokens=draw.choice([None, draw.randint(0, 900)]))
            fair.leave(turn)
        for turn in fair.take_changed():
            assert turn.state in (TurnState.RUNNING, TurnState.REFUSED)
            if turn.state is TurnState.REFUSED:
                alive.remove(turn)
        running = sum(turn.prompts for turn in alive if turn.state is TurnState.RUNNING)
        waiting = sum(turn.prompts for turn in alive if turn.state is TurnState.WAITING)
        assert (fair.running, fair.waiting) == (running, waiting) and running <= 5 and waiting <= 12
        assert not waiting or running + 3 > 5, "there was room for the next"
    for turn in alive:
        fair.leave(turn)
    assert fair.running == fair.waiting == 0 and not fair._keys and len(ended) == 3
