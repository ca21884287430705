"""KV over TCP: scatter and gather straight from and into KV memory, over several connections to each rank.

The kernel reads the runs of a frame where they lie and writes them where they belong, in one call each; no byte is
copied in Python. Listens at an address of its host, port 0 for any free one, and tells which it became.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence

from ..errors import CommMisuse
from ..wire import Clock
from .channel import SocketEnd, StreamLimits


class TcpChannel:
    """Frames on a socket: header, then bytes."""

    def __init__(self, end: SocketEnd) -> None:
        self._end = end

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._end.fileno()

    def send(self, header: bytes, runs: Sequence[memoryview]) -> None:
        """Send a frame."""
        self._end.send_all([header, *runs])

    def receive_header(self, header: bytearray) -> None:
        """Wait for the next frame's header."""
        self._end.fill_when_it_comes(header)

    def receive(self, runs: Sequence[memoryview]) -> None:
        """Fill runs with the frame's bytes."""
        self._end.fill(runs)

    def skip(self, count: int) -> None:
        """Read over a frame's bytes."""
        self._end.read_over(count)

    def end(self) -> None:
        """End the connection."""
        self._end.end()

    def close(self) -> None:
        """Give the descriptor back."""
        self._end.close()


class Tcp:
    """How streams make channels of TCP connections."""

    def check_address(self, address: str, *, across_hosts: bool) -> None:
        """Make sure that an address means this host to whoever it is told: not any host, nor every host's own."""
        host = address.rpartition(":")[0].removeprefix("[").removesuffix("]")
        try:
            parsed = ipaddress.ip_address(host)
        except ValueError:
            local = host == "localhost"
        else:
            local = parsed.is_loopback
            if parsed.is_unspecified:
                raise CommMisuse(
                    f"KV cannot be received at {address}: give the address by which other hosts know this one"
                )
        if local and across_hosts:
            raise CommMisuse(f"KV cannot be received at {address} from other hosts: give one that they can reach")

    def channel_to(self, sock: socket.socket, *, peer: str, limits: StreamLimits, clock: Clock) -> TcpChannel:
        """Return the sending end."""
        return self._channel(sock, peer, limits, clock)

    def channel_from(self, sock: socket.socket, *, peer: str, limits: StreamLimits, clock: Clock) -> TcpChannel:
        """Return the receiving end."""
        return self._channel(sock, peer, limits, clock)

    def _channel(self, sock: socket.socket, peer: str, limits: StreamLimits, clock: Clock) -> TcpChannel:
        return TcpChannel(SocketEnd(sock, peer=peer, frame_timeout_s=limits.frame_timeout_s, clock=clock))
