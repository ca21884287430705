"""The lines of a desk over ``KvTalk``: who calls this replica, whom it calls, and where their ranks take KV.

A ``KvHost`` to the server, and the owner of all callers. Every replica has one line in each direction at most, that of
its newest life. Called from the desk's thread, the engine's and an event loop; its lock is held for moments only, and
no line is called with it held. One thread at a time opens lines, the one that holds the engine's lock.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass

from ...comm.errors import KvMismatch
from ...comm.kv.layout import check_fit
from ...comm.kv.transfer import FromReceiver, FromSender, Peer
from ...placement.kv_routes import KvLayout
from ...sdk.errors import ConfigError
from ..rpc.kv_talk import KvCaller, KvFacts, KvLine, KvTalker
from .lines import LineEvents
from .rank_orders import KvTarget, RankEnd

logger = logging.getLogger(__name__)

_MAX_REPLICAS = 1024


@dataclass(slots=True)
class _Called:
    """A replica that this one sends to. ``facts``: of the life that was met last."""

    address: str
    caller: KvCaller | None = None
    facts: KvFacts | None = None


@dataclass(slots=True)
class _Calling:
    """A replica that sends to this one. ``line``: None while it has left."""

    facts: KvFacts
    line: KvLine | None


class TalkLines:
    """Lines over ``KvTalk``. ``kinds``: of transports that this replica may send by, the one it prefers first."""

    def __init__(self, facts: KvFacts, talker: KvTalker, *, kinds: tuple[str, ...]) -> None:
        self._facts = facts
        self._talker = talker
        self._kinds = kinds
        self._events: LineEvents | None = None
        self._lock = threading.Lock()
        self._called: OrderedDict[str, _Called] = OrderedDict()
        self._calling: OrderedDict[str, _Calling] = OrderedDict()
        self._closed = False

    # ------------------------------------------------------------------ the desk's

    def listen(self, events: LineEvents) -> None:
        """Tell somebody what comes; called once, before anything else."""
        self._events = events

    def open(self, replica: str, address: str) -> bool:
        """Have a line to a replica's driver; return whether there can be one."""
        with self._lock:
            before = self._called.get(replica)
            if self._closed or (before is not None and before.address == address):
                return not self._closed
            called = self._called[replica] = _Called(address)
            self._called.move_to_end(replica)
            forgotten = self._called.popitem(last=False)[1] if len(self._called) > _MAX_REPLICAS else None
        for old in (before, forgotten):
            if old is not None and old.caller is not None:
                old.caller.close()
        try:
            ear = _Ear(self, replica, called)
            called.caller = self._talker.call(replica=replica, address=address, ours=self._facts, ear=ear)
        except ConfigError as error:
            logger.warning("replica %s cannot be called: %s", replica, error)
            with self._lock:
                self._called.pop(replica, None)
            return False
        return True

    def say_to_receiver(self, replica: str, message: FromSender) -> bool:
        """Say something to a replica that this one sends to."""
        with self._lock:
            called = self._called.get(replica)
        return called is not None and called.caller is not None and called.caller.say(message)

    def say_to_sender(self, replica: str, message: FromReceiver) -> bool:
        """Say something to the newest life of a replica that sends to this one."""
        with self._lock:
            calling = self._calling.get(replica)
        return calling is not None and calling.line is not None and calling.line.say(message)

    def target(self, peer: Peer) -> KvTarget | None:
        """Return where the ranks of a life that this one sends to take KV in; None of one that was never met."""
        with self._lock:
            called = self._called.get(peer.replica)
        facts = None if called is None else called.facts
        if facts is None or facts.peer != peer:
            return None
        return KvTarget(layout=facts.layout, ends=self._ends_of(facts))

    def source(self, peer: Peer) -> KvLayout | None:
        """Return the layout of a life that sends to this one; None of one that was never met."""
        with self._lock:
            calling = self._calling.get(peer.replica)
        return calling.facts.layout if calling is not None and calling.facts.peer == peer else None

    def close(self) -> None:
        """Leave all lines. Idempotent."""
        with self._lock:
            self._closed = True
            called, self._called = list(self._called.values()), OrderedDict()
            calling, self._calling = list(self._calling.values()), OrderedDict()
        for each in called:
            if each.caller is not None:
                each.caller.close()
        for one in calling:
            if one.line is not None:
                one.line.close()

    # ------------------------------------------------------------------ the server's: who calls

    @property
    def facts(self) -> KvFacts:
        """What this life is."""
        return self._facts

    def greet(self, theirs: KvFacts, line: KvLine) -> None:
        """Meet a replica that sends to this one. Raises: KvMismatch"""
        self._check(theirs)
        with self._lock:
            known = self._calling.get(theirs.replica)
            if self._closed or (known is not None and known.facts.incarnation > theirs.incarnation):
                raise KvMismatch(f"a later life of {theirs.replica!r} has called already, or this replica ends")
            self._calling[theirs.replica] = _Calling(theirs, line)
            self._calling.move_to_end(theirs.replica)
            forgotten = self._calling.popitem(last=False)[1] if len(self._calling) > _MAX_REPLICAS else None
        for old in (known, forgotten):
            if old is not None and old.line is not None:
                old.line.close()

    def hear(self, line: KvLine, message: FromSender) -> None:
        """Take a message of a replica that sends to this one."""
        assert self._events is not None, "somebody listens before lines are opened"
        self._events.heard_sender(message, line.theirs.peer)

    def left(self, line: KvLine) -> None:
        """Note that a line from a replica is over."""
        with self._lock:
            calling = self._calling.get(line.theirs.replica)
            if calling is not None and calling.line is line:
                calling.line = None

    # ------------------------------------------------------------------ the callers': who was called

    def met(self, called: _Called, theirs: KvFacts) -> None:
        """Meet a replica that this one sends to. Raises: KvMismatch"""
        self._check(theirs)
        if not all(self._ends_of(theirs)):
            offered = sorted({kind for end in theirs.ends for kind in end})
            raise KvMismatch(
                f"{theirs.replica!r} takes KV by {', '.join(offered) or 'nothing'}, and this replica sends by "
                f"{', '.join(self._kinds)}: shm is for replicas on one host"
            )
        called.facts = theirs

    def heard(self, called: _Called, message: FromReceiver) -> None:
        """Take a message of a replica that this one sends to."""
        assert self._events is not None and called.facts is not None, "who speaks was met"
        self._events.heard_receiver(message, called.facts.peer)

    def lost(self, replica: str, error: Exception) -> None:
        """Note that there is no line to a replica, for now."""
        logger.warning("there is no line to replica %s: %s", replica, error)
        if isinstance(error, KvMismatch):
            assert self._events is not None, "somebody listens before lines are opened"
            self._events.receiver_refused(replica)

    # ------------------------------------------------------------------ inside

    def _check(self, theirs: KvFacts) -> None:
        """Make sure that KV of one replica is KV of the other. Raises: KvMismatch"""
        ours = self._facts
        if theirs.replica == ours.replica:
            raise KvMismatch(f"both replicas are {ours.replica!r}")
        if ours.offer is not None and theirs.offer is not None:
            check_fit(ours.offer, theirs.offer)
        if theirs.layout.ranks != len(theirs.ends):
            raise KvMismatch(
                f"{theirs.replica!r} says where {len(theirs.ends)} ranks are, and has {theirs.layout.ranks}"
            )

    def _ends_of(self, theirs: KvFacts) -> tuple[tuple[RankEnd, ...], ...]:
        """Return which ends of a replica's ranks this one may use, best first."""
        kinds = [kind for kind in self._kinds if kind != "shm" or theirs.host_id == self._facts.host_id]
        return tuple(tuple(RankEnd(kind, end[kind]) for kind in kinds if kind in end) for end in theirs.ends)


class _Ear:
    """What is heard of one replica that is called."""

    def __init__(self, lines: TalkLines, replica: str, called: _Called) -> None:
        self._lines = lines
        self._replica = replica
        self._called = called

    def met(self, theirs: KvFacts) -> None:
        """Meet a life of the replica. Raises: KvMismatch"""
        self._lines.met(self._called, theirs)

    def hear(self, message: FromReceiver) -> None:
        """Take a message of it."""
        self._lines.heard(self._called, message)

    def lost(self, error: Exception) -> None:
        """Note that the connection broke, or could not be made."""
        self._lines.lost(self._replica, error)
