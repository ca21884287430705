"""Decoding steps that are recorded once for each number of rows, and replayed.

Owns which steps that are, the recordings, and how a step's inputs get to the places where its recording looks for
them. A pass that cannot be recorded, because it is not made of compiled kernels alone, is found out at the first try;
after that no step is. How recording works is ``kernels.cpu.recorded``'s business, and the model knows nothing of it.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

from torch import Tensor

from ...comm.overlap import run_plain
from ...kernels.attention import PreparedAttention
from ...kernels.cpu.attention_paged import PreparedPaged, renew_paged
from ...kernels.cpu.native import Native, native
from ...kernels.cpu.recorded import Recording, StepMemory, record, switched_on
from ..messages import Int32Array
from ..models.decoder import Decoder, PassInputs
from ..models.forward import ForwardBatch
from ..models.kv_cache import KvCache

MOST_ROWS = 64
"""Of a recorded step; with more, calls take next to no part of it. Bounds the recordings and their memory."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _RecordedStep:
    """A recording, and the inputs that it reads."""

    inputs: PassInputs
    recording: Recording


class RecordedSteps:
    """The recordings of a model that has one rank, with its cache."""

    def __init__(self, model: Decoder, cache: KvCache, compiled: Native) -> None:
        self._model = model
        self._cache = cache
        self._compiled = compiled
        self._steps: dict[int, _RecordedStep] = {}
        self._memory = StepMemory()
        self._refused = False

    @classmethod
    def where_possible(cls, model: Decoder, cache: KvCache) -> RecordedSteps | None:
        """Return recordings for a model; None without compiled kernels, or where they are switched off."""
        compiled = native() if model.device.type == "cpu" else None
        return None if compiled is None or not switched_on(os.environ) else cls(model, cache, compiled)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return the numbers of rows that there are recordings for."""
        return tuple(sorted(self._steps))

    def take(self, counts: Int32Array) -> bool:
        """Return whether a step is run here: each of its rows has one token.

        Shapes: counts [rows], the tokens of each row
        """
        return not self._refused and len(counts) <= MOST_ROWS and bool((counts == 1).all())

    def run(self, batch: ForwardBatch) -> Tensor:
        """Return the hidden states of a step's tokens, valid until the next step; recorded, or as they are always
        computed.
        """
        inputs = run_plain(self._model.open_parts(batch, self._cache))
        known = self._steps.get(inputs.hidden_TH.shape[0])
        if known is None:
            return self._record(inputs)
        _renew(known.inputs, inputs)
        return known.recording.replay()

    def _record(self, inputs: PassInputs) -> Tensor:
        recorded = record(self._compiled, lambda: run_plain(self._model.layer_parts(inputs, self._cache)), self._memory)
        if recorded.recording is None:
            logger.debug("steps are not recorded: %s", recorded.refusal)
            self._refused = True
            self._steps.clear()
        else:
            self._steps[inputs.hidden_TH.shape[0]] = _RecordedStep(inputs=inputs, recording=recorded.recording)
        return recorded.output


def _renew(kept: PassInputs, fresh: PassInputs) -> None:
    """Bring a step's inputs to the places of those that were recorded; ``fresh`` is kept until the step has run."""
    kept.hidden_TH.copy_(fresh.hidden_TH)
    own, new = kept.attention, fresh.attention
    own.cos_TD.copy_(new.cos_TD)
    own.sin_TD.copy_(new.sin_TD)
    own.kv_rows.copy_(new.kv_rows)
    for window, prepared in own.attention.items():
        renew_paged(_paged(prepared), _paged(new.attention[window]))


def _paged(prepared: PreparedAttention) -> PreparedPaged:
    assert isinstance(prepared.decode, PreparedPaged), "a recorded pass attends by compiled kernels"
    return prepared.decode
