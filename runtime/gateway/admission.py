"""How much is let in at once, whose turn is next, and the door that closes before a stop.

A core: no clock, no asyncio; time is an argument. What finds no room waits a while in its API key's own queue, and room
goes to the key that has had the least (``fair_share``); what is over the bounds of queues is refused at once, with a
guess when to come again.
"""

from __future__ import annotations

from collections.abc import Callable

from .errors import BusyRefusal, Draining, HttpRefusal
from .fair_share import FairShare, ShareLimits, Turn, TurnState

_SMOOTHING = 0.1
_FIRST_GUESS_S = 1.0
_FIRST_GUESS_TOKENS = 100.0
_LONGEST_RETRY_S = 60.0


class Ticket:
    """What one request holds of the bound, or waits for, until ``Admission.leave``."""

    __slots__ = ("entered_s", "turn", "wake")

    def __init__(self, turn: Turn, entered_s: float, wake: Callable[[], None]) -> None:
        self.turn = turn
        self.entered_s = entered_s
        self.wake = wake

    @property
    def waits(self) -> bool:
        """Whether its turn has not come."""
        return self.turn.state is TurnState.WAITING


class Admission:
    """Counts prompts on their way, and lets keys in by turns when there are too many.

    A request enters with weight 1 before its body is read, so that bodies are bounded too, and grows to its number of
    prompts once that is known. ``capacity``: prompts at once; ``max_waiting``: that wait for their turn.
    """

    def __init__(self, *, capacity: int, max_waiting: int = 0) -> None:
        self._capacity = capacity
        self._share = FairShare(
            ShareLimits(max_running=capacity, max_waiting=max_waiting, max_waiting_per_key=max_waiting)
        )
        self._waiting: dict[int, Ticket] = {}
        self._mean_request_s = _FIRST_GUESS_S
        self._mean_tokens = _FIRST_GUESS_TOKENS
        self.draining = False

    @property
    def in_flight(self) -> int:
        """Prompts on their way."""
        return self._share.running

    @property
    def waiting(self) -> int:
        """Requests whose turn has not come."""
        return self._share.waiting

    def ask(self, *, caller: str, now_s: float, wake: Callable[[], None]) -> Ticket:
        """Let one request in, or let it wait: ``wake`` is called when its turn has come, or will not come.

        Raises: Draining; BusyRefusal when it may not even wait (both retryable)
        """
        self._check_door()
        ticket = Ticket(self._share.ask(caller, tokens=self._mean_tokens), now_s, wake)
        if ticket.waits:
            self._waiting[id(ticket.turn)] = ticket
        # Asking may have cost another key's newest its place.
        self._tell()
        self.check(ticket)
        return ticket

    def enter(self, *, now_s: float, caller: str = "") -> Ticket:
        """Let one request in now.

        Raises: Draining; BusyRefusal when there is no room (both retryable)
        """
        ticket = self.ask(caller=caller, now_s=now_s, wake=lambda: None)
        if ticket.waits:
            self.leave(ticket, now_s=now_s)
            raise self._busy(1)
        return ticket

    def check(self, ticket: Ticket) -> None:
        """Check a request that was woken. Raises: Draining; BusyRefusal when its turn will not come"""
        if ticket.turn.state is TurnState.REFUSED:
            raise self._busy(1)
        if ticket.waits:
            self._check_door()

    def grow(self, ticket: Ticket, weight: int) -> None:
        """Make a request count as ``weight`` prompts.

        Raises: BusyRefusal (retryable); HttpRefusal when there will never be room for so many
        """
        if weight > self._capacity:
            problem = f"{weight} prompts are more than this server runs at once ({self._capacity}): send fewer"
            raise HttpRefusal(400, problem, param="prompt", code="invalid_value")
        if not self._share.grow(ticket.turn, tokens=self._mean_tokens * weight, prompts=weight):
            raise self._busy(weight)
        self._tell()

    def leave(self, ticket: Ticket, *, now_s: float, tokens: int | None = None) -> None:
        """Give back what a request held; ``tokens``: what it cost its key in the end. Idempotent."""
        ran = ticket.turn.state is TurnState.RUNNING
        self._waiting.pop(id(ticket.turn), None)
        self._share.leave(ticket.turn, tokens=None if tokens is None else float(tokens))
        self._tell()
        if ran:
            self._mean_request_s += _SMOOTHING * (now_s - ticket.entered_s - self._mean_request_s)
            if tokens:
                self._mean_tokens += _SMOOTHING * (tokens - self._mean_tokens)

    def close(self) -> None:
        """Take nothing new; what waits is told so."""
        self.draining = True
        for ticket in self._waiting.values():
            ticket.wake()

    def _check_door(self) -> None:
        if self.draining:
            raise Draining("this server is stopping and takes no new requests")

    def _tell(self) -> None:
        for turn in self._share.take_changed():
            if (ticket := self._waiting.pop(id(turn), None)) is not None:
                ticket.wake()

    def _busy(self, weight: int) -> BusyRefusal:
        return BusyRefusal(
            f"{self.in_flight} prompts are on their way and at most {self._capacity} are let in: try again later",
            retry_after_s=self._room_in_s(weight),
        )

    def _room_in_s(self, weight: int) -> float:
        """Guess when ``weight`` prompts will have left, from how long requests took lately."""
        leaving_per_s = self._capacity / max(self._mean_request_s, 1e-3)
        return min(max((weight + self.waiting) / leaving_per_s, 1.0), _LONGEST_RETRY_S)
