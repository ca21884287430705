"""KV by NIXL, which moves it by RDMA where there is that: read by the receiver out of the sender's registered memory.

Optional: where the library cannot be imported, there are no transports of this kind. Words go over a socket, as for
``tcp``. Only the receiver reads, into what its gate has admitted. That a sender has not given up meanwhile cannot be
seen at this end of a network: it says so after it heard that a frame was read, and nothing is applied before that.
"""

from __future__ import annotations

import logging
import secrets
import socket
import threading
from struct import Struct
from typing import Any, Protocol

import numpy as np

try:
    from nixl._api import nixl_agent, nixl_agent_config
except ImportError:
    nixl_agent = None

from ..errors import BadFrame, CommError, CommMisuse, CommTimeout, PeerLost
from ..wire import Clock, Deadline
from .channel import Look, SocketEnd, StreamLimits
from .memory import KvMemory, KvStore, Runs, Spans
from .places import hear_places, paired, said_places
from .tcp import Tcp

logger = logging.getLogger(__name__)

MAX_METADATA_BYTES = 1 << 20
_SIZE = Struct("!I")
_DONE = b"d"
_KEPT = b"k"
_READY = b"r"
_LOOK_S = (20e-6, 1e-3)
"""How often a read in progress is looked at: at first, and at last."""


class Agent(Protocol):
    """What is used of the library's agents."""

    def register_memory(self, reg_list: Any, mem_type: str) -> Any: ...
    def deregister_memory(self, dereg_list: Any) -> Any: ...
    def get_agent_metadata(self) -> bytes: ...
    def add_remote_agent(self, metadata: bytes) -> Any: ...
    def remove_remote_agent(self, agent: str) -> Any: ...
    def get_xfer_descs(self, descs: Any, mem_type: str) -> Any: ...
    def initialize_xfer(self, operation: str, local_descs: Any, remote_descs: Any, remote_agent: str) -> Any: ...
    def transfer(self, handle: Any) -> str: ...
    def check_xfer_state(self, handle: Any) -> str: ...
    def release_xfer_handle(self, handle: Any) -> Any: ...


def available() -> bool:
    """Return whether the library is here."""
    return nixl_agent is not None


def open_agent() -> Agent:
    """Return an agent of the library's, under a name that no other has. Raises: CommMisuse"""
    if nixl_agent is None:
        raise CommMisuse("KV by NIXL needs its library: pip install nixl")
    agent: Agent = nixl_agent(f"slipstream-{secrets.token_hex(16)}", nixl_agent_config(backends=["UCX"]))
    return agent


class Nixl:
    """How streams make channels of TCP connections and NIXL agents."""

    def __init__(self, agent: Agent | None = None) -> None:
        self._agent = open_agent() if agent is None else agent
        # An agent is for one thread at a time.
        self._lock = threading.Lock()
        self._registered: Any = None
        self._peers: dict[bytes, tuple[str, int]] = {}

    def check_address(self, address: str, *, across_hosts: bool) -> None:
        """Make sure that peers can come to this address."""
        Tcp().check_address(address, across_hosts=across_hosts)

    def register(self, memory: KvStore) -> None:
        """Let the network's adapter reach the memory."""
        if not isinstance(memory, KvMemory):
            raise CommMisuse(
                "KV by NIXL needs a cache in the host's memory, of the type that crosses; use nccl or tcp for others"
            )
        regions = [(address, count, 0, "") for address, count in memory.regions]
        with self._lock:
            self._registered = self._agent.register_memory(regions, mem_type="DRAM")

    def close(self) -> None:
        """Take the memory back."""
        with self._lock:
            registered, self._registered = self._registered, None
            if registered is not None:
                self._agent.deregister_memory(registered)

    def channel_to(self, sock: socket.socket, *, peer: str, limits: StreamLimits, clock: Clock) -> NixlSender:
        """Return the sending end: tell the other how to reach this memory."""
        end = SocketEnd(sock, peer=peer, frame_timeout_s=limits.frame_timeout_s, clock=clock)
        with self._lock:
            metadata = self._agent.get_agent_metadata()
        end.send_all([_SIZE.pack(len(metadata)), metadata])
        word = bytearray(1)
        end.fill([memoryview(word)])
        if word != _READY:
            raise BadFrame(f"{peer} does not say that it can read this rank's memory")
        return NixlSender(end)

    def channel_from(self, sock: socket.socket, *, peer: str, limits: StreamLimits, clock: Clock) -> NixlReceiver:
        """Return the receiving end: learn how to reach the other's memory."""
        end = SocketEnd(sock, peer=peer, frame_timeout_s=limits.frame_timeout_s, clock=clock)
        head = bytearray(_SIZE.size)
        end.fill([memoryview(head)])
        (count,) = _SIZE.unpack(head)
        if not 0 < count <= MAX_METADATA_BYTES:
            raise BadFrame(f"{peer} announces {count} bytes on how to reach its memory")
        metadata = bytearray(count)
        end.fill([memoryview(metadata)])
        remote = self._meet(bytes(metadata), peer)
        try:
            end.send_all([_READY])
        except BaseException:
            self.part(bytes(metadata))
            raise
        return NixlReceiver(end, self, bytes(metadata), remote, limits=limits, clock=clock)

    # -------------------------------------------------------------- for channels

    def read(self, remote: str, into: Spans, out_of: Spans, deadline: Deadline) -> None:
        """Read a peer's memory; when this ends, nothing is written any more. Raises: PeerLost, CommTimeout"""
        agent = self._agent
        try:
            with self._lock:
                if self._registered is None:
                    raise PeerLost("reading KV by NIXL is over: its memory was taken back")
                local, theirs = (agent.get_xfer_descs(_listed(spans), mem_type="DRAM") for spans in (into, out_of))
                handle = agent.initialize_xfer("READ", local, theirs, remote)
                state = agent.transfer(handle)
        except CommError:
            raise
        except Exception as error:  # the library's own kinds, of which it has many
            raise PeerLost(f"reading KV by NIXL failed: {error}") from error
        try:
            state = self._followed(handle, state, deadline)
        finally:
            self._let_go(handle)
        if state != "DONE":
            raise PeerLost(f"reading KV by NIXL ended as {state}")

    def _followed(self, handle: Any, state: str, deadline: Deadline) -> str:
        """Return how a read ends. Raises: CommTimeout"""
        pause, pause_s = threading.Event(), _LOOK_S[0]
        while state == "PROC":
            if not deadline.remaining_s:
                raise CommTimeout("reading KV by NIXL takes too long")
            pause.wait(pause_s)
            pause_s = min(2 * pause_s, _LOOK_S[1])
            with self._lock:
                state = self._agent.check_xfer_state(handle)
        return state

    def _let_go(self, handle: Any) -> None:
        """Give a read back, which ends it if it goes on."""
        try:
            with self._lock:
                self._agent.release_xfer_handle(handle)
        except Exception:  # it cannot be ended by itself: then the adapter may write to nothing here any more
            logger.exception("a read by NIXL does not end; this rank's memory is taken back from it")
            self.close()

    def part(self, metadata: bytes) -> None:
        """Forget a peer when its last channel goes."""
        with self._lock:
            name, count = self._peers.pop(metadata)
            if count > 1:
                self._peers[metadata] = (name, count - 1)
            else:
                self._agent.remove_remote_agent(name)

    def _meet(self, metadata: bytes, peer: str) -> str:
        with self._lock:
            name, count = self._peers.get(metadata, ("", 0))
            if not count:
                try:
                    found = self._agent.add_remote_agent(metadata)
                except Exception as error:  # the library's own kinds, of which it has many
                    raise BadFrame(f"{peer} says what NIXL does not understand: {error}") from error
                name = found.decode() if isinstance(found, bytes) else str(found)
            self._peers[metadata] = (name, count + 1)
            return name


class NixlSender:
    """The end that says where frames are, and that it has kept them until they were read."""

    ahead = 1

    def __init__(self, end: SocketEnd) -> None:
        self._end = end
        self._word = memoryview(bytearray(1))
        self._unsettled = 0

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._end.fileno()

    def send(self, header: bytes, runs: Runs) -> None:
        """Say where a frame is."""
        self._unsettled += 1
        self._end.send_all(said_places(header, runs))

    def settle(self, *, wait: bool) -> int:
        """Return whether the frame was read, and say that it was there until now."""
        if not self._unsettled or not self._end.read_some(self._word, wait=wait):
            return 0
        if self._word != _DONE:
            raise BadFrame(f"{self._end.peer} does not keep to the words about KV frames")
        self._end.send_all([_KEPT])
        self._unsettled -= 1
        return 1

    def end(self) -> None:
        """End the connection; what this end did not confirm is not applied over there."""
        self._end.end()

    def close(self) -> None:
        """Give the descriptor back."""
        self._end.close()


class NixlReceiver:
    """The end that reads them."""

    def __init__(
        self, end: SocketEnd, nixl: Nixl, metadata: bytes, remote: str, *, limits: StreamLimits, clock: Clock
    ) -> None:
        self._end = end
        self._nixl = nixl
        self._metadata = metadata
        self._remote = remote
        self._timeout_s = limits.frame_timeout_s
        self._clock = clock

    def receive_header(self, header: bytearray) -> None:
        """Wait for the next frame's header."""
        self._end.fill_when_it_comes(header)

    def receive(self, runs: Runs, look: Look | None) -> None:
        """Fill runs with the frame's bytes."""
        count = runs.num_bytes
        there = hear_places(self._end, count)
        deadline = Deadline(self._timeout_s, self._clock)
        calls = [pair for calls in paired(runs.spans, there, count) for pair in calls]
        into, out_of = (np.concatenate(spans) for spans in zip(*calls, strict=True))
        self._nixl.read(self._remote, into, out_of, deadline)
        self._end.send_all([_DONE])
        word = bytearray(1)
        self._end.fill([memoryview(word)])
        if word != _KEPT:
            raise BadFrame(f"{self._end.peer} does not keep to the words about KV frames")
        if look is not None:
            for run in runs:
                look(run)

    def skip(self, count: int) -> None:
        """Leave a frame unread."""
        hear_places(self._end, None)
        self._end.send_all([_DONE])
        word = bytearray(1)
        self._end.fill([memoryview(word)])

    def close(self) -> None:
        """Give the descriptor back."""
        self._end.close()
        self._nixl.part(self._metadata)


def _listed(spans: Spans) -> Any:
    """Return spans as the library takes them: address, length, device."""
    return np.concatenate((spans, np.zeros((len(spans), 1), dtype=spans.dtype)), axis=1).astype(np.uint64)
