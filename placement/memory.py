"""How many KV blocks fit, and how many a length needs.

Owns the sizing of the paged KV cache. Every layer keeps every block (a sliding window saves reads, not
memory), so a block costs the same for all layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from .model_facts import ModelFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSize:
    """A sized KV cache.

    Units: block_bytes, bytes of one block over all layers; total_bytes, of the whole cache
    """

    num_blocks: int
    block_size: int
    block_bytes: int

    @property
    def total_bytes(self) -> int:
        """Return the bytes that the whole cache takes."""
        return self.num_blocks * self.block_bytes

    @property
    def num_tokens(self) -> int:
        """Return the token positions that the cache holds."""
        return self.num_blocks * self.block_size


def kv_block_bytes(facts: ModelFacts, block_size: int, dtype_bytes: int) -> int:
    """Return the bytes of one block of ``block_size`` positions over all layers."""
    _require_positive(block_size=block_size, dtype_bytes=dtype_bytes)
    return facts.kv_bytes_per_token(dtype_bytes) * block_size


def blocks_for_tokens(tokens: int, block_size: int) -> int:
    """Return the blocks that ``tokens`` positions of one sequence need."""
    _require_positive(block_size=block_size)
    if tokens < 0:
        raise ValueError(f"tokens must not be negative, got {tokens}")
    return -(-tokens // block_size)


def blocks_in_budget(facts: ModelFacts, block_size: int, dtype_bytes: int, budget_bytes: int) -> int:
    """Return how many whole blocks fit in ``budget_bytes``; 0 when not even one does."""
    return max(0, budget_bytes) // kv_block_bytes(facts, block_size, dtype_bytes)


def longest_that_fits(facts: ModelFacts, block_size: int, dtype_bytes: int, budget_bytes: int) -> int:
    """Return the longest single sequence, in tokens, whose KV fits in ``budget_bytes``."""
    return blocks_in_budget(facts, block_size, dtype_bytes, budget_bytes) * block_size


def size_cache(
    facts: ModelFacts,
    *,
    block_size: int,
    dtype_bytes: int,
    budget_bytes: int,
    max_model_len: int,
    max_num_seqs: int,
) -> CacheSize:
    """Choose the size of the cache: all of the budget, but never more than the engine can use.

    Units: budget_bytes, bytes for the cache alone (weights and activations already taken off)
    Raises: ValueError when one sequence of ``max_model_len`` does not fit; it names the bytes needed and the
    length that would fit.
    """
    _require_positive(max_model_len=max_model_len, max_num_seqs=max_num_seqs)
    block_bytes = kv_block_bytes(facts, block_size, dtype_bytes)
    one_sequence = blocks_for_tokens(max_model_len, block_size)
    affordable = blocks_in_budget(facts, block_size, dtype_bytes, budget_bytes)
    if affordable < one_sequence:
        raise ValueError(
            f"one sequence of max_model_len={max_model_len} needs {one_sequence * block_bytes} bytes of KV "
            f"cache, the budget is {budget_bytes}; the longest that fits is {affordable * block_size} tokens"
        )
    return CacheSize(
        num_blocks=min(affordable, one_sequence * max_num_seqs),
        block_size=block_size,
        block_bytes=block_bytes,
    )


def _require_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be positive, got {size}")
