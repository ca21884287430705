"""Carries out step plans on a model: copies blocks, gathers inputs, runs the decoder, draws tokens.

Owns the rank's side of every running sequence: its tokens, its block table, its sampling state, and the KV cache. The
scheduler sends deltas; drawn tokens are written here first, so that the next step can read them before the scheduler
has heard of them. Steps run one after the other on a thread of their own; torch releases the interpreter lock while
it computes, so the next step is planned meanwhile. Whatever else computes for the engine, loading for one, must run on
that thread too: OpenMP keeps a team of threads for every thread that has ever computed, and once there are more of them
than cores they no longer wait actively for work. On two cores a step of a small model then takes half as long again.

On a request's way: after the scheduler, around models and sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ...comm.groups import ALONE, MeshGroups
from ...comm.sequence_split import StepDivision
from ..clock import monotonic_clock
from ..messages import AdmittedSequence, Int32Array, StageTime, StepPlan, StepResult, TokenLogprobs
from ..models.decoder import Decoder
from ..models.kv_cache import KvCache
from ..models.upload import upload
from .expert_balance import ExpertBalance
from .grammar import GrammarCompiler
from .grammar_masks import GrammarMasks, TokenMasks
from .sampler import SampledRows, Sampler, prompt_token_logprobs
from .sequence_ranks import SequenceRanks
from .stage_link import StageLink
from .step_batch import StepRows
from .step_forward import StepForward
from .step_kv import StepKv
from .vocabulary import VocabularySampler

# Rows of logits computed at once for prompt log-probabilities: bounds their memory (rows x vocabulary x 4 bytes).
_PROMPT_LOGPROB_ROWS = 256

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Where each row of a plan stands in the flat batch.

    Shapes: first, last [rows]: index of the row's first and last token; slot_T, position_T [tokens]
    """

    first: Int32Array
    last: Int32Array
    slot_T: Int32Array
    position_T: Int32Array


def _lay_out(plan: StepPlan) -> _Rows:
    ends = np.cumsum(plan.counts, dtype=np.int32)
    first = ends - plan.counts
    within = np.arange(int(ends[-1]), dtype=np.int32) - np.repeat(first, plan.counts)
    return _Rows(
        first=first,
        last=ends - 1,
        slot_T=np.repeat(plan.slots, plan.counts),
        position_T=np.repeat(plan.starts, plan.counts) + within,
    )


def step_thread() -> ThreadPoolExecutor:
    """Return a thread for all that computes for one engine."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="slipstream-step")


class ModelExecutor:
    """Runs plans on one device.

    Shapes: token table [slots, max_length] int32, block table [slots, max_blocks] int32, both on the host
    """

    def __init__(
        self,
        *,
        model: Decoder,
        layers: StepForward,
        cache: KvCache,
        block_size: int,
        max_slots: int,
        max_length: int,
        device: torch.device,
        grammars: GrammarCompiler,
        thread: ThreadPoolExecutor,
        groups: MeshGroups = ALONE,
        balance: ExpertBalance | None = None,
        sequences: SequenceRanks | None = None,
        kv: StepKv | None = None,
    ) -> None:
        """Take a loaded model, its ``layers`` over ``cache``, and the ``step_thread`` that has loaded it; ``close``
        ends the thread and the groups. ``kv`` sends KV on while it is computed; None where none is.
        """
        self._model = model
        self._groups = groups
        self._cache = cache
        self._layers = layers
        self._kv = kv
        self._sequences = sequences or SequenceRanks(groups.sp, block_size=block_size)
        self._device = device
        self._sampler = Sampler(max_slots)
        self._vocabulary = VocabularySampler(
            self._sampler, groups.tp, vocabulary=model.vocabulary, vocab_size=model.spec.vocab_size
        )
        self._balance = balance
        self._grammars = GrammarMasks(grammars)
        self._tokens = np.zeros((max_slots, max_length), dtype=np.int32)
        self._block_table = np.zeros((max_slots, -(-max_length // block_size)), dtype=np.int32)
        self._prompt_length = np.zeros(max_slots, dtype=np.int32)
        self._prompt_logprobs: dict[int, int] = {}
        self._thread = thread
        self._link = None
        if groups.pp is not None:
            self._link = StageLink(groups.pp, hidden_size=model.received_size, dtype=model.dtype, device=device)

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        """Queue a step behind those submitted before."""
        return self._thread.submit(self._run, plan)

    def call(self, run: Callable[[], _T]) -> Future[_T]:
        """Queue something else that computes, behind the steps submitted before."""
        return self._thread.submit(torch.inference_mode()(run))

    def close(self) -> None:
        """Let the thread end after the step it is at. Not waited for: after a time-out that step may never end."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._groups.close()
        if self._balance is not None:
            self._balance.close()
        self._grammars.close()

    @torch.inference_mode()
    def _run(self, plan: StepPlan) -> StepResult:
        start_s = monotonic_clock()
        if self._balance is not None:
            self._balance.begin_step()
        waited_s = 0.0 if self._link is None else self._link.waited_s
        self._take_tokens(plan)
        # Copies come first: a source may have been freed and handed out again, and is written by this very step.
        self._cache.copy_blocks(plan.copy_sources, plan.copy_targets)
        for admitted in plan.admitted:
            self._admit(admitted)
        self._block_table[plan.block_slots, plan.block_indices] = plan.block_ids
        if plan.admitted:
            self._clear_entered(plan)
        rows = _lay_out(plan)
        if not self._groups.place.is_last_stage:
            self._pass_on(plan, rows)
            execute_s = monotonic_clock() - start_s
            return StepResult(
                step=plan.step,
                token_ids=np.full(len(plan.slots), -1, dtype=np.int32),
                execute_s=execute_s,
                stages=self._stage_time(execute_s, waited_s),
            )
        # Before the model runs, so that the two go on side by side.
        masks = self._begin_masks(plan)
        division = self._sequences.divide(plan.starts, plan.counts)
        hidden_TH = self._forward(plan, rows, division)
        if division is not None:
            hidden_TH = self._sequences.bring(hidden_TH, division, self._wanted(plan, rows))
        prompt_logprobs = self._score_prompts(plan, rows, hidden_TH)
        drawn = self._sample(plan, rows, hidden_TH, masks)
        execute_s = monotonic_clock() - start_s
        return StepResult(
            step=plan.step,
            token_ids=drawn.token_ids,
            execute_s=execute_s,
            logprobs=drawn.logprobs,
            prompt_logprobs=prompt_logprobs,
            invalid_rows=drawn.invalid_rows,
            grammar_rows=drawn.grammar_rows,
            stages=self._stage_time(execute_s, waited_s),
        )

    def _stage_time(self, execute_s: float, waited_before_s: float) -> tuple[StageTime, ...]:
        """Return what the step took here; of a rank without others there is nothing to say."""
        place = self._groups.place
        if place.shape.size == 1:
            return ()
        waiting_s = 0.0 if self._link is None else self._link.waited_s - waited_before_s
        wire_s, hidden_s = self._layers.take_wire_s()
        time = StageTime(
            stage=place.pp, busy_s=execute_s - waiting_s, waiting_s=waiting_s, wire_s=wire_s, wire_hidden_s=hidden_s
        )
        return (time,)

    def _pass_on(self, plan: StepPlan, rows: _Rows) -> None:
        """Compute a stage that is not the last, and be ready for the tokens that the last one draws."""
        assert self._link is not None, "a stage that is not the last has others"
        self._link.send_hidden(self._forward(plan, rows, self._sequences.divide(plan.starts, plan.counts)))
        if plan.samples.any():
            positions = (plan.starts + plan.counts)[plan.samples].astype(np.int64)
            self._link.expect_tokens(plan.slots[plan.samples], positions)

    def _take_tokens(self, plan: StepPlan) -> None:
        """Write down the tokens that this step's slots, or their owners before, were waiting for."""
        if self._link is None or self._groups.place.is_last_stage:
            return
        admitted = np.array([admitted.slot for admitted in plan.admitted], dtype=np.int32)
        for drawn in self._link.settle(np.concatenate((plan.slots, admitted))):
            self._write_tokens(drawn.slots, drawn.positions, drawn.token_ids)

    def _write_tokens(self, slots: Int32Array, positions: NDArray[np.int64], token_ids: Int32Array) -> None:
        # The very last token of a sequence at the model's limit has no place in the table, and needs none.
        fits = positions < self._tokens.shape[1]
        self._tokens[slots[fits], positions[fits]] = token_ids[fits]

    def _admit(self, admitted: AdmittedSequence) -> None:
        slot = admitted.slot
        self._tokens[slot, : len(admitted.token_ids)] = admitted.token_ids
        self._block_table[slot, : len(admitted.block_ids)] = admitted.block_ids
        self._prompt_length[slot] = admitted.prompt_length
        self._sampler.admit(admitted)
        self._grammars.admit(admitted)
        self._prompt_logprobs.pop(slot, None)
        if admitted.wants_prompt_logprobs and admitted.params.prompt_logprobs is not None:
            self._prompt_logprobs[slot] = admitted.params.prompt_logprobs

    def _clear_entered(self, plan: StepPlan) -> None:
        """Clear what stands behind the first position of sequences that enter a block in its middle.

        Nobody else does (``build_forward_batch`` clears blocks that are entered at their beginning): where another
        replica has filled the block up to here, the rest of it is whatever an earlier owner left.
        """
        block_size = self._cache.block_size
        entered = np.isin(plan.slots, [admitted.slot for admitted in plan.admitted])
        slots, starts = plan.slots[entered], plan.starts[entered]
        blocks = self._block_table[slots, starts // block_size]
        # What was copied is a block that another sequence entered, and cleared.
        inside = (starts % block_size > 0) & ~np.isin(blocks, plan.copy_targets)
        for block, start in zip(blocks[inside].tolist(), starts[inside].tolist(), strict=True):
            self._cache.clear_from(block, start % block_size)

    def _forward(self, plan: StepPlan, rows: _Rows, division: StepDivision | None) -> torch.Tensor:
        """Return the hidden states of the step's tokens; of a divided step, of this rank's."""
        step_rows = StepRows(
            token_ids_T=torch.from_numpy(self._tokens[rows.slot_T, rows.position_T].astype(np.int64)),
            starts=plan.starts,
            counts=plan.counts,
            prompt_lengths=self._prompt_length[plan.slots],
            block_tables=self._block_table[plan.slots],
        )
        hidden_TH = None
        if self._link is not None and not self._groups.place.is_first_stage:
            hidden_TH = self._link.receive_hidden(plan.num_tokens if division is None else division.num_tokens)
        kv = self._kv if len(plan.sending_rows) else None
        if kv is not None:
            self._begin_sending(kv, plan)
        if division is not None:
            hidden_TH = self._layers.run_divided(step_rows, hidden_TH, division)
        else:
            hidden_TH = self._layers.run(step_rows, hidden_TH, layer_done=None if kv is None else kv.layer_done)
        if kv is not None:
            kv.end_step()
        return hidden_TH

    def _begin_sending(self, kv: StepKv, plan: StepPlan) -> None:
        rows = plan.sending_rows
        stops = (plan.starts + plan.counts)[rows].tolist()
        blocks = [
            self._block_table[slot, : -(-stop // self._cache.block_size)].tolist()
            for slot, stop in zip(plan.slots[rows].tolist(), stops, strict=True)
        ]
        kv.begin_step(plan.sending_transfers.tolist(), blocks, stops)

    def _begin_masks(self, plan: StepPlan) -> Future[TokenMasks] | None:
        if not self._sequences.draws:
            return None
        drawing = plan.samples
        positions = (plan.starts + plan.counts)[drawing].astype(np.int64)
        return self._grammars.begin(plan.slots[drawing], positions, self._tokens)

    def _sample(
        self, plan: StepPlan, rows: _Rows, hidden_TH: torch.Tensor, masks: Future[TokenMasks] | None
    ) -> SampledRows:
        """Draw for the rows that are due; the answer counts rows as the plan does."""
        tokens = np.full(len(plan.slots), -1, dtype=np.int32)
        drawing = np.flatnonzero(plan.samples)
        if not len(drawing):
            return SampledRows(token_ids=tokens)
        slots = plan.slots[drawing]
        positions = (plan.starts + plan.counts)[drawing].astype(np.int64)
        sampled = SampledRows(token_ids=tokens[drawing])
        if self._sequences.draws:
            last = upload(torch.from_numpy(rows.last[drawing].astype(np.int64)), self._device)
            logits_RL = self._model.logits(hidden_TH.index_select(0, last))
            # The step's own deadline bounds the wait.
            allowed = None if masks is None else masks.result()
            sampled = self._vocabulary.sample(logits_RL, slots, positions, self._tokens, allowed)
        drawn = self._sequences.share(sampled.token_ids, self._device)
        tokens[drawing] = drawn
        self._write_tokens(slots, positions, drawn)
        if self._link is not None:
            self._link.send_tokens(drawn)
        return SampledRows(
            token_ids=tokens,
            logprobs={int(drawing[index]): entry for index, entry in sampled.logprobs.items()},
            invalid_rows=tuple(int(drawing[index]) for index in sampled.invalid_rows),
            grammar_rows=tuple(int(drawing[index]) for index in sampled.grammar_rows),
        )

    def _score_prompts(
        self, plan: StepPlan, rows: _Rows, hidden_TH: torch.Tensor
    ) -> dict[int, tuple[TokenLogprobs, ...]]:
        """Return, for rows that want it, the log-probabilities of the prompt tokens that this step predicts."""
        scores: dict[int, tuple[TokenLogprobs, ...]] = {}
        if not self._sequences.draws:
            return scores
        for row, count in self._scored(plan):
            slot, start, first = int(plan.slots[row]), int(plan.starts[row]), int(rows.first[row])
            entries: list[TokenLogprobs] = []
            for begin in range(0, count, _PROMPT_LOGPROB_ROWS):
                end = min(begin + _PROMPT_LOGPROB_ROWS, count)
                logits_NV = self._vocabulary.whole(self._model.logits(hidden_TH[first + begin : first + end]))
                targets = self._tokens[slot, start + 1 + begin : start + 1 + end]
                entries += prompt_token_logprobs(logits_NV, targets, self._prompt_logprobs[slot])
            scores[row] = tuple(entries)
        return scores

    def _scored(self, plan: StepPlan) -> Iterator[tuple[int, int]]:
        """Yield the rows whose prompts are scored, and how many of their first tokens predict a prompt token."""
        if not self._prompt_logprobs:
            return
        for row, slot in enumerate(plan.slots.tolist()):
            count = min(int(plan.counts[row]), int(self._prompt_length[slot]) - 1 - int(plan.starts[row]))
            if slot in self._prompt_logprobs and count > 0:
                yield row, count

    def _wanted(self, plan: StepPlan, rows: _Rows) -> NDArray[np.bool_]:
        """Return which tokens' hidden states are needed to draw and to score prompts.

        Shapes: returns [tokens]
        """
        wanted = np.zeros(plan.num_tokens, dtype=np.bool_)
        wanted[rows.last[plan.samples]] = True
        for row, count in self._scored(plan):
            wanted[rows.first[row] : rows.first[row] + count] = True
        return wanted
