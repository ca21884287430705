"""Which tokens the grammars of a step's rows allow, computed while the model computes the logits.

Owns each slot's place in its grammar. States are made anew at every admission and catch up from the token table, so
an interrupted sequence, or one that moved here, goes on where it stood.
"""

from __future__ import annotations

import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...sdk.errors import InvalidRequest
from ..messages import AdmittedSequence, Int32Array
from .grammar import GrammarCompiler, GrammarState, MaskFiller

logger = logging.getLogger(__name__)

_MAX_THREADS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenMasks:
    """The masks of those rows that have a grammar.

    Shapes: rows [N] int64, masks [N, words] int32, as ``kernels.token_mask`` takes them
    ``failed_rows``: their grammar allows no judgement any more, and their masks everything.
    """

    rows: NDArray[np.int64]
    masks: NDArray[np.int32]
    failed_rows: tuple[int, ...] = ()


@dataclass(slots=True, kw_only=True)
class _Slot:
    """``early_mask``: tokens that may not come before ``min_tokens``. No state: the grammar could not be compiled."""

    state: GrammarState | None
    prompt_length: int
    min_tokens: int
    early_mask: NDArray[np.uint32]

    @property
    def failed(self) -> bool:
        return self.state is None or self.state.failed

    @property
    def consumed(self) -> int:
        return 0 if self.state is None else self.state.consumed


class GrammarMasks:
    """Grammar states by slot."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._slots: dict[int, _Slot] = {}
        self._filler = MaskFiller(max(1, min(_MAX_THREADS, (os.cpu_count() or 1) // 2)))
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="slipstream-grammar")
        self._end_mask = _mask_of(compiler.eos_token_ids, compiler.vocab_size)

    def admit(self, admitted: AdmittedSequence) -> None:
        """Take a sequence into its slot, in place of whatever was there."""
        self._slots.pop(admitted.slot, None)
        if (constraint := admitted.params.structured_outputs) is None:
            return
        try:
            state = self._compiler.start(constraint)
        except InvalidRequest:
            # It was compiled before the request was taken; should that have been left out, the row fails, not the step.
            logger.exception("a constraint reached the executor that cannot be compiled")
            state = None
        self._slots[admitted.slot] = _Slot(
            state=state,
            prompt_length=admitted.prompt_length,
            min_tokens=admitted.params.min_tokens,
            early_mask=_mask_of(admitted.stop_ids, self._compiler.vocab_size),
        )

    def begin(
        self, slots: Int32Array, positions: NDArray[np.int64], token_table: Int32Array
    ) -> Future[TokenMasks] | None:
        """Start on the masks of tokens that will stand at ``positions``; None when no row has a grammar.

        Shapes: slots, positions [rows]; token_table [slots, max length], known up to each position
        """
        if not self._slots:
            return None
        rows = [row for row, slot in enumerate(slots.tolist()) if slot in self._slots]
        if not rows:
            return None
        wanted = []
        for row in rows:
            slot = self._slots[int(slots[row])]
            begin, end = slot.prompt_length + slot.consumed, int(positions[row])
            wanted.append((slot, end - slot.prompt_length, token_table[int(slots[row]), begin:end].copy()))
        return self._thread.submit(self._fill, rows, wanted)

    def close(self) -> None:
        """Let the thread end after what it is at."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _fill(self, rows: list[int], wanted: list[tuple[_Slot, int, Int32Array]]) -> TokenMasks:
        masks = np.zeros((len(rows), len(self._end_mask)), dtype=np.uint32)
        going = []
        for place, (slot, _, token_ids) in enumerate(wanted):
            if slot.state is not None:
                slot.state.advance(token_ids)
                if not slot.state.ended:
                    going.append((slot.state, place))
        if going:
            self._filler.fill(going, masks.view(np.int32))
        for place, (slot, drawn, _) in enumerate(wanted):
            if slot.failed:
                masks[place] = ~np.uint32(0)
                continue
            if drawn < slot.min_tokens:
                masks[place] &= ~slot.early_mask
            if not masks[place].any():
                # The text is complete: nothing but its end is left, whatever min_tokens says.
                masks[place] = self._end_mask
        failed = tuple(row for row, (slot, _, _) in zip(rows, wanted, strict=True) if slot.failed)
        return TokenMasks(rows=np.asarray(rows, np.int64), masks=masks.view(np.int32), failed_rows=failed)


def _mask_of(token_ids: tuple[int, ...], vocab_size: int) -> NDArray[np.uint32]:
    mask = np.zeros(-(-vocab_size // 32), dtype=np.uint32)
    for token in token_ids:
        mask[token // 32] |= np.uint32(1 << (token % 32))
    return mask
