"""How much is let in at once: a bound on prompts on their way, and the door that closes before a stop.

A core: no clock, no asyncio; time is an argument. What is over the bound is refused at once, with a guess when to come
again; waiting happens in the engine's own bounded queue and nowhere else.
"""

from __future__ import annotations

from .errors import BusyRefusal, Draining, HttpRefusal

_SMOOTHING = 0.1
_FIRST_GUESS_S = 1.0
_LONGEST_RETRY_S = 60.0


class Ticket:
    """What one HTTP request holds of the bound, until ``Admission.leave``."""

    __slots__ = ("entered_s", "weight")

    def __init__(self, entered_s: float) -> None:
        self.weight = 1
        self.entered_s = entered_s


class Admission:
    """Counts prompts on their way.

    A request enters with weight 1 before its body is read, so that bodies are bounded too, and grows to its number of
    prompts once that is known.
    """

    def __init__(self, *, capacity: int) -> None:
        self._capacity = capacity
        self._mean_request_s = _FIRST_GUESS_S
        self.in_flight = 0
        self.draining = False

    def enter(self, *, now_s: float) -> Ticket:
        """Let one request in.

        Raises: Draining; BusyRefusal when the bound is reached (both retryable)
        """
        if self.draining:
            raise Draining("this server is stopping and takes no new requests")
        self._take(1)
        return Ticket(now_s)

    def grow(self, ticket: Ticket, weight: int) -> None:
        """Make a request count as ``weight`` prompts.

        Raises: BusyRefusal (retryable); HttpRefusal when there will never be room for so many
        """
        if weight > self._capacity:
            problem = f"{weight} prompts are more than this server runs at once ({self._capacity}): send fewer"
            raise HttpRefusal(400, problem, param="prompt", code="invalid_value")
        self._take(weight - ticket.weight)
        ticket.weight = weight

    def leave(self, ticket: Ticket, *, now_s: float) -> None:
        """Give back what a request held."""
        self.in_flight -= ticket.weight
        ticket.weight = 0
        self._mean_request_s += _SMOOTHING * (now_s - ticket.entered_s - self._mean_request_s)
        assert self.in_flight >= 0

    def _take(self, weight: int) -> None:
        if self.in_flight + weight > self._capacity:
            raise BusyRefusal(
                f"{self.in_flight} prompts are on their way and at most {self._capacity} are let in: try again later",
                retry_after_s=self._room_in_s(weight),
            )
        self.in_flight += weight

    def _room_in_s(self, weight: int) -> float:
        """Guess when ``weight`` prompts will have left, from how long requests took lately."""
        leaving_per_s = self._capacity / max(self._mean_request_s, 1e-3)
        return min(max(weight / leaving_per_s, 1.0), _LONGEST_RETRY_S)
