"""Talk about KV within one process, without a wire: the same contract, values handed over as they are, at once.

Nothing waits here, so nothing is lost while a connection lasts; ``stop`` and a second ``serve`` are a driver that ends
and one that starts anew at its address. Whoever calls is the thread that hears.
"""

from __future__ import annotations

import threading

from ...comm.errors import KvMismatch
from ...comm.kv.transfer import FromReceiver, FromSender
from ...sdk.errors import EngineUnavailable
from .kv_talk import KvEar, KvFacts, KvHost

MAX_WAITING = 4096


class InProcessKvTalker:
    """A ``KvTalker`` between the hosts of this process."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._hosts: dict[str, KvHost] = {}
        self._callers: list[InProcessKvCaller] = []

    def serve(self, address: str, host: KvHost) -> None:
        """Let a host answer at an address; whoever calls there meets it now."""
        with self._lock:
            self.stop(address)
            self._hosts[address] = host
            for caller in self._at(address):
                caller.connect(host)

    def stop(self, address: str) -> None:
        """End the host at an address: its lines are left, and their callers hear of it."""
        with self._lock:
            if self._hosts.pop(address, None) is not None:
                for caller in self._at(address):
                    caller.lose(EngineUnavailable(f"the driver at {address} has ended"))

    def call(self, *, replica: str, address: str, ours: KvFacts, ear: KvEar) -> InProcessKvCaller:
        """Connect to the driver of a replica; see ``KvTalker.call``."""
        caller = InProcessKvCaller(self, replica, address, ours, ear)
        with self._lock:
            self._callers.append(caller)
            host = self._hosts.get(address)
            if host is None:
                ear.lost(EngineUnavailable(f"nobody answers at {address}"))
            else:
                caller.connect(host)
        return caller

    def forget(self, caller: InProcessKvCaller) -> None:
        """Let go of a caller that was closed."""
        with self._lock:
            if caller in self._callers:
                self._callers.remove(caller)

    def _at(self, address: str) -> list[InProcessKvCaller]:
        return [caller for caller in self._callers if caller.address == address]


class InProcessKvCaller:
    """A ``KvCaller``."""

    def __init__(self, talker: InProcessKvTalker, replica: str, address: str, ours: KvFacts, ear: KvEar) -> None:
        self.address = address
        self._talker = talker
        self._replica = replica
        self._ours = ours
        self._ear = ear
        self._host: KvHost | None = None
        self._line: InProcessKvLine | None = None
        self._waiting: list[FromSender] = []
        self._closed = False

    def connect(self, host: KvHost) -> None:
        """Meet a host, and say what waited for that."""
        line = InProcessKvLine(self, self._ours, self._ear)
        theirs = host.facts
        if theirs.replica != self._replica:
            self._lost(EngineUnavailable(f"at {self.address} is replica {theirs.replica!r}, not {self._replica!r}"))
            return
        self._host, self._line = host, line
        try:
            self._ear.met(theirs)
            host.greet(self._ours, line)
        except KvMismatch as error:
            self._host = self._line = None
            self._lost(error)
            return
        waiting, self._waiting = self._waiting, []
        for message in waiting:
            self.say(message)

    def lose(self, error: Exception) -> None:
        """Lose the connection, if there is one."""
        host, line, self._host, self._line = self._host, self._line, None, None
        if host is not None and line is not None:
            host.left(line)
            self._lost(error)

    def say(self, message: FromSender) -> bool:
        """Send a message; what is said while there is no connection waits for one."""
        host, line = self._host, self._line
        if host is not None and line is not None:
            host.hear(line, message)
            return True
        if self._closed or len(self._waiting) >= MAX_WAITING:
            return False
        self._waiting.append(message)
        return True

    def is_on(self, line: InProcessKvLine) -> bool:
        """Return whether this is its connection now."""
        return self._line is line

    def close(self) -> None:
        """End it. Idempotent."""
        self._closed = True
        self._talker.forget(self)
        host, line, self._host, self._line = self._host, self._line, None, None
        if host is not None and line is not None:
            host.left(line)

    def _lost(self, error: Exception) -> None:
        self._waiting.clear()
        self._ear.lost(error)


class InProcessKvLine:
    """A ``KvLine``."""

    def __init__(self, caller: InProcessKvCaller, theirs: KvFacts, ear: KvEar) -> None:
        self._caller = caller
        self._theirs = theirs
        self._ear = ear

    @property
    def theirs(self) -> KvFacts:
        """What the sending driver said of itself."""
        return self._theirs

    def say(self, message: FromReceiver) -> bool:
        """Send a message to the caller, while the connection lasts."""
        if not self._caller.is_on(self):
            return False
        self._ear.hear(message)
        return True

    def close(self) -> None:
        """End the connection. Idempotent."""
        if self._caller.is_on(self):
            self._caller.lose(EngineUnavailable("the driver ended the connection"))
