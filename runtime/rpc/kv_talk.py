"""What the drivers of two replicas are to one another while KV passes between them, whatever carries their words.

    sending driver                                            receiving driver
      KvTalker.call(replica, address) ──▶ KvCaller     KvHost, behind a server
        KvEar.met      ◀──────────── facts ────────────▶  greet
        KvCaller.say   ── FromSender ───────────────────▶  hear
        KvEar.hear     ◀──────────────── FromReceiver ──   KvLine.say
        KvEar.lost                                         left

Values and protocols only; knows neither gRPC nor what the words mean: that is ``comm/kv``. ``kv_client`` and
``kv_server`` are this over gRPC, ``kv_in_process`` within one process; a contract suite in ``tests`` holds both.
Messages may be lost with a connection, never changed or put into another order within one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from ...comm.kv.layout import KvOffer
from ...comm.kv.transfer import FromReceiver, FromSender, Peer
from ...placement.kv_routes import KvLayout

KV_TALK_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class KvFacts:
    """What one life of a replica says of its KV and of where it takes KV.

    ``ends``: for each rank, the address of each kind of transport ("tcp", "shm"). ``host_id`` is the same where memory
    can be shared. ``offer``: rank 0's, to compare models by name before any request depends on it; None tells nothing.
    """

    replica: str
    incarnation: int
    layout: KvLayout
    ends: tuple[Mapping[str, str], ...]
    host_id: str
    offer: KvOffer | None = None

    @property
    def peer(self) -> Peer:
        """The life that says so."""
        return Peer(self.replica, self.incarnation)


class KvLine(Protocol):
    """The receiving driver's end of one connection."""

    @property
    def theirs(self) -> KvFacts:
        """What the sending driver said of itself."""
        ...

    def say(self, message: FromReceiver) -> bool:
        """Send a message, from any thread, without waiting; False when it is dropped, because too much waits."""
        ...

    def close(self) -> None:
        """End the connection, from any thread. Idempotent."""
        ...


class KvHost(Protocol):
    """A receiving driver. All of it is called on the server's event loop and must not wait."""

    @property
    def facts(self) -> KvFacts:
        """What this life is."""
        ...

    def greet(self, theirs: KvFacts, line: KvLine) -> None:
        """Meet a sending driver; its words come with this line from now on, until ``left``.

        Raises: KvMismatch when its KV is none for us: the connection ends, and it hears why
        """
        ...

    def hear(self, line: KvLine, message: FromSender) -> None:
        """Take a message."""
        ...

    def left(self, line: KvLine) -> None:
        """Note that a connection is over; once for each that was greeted."""
        ...


class KvEar(Protocol):
    """What a sending driver hears of one receiving driver. Called on an event loop; must not wait."""

    def met(self, theirs: KvFacts) -> None:
        """Meet a life of the replica; its words come from now on, until ``lost``.

        Raises: KvMismatch when our KV is none for it: the connection ends, and ``lost`` says so
        """
        ...

    def hear(self, message: FromReceiver) -> None:
        """Take a message of the life that was met."""
        ...

    def lost(self, error: Exception) -> None:
        """Note that the connection broke, or could not be made. It is tried again until the caller is closed.

        ``error``: KvMismatch; SecretRefused, of a caller without a secret perhaps only at its second try; otherwise
        EngineUnavailable
        """
        ...


class KvCaller(Protocol):
    """The sending driver's end of a connection that is made anew whenever it breaks."""

    def say(self, message: FromSender) -> bool:
        """Send a message, from any thread, without waiting; False when it is dropped, because too much waits.

        What is said while there is no connection waits for the one that is being made, and is dropped if that fails.
        """
        ...

    def close(self) -> None:
        """End it, from any thread. Idempotent.

        Nothing is heard any more, ``lost`` neither, but what is being told on the loop at that moment.
        """
        ...


class KvTalker(Protocol):
    """Where a sending driver gets its callers."""

    def call(self, *, replica: str, address: str, ours: KvFacts, ear: KvEar) -> KvCaller:
        """Connect to the driver of a replica, from any thread, without waiting.

        Whoever answers at ``address`` under another name is not met.
        Raises: ConfigError naming ``address``
        """
        ...
