"""A gateway in an imagined cluster: the real router and the real way of each request, over imagined sessions.

What the gateway's shell does between the two is written out here as the shell has it. A request is judged when it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from slipstream.comm.kv.transfer import Peer
from slipstream.runtime.gateway.request import (
    Action,
    Choose,
    Deliver,
    Drop,
    Finished,
    GiveUp,
    GoOn,
    Part,
    RequestWay,
    Submit,
    WayLimits,
)
from slipstream.runtime.gateway.router import Router
from slipstream.runtime.gateway.routes import Ask, ReplicaFacts, Route, RouterSettings, Split
from slipstream.runtime.messages import EngineRequest
from slipstream.runtime.rpc.engine_client import EngineFacts, SendTo
from slipstream.sdk.errors import DeadlineExceeded, EngineUnavailable, Overloaded, SlipstreamError
from slipstream.tests.fakes.oracle_executor import expected_tokens
from slipstream.tests.simulation.kv_replicas import Wrong
from slipstream.tests.simulation.split_replica import Busy, Handed, Refused, Replica, SampleEnded, Token, Word

WAY_LIMITS = WayLimits(shun_s=0.5, stall_s=5.0, commit_s=1.0)
SETTINGS = RouterSettings(whole_below_tokens=6, first_tokens_per_s=100.0)
MAY_END_WITH = (EngineUnavailable, Overloaded, DeadlineExceeded)
LATE_S = 2.0
"""How much later than its deadline a request may end."""


class Cluster(Protocol):
    """What a gateway lives in."""

    now_s: float

    def later(self, peer: Peer | None, after_s: float, act: Callable[[], None]) -> None:
        """Do something after some seconds."""
        ...

    def order(self, peer: Peer, act: Callable[[Replica], None]) -> None:
        """Say something to a life's driver, in order, if that lives to hear it."""
        ...

    def ended(self, name: str, how: str) -> None:
        """Hear that a request is over."""
        ...


@dataclass(slots=True)
class _Attempt:
    key: str
    peer: Peer
    submit: Submit
    route: Route


@dataclass(slots=True)
class _Client:
    """One request, and what its client has."""

    request: EngineRequest
    ends_s: float
    delivered: list[list[int]]
    way: RequestWay
    attempts: dict[int, _Attempt] = field(default_factory=dict)
    routes: list[Route] = field(default_factory=list)
    timer_s: float = float("inf")
    outcome: str = ""


class Gateway:
    """The gateway of the imagined cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self.router = Router(SETTINGS)
        self.clients: dict[str, _Client] = {}
        self._cluster = cluster
        self._attached: dict[str, Peer] = {}
        self._keys: dict[str, tuple[_Client, int]] = {}
        self._tickets = 0

    @property
    def busy(self) -> bool:
        """Whether any request has not ended."""
        return any(not client.outcome for client in self.clients.values())

    # -------------------------------------------------------------- replicas

    def met(self, peer: Peer, facts: EngineFacts) -> None:
        """Take in a life of a replica."""
        before = self._attached.get(peer.replica)
        if before is not None:
            self.lost(before)
        self._attached[peer.replica] = peer
        self.router.join(peer.replica, ReplicaFacts.of(facts))
        for client in list(self.clients.values()):
            if not client.outcome:
                self._act(client, client.way.replicas_changed(self._cluster.now_s))

    def lost(self, peer: Peer) -> None:
        """Lose the session with a life."""
        if self._attached.get(peer.replica) != peer:
            return
        del self._attached[peer.replica]
        self.router.leave(peer.replica)
        for client, number in [entry for entry in self._keys.values() if self._peer_of(entry) == peer]:
            self._failed(client, number, EngineUnavailable(f"{peer.replica} was lost"))

    @staticmethod
    def _peer_of(entry: tuple[_Client, int]) -> Peer | None:
        attempt = entry[0].attempts.get(entry[1])
        return None if attempt is None else attempt.peer

    def hear(self, peer: Peer, word: Word) -> None:
        """Take in what a driver says."""
        if isinstance(word, Busy):
            if self._attached.get(peer.replica) == peer:
                self.router.note_load(peer.replica, word.load, self._cluster.now_s)
                self.router.note_blocks(peer.replica, word.changes)
            return
        entry = self._keys.get(word.key)
        if entry is None:
            return
        client, number = entry
        now_s = self._cluster.now_s
        match word:
            case Token(token_id=token_id):
                self._take(client, number, [token_id])
            case SampleEnded(reason=reason):
                if reason == "abort":
                    self._failed(client, number, EngineUnavailable("the engine gave the request up"))
                elif self._take(client, number, []):
                    self._act(client, client.way.over(number, 0))
                    self._act(client, client.way.ended(number, now_s=now_s))
                    self._forget(client, number)
            case Refused(error=error):
                self._failed(client, number, error)
            case Handed(report=report):
                route = client.attempts[number].route
                assert isinstance(route, Split), "only what was split is handed off"
                self.router.note_hand_off(route, report, now_s)
                self._act(client, client.way.handed_off(number, report.ending, now_s=now_s))
                self._forget(client, number)

    # -------------------------------------------------------------- clients

    def ask(self, request: EngineRequest, *, timeout_s: float, may_split: bool) -> None:
        """Begin a request."""
        delivered: list[list[int]] = [[]]
        ends_s = self._cluster.now_s + timeout_s
        way = RequestWay(
            delivered, max_tokens=request.max_tokens, may_split=may_split, ends_s=ends_s, limits=WAY_LIMITS
        )
        client = self.clients[request.request_id] = _Client(request, ends_s, delivered, way)
        self._act(client, way.begin(self._cluster.now_s))

    def leave(self, name: str) -> None:
        """Let a client go away."""
        client = self.clients[name]
        if not client.outcome:
            self._act(client, client.way.leave())
            self._end(client, "left")

    # -------------------------------------------------------------- inside

    def _take(self, client: _Client, number: int, token_ids: Sequence[int]) -> bool:
        """Deliver what is new of an attempt's tokens; return whether the attempt is still of use."""
        skip: int | None = 0
        if not client.way.leads(number):
            actions = client.way.take(number, 0, token_ids, now_s=self._cluster.now_s)
            skip = next((action.skip for action in actions if isinstance(action, Deliver)), None)
            self._act(client, [action for action in actions if not isinstance(action, Deliver)])
        if skip is not None and not client.outcome:
            client.delivered[0] += token_ids[skip:]
            self._check_tokens(client)
        return skip is not None

    def _failed(self, client: _Client, number: int, error: SlipstreamError) -> None:
        attempt = client.attempts.get(number)
        if attempt is None:
            return
        now_s = self._cluster.now_s
        if attempt.submit.part is Part.SEND and isinstance(attempt.route, Split):
            self.router.note_hand_off(attempt.route, None, now_s)
        tokens, request = client.delivered[0], client.request
        if tokens and (tokens[-1] in request.stop_ids or len(tokens) >= request.max_tokens):
            # Its last token came, and only its end was lost.
            self._act(client, client.way.over(number, 0))
        self._act(client, client.way.failed(number, error, now_s=now_s))
        self._forget(client, number)

    def _act(self, client: _Client, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Choose():
                    self._choose(client, action)
                case Submit():
                    self._submit(client, action)
                case Drop(attempt=number):
                    attempt = client.attempts.get(number)
                    if attempt is not None:
                        key = attempt.key
                        self._forget(client, number)
                        self._cluster.order(attempt.peer, lambda life, key=key: life.abort(key))  # type: ignore[misc]
                case GoOn(attempt=number):
                    key = client.attempts[number].key
                    peer = client.attempts[number].peer
                    self._cluster.order(peer, lambda life, key=key: life.go_on(key))  # type: ignore[misc]
                case GiveUp(error=error):
                    if not isinstance(error, MAY_END_WITH):
                        raise Wrong(f"{client.request.request_id} ended with {error!r}")
                    self._end(client, type(error).__name__)
                case Finished():
                    self._end(client, "finished")
                case Deliver():
                    pass
        self._wake(client)

    def _choose(self, client: _Client, choose: Choose) -> None:
        request, drawn = client.request, client.delivered[0]
        if choose.decode is None:
            self._end_routes(client)
        route = self.router.route(
            Ask(
                prompt=np.concatenate((request.prompt_token_ids, np.array(drawn, dtype=np.int32))),
                max_tokens=request.max_tokens - len(drawn),
                generated=len(drawn),
                may_split=choose.may_split,
                exclude=choose.exclude,
                decode=choose.decode or "",
            ),
            self._cluster.now_s,
        )
        if route is not None:
            client.routes.append(route)
        self._tickets += 1
        self._act(client, client.way.routed(route, ticket=f"t{self._tickets}", now_s=self._cluster.now_s))

    def _submit(self, client: _Client, submit: Submit) -> None:
        peer = self._attached[submit.replica]
        key = f"{client.request.request_id}.{submit.attempt}"
        client.attempts[submit.attempt] = _Attempt(key, peer, submit, client.routes[-1])
        self._keys[key] = (client, submit.attempt)
        request = client.request
        if submit.generated:
            generated = tuple(
                None if tokens is None else np.array(tokens, dtype=np.int32) for tokens in submit.generated
            )
            request = replace(request, generated=generated)
        send_to = None
        if submit.part is Part.SEND:
            send_to = SendTo(replica=submit.decode, address="imagined", ticket=submit.ticket)
        ticket = submit.ticket if submit.part is Part.HOLD else ""
        timeout_s = max(client.ends_s - self._cluster.now_s, 0.001)
        self._cluster.order(
            peer, lambda life: life.submit(key, request, timeout_s=timeout_s, send_to=send_to, ticket=ticket)
        )

    def _wake(self, client: _Client) -> None:
        """See to it that the request is looked at when something of it is due."""
        if client.outcome or client.way.done:
            return
        wakes_s = client.way.wakes_s
        if wakes_s < client.timer_s:
            client.timer_s = wakes_s
            self._cluster.later(None, max(wakes_s - self._cluster.now_s, 0.0) + 1e-6, lambda: self._due(client))

    def _due(self, client: _Client) -> None:
        client.timer_s = float("inf")
        if not client.outcome:
            self._act(client, client.way.due(self._cluster.now_s))
            if not client.way.done and client.way.wakes_s <= self._cluster.now_s:
                raise Wrong(f"{client.request.request_id} is due and does nothing")

    def _forget(self, client: _Client, number: int) -> None:
        attempt = client.attempts.pop(number, None)
        if attempt is not None:
            del self._keys[attempt.key]

    def _end_routes(self, client: _Client) -> None:
        while client.routes:
            self.router.ended(client.routes.pop())

    # -------------------------------------------------------------- judging

    def _check_tokens(self, client: _Client) -> None:
        request, got = client.request, client.delivered[0]
        wanted = expected_tokens(
            request.prompt_token_ids.tolist(), request.seed, request.max_tokens, stop_ids=request.stop_ids
        )
        if got != wanted[: len(got)]:
            raise Wrong(f"{request.request_id} got {got}, not {wanted}")

    def _end(self, client: _Client, how: str) -> None:
        name = client.request.request_id
        if client.outcome:
            raise Wrong(f"{name} ended twice: {client.outcome}, then {how}")
        client.outcome = how
        self._end_routes(client)
        for number in list(client.attempts):
            self._forget(client, number)
        request, got = client.request, client.delivered[0]
        whole = got and (got[-1] in request.stop_ids or len(got) == request.max_tokens)
        if how == "finished" and not whole:
            raise Wrong(f"{name} finished with {got} of {request.max_tokens}")
        if self._cluster.now_s > client.ends_s + LATE_S:
            raise Wrong(f"{name} ended {self._cluster.now_s - client.ends_s:.1f} s late")
        self._cluster.ended(name, how)
