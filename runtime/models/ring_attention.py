"""The attention of one layer where long rows are divided over ranks: keys and values go round, queries stay.

While a hop is on the wire, the rank's queries attend to what there is already: keys of earlier steps and its own at
first, then what the hop before has brought. Results are merged by their log-sum-exp. What arrives is written to the
rank's own cache, where decoding will need it.

Shapes: T tokens of the rank, N query heads, K KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...comm.collectives import Collectives
from ...comm.overlap import Begun, Parts
from ...comm.ring import RingPass
from ...kernels.attention import PreparedAttention, paged_attention
from ...kernels.attention_span import AttentionOptions
from ...kernels.cpu.attention_partial import PartialAttention
from ...kernels.cpu.attention_workspace import AttentionWorkspace
from ...kernels.rope_kv import kv_write_rows, write_kv
from .kv_cache import KvCache
from .ring_batch import RingBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class RingInputs:
    """What one divided step computes once for all layers.

    Shapes: kv_rows, for each hop [tokens that it brings * 2K] int64
    """

    group: Collectives
    batch: RingBatch
    kv_rows: Sequence[Tensor]
    partial: PartialAttention
    workspace: AttentionWorkspace

    @classmethod
    def prepare(
        cls, batch: RingBatch, group: Collectives, cache: KvCache, *, heads: int, workspace: AttentionWorkspace
    ) -> RingInputs:
        """Prepare a step; any layer's cache is like the others'."""
        _, num_blocks, kv_heads, block_size, head_size = cache.layers[0].shape
        return cls(
            group=group,
            batch=batch,
            kv_rows=[
                kv_write_rows(slots_T, num_blocks=num_blocks, kv_heads=kv_heads, block_size=block_size)
                for slots_T in batch.slots
            ],
            partial=PartialAttention(
                tokens=batch.tokens, heads=heads, kv_heads=kv_heads, head_size=head_size, device=workspace.device
            ),
            workspace=workspace,
        )


def ring_attention(
    q_TND: Tensor,
    kv_TSD: Tensor,
    layer_cache: Tensor,
    prepared: PreparedAttention,
    ring: RingInputs,
    options: AttentionOptions,
) -> Parts:
    """Return each of the rank's tokens' attention, as ``paged_attention``; their own keys and values are written.

    Shapes: q_TND [tokens, heads, head size]; kv_TSD [tokens, 2K, head size]; returns [tokens, heads, head size]
    """
    batch = ring.batch
    passing = RingPass(ring.group, kv_TSD[batch.first_token :].contiguous(), batch.tokens_of_piece)
    q_own_TND = q_TND[batch.first_token :]

    def attend_at_once(some_TND: Tensor) -> Tensor:
        return paged_attention(
            some_TND,
            layer_cache,
            prepared,
            scale=options.scale,
            soft_cap=options.soft_cap,
            sinks_N=options.sinks_N,
        )

    def attend(turn: int) -> None:
        for plan in batch.turns[turn][options.window] if batch.turns else ():
            ring.partial.attend(q_own_TND, layer_cache, plan, options, first=turn == 0, workspace=ring.workspace)

    attended_TND = None
    for turn, (hop, rows) in enumerate(zip(batch.hops, ring.kv_rows, strict=True)):
        work = passing.begin(hop)
        yield Begun(work)
        if batch.turns and turn == 0:
            attended_TND = attend_at_once(q_TND[: batch.first_token])
        attend(turn)
        received = yield work
        passing.take(hop, received)
        write_kv(received, rows, layer_cache)
    if attended_TND is None:
        return attend_at_once(q_TND)
    attend(len(batch.hops))
    return torch.cat((attended_TND, ring.partial.finish(q_TND.dtype, options)))
