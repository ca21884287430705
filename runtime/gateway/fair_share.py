"""Who is let in next when not all can be: a fair share for each API key, counted in tokens.

A core: no clock, no asyncio, no HTTP. At most so many prompts run at once. While there is room, a request starts at
once; otherwise it waits in its key's own short queue, and when room comes the key goes first that has had the least
for its weight (start-time fair queueing: Goyal, Vin, Cheng 1996). So a key that sends a thousand requests delays its
own and not those of others, and a share that nobody asks for is everybody's. What a request will cost is a guess when
it starts, and is set right when it leaves.

Every queue is bounded: a key's own, and all together. When all together are full, the newest request of the key with
the most waiting gives way to one of a key with fewer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto


class TurnState(Enum):
    """Where a request stands."""

    WAITING = auto()
    RUNNING = auto()
    REFUSED = auto()
    """It gave way to another key, or had no place from the start."""
    OVER = auto()


@dataclass(slots=True, kw_only=True, eq=False)
class Turn:
    """One request's place. ``prompts``: how much of the bound it takes; ``tokens``: what it is thought to cost."""

    key: str
    prompts: int
    tokens: float
    state: TurnState = TurnState.WAITING
    problem: str = ""
    """Why it was refused, in words for its client."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareLimits:
    """Bounds, in prompts; ``max_waiting_per_key`` keeps one key from filling the queue while nobody else is there."""

    max_running: int
    max_waiting: int
    max_waiting_per_key: int

    def __post_init__(self) -> None:
        if self.max_running < 1:
            raise ValueError(f"max_running must be at least 1, got {self.max_running}")
        if not 0 <= self.max_waiting_per_key <= self.max_waiting:
            raise ValueError(
                f"max_waiting_per_key must be 0 to max_waiting={self.max_waiting}, got {self.max_waiting_per_key}"
            )


@dataclass(slots=True)
class _Key:
    """``had``: the virtual time at which this key has had all that it was given."""

    name: str
    weight: float
    had: float
    queue: deque[Turn] = field(default_factory=deque)
    waiting: int = 0
    running: int = 0


class FairShare:
    """All requests that wait or run, by the key that sent them.

    ``weights``: of keys that are to get more or less than others, whose weight is 1.
    """

    def __init__(self, limits: ShareLimits, *, weights: Mapping[str, float] | None = None) -> None:
        for name, weight in (weights or {}).items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"the weight of a key must be a positive number, got {weight!r} for {name!r}")
        self._limits = limits
        self._weights = dict(weights or {})
        self._keys: dict[str, _Key] = {}
        self._now = 0.0
        self._changed: list[Turn] = []
        self.running = 0
        self.waiting = 0

    def ask(self, key: str, *, tokens: float, prompts: int = 1) -> Turn:
        """Ask for a request to be let in; its ``state`` says whether it runs, waits or is refused.

        A request of more prompts than ever run at once is refused, and so is one that finds its queue full.
        """
        turn = Turn(key=key, prompts=prompts, tokens=max(tokens, 1.0))
        limits = self._limits
        if prompts > limits.max_running:
            return _refuse(turn, f"{prompts} prompts are more than run here at once ({limits.max_running}): send fewer")
        who = self._key(key)
        if not self.waiting and self.running + prompts <= limits.max_running:
            self._start(who, turn)
            return turn
        if who.waiting + prompts > limits.max_waiting_per_key:
            problem = f"{who.waiting} prompts of this key wait already ({limits.max_waiting_per_key} may)"
            _refuse(turn, f"{problem}: try again later")
        elif not self._make_room(who, prompts):
            _refuse(turn, f"{self.waiting} prompts wait already ({limits.max_waiting} may): try again later")
        else:
            who.queue.append(turn)
            who.waiting += prompts
            self.waiting += prompts
            # Its own key may hold what is too large to start now, and another's smaller request still may not pass it.
            self._start_next()
        self._drop_idle(who)
        return turn

    def leave(self, turn: Turn, *, tokens: float | None = None) -> None:
        """Note that a request is over, or that nobody waits for it any more; idempotent.

        ``tokens``: what it cost in the end, where that is known.
        """
        who = self._keys.get(turn.key)
        if turn.state is TurnState.RUNNING and who is not None:
            if tokens is not None:
                who.had += (max(tokens, 0.0) - turn.tokens) / who.weight
            who.running -= turn.prompts
            self.running -= turn.prompts
        elif turn.state is TurnState.WAITING and who is not None:
            who.queue.remove(turn)
            who.waiting -= turn.prompts
            self.waiting -= turn.prompts
        else:
            return
        turn.state = TurnState.OVER
        self._start_next()
        self._drop_idle(who)

    def grow(self, turn: Turn, *, tokens: float, prompts: int) -> bool:
        """Make a running request count for more, now that more of it is known; return whether there is room for it.

        Where there is none it keeps what it has, and its shell refuses it.
        """
        more = prompts - turn.prompts
        who = self._keys[turn.key]
        if turn.state is not TurnState.RUNNING or self.running + more > self._limits.max_running:
            return False
        who.had += (tokens - turn.tokens) / who.weight
        who.running += more
        self.running += more
        turn.prompts, turn.tokens = prompts, tokens
        self._start_next()
        return True

    def take_changed(self) -> list[Turn]:
        """Return the requests that waited and have started or given way since the last call, in order."""
        changed, self._changed = self._changed, []
        return changed

    def waiting_of(self, key: str) -> int:
        """Return how many prompts of a key wait."""
        who = self._keys.get(key)
        return 0 if who is None else who.waiting

    # ------------------------------------------------------------------ inside

    def _start_next(self) -> None:
        """Start those whose turn it is, while there is room; what is first in turn is never passed by a smaller one."""
        while self.waiting:
            who = min((each for each in self._keys.values() if each.queue), key=lambda each: max(each.had, self._now))
            if self.running + who.queue[0].prompts > self._limits.max_running:
                return
            turn = who.queue.popleft()
            who.waiting -= turn.prompts
            self.waiting -= turn.prompts
            self._start(who, turn)
            self._changed.append(turn)
            # Behind the others with which it was level: those that asked before go by turns.
            self._keys[who.name] = self._keys.pop(who.name)

    def _start(self, who: _Key, turn: Turn) -> None:
        # A key that was away starts level with those that were not: it neither saves up a share nor owes one.
        begins = max(who.had, self._now)
        self._now = begins
        who.had = begins + turn.tokens / who.weight
        who.running += turn.prompts
        self.running += turn.prompts
        turn.state = TurnState.RUNNING

    def _make_room(self, asking: _Key, prompts: int) -> bool:
        """Let the newest of the longest queues give way until there is room; False when no queue is longer."""
        limits = self._limits
        giving: list[Turn] = []
        waiting = {each.name: each.waiting for each in self._keys.values()}
        places = {each.name: len(each.queue) for each in self._keys.values()}
        free = limits.max_waiting - self.waiting
        while free < prompts:
            longest = max(waiting, key=waiting.__getitem__, default=None)
            if longest is None or waiting[longest] <= asking.waiting + prompts:
                return False
            places[longest] -= 1
            turn = self._keys[longest].queue[places[longest]]
            waiting[longest] -= turn.prompts
            free += turn.prompts
            giving.append(turn)
        for turn in giving:
            who = self._keys[turn.key]
            assert who.queue.pop() is turn, "the newest gives way first"
            who.waiting -= turn.prompts
            self.waiting -= turn.prompts
            self._changed.append(_refuse(turn, "too much of this key waits while others ask: try again later"))
            self._drop_idle(who)
        return True

    def _key(self, name: str) -> _Key:
        who = self._keys.get(name)
        if who is None:
            who = self._keys[name] = _Key(name, self._weights.get(name, 1.0), self._now)
        return who

    def _drop_idle(self, who: _Key) -> None:
        """Forget a key that is owed nothing and owes nothing: there may be any number of them over time."""
        if not who.queue and not who.running and (who.had <= self._now or not self.running + self.waiting):
            self._keys.pop(who.name, None)
        if not self.running + self.waiting:
            # Nobody is there who could be treated unfairly by beginning anew.
            self._keys.clear()


def _refuse(turn: Turn, problem: str) -> Turn:
    turn.state, turn.problem = TurnState.REFUSED, problem
    return turn
