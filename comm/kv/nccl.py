"""KV between GPUs by NCCL: a communicator for each connection, of two ranks, that ends with it and with nothing else.

Words go over a socket: a header, and whether the receiver's gate lets its frame in. Only then both sides begin, so a
communicator never waits for somebody who does not come, and what was not admitted never leaves the sender. Ending a
connection aborts its communicator, which lets go of whoever waits in it. Frames pass through buffers on the devices.
"""

from __future__ import annotations

import json
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from struct import Struct
from typing import Protocol

from torch import Tensor

from ..collectives import Collectives
from ..errors import BadFrame, CommMisuse
from ..nccl_group import NcclWork
from ..torch_groups import GroupSettings, Rendezvous, open_group
from ..wire import Clock
from .channel import Look, SocketEnd, StreamLimits
from .memory import KvStore, Runs
from .staging import DeviceRuns, StagedStore
from .tcp import Tcp

MAX_INVITATION_BYTES = 1024
_SIZE = Struct("!I")
_GO = b"g"
_SKIP = b"s"
_SENDER, _RECEIVER = 0, 1


class Pairs(Protocol):
    """How two ends come by a communicator. Raises: CommTimeout, PeerLost, BadFrame"""

    def invite(self) -> tuple[bytes, Callable[[], Collectives]]:
        """Return what to tell the sender, and what opens the receiver's end once it was told."""
        ...

    def join(self, invitation: bytes) -> Collectives:
        """Open the sender's end."""
        ...


@dataclass(frozen=True, slots=True)
class GroupPairs:
    """Pairs that meet at a store which the receiver hosts for as long as that takes."""

    settings: GroupSettings

    def invite(self) -> tuple[bytes, Callable[[], Collectives]]:
        """Host a store."""
        open_timeout_s = self.settings.open_timeout_s
        rendezvous = Rendezvous.host(self.settings.host_address, timeout_s=open_timeout_s)
        name = f"kv-{secrets.token_hex(8)}"
        words = json.dumps([rendezvous.address, rendezvous.port, name]).encode()
        return words, lambda: self._open(rendezvous, name, _RECEIVER)

    def join(self, invitation: bytes) -> Collectives:
        """Join a store."""
        try:
            address, port, name = json.loads(invitation)
            known = type(address) is str and type(name) is str and type(port) is int and 0 < port < 1 << 16
        except (ValueError, TypeError, RecursionError):
            known = False
        if not known:
            raise BadFrame("an invitation to a communicator that is none")
        rendezvous = Rendezvous.join(address, port, timeout_s=self.settings.open_timeout_s)
        return self._open(rendezvous, name, _SENDER)

    def _open(self, rendezvous: Rendezvous, name: str, rank: int) -> Collectives:
        try:
            return open_group(rendezvous, self.settings, name=name, prefix=f"slipstream/{name}", rank=rank, size=2)
        finally:
            rendezvous.close()


class Nccl:
    """How streams make channels of sockets and communicators."""

    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs

    def check_address(self, address: str, *, across_hosts: bool) -> None:
        """Make sure that peers can come to this address."""
        Tcp().check_address(address, across_hosts=across_hosts)

    def register(self, memory: KvStore) -> None:
        """Make sure that frames are where communicators take them."""
        if not isinstance(memory, StagedStore) or not memory.on_device:
            raise CommMisuse("KV by NCCL goes from GPU to GPU: make its store with on_device")

    def close(self) -> None:
        """Nothing: communicators end with their connections."""

    def channel_to(self, sock: socket.socket, *, peer: str, limits: StreamLimits, clock: Clock) -> NcclSender:
        """Return the sending end: take the other's invitation."""
        end = SocketEnd(sock, peer=peer, frame_timeout_s=limits.frame_timeout_s, clock=clock)
        # The listener's last word of the meeting is behind us now; what comes next is ours.
        end.send_all([_GO])
        head = bytearray(_SIZE.size)
        end.fill([memoryview(head)])
        (count,) = _SIZE.unpack(head)
        if not 0 < count <= MAX_INVITATION_BYTES:
            raise BadFrame(f"{peer} announces an invitation of {count} bytes")
        invitation = bytearray(count)
        end.fill([memoryview(invitation)])
        return NcclSender(end, self._pairs.join(bytes(invitation)))

    def channel_from(self, sock: socket.socket, *, peer: str, limits: StreamLimits, clock: Clock) -> NcclReceiver:
        """Return the receiving end: invite the other."""
        end = SocketEnd(sock, peer=peer, frame_timeout_s=limits.frame_timeout_s, clock=clock)
        word = bytearray(1)
        end.fill([memoryview(word)])
        if word != _GO:
            raise BadFrame(f"{peer} does not ask for a communicator")
        invitation, open_pair = self._pairs.invite()
        end.send_all([_SIZE.pack(len(invitation)), invitation])
        return NcclReceiver(end, open_pair())


class NcclSender:
    """The sending end: rank 0 of the communicator."""

    ahead = 1

    def __init__(self, end: SocketEnd, pair: Collectives) -> None:
        self._end = end
        self._pair = pair
        self._word = memoryview(bytearray(1))
        self._settled = 0

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._end.fileno()

    def send(self, header: bytes, runs: Runs) -> None:
        """Send a frame if it is let in."""
        self._end.send_all([header])
        self._end.fill([self._word])
        if self._word == _GO:
            _until_done(self._pair, _piece(runs), sending=True)
        elif self._word != _SKIP:
            raise BadFrame(f"{self._end.peer} does not keep to the words about KV frames")
        self._settled += 1

    def settle(self, *, wait: bool) -> int:
        """Return how many frames were sent since the last time."""
        settled, self._settled = self._settled, 0
        return settled

    def end(self) -> None:
        """End the connection and its communicator."""
        self._end.end()
        self._pair.close()

    def close(self) -> None:
        """Give everything back."""
        self._end.close()
        self._pair.close()


class NcclReceiver:
    """The receiving end: rank 1 of the communicator."""

    def __init__(self, end: SocketEnd, pair: Collectives) -> None:
        self._end = end
        self._pair = pair

    def receive_header(self, header: bytearray) -> None:
        """Wait for the next frame's header."""
        self._end.fill_when_it_comes(header)

    def receive(self, runs: Runs, look: Look | None) -> None:
        """Let the frame in and take it."""
        if look is not None:
            raise CommMisuse("KV by NCCL has no checksums: offer it without")
        self._end.send_all([_GO])
        _until_done(self._pair, _piece(runs), sending=False)

    def skip(self, count: int) -> None:
        """Have the frame stay where it is."""
        self._end.send_all([_SKIP])

    def close(self) -> None:
        """Give everything back."""
        self._end.close()
        self._pair.close()


def _piece(runs: Runs) -> Tensor:
    if not isinstance(runs, DeviceRuns):
        raise CommMisuse("KV by NCCL goes from GPU to GPU: make its store with on_device")
    return runs.piece


def _until_done(pair: Collectives, piece: Tensor, *, sending: bool) -> None:
    """Move a piece, and wait on the host until its memory may be used again. Raises: PeerLost, CommTimeout"""
    work = pair.send(piece, to=_RECEIVER) if sending else pair.receive(piece, source=_SENDER)
    work.wait()
    if isinstance(work, NcclWork):
        work.wait_on_host()
