"""From options to a running engine: reads the model, sizes the KV cache, wires the parts, starts the other ranks.

Owns what is worked out from model and device together. Everything that can be refused is refused before the weights
are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ...comm.errors import CommError, CommMisuse
from ...comm.groups import ALONE
from ...comm.mesh import MeshShape
from ...placement.memory import kv_block_bytes
from ...sdk.errors import CheckpointError, ConfigError, EngineError
from ..clock import Clock
from ..config import EngineOptions, SchedulerConfig
from ..engine.engine import Engine, Executor
from ..engine.scheduler import Scheduler
from ..handoff.ranks import KvRanks, LocalKvRanks
from ..handoff.settings import KvSeat, KvSettings, KvShare
from ..handoff.transports import check_kinds
from ..models.fingerprint import model_fingerprint
from ..models.generation_defaults import GenerationDefaults, read_generation_defaults
from ..models.model_spec import ModelSpec
from ..models.registry import read_model_spec
from ..models.sharding import Shard, check_degrees
from ..models.weights import Progress
from .cache_dtype import cache_dtype, check_cache_dtype
from .fixed_order import check_fixed_order
from .grammar import GrammarCompiler
from .kernel_choice import choose_kernels
from .rank import Rank, RankSetup, build_rank
from .rank_processes import RankProcesses
from .replica import ReplicaExecutor, StartPeers
from .sizing import size_engine

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchedEngine:
    """A running engine with what its front end has to know about the model.

    ``eos_token_ids``: the generation config's, or else the model config's. ``grammars``: where a constraint has to be
    compiled before a request that has it is submitted. ``check``: raises EngineError when another rank was lost; for
    whoever has nothing to run. ``kv``: the ranks' ends of KV that is moved, to be closed before the engine; None where
    none is.
    Units: block_bytes, of a KV block over all layers and heads
    """

    engine: Engine
    spec: ModelSpec
    generation: GenerationDefaults
    config: SchedulerConfig
    dtype: torch.dtype
    device: torch.device
    eos_token_ids: tuple[int, ...]
    grammars: GrammarCompiler
    check: Callable[[], None]
    block_bytes: int
    kv: KvRanks | None = None


def launch_engine(
    options: EngineOptions,
    *,
    clock: Clock,
    start_peers: StartPeers | None = None,
    ranks_on_host: int | None = None,
    progress: Progress | None = None,
    kv: KvSettings | None = None,
) -> LaunchedEngine:
    """Load a model and start its engine, with as many other ranks as the options ask for.

    ``start_peers``: how, None for processes on this host. ``ranks_on_host``: how many ranks, this one included, share
    the host's memory and cores, each with GPUs of its own; None is all of them, which see the same GPUs. ``progress``
    is told how much of this rank's weights is loaded. ``kv``: how KV is moved between this replica and others, None
    where none is.

    Raises: ConfigError naming the option; CheckpointError naming the file and the tensor; EngineError when another rank
    does not come up
    """
    path = model_directory(options.model)
    spec = read_model_spec(path)
    generation = read_generation_defaults(path)
    mesh = _mesh(options)
    check_degrees(spec, mesh, experts_over_tp=options.enable_expert_parallel)
    if options.sharded_norm and any(layer.ladder for layer in spec.layers):
        raise ConfigError("sharded_norm", "is not for models with ladder layers: their sums are hidden as they are")
    device = choose_device(options.device)
    check_devices(device, mesh, placed=ranks_on_host is not None)
    if kv is not None:
        _check_kv(kv, mesh, deterministic=options.deterministic)
    choose_kernels(options.kernels)
    dtype = _DTYPES[spec.dtype or "float32" if options.dtype == "auto" else options.dtype]
    check_cache_dtype(options.kv_cache_dtype, dtype, device, mesh, latent=spec.latent is not None)
    if options.deterministic:
        check_fixed_order(spec, mesh, device=device, dtype=dtype, experts_over_tp=options.enable_expert_parallel)
    config = _scheduler_config(options, spec, mesh, device=device, dtype=dtype, ranks_on_host=ranks_on_host)
    eos_token_ids = generation.eos_token_ids or spec.eos_token_ids
    share = None if kv is None else _kv_share(kv, model_fingerprint(path, spec, quantization=options.quantization))
    seat = None if kv is None else KvSeat(address=kv.address, secret=kv.secret)
    setup = _rank_setup(
        options, path, mesh, device=device, dtype=dtype, config=config, eos_token_ids=eos_token_ids, kv=share
    )
    built = _build(
        setup,
        start_peers or partial(RankProcesses, kv_seat=seat),
        partial(build_rank, setup, ranks_on_host=ranks_on_host, progress=progress, kv_seat=seat),
    )
    return LaunchedEngine(
        engine=_engine(options, config, spec, built.executor, clock=clock),
        spec=spec,
        generation=generation,
        config=config,
        dtype=dtype,
        device=device,
        eos_token_ids=eos_token_ids,
        grammars=built.rank.grammars,
        check=built.check,
        block_bytes=kv_block_bytes(
            spec.facts(), options.block_size, cache_dtype(options.kv_cache_dtype, dtype).itemsize
        ),
        kv=built.kv,
    )


def _check_kv(kv: KvSettings, mesh: MeshShape, *, deterministic: bool) -> None:
    """Refuse what KV cannot be moved with. Raises: ConfigError naming the option"""
    if mesh.sp > 1:
        raise ConfigError("sequence_parallel_size", f"{mesh.sp} ranks share prompts: their KV cannot be moved yet")
    if deterministic and kv.wire_dtype != "auto":
        raise ConfigError(
            "kv_transfer_dtype", f"{kv.wire_dtype!r} rounds what one replica computed and another reads: use auto"
        )
    try:
        check_kinds(kv.kinds, kv.address, across_hosts=kv.across_hosts)
    except CommMisuse as error:
        raise ConfigError("kv_address", str(error)) from error


def _kv_share(kv: KvSettings, model: str) -> KvShare:
    return KvShare(
        replica=kv.replica,
        incarnation=kv.incarnation,
        model=model,
        kinds=kv.kinds,
        across_hosts=kv.across_hosts,
        wire_dtype=kv.wire_dtype,
        limits=kv.limits,
    )


def _scheduler_config(
    options: EngineOptions,
    spec: ModelSpec,
    mesh: MeshShape,
    *,
    device: torch.device,
    dtype: torch.dtype,
    ranks_on_host: int | None,
) -> SchedulerConfig:
    """Work out the KV cache's size, and with it what the scheduler is given."""
    max_model_len, cache_size = size_engine(
        options,
        _first_shard(options, mesh).local_spec(spec),
        device,
        dtype,
        cache_dtype=cache_dtype(options.kv_cache_dtype, dtype),
        ranks_on_host=ranks_on_host or mesh.size,
    )
    return options.scheduler_config(
        max_model_len=max_model_len,
        num_blocks=cache_size.num_blocks,
        attention_ratio=spec.facts().attention_ratio(),
    )


def _first_shard(options: EngineOptions, mesh: MeshShape) -> Shard:
    """Return what rank 0 holds: as many layers and heads as any."""
    return Shard(
        place=mesh.place(0),
        experts_over_tp=options.enable_expert_parallel,
        redundant_experts=options.num_redundant_experts,
        fixed_order=options.deterministic,
    )


def _mesh(options: EngineOptions) -> MeshShape:
    return MeshShape(
        pp=options.pipeline_parallel_size,
        sp=options.sequence_parallel_size,
        ep=options.expert_parallel_size,
        tp=options.tensor_parallel_size,
        ranks_per_host=options.ranks_per_host,
    )


def _rank_setup(
    options: EngineOptions,
    path: Path,
    mesh: MeshShape,
    *,
    device: torch.device,
    dtype: torch.dtype,
    config: SchedulerConfig,
    eos_token_ids: tuple[int, ...],
    kv: KvShare | None,
) -> RankSetup:
    return RankSetup(
        model=str(path),
        tokenizer=options.tokenizer or options.model,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        quantization=options.quantization,
        kernels=options.kernels,
        kv_cache_dtype=options.kv_cache_dtype,
        enforce_eager=options.enforce_eager,
        max_tokens=options.max_num_batched_tokens,
        deterministic=options.deterministic,
        num_threads=options.num_threads,
        num_blocks=config.num_blocks,
        block_size=options.block_size,
        max_slots=options.max_num_seqs,
        max_length=config.max_model_len,
        eos_token_ids=eos_token_ids,
        pp=mesh.pp,
        ep=mesh.ep,
        tp=mesh.tp,
        sp=mesh.sp,
        experts_over_tp=options.enable_expert_parallel,
        overlap=options.overlap,
        sharded_norm=options.sharded_norm,
        redundant_experts=options.num_redundant_experts,
        expert_balance_steps=options.eplb_step_interval if options.enable_eplb else 0,
        expert_policy=options.eplb_policy,
        expert_exchange=options.expert_exchange,
        ranks_per_host=mesh.ranks_per_host,
        kv=kv,
    )


def _engine(
    options: EngineOptions, config: SchedulerConfig, spec: ModelSpec, executor: Executor, *, clock: Clock
) -> Engine:
    return Engine(
        Scheduler(config, prefix_key=spec.prefix_cache_key),
        executor,
        clock=clock,
        ahead=options.async_scheduling,
        step_timeout_s=options.step_timeout_s,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Built:
    rank: Rank
    executor: Executor
    check: Callable[[], None]
    kv: KvRanks | None


def _build(setup: RankSetup, start_peers: StartPeers, build: Callable[..., Rank]) -> _Built:
    """Build the driver's own rank, beside the others if there are any."""
    if setup.mesh.size == 1:
        rank = build(ALONE)
        alone = None if rank.kv is None else LocalKvRanks([rank.kv])
        return _Built(
            rank=rank, executor=rank.executor, check=(lambda: None) if alone is None else alone.check, kv=alone
        )
    peers = start_peers(setup)
    try:
        try:
            rank = build(peers.groups, meet=peers.meet)
        except CommError as error:
            # Ranks measure together when they are loaded, and see only that another is gone: it may have said why.
            raise EngineError(peers.why() or str(error)) from error
        try:
            peers.wait_ready()
            kv = None if rank.kv is None else peers.kv_ranks(rank.kv)
        except BaseException:
            rank.executor.close()
            if rank.kv is not None:
                rank.kv.close()
            raise
    except BaseException:
        peers.close()
        raise

    def check() -> None:
        peers.check()
        if kv is not None:
            kv.check()

    return _Built(rank=rank, executor=ReplicaExecutor(rank.executor, peers), check=check, kv=kv)


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


def check_devices(device: torch.device, mesh: MeshShape, *, placed: bool = False) -> None:
    """Refuse more ranks than there are GPUs; a placed rank is shown its own GPU and no other. Raises: ConfigError"""
    if device.type != "cuda" or mesh.size == 1:
        return
    if str(device) != "cuda":
        raise ConfigError("device", f"{device} is one GPU; {mesh.size} ranks take one each: say cuda")
    if placed:
        check_own_gpu()
    elif mesh.size > torch.cuda.device_count():
        raise ConfigError(
            "tensor_parallel_size", f"{mesh.size} ranks need a GPU each, torch sees {torch.cuda.device_count()}"
        )


def check_own_gpu() -> None:
    """Refuse several GPUs in the process of a placed rank, which cannot know which of them is its own.

    Raises: ConfigError
    """
    visible = torch.cuda.device_count()
    if visible != 1:
        raise ConfigError(
            "device", f"a placed rank has a GPU of its own, torch sees {visible}: set CUDA_VISIBLE_DEVICES"
        )
