"""Copies and clearing of blocks, all layers in one launch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slipstream.kernels import backends
from slipstream.kernels.kv_blocks import clear_blocks, clear_blocks_reference, copy_blocks, copy_blocks_reference

BLOCKS = 7
SHAPES = [(3, 4, 8), (1, 1, 1), (3, 5, 7), (2, 16, 80)]


def caches(shape: tuple[int, int, int], dtype: torch.dtype, seed: int, *, parts: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(parts, BLOCKS, *shape).to(dtype) for _ in range(3)]


def bytes_of(layers: list[torch.Tensor]) -> list[torch.Tensor]:
    return [layer.view(torch.uint8).clone() for layer in layers]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", SHAPES)
def test_copies_and_cleared_blocks_are_those_of_the_reference(
    shape: tuple[int, int, int], dtype: torch.dtype, parts: int, seed: int, launches: list[str]
) -> None:
    layers = caches(shape, dtype, seed, parts=parts)
    layers[1].view(torch.uint8).fill_(0x7F)
    expected = [layer.clone() for layer in layers]
    sources, targets = np.array([1, 4], dtype=np.int32), np.array([2, 0], dtype=np.int32)
    copy_blocks(layers, sources, targets)
    copy_blocks_reference(expected, sources, targets)
    assert all(map(torch.equal, bytes_of(layers), bytes_of(expected)))
    blocks_F = torch.tensor([6, 2])
    clear_blocks(blocks_F, layers)
    clear_blocks_reference(blocks_F, expected)
    assert all(map(torch.equal, bytes_of(layers), bytes_of(expected)))
    assert launches == ["_copy_blocks_kernel", "_clear_blocks_kernel"]
    assert all(not layer[:, [6, 2]].view(torch.uint8).any() for layer in layers)


def test_random_copies_have_the_effect_of_one_after_the_other(seed: int) -> None:
    random = np.random.default_rng(seed)
    for _ in range(10):
        sources, targets = random.integers(0, BLOCKS, (2, 6), dtype=np.int32)
        layers = caches((1, 2, 4), torch.float32, seed)
        expected = [layer.clone() for layer in layers]
        copy_blocks_reference(expected, sources, targets)
        copy_blocks(layers, sources, targets)
        assert all(map(torch.equal, layers, expected))


@pytest.mark.parametrize(
    ("sources", "targets", "runs"), [([1, 3], [2, 1], 2), ([1, 2], [2, 3], 2), ([1, 1], [2, 3], 1)]
)
def test_copies_go_side_by_side_where_none_reads_what_another_writes(
    sources: list[int], targets: list[int], runs: int, launches: list[str], seed: int
) -> None:
    copy_blocks(caches((1, 2, 4), torch.float32, seed), np.array(sources, np.int32), np.array(targets, np.int32))
    assert launches == ["_copy_blocks_kernel"] * runs


def test_nothing_to_copy_or_clear_is_no_launch(launches: list[str], seed: int) -> None:
    layers = caches((1, 2, 4), torch.float32, seed)
    copy_blocks(layers, np.empty(0, np.int32), np.empty(0, np.int32))
    clear_blocks(torch.empty(0, dtype=torch.int64), layers)
    assert launches == []


def test_float8_blocks_are_copied_and_cleared_by_torch_too(seed: int) -> None:
    backends.use("torch")
    layers = caches((2, 3, 4), torch.float8_e4m3fn, seed)
    expected = [layer.float() for layer in layers]
    copy_blocks(layers, np.array([1], np.int32), np.array([2], np.int32))
    clear_blocks(torch.tensor([3]), layers)
    for layer in expected:
        layer[:, 2], layer[:, 3] = layer[:, 1].clone(), 0
    assert all(torch.equal(layer.float(), wanted) for layer, wanted in zip(layers, expected, strict=True))
