"""Draw the next tokens of a step's rows.

Owns each slot's sampling parameters. It must not know the scheduler, the model or text: on a request's way it stands
between the model's logits and the ``StepResult``. It keeps nothing that a token depends on but what ``admit`` was told:
penalties are counted afresh from the token table, so an interrupted sequence draws the same tokens again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.logit_edits import EditEntries, LogitEdits, edit_logits_
from ...kernels.sample import draw
from ...kernels.sample_settings import COLDEST_TEMPERATURE, DrawnTokens, DrawSettings
from ...kernels.token_logprobs import token_logprobs
from ...kernels.token_mask import keep_allowed_
from ..messages import AdmittedSequence, BoolArray, Int32Array, TokenLogprobs
from .grammar_masks import TokenMasks

Int64Array = NDArray[np.int64]
Float32Array = NDArray[np.float32]

_NO_LOGPROBS = -1
_PROMPT_CHUNK_ELEMENTS = 1 << 22  # logits whose log-probabilities are made at once: bounds the temporaries


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledRows:
    """What was drawn.

    Shapes: token_ids [rows] int32; ``logprobs`` by row, for the rows that ask
    ``invalid_rows`` had logits with NaN or +inf, or nothing but -inf, and the grammars of ``grammar_rows`` gave up:
    their tokens mean nothing, and their requests must fail.
    """

    token_ids: Int32Array
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    invalid_rows: tuple[int, ...] = ()
    grammar_rows: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Edits:
    """The parameters of a slot whose logits are edited before drawing; most slots have none.

    Shapes: bias_ids, bias_amounts [biased tokens]; stop_ids [stop ids]; prompt_ids [distinct prompt tokens], empty
    without a repetition penalty
    """

    prompt_length: int
    min_tokens: int
    repetition: float
    frequency: float
    presence: float
    bias_ids: Int64Array
    bias_amounts: Float32Array
    stop_ids: Int64Array
    prompt_ids: Int64Array

    @property
    def counts_outputs(self) -> bool:
        return self.frequency != 0.0 or self.presence != 0.0


class _Entries:
    """Collects (row, token, amount) triples of many rows for one update on the device."""

    def __init__(self) -> None:
        self._rows: list[Int64Array] = []
        self._ids: list[Int64Array] = []
        self._amounts: list[Float32Array] = []

    def add(self, row: int, token_ids: Int64Array, amounts: Float32Array | float) -> None:
        self._rows.append(np.full(token_ids.size, row, np.int64))
        self._ids.append(token_ids)
        self._amounts.append(np.broadcast_to(np.asarray(amounts, np.float32), token_ids.shape))

    def entries(self) -> EditEntries:
        if not self._rows:
            return EditEntries()
        return EditEntries(
            rows=np.concatenate(self._rows),
            token_ids=np.concatenate(self._ids),
            amounts=np.concatenate(self._amounts),
        )


class Sampler:
    """Draws tokens for slots; one per executor, for ``num_slots`` sequences at a time."""

    def __init__(self, num_slots: int) -> None:
        self._temperatures = np.zeros(num_slots, np.float64)
        self._top_ps = np.ones(num_slots, np.float64)
        self._top_ks = np.zeros(num_slots, np.int64)
        self._min_ps = np.zeros(num_slots, np.float64)
        self._seeds = np.zeros(num_slots, np.int64)
        self._logprobs = np.full(num_slots, _NO_LOGPROBS, np.int64)
        self._edits: dict[int, _Edits] = {}

    def admit(self, admitted: AdmittedSequence) -> None:
        """Take a sequence's parameters into its slot, in place of whatever was there."""
        slot, params = admitted.slot, admitted.params
        self._temperatures[slot] = params.temperature
        self._top_ps[slot] = params.top_p
        self._top_ks[slot] = params.top_k
        self._min_ps[slot] = params.min_p
        self._seeds[slot] = _two_complement(admitted.seed)
        self._logprobs[slot] = _NO_LOGPROBS if params.logprobs is None else params.logprobs
        edits = _edits_of(admitted)
        if edits is None:
            self._edits.pop(slot, None)
        else:
            self._edits[slot] = edits

    def settings(self, slots: Int32Array, positions: Int64Array) -> DrawSettings:
        """Return how rows are drawn.

        Shapes: slots [rows]; positions [rows], where each new token will stand
        """
        return DrawSettings(
            temperatures=self._temperatures[slots],
            top_ps=self._top_ps[slots],
            top_ks=self._top_ks[slots],
            min_ps=self._min_ps[slots],
            seeds=self._seeds[slots],
            positions=positions,
        )

    def needs_all_logits(self, slots: Int32Array) -> BoolArray:
        """Return for which rows more must be known of the logits than which token scores best.

        Shapes: slots [rows]
        """
        filtered = (self._top_ps[slots] < 1.0) | (self._top_ks[slots] > 0) | (self._min_ps[slots] > 0)
        # Greedy rows have no use for filters.
        filtered &= self._temperatures[slots] >= COLDEST_TEMPERATURE
        edited = np.array([slot in self._edits for slot in slots.tolist()], dtype=np.bool_)
        needed: BoolArray = filtered | edited | (self._logprobs[slots] != _NO_LOGPROBS)
        return needed

    def sample(
        self,
        logits_RV: Tensor,
        slots: Int32Array,
        positions: Int64Array,
        token_table: Int32Array,
        masks: TokenMasks | None = None,
    ) -> SampledRows:
        """Draw a token for every row. The logits are consumed: rows with penalties or masks are edited in place.

        Shapes: logits_RV [rows, vocabulary] float32; slots [rows]; positions [rows], where each new token will stand;
        token_table [slots, max length], each slot's known tokens from position 0
        """
        with torch.inference_mode():
            asking = np.flatnonzero(self._logprobs[slots] != _NO_LOGPROBS)
            edited = [row for row, slot in enumerate(slots.tolist()) if slot in self._edits] if self._edits else []
            raw_NV = _rows_of(logits_RV, asking, copy=bool(edited or masks)) if asking.size else None
            self._edit(logits_RV, edited, slots, positions, token_table)
            if masks is not None:
                device = logits_RV.device
                keep_allowed_(
                    logits_RV, torch.from_numpy(masks.rows).to(device), torch.from_numpy(masks.masks).to(device)
                )
            drawn = draw(logits_RV, self.settings(slots, positions))
            token_ids, valid = on_host(drawn)
            logprobs: dict[int, TokenLogprobs] = {}
            if raw_NV is not None:
                tokens_N = drawn.token_ids_R[torch.from_numpy(asking).to(logits_RV.device)]
                tables = _tables(raw_NV, tokens_N, self._logprobs[slots[asking]])
                logprobs = dict(zip(asking.tolist(), tables, strict=True))
            return SampledRows(
                token_ids=token_ids,
                logprobs=logprobs,
                invalid_rows=() if valid.all() else tuple(np.flatnonzero(~valid).tolist()),
                grammar_rows=() if masks is None else masks.failed_rows,
            )

    def _edit(
        self,
        logits_RV: Tensor,
        edited: list[int],
        slots: Int32Array,
        positions: Int64Array,
        token_table: Int32Array,
    ) -> None:
        """Apply bias, end-token mask, repetition, then frequency and presence, of all rows that ask at once."""
        if not edited:
            return
        bias, mask, repetition, counts = _Entries(), _Entries(), _Entries(), _Entries()
        for row in edited:
            slot = int(slots[row])
            own, position = self._edits[slot], int(positions[row])
            bias.add(row, own.bias_ids, own.bias_amounts)
            if position - own.prompt_length < own.min_tokens:
                mask.add(row, own.stop_ids, 0.0)
            if own.repetition == 1.0 and not own.counts_outputs:
                continue
            ids, times = np.unique(token_table[slot, own.prompt_length : position], return_counts=True)
            output_ids = ids.astype(np.int64)
            if own.repetition != 1.0:
                repetition.add(row, own.prompt_ids, own.repetition)
                repetition.add(row, output_ids, own.repetition)
            if own.counts_outputs:
                counts.add(row, output_ids, (-own.frequency * times - own.presence).astype(np.float32))
        edits = LogitEdits(
            bias=bias.entries(), mask=mask.entries(), repetition=repetition.entries(), counts=counts.entries()
        )
        edit_logits_(logits_RV, edits)


def on_host(drawn: DrawnTokens) -> tuple[Int32Array, BoolArray]:
    """Return drawn tokens, and which are valid, in one copy from the device.

    Shapes: returns [rows] int32, [rows]
    """
    both_2R = torch.stack((drawn.token_ids_R.to(torch.int32), drawn.valid_R.to(torch.int32))).cpu().numpy()
    return both_2R[0], both_2R[1] != 0


def prompt_token_logprobs(logits_NV: Tensor, target_ids_N: NDArray[np.int32], k: int) -> tuple[TokenLogprobs, ...]:
    """Return the log-probabilities of prompt tokens: row i's logits are those that predict ``target_ids_N[i]``.

    Shapes: logits_NV [positions, vocabulary] float32; target_ids_N [positions]
    """
    step = max(1, _PROMPT_CHUNK_ELEMENTS // logits_NV.shape[1])
    tables: list[TokenLogprobs] = []
    with torch.inference_mode():
        targets_N = torch.from_numpy(target_ids_N.astype(np.int64)).to(logits_NV.device)
        for start in range(0, logits_NV.shape[0], step):
            part = slice(start, start + step)
            ks = np.full(targets_N[part].shape[0], k, np.int64)
            tables += _tables(logits_NV[part], targets_N[part], ks)
    return tuple(tables)


def _edits_of(admitted: AdmittedSequence) -> _Edits | None:
    params = admitted.params
    repeats = params.repetition_penalty != 1.0
    # A grammar's own mask minds min_tokens: where the text is complete, its end is all that is left to draw.
    ends_late = params.min_tokens > 0 and bool(admitted.stop_ids) and params.structured_outputs is None
    if not (repeats or params.frequency_penalty or params.presence_penalty or params.logit_bias or ends_late):
        return None
    prompt = admitted.token_ids[: admitted.prompt_length] if repeats else admitted.token_ids[:0]
    return _Edits(
        prompt_length=admitted.prompt_length,
        min_tokens=params.min_tokens if ends_late else 0,
        repetition=params.repetition_penalty,
        frequency=params.frequency_penalty,
        presence=params.presence_penalty,
        bias_ids=np.fromiter(params.logit_bias.keys(), np.int64, len(params.logit_bias)),
        bias_amounts=np.fromiter(params.logit_bias.values(), np.float32, len(params.logit_bias)),
        stop_ids=np.asarray(admitted.stop_ids, np.int64),
        prompt_ids=np.unique(prompt).astype(np.int64),
    )


def _two_complement(seed: int) -> int:
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def _rows_of(logits_RV: Tensor, rows: NDArray[np.intp], *, copy: bool) -> Tensor:
    if not copy and rows.size == logits_RV.shape[0]:
        return logits_RV
    return logits_RV.index_select(0, torch.from_numpy(rows).to(logits_RV.device))


def _tables(logits_NV: Tensor, token_ids_N: Tensor, ks: Int64Array) -> list[TokenLogprobs]:
    """Make one table a row: the given token first, then the row's own k most likely."""
    made = token_logprobs(logits_NV, token_ids_N, int(ks.max(initial=0)))
    ids = torch.cat((token_ids_N.unsqueeze(-1), made.top_ids_RK), dim=-1).to(torch.int32).cpu().numpy()
    logprobs = torch.cat((made.logprobs_R.unsqueeze(-1), made.top_logprobs_RK), dim=-1).cpu().numpy()
    ranks = made.ranks_R.tolist()
    return [
        TokenLogprobs(token_ids=ids[row, : 1 + k], logprobs=logprobs[row, : 1 + k], rank=ranks[row])
        for row, k in enumerate(ks.tolist())
    ]
