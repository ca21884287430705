"""Pieces in turns: who runs when, what happens when something fails, and the same bits as one piece alone."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from slipstream.benchmarks.overlap.stack import Order, Stack, StackShape
from slipstream.comm.collectives import Collectives, Work
from slipstream.comm.errors import CommTimeout, PeerLost
from slipstream.comm.local_groups import local_group, run_ranks
from slipstream.comm.overlap import Begun, Deadline, Steps, run_interleaved, run_plain
from slipstream.comm.overlap_meter import OverlapMeter
from slipstream.comm.overlap_split import Cuts
from slipstream.tests.fakes.scripted_work import HandClock, ScriptedWork


def _piece(name: str, yields: int, log: list[str], clock: HandClock, *, lasts_s: float = 0.0) -> Steps[str]:
    for number in range(yields):
        log.append(f"run {name}{number}")
        received = yield ScriptedWork(clock, lasts_s, name=f"{name}{number}", log=log)
        assert received.shape == (1,), "the work's result is sent back"
    log.append(f"run {name}{yields}")
    return name


def test_a_plain_run_waits_for_each_work_at_once() -> None:
    log: list[str] = []
    assert run_plain(_piece("a", 2, log, HandClock())) == "a"
    assert log == ["run a0", "wait a0", "run a1", "wait a1", "run a2"]


def test_pieces_take_turns_and_a_work_is_waited_for_when_its_turn_comes() -> None:
    log: list[str] = []
    clock = HandClock()
    assert run_interleaved([_piece("a", 2, log, clock), _piece("b", 2, log, clock)]) == ["a", "b"]
    assert log == [
        *("run a0", "run b0"),
        *("wait a0", "run a1", "wait b0", "run b1"),
        *("wait a1", "run a2", "wait b1", "run b2"),
    ]


@pytest.mark.parametrize("yields", [(0, 0), (0, 3), (3, 1, 2), (1, 1, 1)])
def test_pieces_of_any_length_all_come_to_their_end(yields: tuple[int, ...]) -> None:
    log: list[str] = []
    clock = HandClock()
    names = "abc"[: len(yields)]
    pieces = [_piece(name, count, log, clock) for name, count in zip(names, yields, strict=True)]
    assert run_interleaved(pieces) == list(names)
    for name, count in zip(names, yields, strict=True):
        own = [entry for entry in log if entry.split()[1].startswith(name)]
        assert own == [line for n in range(count) for line in (f"run {name}{n}", f"wait {name}{n}")] + [
            f"run {name}{count}"
        ]


def test_nothing_to_run_is_nothing_done() -> None:
    assert run_interleaved([]) == []


def test_a_segment_follows_that_of_the_piece_before_and_precedes_its_next() -> None:
    """The contract that lets a later part of the tokens attend to keys that an earlier part wrote in the same layer."""
    clock = HandClock()
    written: dict[int, int] = {}

    def part(number: int, layers: int) -> Generator[Work, Tensor, None]:
        for layer in range(layers):
            if number:
                assert written[number - 1] == layer, "the part before has done this layer, and not yet the next"
            written[number] = layer
            yield ScriptedWork(clock)

    run_interleaved([part(0, 5), part(1, 5), part(2, 5)])
    assert written == {0: 4, 1: 4, 2: 4}


def test_an_error_of_a_piece_closes_all_and_waits_for_what_is_in_flight() -> None:
    log: list[str] = []
    clock = HandClock()
    closed: list[str] = []

    def bystander() -> Steps[str]:
        try:
            yield from _piece("a", 3, log, clock)
        finally:
            closed.append("a")
        return "a"

    def failing() -> Steps[str]:
        yield ScriptedWork(clock, name="b0", log=log)
        raise ArithmeticError("no such layer")

    with pytest.raises(ArithmeticError, match="no such layer") as caught:
        run_interleaved([bystander(), failing()])
    assert closed == ["a"]
    assert log == ["run a0", "wait a0", "run a1", "wait b0", "wait a1"]
    assert caught.value.__notes__ == ["in piece 1 of a forward pass, after its communication 1"]


def test_an_error_of_a_work_goes_on_after_the_others_have_ended() -> None:
    log: list[str] = []
    clock = HandClock()

    def failing() -> Steps[str]:
        yield ScriptedWork(clock, name="b0", log=log, error=PeerLost("rank 1 ended"))
        raise AssertionError("a piece is not resumed after its work has failed")

    def also_failing() -> Steps[str]:
        yield ScriptedWork(clock, name="c0", log=log, error=PeerLost("rank 1 ended, seen again"))
        return "c"

    with pytest.raises(PeerLost) as caught:
        run_interleaved([_piece("a", 2, log, clock), failing(), also_failing()])
    assert str(caught.value) == "rank 1 ended", "the first error, not what follows from it"
    assert log == ["run a0", "wait a0", "run a1", "wait b0", "wait a1", "wait c0"], "b0 only once"


def test_all_waits_end_at_the_deadline() -> None:
    clock = HandClock()
    log: list[str] = []
    deadline = Deadline(at_s=2.5, clock=clock)
    with pytest.raises(CommTimeout, match="a2 took too long"):
        run_plain(_piece("a", 5, log, clock, lasts_s=1.0), deadline=deadline)
    assert clock() == 2.5
    assert log[-1] == "wait a2"


def test_without_a_deadline_the_groups_own_counts() -> None:
    clock = HandClock()
    work = ScriptedWork(clock)

    def piece() -> Generator[Work, Tensor, None]:
        yield work

    run_plain(piece())
    assert work.timeouts == [None]


def _ahead(name: str, rounds: int, log: list[str], clock: HandClock) -> Steps[str]:
    """A piece whose works stay in flight while it computes the next round."""
    pending: Work | None = None
    for number in range(rounds):
        log.append(f"run {name}{number}")
        work = ScriptedWork(clock, name=f"{name}{number}", log=log)
        yield Begun(work)
        if pending is not None:
            yield pending
        pending = work
    if pending is not None:
        yield pending
    return name


def test_what_a_piece_has_begun_is_waited_for_when_it_asks() -> None:
    log: list[str] = []
    assert run_plain(_ahead("a", 3, log, HandClock())) == "a"
    assert log == ["run a0", "run a1", "wait a0", "run a2", "wait a1", "wait a2"]


def test_beginning_a_work_is_no_turn() -> None:
    log: list[str] = []
    clock = HandClock()
    assert run_interleaved([_ahead("a", 3, log, clock), _ahead("b", 3, log, clock)]) == ["a", "b"]
    assert log == [
        *("run a0", "run a1", "run b0", "run b1"),
        *("wait a0", "run a2", "wait b0", "run b2"),
        *("wait a1", "wait b1", "wait a2", "wait b2"),
    ]


def test_what_was_begun_is_waited_for_when_a_piece_fails() -> None:
    log: list[str] = []
    clock = HandClock()

    def failing() -> Steps[str]:
        yield ScriptedWork(clock, name="b0", log=log)
        yield Begun(ScriptedWork(clock, name="b1", log=log, error=PeerLost("rank 1 ended, seen again")))
        yield Begun(ScriptedWork(clock, name="b2", log=log))
        raise ArithmeticError("no such layer")

    with pytest.raises(ArithmeticError, match="no such layer"):
        run_interleaved([_ahead("a", 4, log, clock), failing()])
    assert log == ["run a0", "run a1", "wait a0", "run a2", "wait b0", *("wait a1", "wait a2", "wait b1", "wait b2")]


def test_a_piece_must_wait_for_what_it_has_begun() -> None:
    def careless() -> Steps[None]:
        yield Begun(ScriptedWork(HandClock()))

    with pytest.raises(AssertionError, match="waits for all that it has begun"):
        run_plain(careless())


def test_a_failed_step_leaves_nothing_in_the_meter() -> None:
    clock = HandClock()
    meter = OverlapMeter(clock, wire_s=lambda _: 1.0)

    def failing() -> Steps[str]:
        yield ScriptedWork(clock, error=PeerLost("gone"))
        return ""

    with pytest.raises(PeerLost):
        run_plain(failing(), meter=meter)
    assert run_plain(_piece("a", 2, [], clock, lasts_s=1.0), meter=meter) == "a"
    assert (meter.totals.works, meter.totals.wire_s, meter.totals.exposed_s) == (2, 2.0, 2.0)


DENSE = StackShape(hidden=256, intermediate=512, layers=2)
EXPERTS = StackShape(hidden=256, intermediate=128, layers=2, experts=4)


def _run_stack(
    shape: StackShape, seed: int, *, ranks: int, tokens: int, cuts: Cuts = (), order: Order = "plain"
) -> list[Tensor]:
    """Return every rank's hidden states."""

    def run(group: Collectives) -> Tensor:
        stack = Stack(shape, rank=group.rank, ranks=ranks, seed=seed, most_tokens=tokens, deterministic=True)
        x_TH = torch.randn((tokens, shape.hidden), generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            return torch.cat(run_interleaved(stack.pieces(group, x_TH, stack.parts(tokens, cuts), order)))

    return run_ranks(local_group(ranks), run)


@pytest.mark.parametrize("shape", [DENSE, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_parts_in_turns_give_the_bits_of_the_whole(shape: StackShape, ranks: int, seed: int) -> None:
    whole = _run_stack(shape, seed, ranks=ranks, tokens=48)
    # A part of one token is another matter: the router's fp32 product takes another path for one row.
    for cuts in ((16,), (29,), (46,), (10, 33), (2, 5, 20)):
        parts = _run_stack(shape, seed, ranks=ranks, tokens=48, cuts=cuts)
        for rank in range(ranks):
            assert torch.equal(parts[rank], whole[rank]), f"cut after {cuts}"


@pytest.mark.parametrize("shape", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_ranks_share_one_model(shape: StackShape, seed: int) -> None:
    """Without this the stack would prove nothing: its ranks' slices make up one model."""
    (alone,) = _run_stack(shape, seed, ranks=1, tokens=48)
    for order in ("plain", "sharded"):
        for found in _run_stack(shape, seed, ranks=2, tokens=48, cuts=(20,), order=order):
            torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tokens", [48, 45])
@pytest.mark.parametrize("ranks", [2, 4])
def test_norms_in_shares_give_the_bits_of_the_plain_way(tokens: int, ranks: int, seed: int) -> None:
    plain = _run_stack(DENSE, seed, ranks=ranks, tokens=tokens)
    for cuts in ((), (20,), (9, 30)):
        sharded = _run_stack(DENSE, seed, ranks=ranks, tokens=tokens, cuts=cuts, order="sharded")
        for rank in range(ranks):
            assert torch.equal(sharded[rank], plain[rank])


def test_experts_over_ranks_in_two_batches_give_the_bits_of_the_whole(seed: int) -> None:
    shape = replace(EXPERTS, spread=True)
    whole = _run_stack(shape, seed, ranks=2, tokens=48)
    parts = _run_stack(shape, seed, ranks=2, tokens=48, cuts=(20,))
    assert torch.equal(torch.stack(parts), torch.stack(whole))
    (alone,) = _run_stack(shape, seed, ranks=1, tokens=48)
    torch.testing.assert_close(whole[0], alone, atol=1e-4, rtol=1e-4)


def test_ladder_order_is_the_same_function_on_any_number_of_ranks_and_cuts(seed: int) -> None:
    (alone,) = _run_stack(DENSE, seed, ranks=1, tokens=48, order="ladder")
    whole = _run_stack(DENSE, seed, ranks=2, tokens=48, order="ladder")
    torch.testing.assert_close(whole[0], alone, atol=1e-4, rtol=1e-4)
    assert torch.equal(_run_stack(DENSE, seed, ranks=2, tokens=48, cuts=(20,), order="ladder")[1], whole[1])
    (plain,) = _run_stack(DENSE, seed, ranks=1, tokens=48)
    assert not torch.allclose(alone, plain, atol=1e-2), "another model than the plain order"
