"""The requests of a driver that are split between two replicas: their KV goes out, or is waited for.

On the engine's thread alone, with the engine's lock held. Joins a driver's requests to the hand-off desk, which knows
transfers and tickets; what becomes of the request is the driver's to tell.
"""

from __future__ import annotations

from dataclasses import replace

from ...sdk.errors import InvalidRequest, Overloaded
from ..engine.engine import Engine
from ..engine.sequence import Sequence, SequenceState
from ..handoff.desk import HandOffDesk
from ..handoff.receiving import Arrived
from ..handoff.sending import Outbound, SendEnded
from ..handoff.stats import DeskLoad
from ..handoff.tickets import known_tokens
from ..messages import EngineRequest, FinishReason
from ..rpc.engine_client import EngineFacts, SendTo
from .driver_session import LiveRequest

_NO_DESK = DeskLoad()


class HandOffs:
    """Split requests at one driver. ``desk``: None where KV is never moved; ``max_awaiting``: requests that wait."""

    def __init__(self, engine: Engine, desk: HandOffDesk | None, facts: EngineFacts, *, max_awaiting: int) -> None:
        self._engine = engine
        self._desk = desk
        self._facts = facts
        self._max_awaiting = max_awaiting
        self._awaiting: dict[str, LiveRequest] = {}

    @property
    def load(self) -> DeskLoad:
        """Return how busy the desk is."""
        return _NO_DESK if self._desk is None else self._desk.load

    # -------------------------------------------------------------- what a gateway says

    def begin(self, live: LiveRequest, request: EngineRequest, send: Outbound | None = None) -> None:
        """Submit a request to the engine; as ``Engine.submit`` raises."""
        live.sequences = self._engine.submit(request, send=send)
        live.open_samples = sum(each.state is not SequenceState.FINISHED for each in live.sequences)

    def send(self, live: LiveRequest, request: EngineRequest, send_to: SendTo) -> None:
        """Compute a request's prompt here and send it on. Raises: InvalidRequest; as ``Engine.submit``"""
        if self._desk is None or not self._facts.sends_kv:
            raise InvalidRequest(
                "send_to", "this replica sends no KV: it was started without a transport, or to decode"
            )
        drawn = known_tokens(request) - len(request.prompt_token_ids)
        if request.max_tokens <= drawn + 1:
            # Its token ends it, so that nobody goes on with it.
            self.begin(live, request)
            return
        self.begin(live, replace(request, max_tokens=drawn + 1), Outbound(send_to=send_to, deadline_s=live.deadline_s))
        live.sent_on = True

    def hold(self, live: LiveRequest, request: EngineRequest, ticket: str) -> None:
        """Let a request wait for its KV. Raises: InvalidRequest, Overloaded"""
        desk = self._desk
        if desk is None or not self._facts.receives_kv:
            raise InvalidRequest(
                "ticket", "this replica takes no KV: it was started without a transport, or to prefill"
            )
        if len(self._awaiting) >= self._max_awaiting:
            raise Overloaded(f"{len(self._awaiting)} requests wait for their KV already")
        self._engine.scheduler.check_fits(request)
        if not desk.expect(ticket, request):
            raise InvalidRequest("ticket", f"{ticket!r} is, or was, another request's")
        live.ticket, live.waiting, live.open_samples = ticket, request, 1
        self._awaiting[ticket] = live

    def go_on(self, live: LiveRequest) -> None:
        """Compute a request here that waits for its KV; one that does not is left alone. As ``Engine.submit`` raises"""
        request = live.waiting
        if request is not None:
            self._stop_waiting(live)
            self.begin(live, request)

    def leave(self, live: LiveRequest) -> None:
        """Let go of what a request that has ended holds elsewhere than in the engine. Idempotent."""
        if live.waiting is not None:
            self._stop_waiting(live)
        if live.sent_on and self._desk is not None:
            self._stop_sending(live)

    # -------------------------------------------------------------- what the engine says

    def is_handed(self, live: LiveRequest, sequence: Sequence) -> bool:
        """Return whether a request that was sent on goes on elsewhere, now that its sequence here has ended."""
        desk = self._desk
        if desk is None or sequence.finish_reason is not FinishReason.LENGTH:
            return False
        assert live.last is not None, f"{sequence} ended by its length without a token"
        if sequence.transfer is not None:
            desk.prompt_done(sequence.transfer, *live.last)
        live.handed = True
        return True

    # -------------------------------------------------------------- what the desk says

    def find(self, arrived: Arrived) -> LiveRequest | None:
        """Return the request that KV has come for, None when it is gone."""
        return self._awaiting.get(arrived.ticket)

    def drop(self, arrived: Arrived) -> None:
        """Let go of KV that nobody wants any more."""
        assert self._desk is not None, "only a desk says that KV arrived"
        self._desk.drop(arrived)

    def arrived(self, live: LiveRequest, arrived: Arrived) -> None:
        """Let a request go on with the KV that came for it, or without where it cannot. As ``Engine.submit`` raises"""
        request, hand_off = live.waiting, arrived.hand_off
        assert self._desk is not None and request is not None, "only a request that waits can have its KV"
        if hand_off is None:
            self.go_on(live)
            return
        live.sequences = self._engine.scheduler.adopt(request, arrived.transfer, hand_off.token_id, hand_off.logprobs)
        self._desk.adopted(arrived)
        self._forget_waiting(live)

    def is_over(self, live: LiveRequest, ended: SendEnded) -> bool:
        """Return whether a request that was sent on is over with this: it may have begun another transfer since."""
        return live.sent_on and live.sequences[0].transfer == ended.number

    # -------------------------------------------------------------- inside

    def _stop_waiting(self, live: LiveRequest) -> None:
        assert self._desk is not None, "only a desk lets requests wait"
        self._desk.leave(live.ticket)
        self._forget_waiting(live)

    def _forget_waiting(self, live: LiveRequest) -> None:
        del self._awaiting[live.ticket]
        live.waiting = None

    def _stop_sending(self, live: LiveRequest) -> None:
        assert self._desk is not None, "only a desk sends"
        live.sent_on = False
        for sequence in live.sequences:
            if sequence.transfer is not None:
                self._desk.stop(sequence.transfer)
