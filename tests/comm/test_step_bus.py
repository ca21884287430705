"""The step bus: steps out, answers back, and every way in which a rank or the driver can fail, by name and in time."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest

from slipstream.comm.errors import (
    BadFrame,
    CommMisuse,
    CommTimeout,
    GroupClosed,
    HandshakeRefused,
    PeerLost,
    RankFailed,
    StepGap,
    TooFarAhead,
)
from slipstream.comm.frames import FrameKind
from slipstream.comm.handshake import SECRET_VARIABLE, Identity
from slipstream.comm.sockets import connect
from slipstream.comm.step_bus import StepHub
from slipstream.comm.step_endpoint import StepEndpoint
from slipstream.comm.step_listener import MAX_STRANGERS, StepListener
from slipstream.comm.wire import BusLimits, Wire
from slipstream.runtime.clock import monotonic_clock
from slipstream.tests.comm.buses import (
    IDENTITY,
    PATIENCE_S,
    addresses,
    bus,
    driver_by_hand,
    gather,
    join,
    rank_by_hand,
    read_frame,
)

SOON_S = 0.2
LARGE = 8 << 20

pytestmark = pytest.mark.timeout(2 * PATIENCE_S)
both = pytest.mark.parametrize("kind", ["unix", "tcp"])


def echo(endpoint: StepEndpoint) -> None:
    """Answer steps with their own payload until the bus ends."""
    while True:
        try:
            seq, payload = endpoint.next_step(PATIENCE_S)
            endpoint.send_result(seq, payload)
        except (GroupClosed, PeerLost):
            return


@contextmanager
def in_thread(target: Callable[[StepEndpoint], None], endpoint: StepEndpoint) -> Iterator[None]:
    thread = threading.Thread(target=target, args=(endpoint,))
    thread.start()
    try:
        yield
    finally:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


# --- steps and answers


@both
@pytest.mark.parametrize("size", [0, 1, 200, 20_000, 65_523, 65_524, LARGE])
def test_a_step_goes_to_every_rank_and_every_answer_comes_back(kind: str, size: int) -> None:
    payload = random.Random(size).randbytes(size)
    with bus(kind, 3) as b:
        seq = b.hub.send_step(payload)
        for rank, endpoint in enumerate(b.endpoints, start=1):
            assert endpoint.next_step(PATIENCE_S) == (seq, payload)
            endpoint.send_result(seq, b"from %d" % rank)
        assert b.hub.result(seq, PATIENCE_S) == {1: b"from 1", 2: b"from 2", 3: b"from 3"}
        assert b.hub.ranks == (1, 2, 3)


@both
def test_steps_and_large_answers_cross_in_any_rhythm(kind: str, seed: int) -> None:
    draw = random.Random(seed)
    sizes = [draw.choice([0, 30, 700, 5_000, 70_000, 400_000]) for _ in range(300)]
    sent: list[tuple[int, bytes]] = []
    with bus(kind, 3, limits=BusLimits(max_ahead=4)) as b, ExitStack() as threads:
        for endpoint in b.endpoints:
            threads.enter_context(in_thread(echo, endpoint))
        for size in sizes:
            while len(sent) == 4 or (sent and draw.random() < 0.5):
                seq, payload = sent.pop(0)
                assert b.hub.result(seq, PATIENCE_S) == dict.fromkeys((1, 2, 3), payload)
            payload = draw.randbytes(size)
            sent.append((b.hub.send_step(payload), payload))
        for seq, payload in sent:
            assert b.hub.result(seq, PATIENCE_S) == dict.fromkeys((1, 2, 3), payload)
        assert [seq for seq, _ in sent][-1] == len(sizes), "numbers count from 1, without gaps"
        b.hub.close()


def test_steps_may_be_collected_in_another_order() -> None:
    with bus("unix", 1) as b, in_thread(echo, b.only):
        seqs = [b.hub.send_step(bytes([number])) for number in range(5)]
        for seq in reversed(seqs):
            assert b.hub.result(seq, PATIENCE_S) == {1: bytes([seq - 1])}
        with pytest.raises(CommMisuse, match="step 3 is not on its way: it was collected, or never sent"):
            b.hub.result(3, PATIENCE_S)
        with pytest.raises(CommMisuse, match="step 6 is not on its way"):
            b.hub.result(6, PATIENCE_S)
        b.hub.close()


def test_a_replica_of_one_rank_has_a_bus_too() -> None:
    with addresses("unix") as address, StepListener(address) as listener:
        hub = gather(listener, 0)
        assert hub.result(hub.send_step(b"x"), PATIENCE_S) == {}
        hub.close()


def test_a_large_step_is_sent_while_nobody_reads_it() -> None:
    """The driver goes on to compute: what the sockets have no room for must not wait for its next call."""
    with bus("unix", 2) as b:
        first, second = b.hub.send_step(bytes(LARGE)), b.hub.send_step(b"next")
        for endpoint in b.endpoints:
            assert endpoint.next_step(PATIENCE_S) == (first, bytes(LARGE))
            assert endpoint.next_step(PATIENCE_S) == (second, b"next")


# --- bounds


@both
def test_the_driver_may_not_run_ahead_of_the_slowest_rank(kind: str) -> None:
    with bus(kind, 2, limits=BusLimits(max_ahead=3)) as b:
        fast, slow = b.endpoints
        for seq in (1, 2, 3):
            b.hub.send_step(b"")
            fast.send_result(fast.next_step(PATIENCE_S)[0], b"")
            with pytest.raises(CommTimeout, match=rf"step {seq}: no answer from rank 2 within"):
                b.hub.result(seq, 0.0)
            assert b.hub.waits_for(seq) == (2,)
        with pytest.raises(TooFarAhead, match="3 steps are on their way, rank 2 has answered 0 of 3"):
            b.hub.send_step(b"refused")
        slow.send_result(slow.next_step(PATIENCE_S)[0], b"at last")
        assert b.hub.result(1, PATIENCE_S) == {1: b"", 2: b"at last"}
        assert b.hub.send_step(b"taken") == 4, "what was refused was sent to nobody"
        with pytest.raises(TooFarAhead):
            b.hub.send_step(b"refused")


def test_bytes_that_wait_for_a_rank_are_bounded() -> None:
    with bus("unix", 1, limits=BusLimits(max_unsent_bytes=1000)) as b:
        b.hub.send_step(bytes(LARGE))
        with pytest.raises(TooFarAhead, match="bytes still wait for rank 1 to read"):
            b.hub.send_step(b"")
        assert b.only.next_step(PATIENCE_S) == (1, bytes(LARGE))


def test_payloads_are_bounded_where_they_are_made() -> None:
    with bus("unix", 1, limits=BusLimits(max_payload_bytes=100)) as b:
        with pytest.raises(CommMisuse, match="a step of 101 bytes is over the limit of 100"):
            b.hub.send_step(bytes(101))
        seq = b.hub.send_step(bytes(100))
        assert b.only.next_step(PATIENCE_S) == (seq, bytes(100))
        with pytest.raises(CommMisuse, match="a result of 101 bytes is over the limit of 100"):
            b.only.send_result(seq, bytes(101))
        b.only.send_result(seq, b"")
        assert b.hub.result(seq, PATIENCE_S) == {1: b""}


@both
def test_a_frame_over_the_limit_ends_the_bus_for_both(kind: str) -> None:
    small, large = BusLimits(max_payload_bytes=100), BusLimits(max_payload_bytes=1000)
    with bus(kind, 1, limits=small, rank_limits=large) as b:
        seq = b.hub.send_step(b"")
        b.only.next_step(PATIENCE_S)
        b.only.send_result(seq, bytes(500))
        with pytest.raises(BadFrame, match="announces 500 bytes, more than the limit of 100"):
            b.hub.result(seq, PATIENCE_S)
        with pytest.raises((GroupClosed, PeerLost)):
            b.only.next_step(PATIENCE_S)
    with bus(kind, 1, limits=large, rank_limits=small) as b:
        seq = b.hub.send_step(bytes(500))
        with pytest.raises(BadFrame, match="announces 500 bytes"):
            b.only.next_step(PATIENCE_S)
        with pytest.raises((GroupClosed, PeerLost)):
            b.hub.result(seq, PATIENCE_S)


@pytest.mark.parametrize("wrong", [{"max_ahead": 0}, {"max_payload_bytes": 0}, {"max_payload_bytes": 1 << 32}])
def test_limits_that_cannot_be_are_named(wrong: dict[str, int]) -> None:
    with pytest.raises(CommMisuse, match=next(iter(wrong))):
        BusLimits(**wrong)


# --- deadlines


@both
def test_waits_end_at_their_deadline_and_may_be_repeated(kind: str) -> None:
    with bus(kind, 1) as b:
        with pytest.raises(CommTimeout, match=r"step bus 'decode-0', rank 1: no step came within 0\.2 s"):
            b.only.next_step(SOON_S)
        seq = b.hub.send_step(b"x")
        with pytest.raises(CommTimeout, match=r"no answer from rank 1 within 0\.2 s"):
            b.hub.result(seq, SOON_S)
        b.only.send_result(b.only.next_step(PATIENCE_S)[0], b"y")
        assert b.hub.result(seq, PATIENCE_S) == {1: b"y"}


def test_a_wait_behind_another_has_its_deadline_too() -> None:
    with bus("unix", 1) as b, ThreadPoolExecutor(1) as pool:
        first = pool.submit(b.only.next_step, PATIENCE_S)
        with pytest.raises(CommTimeout):
            b.only.next_step(SOON_S)
        b.hub.send_step(b"x")
        assert first.result(PATIENCE_S) == (1, b"x")


def test_a_rank_that_reads_nothing_ends_the_bus() -> None:
    with bus("unix", 1, limits=BusLimits(stall_timeout_s=SOON_S)) as b:
        seq = b.hub.send_step(bytes(LARGE))
        with pytest.raises(CommTimeout, match=r"rank 1: reads nothing for 0\.2 s"):
            b.hub.result(seq, PATIENCE_S)
        with pytest.raises(CommTimeout, match="reads nothing"):
            b.hub.send_step(b"")


def test_a_driver_that_reads_nothing_ends_the_rank() -> None:
    with bus("unix", 1, limits=BusLimits(stall_timeout_s=SOON_S)) as b:
        seq = b.hub.send_step(b"")
        b.only.next_step(PATIENCE_S)
        with pytest.raises(CommTimeout, match=r"the driver reads nothing for 0\.2 s"):
            b.only.send_result(seq, bytes(LARGE))


# --- failures that a rank reports


def test_a_failure_is_heard_before_the_others_answer_and_the_bus_lives() -> None:
    with bus("unix", 2) as b:
        one, two = b.endpoints
        seq = b.hub.send_step(b"")
        for endpoint in b.endpoints:
            endpoint.next_step(PATIENCE_S)
        two.send_failure(seq, "no memory" + "!" * 10_000)
        with pytest.raises(RankFailed, match="rank 2 failed at step 1: no memory!!!") as failed:
            b.hub.result(seq, PATIENCE_S)
        assert (failed.value.rank, failed.value.seq) == (2, 1)
        assert len(failed.value.text) < 5_000
        following = b.hub.send_step(b"again")
        one.send_result(seq, b"late")
        for endpoint in b.endpoints:
            endpoint.send_result(endpoint.next_step(PATIENCE_S)[0], b"ok")
        assert b.hub.result(following, PATIENCE_S) == {1: b"ok", 2: b"ok"}


def test_failed_steps_that_are_not_answered_by_all_count_against_the_bound() -> None:
    with bus("unix", 2, limits=BusLimits(max_ahead=2)) as b:
        for _ in range(2):
            seq = b.hub.send_step(b"")
            b.endpoints[0].next_step(PATIENCE_S)
            b.endpoints[0].send_failure(seq, "broken")
            with pytest.raises(RankFailed):
                b.hub.result(seq, PATIENCE_S)
        with pytest.raises(TooFarAhead, match="rank 2 has answered 0 of 2"):
            b.hub.send_step(b"")


# --- numbers


@both
@pytest.mark.parametrize(("answers", "error"), [([2], "missed"), ([1, 1], "repeated"), ([1, 2, 4], "missed")])
def test_an_answer_out_of_turn_is_found_out(kind: str, answers: list[int], error: str) -> None:
    with addresses(kind) as address, StepListener(address) as listener, ThreadPoolExecutor(1) as pool:
        joining = pool.submit(rank_by_hand, listener.address, 1)
        hub, wire = gather(listener, 1), joining.result(PATIENCE_S)
        for _ in range(3):
            hub.send_step(b"")
        for seq in answers:
            wire.send(FrameKind.RESULT, seq, b"")
        with pytest.raises(StepGap, match=f"rank 1 answered step {answers[-1]}, due was .*: it {error} a step"):
            hub.result(3, PATIENCE_S)
        with pytest.raises(StepGap):
            hub.send_step(b"")
        while (frame := read_frame(wire)).kind is FrameKind.STEP:
            pass
        assert frame.kind is FrameKind.CLOSE
        assert error in frame.text, "the rank is told what it did"
        wire.close()
        hub.close()


@both
@pytest.mark.parametrize(("steps", "error"), [([2], "missed"), ([1, 1], "repeated"), ([0], "repeated")])
def test_a_step_out_of_turn_is_found_out(kind: str, steps: list[int], error: str) -> None:
    with driver_by_hand(kind) as (address, let_in), ThreadPoolExecutor(1) as pool:
        joining = pool.submit(join, address, 1)
        wire, endpoint = let_in(), joining.result(PATIENCE_S)
        for seq in steps:
            wire.send(FrameKind.STEP, seq, b"")
        for seq in steps[:-1]:
            assert endpoint.next_step(PATIENCE_S)[0] == seq
        with pytest.raises(StepGap, match=f"step {steps[-1]} came, due was .*: a step was {error}"):
            endpoint.next_step(PATIENCE_S)
        with pytest.raises(StepGap):
            endpoint.send_result(1, b"")
        frame = read_frame(wire)
        assert frame.kind is FrameKind.CLOSE
        assert error in frame.text
        wire.close()
        endpoint.close()


def test_a_rank_can_only_answer_the_step_whose_turn_it_is() -> None:
    with bus("unix", 1) as b:
        with pytest.raises(StepGap, match="step 1 cannot be answered: due is 1, the last that came 0"):
            b.only.send_result(1, b"")
        for _ in range(2):
            b.hub.send_step(b"")
            b.only.next_step(PATIENCE_S)
        with pytest.raises(StepGap, match="step 2 cannot be answered: due is 1"):
            b.only.send_failure(2, "")
        b.only.send_result(1, b"")
        with pytest.raises(StepGap, match="step 1 cannot be answered: due is 2"):
            b.only.send_result(1, b"")
        b.only.send_result(2, b"")
        assert b.hub.result(2, PATIENCE_S) == {1: b""}


@pytest.mark.parametrize("sent", [FrameKind.STEP, FrameKind.HELLO, FrameKind.WELCOME])
def test_frames_that_no_rank_sends_end_the_bus(sent: FrameKind) -> None:
    with addresses("unix") as address, StepListener(address) as listener, ThreadPoolExecutor(1) as pool:
        joining = pool.submit(rank_by_hand, listener.address, 1)
        hub, wire = gather(listener, 1), joining.result(PATIENCE_S)
        wire.send(sent, 1, b"")
        seq = hub.send_step(b"")
        with pytest.raises(BadFrame, match=f"rank 1 sent a frame of kind {sent.name}"):
            hub.result(seq, PATIENCE_S)
        wire.close()
        hub.close()


# --- processes that end or stop


@contextmanager
def rank_processes(kind: str, ranks: int) -> Iterator[tuple[StepHub, dict[int, subprocess.Popen[bytes]]]]:
    """Yield a hub and its ranks, each a process that answers steps with their payload."""
    environment = {**os.environ, SECRET_VARIABLE: IDENTITY.secret.decode()}
    processes: dict[int, subprocess.Popen[bytes]] = {}
    with addresses(kind) as address, StepListener(address) as listener, ExitStack() as stack:
        for rank in range(1, ranks + 1):
            command = [sys.executable, "-P", "-m", "slipstream.tests.comm.step_rank"]
            arguments = [listener.address, IDENTITY.replica, str(rank)]
            processes[rank] = process = subprocess.Popen([*command, *arguments], env=environment)
            stack.callback(process.wait, PATIENCE_S)
            stack.callback(process.kill)
        hub = gather(listener, ranks)
        stack.callback(hub.close)
        yield hub, processes


@both
def test_a_rank_that_is_stopped_and_one_that_is_killed(kind: str) -> None:
    with rank_processes(kind, 2) as (hub, processes):
        payload = os.urandom(20_000)
        assert hub.result(hub.send_step(payload), PATIENCE_S) == {1: payload, 2: payload}

        processes[2].send_signal(signal.SIGSTOP)
        seq = hub.send_step(payload)
        with pytest.raises(CommTimeout, match=r"no answer from rank 2 within 0\.2 s"):
            hub.result(seq, SOON_S)
        processes[2].send_signal(signal.SIGCONT)
        assert hub.result(seq, PATIENCE_S) == {1: payload, 2: payload}, "it only was slow"

        processes[2].send_signal(signal.SIGSTOP)
        seq = hub.send_step(payload)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(hub.result, seq, PATIENCE_S)
            processes[2].kill()
            with pytest.raises(PeerLost, match="step bus 'decode-0': rank 2 is gone"):
                waiting.result(PATIENCE_S)
        with pytest.raises(PeerLost):
            hub.send_step(b"")
        assert processes[1].wait(PATIENCE_S) == 0, "the other rank was told that the bus is closed"


def test_the_end_of_a_rank_is_seen_between_steps() -> None:
    with rank_processes("unix", 1) as (hub, processes):
        hub.result(hub.send_step(b""), PATIENCE_S)
        hub.check()
        processes[1].kill()
        processes[1].wait(PATIENCE_S)
        with pytest.raises(PeerLost, match="rank 1 is gone"):
            hub.check()


def test_the_end_of_the_driver_is_seen_by_a_rank_that_waits() -> None:
    with driver_by_hand("tcp") as (address, let_in), ThreadPoolExecutor(1) as pool:
        joining = pool.submit(join, address, 1)
        wire, endpoint = let_in(), joining.result(PATIENCE_S)
        waiting = pool.submit(endpoint.next_step, PATIENCE_S)
        # As the kernel does it for a process that was killed: nothing is said.
        wire.close()
        with pytest.raises(PeerLost, match="rank 1: the driver is gone: its connection ended"):
            waiting.result(PATIENCE_S)
        endpoint.close()


def test_survivors_are_told_who_was_lost() -> None:
    with addresses("unix") as address, StepListener(address) as listener, ThreadPoolExecutor(2) as pool:
        joining = pool.submit(rank_by_hand, listener.address, 1), pool.submit(join, listener.address, 2)
        hub = gather(listener, 2)
        wire, survivor = joining[0].result(PATIENCE_S), joining[1].result(PATIENCE_S)
        wire.close()
        with pytest.raises(PeerLost, match="rank 1 is gone"):
            hub.result(hub.send_step(b""), PATIENCE_S)
        with pytest.raises(GroupClosed, match="rank 2: the driver ended the bus: rank 1 is gone"):
            survivor.next_step(PATIENCE_S)
        survivor.close()
        hub.close()


def test_an_answer_right_before_the_end_counts() -> None:
    with bus("unix", 1) as b:
        seqs = [b.hub.send_step(b""), b.hub.send_step(b"")]
        b.only.send_result(b.only.next_step(PATIENCE_S)[0], b"last words")
        b.only.close("done")
        assert b.hub.result(seqs[0], PATIENCE_S) == {1: b"last words"}
        with pytest.raises(GroupClosed, match="rank 1 closed its end: done"):
            b.hub.result(seqs[1], PATIENCE_S)


# --- close


@both
def test_close_wakes_everybody_and_says_why(kind: str) -> None:
    with bus(kind, 2) as b, ThreadPoolExecutor(3) as pool:
        seq = b.hub.send_step(b"")
        for endpoint in b.endpoints:
            endpoint.next_step(PATIENCE_S)
        waiting = [pool.submit(endpoint.next_step, PATIENCE_S) for endpoint in b.endpoints]
        driver = pool.submit(b.hub.result, seq, PATIENCE_S)
        b.hub.close("the replica is drained")
        for rank in waiting:
            with pytest.raises(GroupClosed, match="the driver ended the bus: the replica is drained"):
                rank.result(PATIENCE_S)
        with pytest.raises(GroupClosed, match="the replica is drained"):
            driver.result(PATIENCE_S)
        b.hub.close()
        for call in (lambda: b.hub.send_step(b""), lambda: b.hub.result(seq, PATIENCE_S), b.hub.check):
            with pytest.raises(GroupClosed, match="step bus 'decode-0': the replica is drained"):
                call()


def test_a_rank_that_closes_wakes_its_own_threads_and_the_driver() -> None:
    with bus("unix", 1) as b, ThreadPoolExecutor(2) as pool:
        seq = b.hub.send_step(b"")
        b.only.next_step(PATIENCE_S)
        waiting, driver = pool.submit(b.only.next_step, PATIENCE_S), pool.submit(b.hub.result, seq, PATIENCE_S)
        b.only.close("out of here")
        with pytest.raises(GroupClosed, match="rank 1: out of here"):
            waiting.result(PATIENCE_S)
        with pytest.raises(GroupClosed, match="rank 1 closed its end: out of here"):
            driver.result(PATIENCE_S)
        b.only.close()
        with pytest.raises(GroupClosed):
            b.only.send_result(seq, b"")


def test_close_does_not_wait_for_what_nobody_reads() -> None:
    with bus("unix", 1) as b:
        b.hub.send_step(bytes(LARGE))
        b.hub.close()
        with pytest.raises((PeerLost, GroupClosed)):
            b.only.next_step(PATIENCE_S)


def test_a_bus_can_be_made_anew_at_the_same_listener() -> None:
    with addresses("tcp") as address, StepListener(address) as listener, ThreadPoolExecutor(1) as pool:
        for _ in range(2):
            joining = pool.submit(join, listener.address, 1)
            hub, endpoint = gather(listener, 1), joining.result(PATIENCE_S)
            seq = hub.send_step(b"x")
            endpoint.send_result(endpoint.next_step(PATIENCE_S)[0], b"y")
            assert hub.result(seq, PATIENCE_S) == {1: b"y"}
            hub.close()
            endpoint.close()


# --- who may join


@both
@pytest.mark.parametrize(
    ("identity", "rank", "error"),
    [
        (Identity(replica="decode-0", secret=b"not the secret of it"), 1, "the secret is not the driver's"),
        (Identity(replica="decode-1", secret=IDENTITY.secret), 1, "this is replica 'decode-0', not 'decode-1'"),
        (IDENTITY, 2, "rank 2 is none of this replica"),
    ],
)
def test_who_may_not_join_is_told_why_and_holds_nobody_up(kind: str, identity: Identity, rank: int, error: str) -> None:
    with addresses(kind) as address, StepListener(address) as listener, ThreadPoolExecutor(1) as pool:
        gathering = pool.submit(gather, listener, 1)
        with pytest.raises(HandshakeRefused, match=f"step bus .*, rank {rank}: the driver refused: {error}"):
            join(listener.address, rank, identity=identity)
        endpoint = join(listener.address, 1)
        hub = gathering.result(PATIENCE_S)
        assert hub.ranks == (1,)
        endpoint.close()
        hub.close()


def test_a_rank_joins_once_but_may_come_again_when_it_was_lost() -> None:
    with addresses("unix") as address, StepListener(address) as listener, ThreadPoolExecutor(1) as pool:
        gathering = pool.submit(gather, listener, 2)
        first = join(listener.address, 1)
        with pytest.raises(HandshakeRefused, match="rank 1 has joined already"):
            join(listener.address, 1)
        first.close()
        again = join(listener.address, 1)
        other = join(listener.address, 2)
        hub = gathering.result(PATIENCE_S)
        hub.send_step(b"x")
        assert again.next_step(PATIENCE_S) == other.next_step(PATIENCE_S) == (1, b"x")
        for each in (again, other, hub):
            each.close()


def test_ranks_that_are_missing_are_named_and_those_who_came_are_told() -> None:
    with addresses("unix") as address, StepListener(address) as listener, ThreadPoolExecutor(1) as pool:
        now_s = 0.0
        gathering = pool.submit(gather, listener, 3, timeout_s=0.1, clock=lambda: now_s)
        endpoint = join(listener.address, 2)
        with pytest.raises(HandshakeRefused):
            join(listener.address, 1, identity=Identity(replica="decode-0", secret=b"not the secret of it"))
        now_s = 1.0
        with pytest.raises(CommTimeout, match=r"rank 1, 3 did not connect within 0\.1 s; refused: the secret is not"):
            gathering.result(PATIENCE_S)
        with pytest.raises(GroupClosed, match="rank 1, 3 did not connect"):
            endpoint.next_step(PATIENCE_S)
        endpoint.close()


def test_a_driver_that_learns_better_gives_up_waiting_and_tells_those_who_came() -> None:
    with addresses("unix") as address, StepListener(address) as listener, ThreadPoolExecutor(1) as pool:
        ended = threading.Event()

        def look() -> None:
            if ended.is_set():
                raise RuntimeError("rank 2's process has ended")

        gathering = pool.submit(
            listener.gather, IDENTITY, ranks=(1, 2), timeout_s=PATIENCE_S, clock=monotonic_clock, meanwhile=look
        )
        endpoint = join(listener.address, 1)
        ended.set()
        with pytest.raises(RuntimeError, match="process has ended"):
            gathering.result(PATIENCE_S)
        with pytest.raises(GroupClosed, match="rank 2's process has ended"):
            endpoint.next_step(PATIENCE_S)
        endpoint.close()


@both
def test_strangers_who_say_nothing_or_nonsense_hold_nobody_up(kind: str) -> None:
    with addresses(kind) as address, StepListener(address) as listener, ExitStack() as stack:
        silent = [connect(listener.address, timeout_s=PATIENCE_S) for _ in range(MAX_STRANGERS + 3)]
        for sock in silent:
            stack.callback(sock.close)
        silent[-1].sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
        pool = stack.enter_context(ThreadPoolExecutor(1))
        joining = pool.submit(join, listener.address, 1)
        hub, endpoint = gather(listener, 1), joining.result(PATIENCE_S)
        stack.callback(hub.close)
        stack.callback(endpoint.close)
        for sock in silent:
            sock.settimeout(PATIENCE_S)
            assert ended(sock), "nobody is kept once all ranks are there"


def ended(sock: socket.socket) -> bool:
    """Read until the other side ends the connection; a time-out raises."""
    try:
        while sock.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return True


def test_who_answers_but_is_no_driver_is_named() -> None:
    with addresses("tcp") as address, StepListener(address) as listener:
        plain = socket.create_server(("127.0.0.1", 0))
        with plain, ThreadPoolExecutor(1) as pool:
            joining = pool.submit(join, f"127.0.0.1:{plain.getsockname()[1]}", 1)
            accepted, _ = plain.accept()
            wire = Wire(accepted, peer="a rank", max_payload_bytes=100)
            wire.send(FrameKind.CHALLENGE, 0, b"hello?")
            with pytest.raises(HandshakeRefused, match="who answers at the driver's address is no driver"):
                joining.result(PATIENCE_S)
            wire.close()
        gone = listener.address
    with pytest.raises(PeerLost, match=f"cannot connect to {gone}"):
        join(gone, 1)


@pytest.mark.parametrize("address", ["", "host", "host:", ":80", "host:port", "host:99999", "unix"])
def test_addresses_that_are_none_are_named(address: str) -> None:
    with pytest.raises(CommMisuse, match="is no address"):
        StepListener(address)


def test_an_address_that_is_taken_is_named_and_a_path_is_removed() -> None:
    with addresses("unix") as address:
        path = address.removeprefix("unix:")
        with StepListener(address):
            assert os.stat(path).st_mode & 0o777 == 0o600
            with pytest.raises(CommMisuse, match=f"cannot listen at {address}"):
                StepListener(address)
        assert not os.path.exists(path)


def test_ranks_count_from_one() -> None:
    with addresses("unix") as address, StepListener(address) as listener:
        with pytest.raises(CommMisuse, match="count from 1"):
            join(listener.address, 0)
        with pytest.raises(CommMisuse, match="count from 1"):
            listener.gather(IDENTITY, ranks=[0, 1], timeout_s=0.0, clock=lambda: 0.0)
