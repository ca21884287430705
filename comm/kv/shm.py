"""KV between processes of one host: words go over a unix socket, bytes do not.

The receiver reads them out of the sender's memory where the system lets it (``direct``), one copy in all. Elsewhere,
as where processes may not look at one another or are in containers of their own, they go through a ring of shared
memory (``ring``). Which it is comes from a trial when two ends have met. Either way it is the receiver who writes to
its blocks, and its gate holds as it does over a network.
"""

from __future__ import annotations

import mmap
import os
import socket

from ..errors import BadFrame, CommMisuse, CommTimeout, PeerLost
from ..wire import Clock
from .channel import PlainCarrier, SocketEnd, StreamLimits
from .direct import PROBE_BYTES, DirectReceiver, DirectSender, probe, readable_peer
from .ring import RingReceiver, RingSender, mapped_ring, new_ring

_RING = b"r"
_DIRECT = b"d"


class Shm(PlainCarrier):
    """How streams make channels of unix sockets and what both ends can reach; ``direct``: if memory may be read."""

    def __init__(self, *, direct: bool = True) -> None:
        self._direct = direct

    def check_address(self, address: str, *, across_hosts: bool) -> None:
        """Make sure that both ends are on one host."""
        if across_hosts or not address.startswith("unix:"):
            raise CommMisuse(f"KV at {address} cannot go through shared memory: that is of one host, at unix:/path")

    def channel_to(
        self, sock: socket.socket, *, peer: str, limits: StreamLimits, clock: Clock
    ) -> DirectSender | RingSender:
        """Return the sending end: let the other try what it can do, and map its ring if that is what it hands over."""
        end = SocketEnd(sock, peer=peer, frame_timeout_s=limits.frame_timeout_s, clock=clock)
        words, token = probe()
        end.send_all([_DIRECT + words] if self._direct else [_RING])
        try:
            answer, descriptors, _, _ = socket.recv_fds(sock, 1, 1)
        except BlockingIOError as error:
            raise CommTimeout(f"{peer} does not say how KV is to reach it") from error
        except OSError as error:
            raise PeerLost(f"{peer} is gone: {error}") from error
        # Read by the other end until it has answered.
        del token
        if answer == _DIRECT and self._direct:
            return DirectSender(end)
        if len(descriptors) != 1:
            raise PeerLost(f"{peer} handed over no shared memory")
        try:
            return RingSender(end, mapped_ring(descriptors[0], peer))
        finally:
            os.close(descriptors[0])

    def channel_from(
        self, sock: socket.socket, *, peer: str, limits: StreamLimits, clock: Clock
    ) -> DirectReceiver | RingReceiver:
        """Return the receiving end: try to read from the other, or make a ring and hand it over."""
        end = SocketEnd(sock, peer=peer, frame_timeout_s=limits.frame_timeout_s, clock=clock)
        word = bytearray(1)
        end.fill([memoryview(word)])
        if word == _DIRECT:
            words = bytearray(PROBE_BYTES)
            end.fill([memoryview(words)])
            process = readable_peer(sock, words) if self._direct else None
            if process is not None:
                end.send_all([_DIRECT])
                return DirectReceiver(end, process)
        elif word != _RING:
            raise BadFrame(f"{peer} does not say how its KV can be reached")
        descriptor = new_ring(limits.ring_bytes)
        try:
            socket.send_fds(sock, [_RING], [descriptor])
            return RingReceiver(end, mmap.mmap(descriptor, 0))
        except OSError as error:
            raise PeerLost(f"{peer} is gone: {error}") from error
        finally:
            os.close(descriptor)
