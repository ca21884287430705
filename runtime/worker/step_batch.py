"""The rows of a step as arrays, and the batch that a decoder takes of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..messages import Int32Array
from ..models.decoder import Decoder
from ..models.forward import ForwardBatch, build_forward_batch
from ..models.kv_cache import KvCache


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRows:
    """The rows of a step, as arrays; tokens one row after the other.

    Shapes: token_ids_T [tokens] int64 on the host; starts, counts, prompt_lengths [rows] int32; block_tables [rows,
    most blocks] int32
    """

    token_ids_T: Tensor
    starts: Int32Array
    counts: Int32Array
    prompt_lengths: Int32Array
    block_tables: Int32Array


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchBuilder:
    """Builds the batches of a model with its cache."""

    model: Decoder
    cache: KvCache
    deterministic: bool

    def build(self, rows: StepRows, *, decode_room: int | None = None) -> ForwardBatch:
        """Return a step's batch; ``decode_room`` as of ``build_forward_batch``."""
        return build_forward_batch(
            token_ids=rows.token_ids_T,
            starts=rows.starts,
            counts=rows.counts,
            prompt_lengths=rows.prompt_lengths,
            block_tables=rows.block_tables,
            block_size=self.cache.block_size,
            spec=self.model.spec,
            deterministic=self.deterministic,
            dtype=self.model.dtype,
            cache_dtype=self.cache.layers[0].dtype,
            device=self.model.device,
            decode_room=decode_room,
        )
