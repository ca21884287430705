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


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLoad:
    """How busy the scheduler is: sequences by state, and blocks."""

    running: int
    waiting: int
    blocks_total: int
    blocks_available: int
    preemptions: int
