"""The two ends of a measured link over loopback: what is measured, who is let in, what it is called when it fails."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from slipstream.runtime.controller.link_listener import LinkListener
from slipstream.runtime.controller.link_probe import measure, throughput
from slipstream.runtime.controller.link_wire import (
    ProbeLimits,
    ProbeRefused,
    ProbeTimeout,
    ProbeUnreachable,
    receive,
)

TOKEN = "0123456789abcdef" * 4
LIMITS = ProbeLimits(streams=2, seconds=0.2, exchanges=50, timeout_s=8.0)


@contextmanager
def listening(limits: ProbeLimits = LIMITS) -> Iterator[LinkListener]:
    listener = LinkListener("127.0.0.1:0", TOKEN, limits)
    try:
        yield listener
    finally:
        listener.close()
        assert not [each.name for each in threading.enumerate() if each.name.startswith("slipstream-link")]


def connected(listener: LinkListener) -> socket.socket:
    host, _, port = listener.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=5)


def test_round_trips_and_bytes_are_measured() -> None:
    with listening() as listener:
        found = measure(listener.address, TOKEN, LIMITS)
    assert 0 < found.round_trip_s <= found.round_trip_p99_s < 1
    assert found.bytes_per_s > 1e6
    # The rate is of the time in which they came, the first part aside.
    assert found.moved_bytes == pytest.approx(found.bytes_per_s * LIMITS.seconds, rel=0.9)


def test_no_more_bytes_come_than_the_limits_say() -> None:
    limits = replace(LIMITS, seconds=20.0, max_bytes=3_000_000, timeout_s=60.0)
    with listening(limits) as listener:
        assert measure(listener.address, TOKEN, limits).moved_bytes == limits.max_bytes


def test_who_has_another_token_is_sent_away_and_who_has_the_right_one_is_served() -> None:
    with listening() as listener:
        with pytest.raises(ProbeRefused, match="does not take part in this measurement"):
            measure(listener.address, "f" * 64, LIMITS)
        assert measure(listener.address, TOKEN, LIMITS).moved_bytes


def test_strangers_that_say_nothing_or_nonsense_do_not_keep_a_measurement_from_running() -> None:
    with listening() as listener:
        silent = [connected(listener) for _ in range(8)]
        loud = connected(listener)
        loud.sendall(b"\xff" * 70_000)
        assert measure(listener.address, TOKEN, LIMITS).moved_bytes
        # A stranger hears the challenge and a refusal, and nothing else.
        receive(loud)
        assert receive(loud) == b""
        with pytest.raises(OSError):
            receive(loud)
        for each in (*silent, loud):
            each.close()


def test_a_listener_serves_one_measurement() -> None:
    with listening() as listener:
        measure(listener.address, TOKEN, LIMITS)
        with pytest.raises(ProbeRefused):
            measure(listener.address, TOKEN, LIMITS)


def test_more_streams_than_were_agreed_on_are_refused() -> None:
    with listening() as listener, pytest.raises(ProbeRefused):
        measure(listener.address, TOKEN, replace(LIMITS, streams=3))


def test_where_nobody_listens_or_answers_is_said() -> None:
    with listening() as listener:
        address = listener.address
    with pytest.raises(ProbeUnreachable, match=address):
        measure(address, TOKEN, LIMITS)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        where = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ProbeTimeout, match="does not answer in time"):
            measure(where, TOKEN, replace(LIMITS, seconds=0.1, timeout_s=0.5))
    with pytest.raises(ProbeUnreachable, match="cannot listen"):
        LinkListener("203.0.113.1:0", TOKEN, LIMITS)


def test_who_is_no_listener_is_found_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            connection, _ = other.accept()
            with connection:
                connection.sendall(b"\x00\x05HTTP/" * 9)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ProbeRefused):
            measure(f"127.0.0.1:{other.getsockname()[1]}", TOKEN, LIMITS)
        thread.join()


def test_a_listener_that_goes_away_while_bytes_flow_is_said() -> None:
    limits = replace(LIMITS, seconds=3.0)
    with listening(limits) as listener:
        closer = threading.Timer(0.3, listener.close)
        closer.start()
        with pytest.raises(ProbeUnreachable):
            measure(listener.address, TOKEN, limits)
        closer.join()


def test_a_listeners_time_ends_by_itself() -> None:
    limits = replace(LIMITS, seconds=0.1, timeout_s=0.3)
    listener = LinkListener("127.0.0.1:0", TOKEN, limits)
    listener._acceptor.join(5)
    assert not listener._acceptor.is_alive()
    with pytest.raises(ProbeUnreachable):
        measure(listener.address, TOKEN, LIMITS)
    listener.close()


def test_the_rate_is_the_median_of_chunks_after_a_warm_up() -> None:
    slow_start = [(0.1 * step, 0 if step < 3 else (step - 3) * 100) for step in range(11)]
    assert throughput(slow_start) == pytest.approx(1000)
    # One long pause in the middle is not what the link carries.
    paused = [(0.1 * step, min(step, 10) * 100 + max(0, step - 13) * 100) for step in range(31)]
    assert throughput(paused) == pytest.approx(1000)
    assert throughput([(0.0, 0), (0.01, 500)]) == pytest.approx(50_000)
    with pytest.raises(ProbeUnreachable, match="0 bytes came"):
        throughput([(0.1 * step, 0) for step in range(11)])


@pytest.mark.parametrize(
    "wrong", [{"streams": 0}, {"streams": 65}, {"seconds": 0}, {"max_bytes": 0}, {"timeout_s": 0.3}, {"exchanges": 0}]
)
def test_limits_without_bounds_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(LIMITS, **wrong)


def test_the_probe_loads_neither_ray_nor_torch() -> None:
    program = (
        "import sys, slipstream.runtime.controller.link_actor as _; sys.exit(bool({'ray', 'torch'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-P", "-c", program], timeout=60).returncode == 0
