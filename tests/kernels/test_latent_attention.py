"""Attention to latents on a CPU: every way against the reference, and a position's bits in any company."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from slipstream.kernels.attention import prepare_attention
from slipstream.kernels.attention_plan import build_attention_plan
from slipstream.kernels.cpu.attention_workspace import AttentionWorkspace
from slipstream.kernels.latent_attention import latent_attention
from slipstream.kernels.mla_span import MlaOptions, mla_reference
from slipstream.tests.kernels.native_ways import torch_alone

CPU = torch.device("cpu")
BLOCK, HEADS, LATENT, WIDTH = 8, 3, 40, 52
OPTIONS = MlaOptions(scale=0.2, latent=LATENT)
CLOSE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
ROWS = [(0, 1), (7, 1), (530, 1), (0, 1), (0, 5), (13, 40), (500, 20)]
"""First positions and numbers of positions: behind whole spans of keys, too."""


class Sequences:
    """A cache with the latents of some sequences, in shuffled blocks; what nobody has written is NaN."""

    def __init__(self, rows: list[tuple[int, int]], dtype: torch.dtype) -> None:
        counts = [(start + count - 1) // BLOCK + 1 for start, count in rows]
        blocks = torch.randperm(sum(counts) + 2).numpy().astype(np.int32)
        self.layer_cache = torch.full((1, len(blocks), 1, BLOCK, WIDTH), math.nan, dtype=dtype)
        self.tables = np.zeros((len(rows), max(counts)), np.int32)
        for row, ((start, count), own) in enumerate(zip(rows, counts, strict=True)):
            self.tables[row, :own], blocks = blocks[:own], blocks[own:]
            latents = torch.randn(own * BLOCK, WIDTH, dtype=dtype)
            # A block's unwritten end is cleared when it is entered.
            latents[start + count :] = 0
            self.layer_cache[0, torch.from_numpy(self.tables[row, :own]).long(), 0] = latents.view(own, BLOCK, WIDTH)


def attend(
    q_TNW: torch.Tensor, rows: list[tuple[int, int]], tables: np.ndarray, layer_cache: torch.Tensor
) -> torch.Tensor:
    """Attend as a layer does, in one step of these rows."""
    dtype = q_TNW.dtype
    starts, counts = np.array(rows, np.int32).T
    plan = build_attention_plan(
        starts=np.ascontiguousarray(starts),
        counts=np.ascontiguousarray(counts),
        block_tables=tables,
        block_size=BLOCK,
        heads=HEADS,
        kv_heads=1,
        head_size=WIDTH,
        window=None,
        dtype=dtype,
        device=CPU,
        latent=LATENT,
        deterministic=True,
    )
    workspace = AttentionWorkspace(dtype=dtype, device=CPU)
    prepared = prepare_attention(plan, layer_cache, tokens=len(q_TNW), heads=HEADS, workspace=workspace)
    return latent_attention(q_TNW, layer_cache, prepared, OPTIONS)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", CLOSE)
def test_every_way_is_the_reference(dtype: torch.dtype, compiled: bool, seed: int) -> None:
    torch.manual_seed(seed)
    sequences = Sequences(ROWS, dtype)
    positions = [start + place for start, count in ROWS for place in range(count)]
    of_rows = np.repeat(np.arange(len(ROWS)), [count for _, count in ROWS])
    q_TNW = torch.randn(len(positions), HEADS, WIDTH, dtype=dtype)
    tables_TB = torch.from_numpy(sequences.tables[of_rows])
    expected = mla_reference(q_TNW, sequences.layer_cache[0, :, 0], torch.tensor(positions), tables_TB, OPTIONS)
    if compiled:
        found = attend(q_TNW, ROWS, sequences.tables, sequences.layer_cache)
    else:
        with torch_alone():
            found = attend(q_TNW, ROWS, sequences.tables, sequences.layer_cache)
    assert found.shape == (len(positions), HEADS, LATENT)
    torch.testing.assert_close(found, expected, atol=CLOSE[dtype], rtol=CLOSE[dtype])


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_position_has_its_own_bits(dtype: torch.dtype, compiled: bool, seed: int) -> None:
    """Decoded alone, or in chunks of any size."""
    torch.manual_seed(seed)
    length = 270
    sequences = Sequences([(0, length)], dtype)
    q_TNW = torch.randn(length, HEADS, WIDTH, dtype=dtype)

    def in_chunks(size: int) -> torch.Tensor:
        cuts = [(start, min(size, length - start)) for start in range(0, length, size)]
        parts = [
            attend(q_TNW[start : start + count], [(start, count)], sequences.tables, sequences.layer_cache)
            for start, count in cuts
        ]
        return torch.cat(parts)

    def all_ways() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return in_chunks(length), in_chunks(37), in_chunks(1)

    if compiled:
        whole, chunks, decoded = all_ways()
    else:
        with torch_alone():
            whole, chunks, decoded = all_ways()
    assert torch.equal(chunks, whole)
    assert torch.equal(decoded, whole)
