"""What the router knows of one replica: what it is, its newest report, and what was sent to it that no report counts.

A core: time is an argument. A load that is read between two requests must not be zero because the one is over and the
other not there yet: what was sent counts until a report could know of it, and a little beyond its end.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from itertools import islice

from ..rpc.engine_client import EngineLoadReport
from .decode_pace import DecodePace
from .routes import ReplicaFacts, RouterSettings

_TRUSTED_S = 1.0
"""A report this old still says what goes on: for so long the replica is thought to have worked on since."""

_MOST_COUNTED = 512


@dataclass(slots=True)
class Sent:
    """What a route brings to a replica.

    Units: tokens, to be computed there; cached, tokens that need not be; blocks, of KV that it takes there
    """

    sent_s: float
    tokens: int
    cached: int
    sequences: int
    blocks: int


class Standing:
    """One replica, as it stands."""

    def __init__(self, name: str, facts: ReplicaFacts, settings: RouterSettings, *, turn: int) -> None:
        self.name = name
        self.facts = facts
        self.load: EngineLoadReport | None = None
        self.pace = DecodePace()
        self.turn = turn
        """When it was chosen last, counted in choices."""
        self._settings = settings
        self._load_s = -math.inf
        self._sent: dict[int, Sent] = {}
        self._sent_tokens = self._sent_sequences = self._sent_blocks = 0
        # Of those that reports count: a report takes one that waits for as long as its prompt, cached or not.
        self._counted: OrderedDict[int, int] = OrderedDict()
        self._overstated = 0
        self._recent_tokens = 0.0
        self._recent_at_s = 0.0

    # ------------------------------------------------------------------ what happens

    def note(self, load: EngineLoadReport, now_s: float) -> None:
        """Take in a report: it counts what was sent before it, unless it was on its way meanwhile."""
        self.load, self._load_s = load, now_s
        self.pace.note(load.running, load.token_s)
        known_s = now_s - self._settings.report_lag_s
        for number, sent in [each for each in self._sent.items() if each[1].sent_s <= known_s]:
            self._uncount(number)
            self._counted[number] = sent.cached
        while len(self._counted) > _MOST_COUNTED:
            self._counted.popitem(last=False)
        # First come, first served: those that wait are those that were sent last.
        self._overstated = sum(islice(reversed(self._counted.values()), load.waiting)) if load.waiting else 0

    def send(self, number: int, sent: Sent) -> None:
        """Note what goes there under a number of its own."""
        self._sent[number] = sent
        self._sent_tokens += sent.tokens
        self._sent_sequences += sent.sequences
        self._sent_blocks += sent.blocks
        self._recent_tokens = self._recent(sent.sent_s) + sent.tokens
        self._recent_at_s = sent.sent_s

    def drop(self, number: int) -> None:
        """Forget what went there, because it is over. Idempotent."""
        self._counted.pop(number, None)
        self._uncount(number)

    def _uncount(self, number: int) -> None:
        sent = self._sent.pop(number, None)
        if sent is not None:
            self._sent_tokens -= sent.tokens
            self._sent_sequences -= sent.sequences
            self._sent_blocks -= sent.blocks

    # ------------------------------------------------------------------ what follows

    @property
    def takes_requests(self) -> bool:
        """Whether it may get new requests."""
        load = self.load
        return load is None or not (load.draining or load.queue_room - self._sent_sequences < 1)

    @property
    def rate(self) -> float:
        """Prompt tokens that it computes a second, 0 while that is not known."""
        return 0.0 if self.load is None else self.load.prefill_tokens_per_s

    def queued_tokens(self, now_s: float, rate: float) -> float:
        """Return the tokens to be computed before a new request's.

        Those that were reported, less what was computed since, and those sent that no report counts.
        """
        load = self.load
        if load is None:
            return float(self._sent_tokens)
        left = float(max(load.queued_tokens - self._overstated, 0))
        if left:
            left = max(0.0, left - rate * min(max(now_s - self._load_s, 0.0), _TRUSTED_S))
        return left + self._sent_tokens

    def recent_tokens(self, now_s: float) -> float:
        """Return the tokens that were sent there lately, done or not, older ones counting less."""
        return self._recent(now_s) if self._recent_tokens else 0.0

    @property
    def sequences(self) -> int:
        """Sequences that run there, or are about to."""
        load = self.load
        return self._sent_sequences + (0 if load is None else load.running + load.waiting + load.awaiting)

    @property
    def free_blocks(self) -> int | None:
        """Blocks that are left, None while that is not known."""
        return None if self.load is None else self.load.blocks_available - self._sent_blocks

    def blocks_for(self, tokens: int) -> int:
        """Return the blocks that so many tokens take, 0 where blocks are not known."""
        size = self.facts.block_size
        return -(-tokens // size) if size else 0

    def could_hold(self, tokens: int) -> bool:
        """Return whether a sequence of so many tokens fits there at all."""
        if tokens > self.facts.max_model_len:
            return False
        return self.load is None or not self.load.blocks_total or self.blocks_for(tokens) <= self.load.blocks_total

    def has_room(self, tokens: int) -> bool:
        """Return whether blocks for so many tokens are free now, as far as is known."""
        free = self.free_blocks
        return free is None or self.load is None or not self.load.blocks_total or self.blocks_for(tokens) <= free

    def _recent(self, now_s: float) -> float:
        return self._recent_tokens * math.exp(-max(now_s - self._recent_at_s, 0.0) / self._settings.recent_s)
