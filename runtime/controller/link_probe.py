"""What a TCP connection carries from a listener (``link_listener``) to here: round trips, and bytes in several streams.

Plain sockets; knows no nodes and no Ray. What comes first is not counted: TCP has to find its speed.
"""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from statistics import median

from ...comm.errors import CommTimeout, HandshakeRefused, PeerLost
from ...comm.handshake import RankHandshake
from ...comm.sockets import connect
from ..clock import Clock, monotonic_clock
from .link_wire import (
    BUFFER_BYTES,
    ECHO,
    HANDSHAKE_S,
    ProbeLimits,
    ProbeRefused,
    ProbeTimeout,
    ProbeUnreachable,
    hang_up,
    identity_of,
    prepare,
    read,
    receive,
    send,
)
from .links import LinkFigures

_MARK_S = 0.01
_CHUNKS = 8
_WARM_UP = 0.25
"""The share of the time that TCP may take to find its speed."""

_WARM_UP_EXCHANGES = 10


def measure(address: str, token: str, limits: ProbeLimits, *, clock: Clock = monotonic_clock) -> LinkFigures:
    """Measure what comes from a listener. Raises: ProbeError"""
    deadline_s = clock() + limits.timeout_s
    identity = identity_of(token)
    with _named(address), ExitStack() as connections:

        def stream(number: int) -> socket.socket:
            connection = connections.enter_context(connect(address, timeout_s=_left_s(deadline_s, clock)))
            prepare(connection, timeout_s=min(HANDSHAKE_S, _left_s(deadline_s, clock)))
            handshake = RankHandshake(identity, rank=number)
            send(connection, handshake.hello(receive(connection)))
            handshake.check(receive(connection))
            connection.settimeout(_left_s(deadline_s, clock))
            return connection

        trips = _round_trips(stream(ECHO), limits, clock)
        marks = _flow([stream(number) for number in range(1, limits.streams + 1)], limits, clock)
    return LinkFigures(
        bytes_per_s=throughput(marks),
        round_trip_s=median(trips),
        round_trip_p99_s=sorted(trips)[math.ceil(0.99 * len(trips)) - 1],
        moved_bytes=marks[-1][1],
    )


def throughput(marks: Sequence[tuple[float, int]]) -> float:
    """Return the median rate over chunks of about equal time, after a warm-up.

    Shapes: marks [times, at least 2] of (s, bytes received until then), ascending
    Raises: ProbeUnreachable when nothing came
    """
    (began_s, _), (ended_s, total) = marks[0], marks[-1]
    warm_s = began_s + _WARM_UP * (ended_s - began_s)
    chosen = [max(mark for mark in marks if mark[0] <= warm_s)]
    for number in range(1, _CHUNKS + 1):
        border_s = warm_s + number / _CHUNKS * (ended_s - warm_s)
        # Rates are over the times that there really were.
        mark = next((mark for mark in marks if mark[0] >= border_s), marks[-1])
        if mark[0] > chosen[-1][0]:
            chosen.append(mark)
    rate = median((after[1] - before[1]) / (after[0] - before[0]) for before, after in pairwise(chosen))
    if rate <= 0:
        raise ProbeUnreachable(f"{total} bytes came in {ended_s - began_s:.1f} s, with long pauses")
    return rate


def _round_trips(connection: socket.socket, limits: ProbeLimits, clock: Clock) -> list[float]:
    """Return how long messages took there and back, without the first ones."""
    message, answer = bytes(limits.exchange_bytes), memoryview(bytearray(limits.exchange_bytes))
    found: list[float] = []
    ends_s = clock() + limits.seconds
    while len(found) < limits.exchanges and (clock() < ends_s or not found):
        began_s = clock()
        connection.sendall(message)
        read(connection, answer)
        found.append(clock() - began_s)
    return found[min(_WARM_UP_EXCHANGES, len(found) // 4) :]


def _flow(connections: Sequence[socket.socket], limits: ProbeLimits, clock: Clock) -> list[tuple[float, int]]:
    """Receive on all connections at once, and return how much had come at which time."""
    counts, over = [0] * len(connections), threading.Event()

    def take(index: int) -> None:
        buffer = memoryview(bytearray(BUFFER_BYTES))
        with suppress(OSError):
            while not over.is_set() and (count := connections[index].recv_into(buffer)):
                counts[index] += count

    threads = [
        threading.Thread(target=take, args=(index,), name="slipstream-link-stream", daemon=True)
        for index in range(len(connections))
    ]
    # Before the first byte is taken: few bytes may all be waiting here already.
    marks = [(clock(), 0)]
    ends_s = marks[0][0] + limits.seconds
    for thread in threads:
        thread.start()
    alive = True
    # What comes after the last byte is no pause of the link's.
    while alive and marks[-1][0] < ends_s and marks[-1][1] < limits.max_bytes:
        over.wait(_MARK_S)
        # Asked before the bytes are: what has ended has counted all that it will.
        alive = any(thread.is_alive() for thread in threads)
        marks.append((clock(), sum(counts)))
    over.set()
    for connection in connections:
        hang_up(connection)
    for thread in threads:
        thread.join(HANDSHAKE_S)
    if marks[-1][0] < ends_s and marks[-1][1] < limits.max_bytes:
        raise ProbeUnreachable(f"the connections ended after {marks[-1][1]} bytes")
    return marks


@contextmanager
def _named(address: str) -> Iterator[None]:
    """Give what goes wrong its name."""
    try:
        yield
    except HandshakeRefused as error:
        raise ProbeRefused(f"who answers at {address} does not take part in this measurement") from error
    except (CommTimeout, TimeoutError) as error:
        raise ProbeTimeout(f"{address} does not answer in time") from error
    except PeerLost as error:
        raise ProbeUnreachable(str(error)) from error
    except OSError as error:
        raise ProbeUnreachable(f"the connection to {address} broke: {error}") from error


def _left_s(deadline_s: float, clock: Clock) -> float:
    left_s = deadline_s - clock()
    if left_s <= 0:
        raise TimeoutError("the measurement's time is over")
    return left_s
