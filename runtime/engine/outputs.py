"""What the scheduler tells the front end: tokens by sequence, and how busy it is."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..messages import TokenLogprobs
from .sequence import Sequence


@dataclass(slots=True, kw_only=True)
class StepOutputs:
    """What a step's result meant for the sequences, in columns: sequence ``i`` got ``token_ids[i]``.

    ``logprobs`` by the same index; ``prompt_logprobs``: (sequence, position of the first entry, entries);
    ``finished`` holds the sequences that ended with this step, aborted ones excluded.
    """

    sequences: list[Sequence] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: list[tuple[Sequence, int, tuple[TokenLogprobs, ...]]] = field(default_factory=list)
    finished: list[Sequence] = field(default_factory=list)

    def add_before(self, earlier: StepOutputs) -> None:
        """Put what an earlier event meant for sequences before this."""
        shift = len(earlier.sequences)
        self.logprobs = {**earlier.logprobs, **{shift + place: entry for place, entry in self.logprobs.items()}}
        self.sequences[:0] = earlier.sequences
        self.token_ids[:0] = earlier.token_ids
        self.prompt_logprobs[:0] = earlier.prompt_logprobs
        self.finished[:0] = earlier.finished


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLoad:
    """How busy the scheduler is: sequences by state, and blocks.

    ``queued_tokens``: known tokens of all sequences whose KV is still to be computed, the next one of each excluded.
    """

    running: int
    waiting: int
    blocks_total: int
    blocks_available: int
    preemptions: int
    queued_tokens: int = 0
