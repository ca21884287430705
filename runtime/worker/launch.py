"""From options to a running engine on one device: reads the model, sizes the KV cache, wires the parts.

Owns what is worked out from model and device together. Everything that can be refused is refused before the weights
are read.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from ...placement.memory import CacheSize, blocks_for_tokens, longest_that_fits, size_cache
from ...sdk.errors import CheckpointError, ConfigError
from ..clock import Clock
from ..config import EngineOptions, SchedulerConfig
from ..engine.engine import Engine
from ..engine.scheduler import Scheduler
from ..models.decoder import load_decoder
from ..models.generation_defaults import GenerationDefaults, read_generation_defaults
from ..models.kv_cache import KvCache
from ..models.model_spec import ModelSpec
from ..models.registry import read_model_spec
from .cpu_settings import settle_cpu
from .executor import ModelExecutor, step_thread
from .grammar import GrammarCompiler

logger = logging.getLogger(__name__)

_CPU_CACHE_LIMIT_BYTES = 4 << 30
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchedEngine:
    """A running engine with what its front end has to know about the model.

    ``eos_token_ids``: the generation config's, or else the model config's. ``grammars``: where a constraint has to be
    compiled before a request that has it is submitted.
    """

    engine: Engine
    spec: ModelSpec
    generation: GenerationDefaults
    config: SchedulerConfig
    dtype: torch.dtype
    device: torch.device
    eos_token_ids: tuple[int, ...]
    grammars: GrammarCompiler


def launch_engine(options: EngineOptions, *, clock: Clock) -> LaunchedEngine:
    """Load a model and start its engine.

    Raises: ConfigError naming the option; CheckpointError naming the file and the tensor
    """
    path = model_directory(options.model)
    spec = read_model_spec(path)
    generation = read_generation_defaults(path)
    device = choose_device(options.device)
    dtype = _DTYPES[spec.dtype or "float32" if options.dtype == "auto" else options.dtype]
    if options.deterministic and device.type != "cpu":
        raise ConfigError("deterministic", f"is for the CPU in this version, the device is {device}")
    max_model_len, cache_size = _size(options, spec, device, dtype)
    config = options.scheduler_config(max_model_len=max_model_len, num_blocks=cache_size.num_blocks)
    if device.type == "cpu":
        settle_cpu(options.num_threads, weight_bytes=spec.facts().step_read_bytes(dtype.itemsize))
    thread = step_thread()
    try:
        model = thread.submit(
            load_decoder,
            path,
            spec,
            dtype=dtype,
            device=device,
            quantization=options.quantization,
            deterministic=options.deterministic,
        ).result()
    except BaseException:
        thread.shutdown(wait=False, cancel_futures=True)
        raise
    cache = KvCache.allocate(
        spec, num_blocks=cache_size.num_blocks, block_size=options.block_size, dtype=dtype, device=device
    )
    eos_token_ids = generation.eos_token_ids or spec.eos_token_ids
    grammars = GrammarCompiler(
        Path(options.tokenizer or options.model).expanduser() / "tokenizer.json",
        vocab_size=spec.vocab_size,
        eos_token_ids=eos_token_ids,
    )
    executor = ModelExecutor(
        model=model,
        cache=cache,
        block_size=options.block_size,
        max_slots=options.max_num_seqs,
        max_length=max_model_len,
        device=device,
        grammars=grammars,
        thread=thread,
        deterministic=options.deterministic,
    )
    engine = Engine(
        Scheduler(config, prefix_key=spec.prefix_cache_key),
        executor,
        clock=clock,
        ahead=options.async_scheduling,
        step_timeout_s=options.step_timeout_s,
    )
    return LaunchedEngine(
        engine=engine,
        spec=spec,
        generation=generation,
        config=config,
        dtype=dtype,
        device=device,
        eos_token_ids=eos_token_ids,
        grammars=grammars,
    )


def model_directory(model: str) -> Path:
    """Return the directory of a model, or say what is wrong with it."""
    path = Path(model).expanduser()
    if not path.is_dir():
        raise CheckpointError(str(path), "is not a directory; give the path of a downloaded Hugging Face model")
    return path


def choose_device(device: str) -> torch.device:
    """Return the torch device for an option such as ``auto``, ``cpu`` or ``cuda:1``."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError("device", f"torch does not know {device!r}") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ConfigError("device", f"must be cpu or cuda, got {device!r}")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", f"{device!r} was asked for, but torch sees no GPU")
    return chosen


def _size(options: EngineOptions, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> tuple[int, CacheSize]:
    """Return the longest sequence and the size of the KV cache."""
    facts, block_size = spec.facts(), options.block_size
    limit = spec.max_model_len
    if options.max_model_len is not None and options.max_model_len > limit:
        raise ConfigError("max_model_len", f"{options.max_model_len} is more than the model's own {limit}")
    block_bytes = facts.kv_bytes_per_token(dtype.itemsize) * block_size
    if options.num_gpu_blocks_override is not None:
        affordable = options.num_gpu_blocks_override * block_size
        length = options.max_model_len or min(limit, affordable)
        size = CacheSize(num_blocks=options.num_gpu_blocks_override, block_size=block_size, block_bytes=block_bytes)
        return _warn_if_shorter(options, limit, length), size
    budget = _cache_budget(options, facts.weight_bytes(dtype.itemsize), device)
    affordable = longest_that_fits(facts, block_size, dtype.itemsize, budget)
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
        dtype_bytes=dtype.itemsize,
        budget_bytes=budget,
        max_model_len=length,
        max_num_seqs=options.max_num_seqs,
    )
    return _warn_if_shorter(options, limit, length), size


def _cache_budget(options: EngineOptions, weight_bytes: int, device: torch.device) -> int:
    """Return the bytes that the KV cache may take; the weights are still to be loaded."""
    if options.kv_cache_memory_bytes is not None:
        return options.kv_cache_memory_bytes
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return int(free_bytes * options.gpu_memory_utilization) - weight_bytes
    free_bytes = psutil.virtual_memory().available
    return min(_CPU_CACHE_LIMIT_BYTES, int(free_bytes * options.gpu_memory_utilization) - weight_bytes)


def _warn_if_shorter(options: EngineOptions, limit: int, length: int) -> int:
    if options.max_model_len is None and length < limit:
        logger.warning(
            "max_model_len is %d, not the model's %d: the KV cache holds no more (see kv_cache_memory_bytes)",
            length,
            limit,
        )
    return length
