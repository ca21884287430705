"""One step's batch as the decoder takes it, built from the executor's arrays.

Owns the way from rows (contiguous runs of positions) to per-token tensors and attention plans; numpy without
a loop over rows. Called once a step, before the layers run. Of a step that is divided over ranks, the batch is one
rank's.

Shapes: R rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...comm.sequence_split import StepDivision, tokens_of
from ...kernels.attention_plan import AttentionPlan, build_attention_plan
from .model_spec import ModelSpec
from .ring_batch import RingBatch, build_ring_batch
from .upload import upload

Int32Array = NDArray[np.int32]

_HOST = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """The tokens of one step and where they stand.

    ``slot_mapping_T`` is block * block_size + offset of each token; ``rope_lengths_T`` is only there for
    dynamic rope; ``fresh_blocks_F`` are blocks entered at their first position and not filled: they are
    cleared before they are written. ``longest`` is the largest position plus one. ``attention`` is planned for the
    first ``attended`` tokens; the others are pieces of divided rows, and ``ring`` says how they attend.

    Shapes: token_ids_T, positions_T, rope_lengths_T, slot_mapping_T [tokens] int64; fresh_blocks_F [blocks]
    int64
    """

    token_ids_T: Tensor
    positions_T: Tensor
    rope_lengths_T: Tensor | None
    slot_mapping_T: Tensor
    fresh_blocks_F: Tensor
    longest: int
    attended: int
    attention: Mapping[int | None, AttentionPlan]
    ring: RingBatch | None = None


def build_forward_batch(
    *,
    token_ids: Tensor,
    starts: Int32Array,
    counts: Int32Array,
    prompt_lengths: Int32Array,
    block_tables: Int32Array,
    block_size: int,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    cache_dtype: torch.dtype | None = None,
    deterministic: bool = False,
    attended_rows: int | None = None,
    decode_room: int | None = None,
) -> ForwardBatch:
    """Build the batch of one step: row r computes positions ``starts[r]`` to ``starts[r] + counts[r]`` of a
    sequence, with weights of type ``dtype``; ``cache_dtype``, ``deterministic`` and ``decode_room`` as in
    ``build_attention_plan``.
    Attention is planned for the first ``attended_rows`` of the rows; None: for all. All of the batch goes to a GPU in
    one copy.

    Shapes: token_ids [tokens] int64 on the host or on ``device``, the rows' tokens one row after the other; starts,
    counts, prompt_lengths [rows] int32, counts at least 1; block_tables [rows, most blocks] int32, what stands beyond
    a row's last block is never read
    """
    starts64, counts64 = starts.astype(np.int64), counts.astype(np.int64)
    rows_T = np.repeat(np.arange(len(starts64)), counts64)
    positions_T = np.arange(len(rows_T)) + np.repeat(starts64 - (np.cumsum(counts64) - counts64), counts64)
    if token_ids.shape[0] != len(positions_T):
        raise ValueError(f"rows of {len(positions_T)} tokens in all came with {token_ids.shape[0]} token ids")
    blocks_T = block_tables[rows_T, positions_T // block_size].astype(np.int64)
    rope_lengths_T = None
    if spec.rope.depends_on_prompt_length:
        lengths_T = np.maximum(prompt_lengths.astype(np.int64)[rows_T], positions_T + 1)
        rope_lengths_T = torch.from_numpy(lengths_T)
    batch = ForwardBatch(
        token_ids_T=token_ids,
        positions_T=torch.from_numpy(positions_T),
        rope_lengths_T=rope_lengths_T,
        slot_mapping_T=torch.from_numpy(blocks_T * block_size + positions_T % block_size),
        fresh_blocks_F=torch.from_numpy(_fresh_blocks(starts64, counts64, block_tables, block_size)),
        longest=int(positions_T.max(initial=-1)) + 1,
        attended=int(counts64[:attended_rows].sum()),
        attention={
            window: build_attention_plan(
                starts=starts[:attended_rows],
                counts=counts[:attended_rows],
                block_tables=block_tables[:attended_rows],
                block_size=block_size,
                heads=spec.num_heads,
                kv_heads=spec.num_kv_heads,
                head_size=spec.head_dim,
                window=window,
                dtype=dtype,
                device=device,
                cache_dtype=cache_dtype,
                latent=None if spec.latent is None else spec.latent.kv_rank,
                deterministic=deterministic,
                items_on=_HOST,
                decode_room=decode_room,
            )
            for window in spec.windows
        },
    )
    return upload(batch, device)


def build_divided_batch(
    division: StepDivision,
    *,
    token_ids: Tensor,
    prompt_lengths: Int32Array,
    block_tables: Int32Array,
    block_size: int,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    deterministic: bool = False,
) -> ForwardBatch:
    """Build one rank's batch of a step that is divided; otherwise as ``build_forward_batch``, of the step's rows.

    With ``deterministic``, pieces attend when all keys have come, and so to all of them in one order.
    """
    computed = division.computed
    rows = [piece.row for piece in computed]
    starts = np.array([piece.start for piece in computed], np.int32)
    batch = build_forward_batch(
        token_ids=token_ids.index_select(0, torch.from_numpy(tokens_of(computed)).to(token_ids.device)),
        starts=starts,
        counts=np.array([piece.end for piece in computed], np.int32) - starts,
        prompt_lengths=prompt_lengths[rows],
        block_tables=block_tables[rows],
        block_size=block_size,
        spec=spec,
        dtype=dtype,
        device=device,
        deterministic=deterministic,
        attended_rows=None if deterministic else len(division.whole),
    )
    ring = build_ring_batch(
        division,
        block_tables=block_tables,
        block_size=block_size,
        kv_heads=spec.num_kv_heads,
        windows=spec.windows,
        dtype=dtype,
        device=device,
        in_turns=not deterministic,
    )
    # A block is cleared by every rank, whichever of them writes to it first.
    fresh = _fresh_blocks(division.starts, division.counts, block_tables, block_size)
    return replace(batch, fresh_blocks_F=torch.from_numpy(fresh).to(device), ring=ring)


def _fresh_blocks(
    starts: NDArray[np.int64], counts: NDArray[np.int64], block_tables: Int32Array, block_size: int
) -> NDArray[np.int64]:
    # Only a row's last block can be entered at its beginning and left unfilled.
    lasts = starts + counts - 1
    indices = lasts // block_size
    fresh = np.flatnonzero((starts <= indices * block_size) & (lasts % block_size != block_size - 1))
    blocks: NDArray[np.int64] = block_tables[fresh, indices[fresh]].astype(np.int64)
    return blocks
