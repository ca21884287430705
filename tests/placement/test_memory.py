"""Sizes of models and of their KV caches, by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from slipstream.placement.memory import (
    blocks_for_tokens,
    blocks_in_budget,
    kv_block_bytes,
    longest_that_fits,
    size_cache,
)
from slipstream.placement.model_facts import ModelFacts

# Llama 3 8B: 131,072 bytes of KV per token in bfloat16.
LLAMA = ModelFacts(
    num_layers=32,
    hidden_size=4096,
    vocab_size=128_256,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    parameters=8_030_261_248,
    active_parameters=7_504_924_672,
    windows=(None,) * 32,
)


def test_bytes() -> None:
    assert LLAMA.weight_bytes(2) == 16_060_522_496
    assert LLAMA.step_read_bytes(2) == 15_009_849_344
    assert LLAMA.kv_bytes_per_token(2) == 131_072
    assert kv_block_bytes(LLAMA, 16, 2) == 2 * 2**20
    assert kv_block_bytes(LLAMA, 16, 4) == 4 * 2**20


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (8192, 512)])
def test_blocks_for_tokens(tokens: int, blocks: int) -> None:
    assert blocks_for_tokens(tokens, 16) == blocks


@pytest.mark.parametrize(("budget_mib", "blocks"), [(-1, 0), (0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (1024, 512)])
def test_blocks_in_budget(budget_mib: int, blocks: int) -> None:
    assert blocks_in_budget(LLAMA, 16, 2, budget_mib * 2**20) == blocks
    assert longest_that_fits(LLAMA, 16, 2, budget_mib * 2**20) == blocks * 16


def test_a_cache_takes_the_budget() -> None:
    size = size_cache(LLAMA, block_size=16, dtype_bytes=2, budget_bytes=2**30 + 7, max_model_len=8000, max_num_seqs=256)
    assert (size.num_blocks, size.num_tokens, size.total_bytes) == (512, 8192, 2**30)


def test_a_cache_takes_no_more_than_can_be_used() -> None:
    size = size_cache(LLAMA, block_size=16, dtype_bytes=2, budget_bytes=2**40, max_model_len=100, max_num_seqs=3)
    assert size.num_blocks == 3 * 7


def test_a_sequence_that_does_not_fit_is_refused_with_numbers() -> None:
    with pytest.raises(ValueError, match=r"max_model_len=8193 needs 1075838976 bytes .* 8192 tokens"):
        size_cache(LLAMA, block_size=16, dtype_bytes=2, budget_bytes=2**30, max_model_len=8193, max_num_seqs=1)


@pytest.mark.parametrize("wrong", [{"num_layers": 0}, {"parameters": -1}, {"windows": (None,)}])
def test_senseless_facts_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"facts must be positive|as many windows"):
        dataclasses.replace(LLAMA, **wrong)


def test_senseless_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="block_size"):
        kv_block_bytes(LLAMA, 0, 2)
    with pytest.raises(ValueError, match="tokens"):
        blocks_for_tokens(-1, 16)
