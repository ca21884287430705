"""One sequence: a request's prompt and what one of its samples has generated.

Holds identity, content and history; the numbers that change every step live in the arrays of ``slots`` while the
sequence runs. State changes are made by the scheduler alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from ..messages import EngineRequest, FinishReason, Int32Array, SequenceId

_SEED_STEP = 0x9E3779B97F4A7C15
_MASK_64 = (1 << 64) - 1


class SequenceState(Enum):
    """Where a sequence is: each is in exactly one place."""

    HELD = "held"
    """Waits for its request's first sample to compute the prompt that they share."""
    WAITING = "waiting"
    ADOPTED = "adopted"
    """Has its blocks, which another replica has filled, and waits for a slot."""
    RUNNING = "running"
    FINISHED = "finished"


def sample_seed(seed: int, index: int) -> int:
    """Return the seed of sample ``index`` of a request, in [0, 2**64); sample 0 keeps the request's own seed."""
    return (seed + index * _SEED_STEP) & _MASK_64


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """A request's prompt with one sample of its continuation.

    Shapes: tokens [known tokens] int32, kept here while the sequence is not running (the slot arrays hold it then)
    Units: lengths in tokens; ``*_time_s`` seconds on the engine's clock
    """

    sequence_id: SequenceId
    request: EngineRequest
    index: int
    arrival: int
    tokens: Int32Array
    prompt_length: int
    max_length: int
    state: SequenceState = SequenceState.WAITING
    slot: int = -1
    pending: int = 0
    """Tokens drawn by steps whose results have not come back, while the sequence is not running."""
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    root: bytes = b""
    first_sample: Sequence | None = None
    prompt_logprobs_due: bool = False
    cached_tokens: int | None = None
    preemptions: int = 0
    first_scheduled_time_s: float | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    queued: int = 0
    """What it counts for in ``SchedulerLoad.queued_tokens`` while it waits."""
    send: object | None = None
    """What ``KvSending`` makes of a sequence whose KV goes to another replica; None of all others."""
    transfer: int | None = None
    """The number of the transfer that its KV goes by; still known when its token has ended it."""

    @property
    def request_id(self) -> str:
        """The request that this sequence belongs to."""
        return self.request.request_id

    @property
    def seed(self) -> int:
        """The seed of this sample."""
        return sample_seed(self.request.seed, self.index)

    def __repr__(self) -> str:
        return f"Sequence({self.sequence_id}, {self.request_id!r}[{self.index}], {self.state.value}, slot {self.slot})"


def make_sequences(
    request: EngineRequest, *, first_id: int, arrival: int, root: bytes, send: object | None = None
) -> list[Sequence]:
    """Make the ``n`` sequences of a request, those that are over included; all but the first that is not are held until
    the shared prompt is computed.
    """
    prompt = np.ascontiguousarray(request.prompt_token_ids, dtype=np.int32)
    sequences = [
        Sequence(
            sequence_id=SequenceId(first_id + index),
            request=request,
            index=index,
            arrival=arrival,
            tokens=_known_tokens(prompt, request, index),
            prompt_length=len(prompt),
            max_length=len(prompt) + request.max_tokens,
            state=SequenceState.HELD,
            root=root,
            send=send,
        )
        for index in range(request.params.n)
    ]
    live = []
    for sequence in sequences:
        if request.generated and request.generated[sequence.index] is None:
            sequence.state, sequence.finish_reason = SequenceState.FINISHED, FinishReason.ABORT
        else:
            live.append(sequence)
    first, others = live[0], live[1:]
    first.state = SequenceState.WAITING
    # Nothing precedes a prompt's first token: it has no log-probability.
    first.prompt_logprobs_due = request.params.prompt_logprobs is not None and len(prompt) > 1
    for sequence in others:
        sequence.first_sample = first
    return sequences


def _known_tokens(prompt: Int32Array, request: EngineRequest, index: int) -> Int32Array:
    """Return a sample's tokens, those included that another replica has drawn."""
    drawn = request.generated[index] if request.generated else None
    return prompt if drawn is None or not len(drawn) else np.concatenate((prompt, drawn), dtype=np.int32)
