"""Shared prefixes: which spans rows have in common, and attention that reads them once against rows on their own."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
import torch

from slipstream.kernels import backends
from slipstream.kernels.attention_decode import decode_attention, decode_attention_reference
from slipstream.kernels.attention_items import DecodeItems, decode_items
from slipstream.kernels.attention_span import SPAN_KEYS, AttentionOptions
from slipstream.kernels.shared_items import SharedItems, share_items
from slipstream.kernels.shared_prefix import shared_decode_attention, shared_tile_rows

CPU = torch.device("cpu")
CLOSE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
BLOCK, SPAN_BLOCKS, SIZE = 32, SPAN_KEYS // 32, 64


def tables_of(positions: list[int], shared: dict[int, list[list[int]]]) -> np.ndarray:
    """Return block tables of rows of which some have the same blocks in some spans; the rest of a table is no block."""
    blocks = np.random.default_rng(len(positions)).permutation(255).astype(np.int32)
    tables = np.full((len(positions), max(positions, default=0) // BLOCK + 2), 1 << 30, np.int32)
    taken = 0
    for row, position in enumerate(positions):
        count = position // BLOCK + 1
        tables[row, :count] = blocks[taken : taken + count]
        taken += count
    for span, groups in shared.items():
        own = slice(span * SPAN_BLOCKS, (span + 1) * SPAN_BLOCKS)
        for first, *others in groups:
            for row in others:
                tables[row, own] = tables[first, own]
    return tables


def items_of(positions: list[int], tables: np.ndarray, *, window: int | None, capacity: int | None) -> DecodeItems:
    return decode_items(
        np.array(positions), np.arange(len(positions)), tables, window=window, device=CPU, capacity=capacity
    )


def share(items: DecodeItems, *, window: int | None = None, tile_rows: int = 8, least_rows: int = 2) -> SharedItems:
    return share_items(
        items, window=window, block_size=BLOCK, heads_per_kv=2, tile_rows=tile_rows, least_rows=least_rows
    )


def groups_of(items: SharedItems) -> dict[int, list[set[int]]]:
    """Return the tiles' rows by span."""
    found: dict[int, list[set[int]]] = defaultdict(list)
    for _, span, first, count in items.tiles_4C[:, : int(items.tile_count_1)].T.tolist():
        found[span].append(set(items.members_S[first : first + count].tolist()))
    return dict(found)


def own_of(items: SharedItems) -> set[tuple[int, int]]:
    return {(row, span) for row, span in items.own.items_2C[:, : int(items.own.item_count_1)].T.tolist()}


def test_a_tree_is_found_span_by_span() -> None:
    positions = [1100, 1023, 1200, 1100, 600]
    tables = tables_of(positions, {0: [[0, 1, 2, 3, 4]], 1: [[0, 1], [2, 3]]})
    shared = share(items_of(positions, tables, window=None, capacity=None), tile_rows=16)
    assert groups_of(shared) == {0: [{0, 1, 2, 3, 4}], 1: [{0, 1}, {2, 3}]}
    # Row 1 ends with its second span, row 4 has no whole one of its own.
    assert own_of(shared) == {(0, 2), (2, 2), (3, 2), (4, 1)}


def test_what_is_not_shared_stays() -> None:
    positions = [1023, 1022, 1023, 1023]
    tables = tables_of(positions, {0: [[0, 1, 2]], 1: [[0, 1, 2]]})
    # The same first and last block, another one between; row 3 has row 0's blocks, in another span.
    tables[2, 5], tables[3, SPAN_BLOCKS : 2 * SPAN_BLOCKS] = 255, tables[0, :SPAN_BLOCKS]
    shared = share(items_of(positions, tables, window=None, capacity=None))
    # Row 1 does not see all of the second span.
    assert groups_of(shared) == {0: [{0, 1}], 1: [{0, 2}]}
    assert own_of(shared) == {(1, 1), (2, 0), (3, 0), (3, 1)}


def test_few_rows_windows_and_tiles() -> None:
    positions = [1050, 1040, 1600, 1050, 1050]
    tables = tables_of(positions, {0: [[0, 1, 2, 3, 4]], 1: [[0, 1, 2, 3, 4]]})
    items = items_of(positions, tables, window=600, capacity=None)
    shared = share(items, window=600)
    # None sees all of the first span, row 2 not all of the second; a tile has room for four rows.
    assert groups_of(shared) == {1: [{0, 1, 3, 4}]}
    assert groups_of(share(items, window=600, least_rows=5)) == {}
    tiles = groups_of(share(items_of(positions, tables, window=None, capacity=None)))
    assert [sorted(map(len, tiles[span])) for span in (0, 1)] == [[1, 4], [1, 4]]


def test_shapes_are_those_of_the_capacity() -> None:
    some = share(items_of([1050] * 4, tables_of([1050] * 4, {0: [[0, 1, 2]]}), window=None, capacity=40))
    none = share(items_of([3] * 4, tables_of([1050] * 4, {}), window=None, capacity=40))
    for name in ("members_S", "tiles_4C", "tile_count_1"):
        assert getattr(some, name).shape == getattr(none, name).shape
    assert some.own.items_2C.shape == none.own.items_2C.shape == (2, 40)
    assert int(none.tile_count_1) == 0 and own_of(none) == {(row, 0) for row in range(4)}
    empty = share(items_of([], np.zeros((0, 1), np.int32), window=None, capacity=None))
    assert int(empty.tile_count_1) == 0


def random_cache(positions: list[int], tables: np.ndarray, kv_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a cache that is NaN where no row has written."""
    cache = torch.full((2, 256, kv_heads, BLOCK, SIZE), math.nan, dtype=dtype)
    for row, position in enumerate(positions):
        blocks = torch.from_numpy(tables[row, : position // BLOCK + 1]).long()
        fresh = cache[0, blocks, 0, 0, 0].isnan()
        numbers = torch.randn(2, int(fresh.sum()), kv_heads, BLOCK, SIZE).to(dtype)
        if bool(fresh[-1]):
            numbers[:, -1, :, position % BLOCK + 1 :] = math.nan
        cache[:, blocks[fresh]] = numbers
    return cache


@pytest.mark.parametrize(
    ("dtype", "heads", "kv_heads", "window"),
    [
        (torch.float32, 4, 2, None),
        (torch.float16, 6, 1, 700),
        (torch.bfloat16, 20, 1, None),
        (torch.bfloat16, 3, 3, None),
    ],
)
def test_kernel_is_the_reference(
    dtype: torch.dtype, heads: int, kv_heads: int, window: int | None, seed: int, launches: list[str]
) -> None:
    torch.manual_seed(seed)
    positions = [530, 511, 600] if window is None else [530, 511, 600, 1024]
    tables = tables_of(positions, {0: [[0, 1, 2]]} if window is None else {0: [[0, 1, 2, 3]]})
    cache = random_cache(positions, tables, kv_heads, dtype)
    q_TND = torch.randn(len(positions), heads, SIZE, dtype=dtype)
    options = AttentionOptions(scale=0.125, window=window, sinks_N=torch.randn(heads))
    items = items_of(positions, tables, window=window, capacity=12)
    shared = share_items(
        items,
        window=window,
        block_size=BLOCK,
        heads_per_kv=heads // kv_heads,
        tile_rows=shared_tile_rows(SIZE, dtype, dtype, deterministic=False),
        least_rows=2,
    )
    assert {row for rows in groups_of(shared)[0] for row in rows} == {0, 1, 2}
    found, expected = torch.empty_like(q_TND), torch.empty_like(q_TND)
    shared_decode_attention(q_TND, cache, shared, options, found)
    decode_attention_reference(q_TND, cache, items, options, expected)
    torch.testing.assert_close(found, expected, rtol=CLOSE[dtype], atol=CLOSE[dtype])
    assert launches == ["_shared_prefix_kernel", "_attention_decode_kernel", "_attention_merge_kernel"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_of_decoding_give_the_bits_of_decoding(dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    positions = [530, 511, 600]
    tables = tables_of(positions, {0: [[0, 1, 2]]})
    cache = random_cache(positions, tables, 1, dtype)
    q_TND = torch.randn(3, 4, SIZE, dtype=dtype)
    items = items_of(positions, tables, window=None, capacity=None)
    tile_rows = shared_tile_rows(SIZE, dtype, dtype, deterministic=True)
    shared = share_items(items, window=None, block_size=BLOCK, heads_per_kv=4, tile_rows=tile_rows, least_rows=2)
    assert groups_of(shared) == {0: [{0, 1, 2}]}
    alone, found = torch.empty_like(q_TND), torch.empty_like(q_TND)
    options = AttentionOptions(scale=0.125, soft_cap=20.0)
    decode_attention(q_TND, cache, items, options, alone)
    shared_decode_attention(q_TND, cache, shared, options, found)
    assert torch.equal(found, alone)


def test_on_a_cpu_nothing_is_shared(seed: int, launches: list[str]) -> None:
    torch.manual_seed(seed)
    backends.use("torch")
    positions = [530, 511]
    tables = tables_of(positions, {0: [[0, 1]]})
    cache = random_cache(positions, tables, 1, torch.float32)
    q_TND = torch.randn(2, 2, SIZE)
    items = items_of(positions, tables, window=None, capacity=None)
    options = AttentionOptions(scale=0.125)
    found, expected = torch.empty_like(q_TND), torch.empty_like(q_TND)
    shared_decode_attention(q_TND, cache, share(items), options, found)
    decode_attention_reference(q_TND, cache, items, options, expected)
    assert torch.equal(found, expected) and not launches


def test_tiles_of_another_size_are_refused() -> None:
    items = share(items_of([3], np.zeros((1, 1), np.int32), window=None, capacity=None), tile_rows=48)
    with pytest.raises(ValueError, match="tiles of 48 rows"):
        shared_decode_attention(
            torch.zeros(1, 2, SIZE),
            torch.zeros(2, 1, 1, BLOCK, SIZE),
            items,
            AttentionOptions(scale=1.0),
            torch.empty(1, 2, SIZE),
        )
