"""What passes between the scheduler, the executor and the front ends: plain values, no behaviour.

A step goes out as one ``StepPlan`` and comes back as one ``StepResult``. Plans are deltas: an executor is told a
sequence's tokens and parameters once, when it is admitted, and afterwards only which rows to compute and which blocks
were added. The executor keeps drawn tokens itself, so that a step can be planned before the last one's tokens are
known to the scheduler. Arrays are numpy, flat and of fixed dtype, ready to travel as bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NewType

import numpy as np
from numpy.typing import NDArray

from ..sdk.params import SamplingParams

SequenceId = NewType("SequenceId", int)

Int32Array = NDArray[np.int32]
BoolArray = NDArray[np.bool_]


class FinishReason(Enum):
    """Why a sequence ended. ``GRAMMAR``: its constraint became too complex to say which token may come next."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    GRAMMAR = "grammar"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One request as the engine takes it: token ids in, nothing about text.

    Shapes: prompt_token_ids [prompt tokens] int32
    Units: arrival_time_s, seconds on the engine's clock
    ``seed`` is resolved (never None); ``stop_ids`` are end-of-sequence and stop ids together; ``max_tokens`` is
    resolved against the model's length. ``cache_salt`` keeps the prefix cache of tenants apart. Lower ``priority``
    goes first. ``generated``: tokens that each sample has already, drawn by another replica; None of a sample that is
    over, and () of a request that begins. They count as drawn: ``max_tokens``, penalties and grammars include them.
    """

    request_id: str
    prompt_token_ids: Int32Array
    params: SamplingParams
    seed: int
    stop_ids: tuple[int, ...]
    max_tokens: int
    arrival_time_s: float
    priority: int = 0
    cache_salt: str | None = None
    generated: tuple[Int32Array | None, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmittedSequence:
    """A sequence that enters the executor at this step, with everything the executor must keep about it.

    Shapes: token_ids [known tokens] int32 (prompt, then what was generated before an interruption);
    block_ids [blocks] int32
    ``wants_prompt_logprobs``: the prompt's log-probabilities were asked for and have not been delivered yet.
    """

    slot: int
    sequence_id: SequenceId
    token_ids: Int32Array
    prompt_length: int
    block_ids: Int32Array
    params: SamplingParams
    seed: int
    stop_ids: tuple[int, ...]
    wants_prompt_logprobs: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step: rows to compute, in order, each a contiguous run of positions of one sequence.

    Shapes: slots, starts, counts, sequence_ids [rows]; samples [rows] bool; block_slots, block_indices, block_ids
    [new blocks] int32, block ``block_indices[i]`` of slot ``block_slots[i]`` is ``block_ids[i]``;
    copy_sources, copy_targets [copies] int32, whole blocks copied one after the other before anything is computed;
    sending_rows [rows that are sent] int32, and sending_transfers likewise: the KV of row ``sending_rows[i]``, as far
    as it is computed, goes to another replica under the number ``sending_transfers[i]`` of this life's transfers
    """

    step: int
    admitted: tuple[AdmittedSequence, ...]
    slots: Int32Array
    sequence_ids: NDArray[np.int64]
    starts: Int32Array
    counts: Int32Array
    samples: BoolArray
    block_slots: Int32Array
    block_indices: Int32Array
    block_ids: Int32Array
    copy_sources: Int32Array
    copy_targets: Int32Array
    sending_rows: Int32Array = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    sending_transfers: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    @property
    def num_tokens(self) -> int:
        """Tokens computed by this step."""
        return int(self.counts.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities at one position: the token that stands there first, then the most likely ones in order.

    Shapes: token_ids [1 + k] int32, logprobs [1 + k] float32; ``rank`` of the first counts from 1
    """

    token_ids: Int32Array
    logprobs: NDArray[np.float32]
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTime:
    """What a rank of a pipeline stage spent on steps: in ``waiting_s`` other stages' hidden states and tokens were not
    there. In ``wire_s`` something that layers exchange was on its way between the ranks of the stage, and for
    ``wire_hidden_s`` of that the rank computed meanwhile.
    """

    stage: int
    busy_s: float
    waiting_s: float
    wire_s: float = 0.0
    wire_hidden_s: float = 0.0

    def plus(self, other: StageTime) -> StageTime:
        """Return the sum of two times of one stage."""
        return StageTime(
            stage=self.stage,
            busy_s=self.busy_s + other.busy_s,
            waiting_s=self.waiting_s + other.waiting_s,
            wire_s=self.wire_s + other.wire_s,
            wire_hidden_s=self.wire_hidden_s + other.wire_hidden_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step produced.

    Shapes: token_ids [rows of the plan] int32, -1 where nothing was drawn
    ``logprobs`` by row; ``prompt_logprobs`` by row: entry ``i`` belongs to position ``starts[row] + 1 + i``.
    ``invalid_rows`` had logits that no token can be drawn from (NaN, infinities), and the grammars of ``grammar_rows``
    no longer said which tokens may be: their sequences fail. ``stages``: a rank's own time, and of a replica's
    result that of each stage's first rank; of one rank alone, nothing.
    Units: execute_s, seconds the executor worked
    """

    step: int
    token_ids: Int32Array
    execute_s: float
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    invalid_rows: tuple[int, ...] = ()
    grammar_rows: tuple[int, ...] = ()
    stages: tuple[StageTime, ...] = ()
