"""Writing, clearing and copying KV blocks."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
import torch

from slipstream.kernels.kv_blocks import clear_blocks, copy_blocks
from slipstream.kernels.rope_kv import kv_write_rows, read_kv, write_kv

BLOCKS, HEADS, SIZE, HEAD_SIZE = 7, 3, 4, 5


def cache(parts: int = 2) -> torch.Tensor:
    shape = (parts, BLOCKS, HEADS, SIZE, HEAD_SIZE)
    return torch.arange(prod(shape), dtype=torch.float32).view(shape)


def test_keys_and_values_go_to_their_slots_and_nowhere_else(seed: int) -> None:
    layer = cache()
    expected = layer.clone()
    slots = np.random.default_rng(seed).permutation(BLOCKS * SIZE)[:9]
    heads = torch.randn(9, 4 + 2 * HEADS, HEAD_SIZE, generator=torch.Generator().manual_seed(seed))
    kv = heads[:, 4:]
    for token, slot in enumerate(slots):
        expected[0, slot // SIZE, :, slot % SIZE] = kv[token, :HEADS]
        expected[1, slot // SIZE, :, slot % SIZE] = kv[token, HEADS:]
    rows = kv_write_rows(torch.from_numpy(slots), num_blocks=BLOCKS, kv_heads=HEADS, block_size=SIZE)
    write_kv(kv, rows, layer)
    assert torch.equal(layer, expected)
    assert torch.equal(read_kv(rows, layer), kv)


def test_keys_that_are_values_too_go_to_one_place(seed: int) -> None:
    layer = cache(1)
    expected = layer.clone()
    slots = np.random.default_rng(seed).permutation(BLOCKS * SIZE)[:9]
    keys = torch.randn(9, HEADS, HEAD_SIZE, generator=torch.Generator().manual_seed(seed))
    for token, slot in enumerate(slots):
        expected[0, slot // SIZE, :, slot % SIZE] = keys[token]
    rows = kv_write_rows(torch.from_numpy(slots), num_blocks=BLOCKS, kv_heads=HEADS, block_size=SIZE, parts=1)
    write_kv(keys, rows, layer)
    assert torch.equal(layer, expected)


@pytest.mark.parametrize("slot", [-1, BLOCKS * SIZE])
def test_a_slot_that_is_not_there_is_refused(slot: int) -> None:
    with pytest.raises(IndexError, match=f"of a cache of {BLOCKS} blocks of {SIZE}"):
        kv_write_rows(torch.tensor([3, slot]), num_blocks=BLOCKS, kv_heads=HEADS, block_size=SIZE)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cleared_blocks_are_zero_even_if_they_were_not_numbers(dtype: torch.dtype, parts: int) -> None:
    layers = [cache(parts).to(dtype) + index for index in range(3)]
    expected = [layer.clone() for layer in layers]
    for layer, cleared in zip(layers, expected, strict=True):
        layer[:, 2] = float("nan")
        cleared[:, [2, 5]] = 0
    clear_blocks(torch.tensor([2, 5]), layers)
    assert all(map(torch.equal, layers, expected))


@pytest.mark.parametrize("block", [-1, BLOCKS])
def test_blocks_that_are_not_there_are_not_cleared(block: int) -> None:
    with pytest.raises(IndexError):
        clear_blocks(torch.tensor([2, block]), [cache()])


@pytest.mark.parametrize(
    ("sources", "targets"),
    [
        ([], []),
        ([1], [2]),
        ([1, 3], [2, 4]),
        ([1, 2], [2, 3]),
        ([1, 1, 1], [2, 3, 4]),
        ([1, 2], [3, 3]),
        ([1, 2, 1], [2, 1, 3]),
        ([0, 1, 2, 3, 2], [1, 2, 3, 4, 1]),
        ([5, 0], [5, 6]),
    ],
)
def test_copies_have_the_effect_of_one_after_the_other(sources: list[int], targets: list[int]) -> None:
    layers = [cache(), cache() + 0.5]
    expected = [layer.clone() for layer in layers]
    for source, target in zip(sources, targets, strict=True):
        for layer in expected:
            layer[:, target] = layer[:, source]
    copy_blocks(layers, np.array(sources, dtype=np.int32), np.array(targets, dtype=np.int32))
    assert all(torch.equal(found, wanted) for found, wanted in zip(layers, expected, strict=True))


@pytest.mark.parametrize("parts", [1, 2])
def test_random_copies_have_the_effect_of_one_after_the_other(parts: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    for _ in range(50):
        sources, targets = random.integers(0, BLOCKS, (2, 12), dtype=np.int32)
        layer, expected = cache(parts), cache(parts)
        for source, target in zip(sources, targets, strict=True):
            expected[:, target] = expected[:, source]
        copy_blocks([layer], sources, targets)
        assert torch.equal(layer, expected)


def test_copies_need_as_many_targets_as_sources() -> None:
    with pytest.raises(ValueError, match="as many targets"):
        copy_blocks([cache()], np.array([1, 2], dtype=np.int32), np.array([3], dtype=np.int32))
