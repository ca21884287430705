"""Who waits here for KV, by the ticket under which it will come. Pure, and bounded.

A ticket is known by both replicas before either knows the other's transfer. It is good for one commitment: whoever
names it afterwards is told that it was used, or why nobody wants it any more. Of several transfers that name a ticket
the newest has it, because only its gateway, who has given the others up, sends a request on twice.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from ...comm.kv.transfer import Ending, Reserve, TransferId
from ..messages import EngineRequest

MAX_HINT_BYTES = 128
_MAX_REMEMBERED = 8192


@dataclass(slots=True)
class Awaited:
    """A request that waits for its KV. ``transfer``: the one that has blocks for it; ``arrived``: it has committed."""

    ticket: str
    request: EngineRequest
    transfer: TransferId | None = None
    arrived: bool = False


class Tickets:
    """Requests that wait, and the last tickets that nobody waits for any more."""

    def __init__(self) -> None:
        self._awaited: dict[str, Awaited] = {}
        self._gone: OrderedDict[str, Ending] = OrderedDict()

    def __len__(self) -> int:
        """Return the requests that wait."""
        return len(self._awaited)

    def add(self, ticket: str, request: EngineRequest) -> Awaited | None:
        """Let a request wait; None when the ticket is, or was, another's."""
        if ticket in self._awaited or ticket in self._gone:
            return None
        self._awaited[ticket] = awaited = Awaited(ticket, request)
        return awaited

    def remove(self, ticket: str, ending: Ending) -> Awaited | None:
        """Let a request wait no longer, and remember why; None when there is none."""
        awaited = self._awaited.pop(ticket, None)
        if awaited is not None:
            self._gone[ticket] = ending
            while len(self._gone) > _MAX_REMEMBERED:
                self._gone.popitem(last=False)
        return awaited

    def find(self, ticket: str) -> Awaited | None:
        """Return who waits under a ticket."""
        return self._awaited.get(ticket)

    def of(self, reserve: Reserve) -> Awaited | None:
        """Return who waits for a reservation."""
        ticket = ticket_of(reserve.hint)
        return None if ticket is None else self._awaited.get(ticket)

    def why_not(self, reserve: Reserve) -> Ending | None:
        """Return why a reservation can never be of use, None when it may be."""
        ticket = ticket_of(reserve.hint)
        if ticket is None:
            return Ending.BAD_REFERENCE
        awaited = self._awaited.get(ticket)
        if awaited is None:
            return self._gone.get(ticket)
        if awaited.arrived:
            return Ending.CONSUMED
        return None if known_tokens(awaited.request) == reserve.tokens else Ending.BAD_REFERENCE


def known_tokens(request: EngineRequest) -> int:
    """Return how many tokens a request of one sample has: what its KV has to be of."""
    drawn = request.generated[0] if request.generated else None
    return len(request.prompt_token_ids) + (0 if drawn is None else len(drawn))


def hint_of(ticket: str) -> bytes:
    """Return a ticket as a reservation's hint."""
    return ticket.encode()


def ticket_of(hint: bytes) -> str | None:
    """Return the ticket that a hint is, None when it is none."""
    if not 0 < len(hint) <= MAX_HINT_BYTES:
        return None
    try:
        return hint.decode()
    except UnicodeDecodeError:
        return None
