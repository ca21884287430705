"""How long sequences may be and how many KV blocks there are: from options, the model's part of a rank, and its memory.

Owns the refusals of what does not fit. Reads how much memory is free, and takes none.
"""

from __future__ import annotations

import logging

import psutil
import torch

from ...placement.memory import CacheSize, blocks_for_tokens, longest_that_fits, size_cache
from ...sdk.errors import ConfigError
from ..config import EngineOptions
from ..models.model_spec import ModelSpec

logger = logging.getLogger(__name__)

_CPU_CACHE_LIMIT_BYTES = 4 << 30


def size_engine(
    options: EngineOptions,
    spec: ModelSpec,
    device: torch.device,
    dtype: torch.dtype,
    *,
    cache_dtype: torch.dtype | None = None,
    ranks_on_host: int = 1,
) -> tuple[int, CacheSize]:
    """Return the longest sequence and the size of each rank's KV cache; ``spec`` is what a rank has.

    ``dtype``: of the weights; ``cache_dtype``: of the cache, None the same.

    Raises: ConfigError naming the option and the numbers
    """
    facts, block_size = spec.facts(), options.block_size
    number_bytes = (cache_dtype or dtype).itemsize
    limit = spec.max_model_len
    if options.max_model_len is not None and options.max_model_len > limit:
        raise ConfigError("max_model_len", f"{options.max_model_len} is more than the model's own {limit}")
    block_bytes = facts.kv_bytes_per_token(number_bytes) * block_size
    if options.num_gpu_blocks_override is not None:
        affordable = options.num_gpu_blocks_override * block_size
        length = options.max_model_len or min(limit, affordable)
        size = CacheSize(num_blocks=options.num_gpu_blocks_override, block_size=block_size, block_bytes=block_bytes)
        return _warn_if_shorter(options, limit, length), size
    budget = _cache_budget(options, facts.weight_bytes(dtype.itemsize), device, ranks_on_host)
    affordable = longest_that_fits(facts, block_size, number_bytes, budget)
    length = options.max_model_len or min(limit, affordable)
    if affordable < blocks_for_tokens(length, block_size) * block_size or length < 1:
        raise ConfigError(
            "kv_cache_memory_bytes" if options.max_model_len is None else "max_model_len",
            f"a KV cache of {budget} bytes holds {affordable} tokens of this model, too few for a sequence of "
            f"{max(length, 1)}: lower max_model_len or raise kv_cache_memory_bytes",
        )
    size = size_cache(
        facts,
        block_size=block_size,
        dtype_bytes=number_bytes,
        budget_bytes=budget,
        max_model_len=length,
        max_num_seqs=options.max_num_seqs,
    )
    return _warn_if_shorter(options, limit, length), size


def _cache_budget(options: EngineOptions, weight_bytes: int, device: torch.device, ranks_on_host: int) -> int:
    """Return the bytes that a rank's KV cache may take; the weights are still to be loaded."""
    if options.kv_cache_memory_bytes is not None:
        return options.kv_cache_memory_bytes
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return int(free_bytes * options.gpu_memory_utilization) - weight_bytes
    free_bytes = psutil.virtual_memory().available // ranks_on_host
    return min(_CPU_CACHE_LIMIT_BYTES, int(free_bytes * options.gpu_memory_utilization) - weight_bytes)


def _warn_if_shorter(options: EngineOptions, limit: int, length: int) -> int:
    if options.max_model_len is None and length < limit:
        logger.warning(
            "max_model_len is %d, not the model's %d: the KV cache holds no more (see kv_cache_memory_bytes)",
            length,
            limit,
        )
    return length
