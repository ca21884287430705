"""KV over TCP: scatter and gather straight from and into KV memory, over several connections to each rank.

The kernel reads the runs of a frame where they lie and writes them where they belong, in one call each; no byte is
copied in Python. Listens at an address of its host, port 0 for any free one, and tells which it became.
"""

from __future__ import annotations

import ipaddress
import socket

from ..errors import CommMisuse, PeerLost
from ..wire import Clock
from .channel import PORTION_BYTES, Look, PlainCarrier, SocketEnd, StreamLimits, portions
from .memory import Runs

NEAR_BUFFER_BYTES = 256 << 10
"""What the kernel holds of a connection within one host, each way. Left alone it lets this grow to megabytes, through
which bytes fall out of the processor's caches between its two copies. Between hosts it knows best."""


class TcpChannel:
    """Frames on a socket: header, then bytes."""

    ahead = 1

    def __init__(self, end: SocketEnd) -> None:
        self._end = end
        self._settled = 0

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._end.fileno()

    def send(self, header: bytes, runs: Runs) -> None:
        """Send a frame: the kernel has its bytes when this returns."""
        self._end.send_all([header, *runs])
        self._settled += 1

    def settle(self, *, wait: bool) -> int:
        """Return how many frames were sent since the last time."""
        settled, self._settled = self._settled, 0
        return settled

    def receive_header(self, header: bytearray) -> None:
        """Wait for the next frame's header."""
        self._end.fill_when_it_comes(header)

    def receive(self, runs: Runs, look: Look | None) -> None:
        """Fill runs with the frame's bytes."""
        if look is None:
            self._end.fill(runs)
            return
        for pieces in portions(runs, PORTION_BYTES):
            self._end.fill(pieces)
            for piece in pieces:
                look(piece)

    def skip(self, count: int) -> None:
        """Read over a frame's bytes."""
        self._end.read_over(count)

    def end(self) -> None:
        """End the connection."""
        self._end.end()

    def close(self) -> None:
        """Give the descriptor back."""
        self._end.close()


class Tcp(PlainCarrier):
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
        try:
            if sock.getsockname()[0] == sock.getpeername()[0]:
                for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                    sock.setsockopt(socket.SOL_SOCKET, option, NEAR_BUFFER_BYTES)
        except OSError as error:
            raise PeerLost(f"{peer} is gone: {error}") from error
        return TcpChannel(SocketEnd(sock, peer=peer, frame_timeout_s=limits.frame_timeout_s, clock=clock))
