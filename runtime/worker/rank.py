"""One rank's share of an engine: the model's part, its cache and its executor, from one description.

The description is the same for all ranks of a replica and travels as JSON (``rank_order``): the driver has worked it
out, and no rank decides anything by itself. The driver builds its own rank from it too.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ...comm.errors import CommMisuse
from ...comm.groups import MeshGroups
from ...comm.mesh import MeshShape
from ...comm.overlap_meter import OverlapMeter
from ...comm.overlap_split import Cuts
from ...placement.experts import ExpertPlacement
from ...placement.kv_routes import KvLayout
from ...sdk.errors import ConfigError
from ..clock import monotonic_clock
from ..handoff.rank_kv import RankKv
from ..handoff.settings import KvSeat, KvShare
from ..models.decoder import Decoder, load_decoder
from ..models.formats import choose_formats
from ..models.kv_cache import KvCache
from ..models.layout import Role
from ..models.model_spec import ModelSpec, MoeSpec
from ..models.registry import read_model_spec
from ..models.sharding import Shard
from ..models.weights import Progress, read_expert
from .cache_dtype import cache_dtype
from .cpu_settings import settle_cpu
from .executor import ModelExecutor, step_thread
from .expert_balance import ExpertBalance
from .expert_trial import set_exchange
from .grammar import GrammarCompiler
from .graph_backend import GraphBackend, graph_backend
from .graphs import DecodeGraphs
from .kernel_choice import choose_kernels
from .norm_shares import fewest_in_shares
from .recorded_steps import RecordedSteps
from .sequence_ranks import SequenceRanks
from .step_batch import BatchBuilder, StepRows
from .step_forward import StepForward
from .token_split import measure_split
from .warm_up import WARM_UP_LIMIT_S, WarmUp, WarmUpSizes, tuning_for, warm_up
from .wire_meter import ring_meter, wire_meter


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSetup:
    """What every rank of a replica has to know.

    - ``device``: of all ranks; with several of them, ``cuda`` is one GPU each: the only one that a process sees, or of
      those that it sees the rank's own, in the order of the ranks.
    - ``max_slots``, ``max_length``: sequences at once and their longest. ``num_blocks``: of each rank's cache.
    - ``num_threads``: on a CPU, of each rank; None is a share of the cores.
    - ``kernels``, ``kv_cache_dtype``, ``enforce_eager``: as the engine's options. ``max_tokens``: of a step.
    - ``sharded_norm``: None is what was found to be faster.
    - ``kv``: how KV is moved between this replica and others; None where none is.
    """

    model: str
    tokenizer: str
    dtype: str
    device: str
    quantization: str
    deterministic: bool
    num_threads: int | None
    num_blocks: int
    block_size: int
    max_slots: int
    max_length: int
    eos_token_ids: tuple[int, ...]
    pp: int = 1
    ep: int = 1
    tp: int = 1
    sp: int = 1
    experts_over_tp: bool = False
    kernels: str = "auto"
    kv_cache_dtype: str = "auto"
    enforce_eager: bool = False
    max_tokens: int = 2048
    overlap: bool = False
    sharded_norm: bool | None = None
    redundant_experts: int = 0
    expert_balance_steps: int = 0
    expert_policy: str = "balance"
    expert_exchange: str = "auto"
    ranks_per_host: int | None = None
    kv: KvShare | None = None

    @property
    def mesh(self) -> MeshShape:
        """The replica's shape."""
        return MeshShape(pp=self.pp, sp=self.sp, ep=self.ep, tp=self.tp, ranks_per_host=self.ranks_per_host)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """A rank that can carry out steps.

    ``kv``: its end of KV that is moved, to be closed after the executor. ``warm_up``: what was done before the first
    request; None on a CPU.
    """

    executor: ModelExecutor
    grammars: GrammarCompiler
    kv: RankKv | None = None
    warm_up: WarmUp | None = None


def build_rank(
    setup: RankSetup,
    groups: MeshGroups,
    *,
    ranks_on_host: int | None = None,
    progress: Progress | None = None,
    meet: Callable[[], None] = lambda: None,
    kv_seat: KvSeat | None = None,
) -> Rank:
    """Load a rank's part of the model and make its executor; close that, and its KV, to end everything.

    ``ranks_on_host``: how many of the replica's ranks share this host's cores; None is all. ``progress`` is told how
    much of the weights is loaded. ``meet`` returns once every rank has come to it: loading may take one of them much
    longer than an exchange may, and then ranks measure together. ``kv_seat``: this rank's own part of moving KV, where
    the replica does.

    Raises: ConfigError naming the option; CheckpointError naming the file and the tensor
    """
    choose_kernels(setup.kernels)
    path, device = Path(setup.model), rank_device(setup, groups.place.rank)
    spec = read_model_spec(path)
    dtype, shard = getattr(torch, setup.dtype), _shard(setup, groups)
    local_spec = shard.local_spec(spec)
    if device.type == "cpu":
        weight_bytes = local_spec.facts().step_read_bytes(dtype.itemsize)
        settle_cpu(setup.num_threads, weight_bytes=weight_bytes, ranks=ranks_on_host or setup.mesh.size)
    thread = _thread_on(device)
    # What ranks do together is not captured.
    backend = None if setup.enforce_eager or groups.place.shape.size > 1 else graph_backend(device)
    load = partial(
        load_decoder,
        path,
        spec,
        dtype=dtype,
        device=device,
        quantization=setup.quantization,
        groups=groups,
        shard=shard,
        progress=progress,
    )
    try:
        model = thread.submit(load).result()
        # A block more than the scheduler knows of, for rows that only fill a graph.
        num_blocks = setup.num_blocks + (backend is not None)
        kind = cache_dtype(setup.kv_cache_dtype, dtype)
        cache = KvCache.allocate(local_spec, num_blocks, setup.block_size, kind, device)
        meet()
        thread.submit(set_exchange, setup.expert_exchange, model, local_spec).result()
        layers = thread.submit(_layers, setup, spec, model, cache, groups, backend).result()
        kv = None if setup.kv is None else _rank_kv(setup, setup.kv, kv_seat, spec, cache, groups)
    except BaseException:
        thread.shutdown(wait=False, cancel_futures=True)
        raise
    grammars = _grammars(setup, spec)
    executor = ModelExecutor(
        model=model,
        layers=layers,
        cache=cache,
        block_size=setup.block_size,
        max_slots=setup.max_slots,
        max_length=setup.max_length,
        device=device,
        grammars=grammars,
        thread=thread,
        groups=groups,
        balance=_balance(setup, spec, model, shard),
        sequences=SequenceRanks(groups.sp, block_size=setup.block_size),
        kv=kv,
    )
    return Rank(executor=executor, grammars=grammars, kv=kv, warm_up=_warm_up(setup, executor, layers, model))


def _thread_on(device: torch.device) -> ThreadPoolExecutor:
    """Return a ``step_thread`` whose kernels are launched on a device."""
    thread = step_thread()
    if device.index is not None:
        thread.submit(torch.cuda.set_device, device).result()
    return thread


def _warm_up(setup: RankSetup, executor: ModelExecutor, layers: StepForward, model: Decoder) -> WarmUp | None:
    """Prepare the device for requests; where that fails, end the executor. A CPU needs none of it."""
    if model.device.type == "cpu" and layers.graphs is None:
        return None
    sizes = WarmUpSizes(
        most_tokens=setup.max_tokens,
        most_rows=setup.max_slots,
        longest=setup.max_length,
        num_blocks=setup.num_blocks,
        block_size=setup.block_size,
    )
    tuning = tuning_for(model.device, deterministic=setup.deterministic)
    limit_s = WARM_UP_LIMIT_S if setup.mesh.size == 1 else None
    try:
        report = warm_up(executor, sizes, clock=monotonic_clock, graphs=layers.graphs, tuning=tuning, limit_s=limit_s)
    except BaseException:
        executor.close()
        raise
    _forget_loads(model)
    return report


def _forget_loads(model: Decoder) -> None:
    """Made-up tokens say nothing about the experts' loads."""
    for experts in model.expert_layers.values():
        experts.load_E.zero_()


def _shard(setup: RankSetup, groups: MeshGroups) -> Shard:
    return Shard(
        place=groups.place,
        experts_over_tp=setup.experts_over_tp,
        redundant_experts=setup.redundant_experts,
        fixed_order=setup.deterministic,
    )


def _grammars(setup: RankSetup, spec: ModelSpec) -> GrammarCompiler:
    return GrammarCompiler(
        Path(setup.tokenizer).expanduser() / "tokenizer.json",
        vocab_size=spec.vocab_size,
        eos_token_ids=setup.eos_token_ids,
    )


def _rank_kv(
    setup: RankSetup, share: KvShare, seat: KvSeat | None, spec: ModelSpec, cache: KvCache, groups: MeshGroups
) -> RankKv:
    if seat is None:
        raise ConfigError("kv", f"rank {groups.place.rank} was not told where it takes KV in")
    layout = kv_layout(spec, setup.mesh, block_size=setup.block_size)
    try:
        return RankKv(share, seat, rank=groups.place.rank, layout=layout, cache=cache.layers, clock=monotonic_clock)
    except CommMisuse as error:
        raise ConfigError("kv_address", str(error)) from error


def kv_layout(spec: ModelSpec, mesh: MeshShape, *, block_size: int) -> KvLayout:
    """Return how a replica's ranks hold a model's KV; ranks that share experts alone hold the same."""
    return KvLayout(
        layers=spec.num_layers,
        kv_heads=spec.num_kv_heads,
        block_size=block_size,
        tp=mesh.tp,
        pp=mesh.pp,
        copies=mesh.sp * mesh.ep,
    )


def _balance(setup: RankSetup, spec: ModelSpec, model: Decoder, shard: Shard) -> ExpertBalance | None:
    """Return what moves experts while they serve, if that was asked for and the rank has any."""
    layers = model.expert_layers
    if not setup.expert_balance_steps or not layers:
        return None
    if spec.stored_as is not None:
        raise ConfigError("enable_eplb", "moves experts of checkpoints that are not quantized")
    if any(isinstance(layer.mlp, MoeSpec) and layer.mlp.has_biases for layer in spec.layers):
        raise ConfigError("enable_eplb", "moves experts without biases, those of the model have some")
    counts = {layer.num_experts for layer in layers.values()}
    if len(counts) > 1:
        raise ConfigError("enable_eplb", f"needs as many experts in every layer, the model has {sorted(counts)}")
    first = shard.expert_placement(counts.pop())
    placement = ExpertPlacement.of_ranks(
        [first.experts_by_rank(0)] * len(layers), num_experts=first.num_experts, ranks_per_host=first.ranks_per_host
    )
    formats = choose_formats(setup.quantization, dtype=model.dtype, device=model.device, shard=shard)

    def read(layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        return read_expert(
            setup.model, spec, layer=layer, expert=expert, dtype=model.dtype, device=model.device, shard=shard
        )

    return ExpertBalance(
        layers,
        placement,
        interval=setup.expert_balance_steps,
        policy=setup.expert_policy,
        read=read,
        prepare_gate_up=formats.of(Role.EXPERTS).prepare,
        prepare_down=formats.of(Role.SUMMED_EXPERTS).prepare,
        device=model.device,
    )


@torch.inference_mode()
def _layers(
    setup: RankSetup,
    spec: ModelSpec,
    model: Decoder,
    cache: KvCache,
    groups: MeshGroups,
    backend: GraphBackend | None,
) -> StepForward:
    """Return the rank's layers; which ways steps go through them is measured with the other ranks of the stage."""
    make = partial(
        StepForward,
        model,
        cache,
        block_size=setup.block_size,
        deterministic=setup.deterministic,
        ring_meter=_ring_meter(model, groups),
    )
    group, also = (groups.tp, groups.ep) if groups.tp is not None else (groups.ep, None)
    if group is None:
        if groups.place.shape.size > 1:
            return make()
        graphs = DecodeGraphs.where_possible(
            BatchBuilder(model=model, cache=cache, deterministic=setup.deterministic),
            backend,
            scratch_block=setup.num_blocks,
            most_rows=setup.max_slots,
            most_columns=-(-setup.max_length // setup.block_size),
        )
        return make(recorded=RecordedSteps.where_possible(model, cache), graphs=graphs)
    spent = model.spec.hidden_size * model.dtype.itemsize
    most_tokens = min(setup.max_length, setup.num_blocks * setup.block_size)
    on_cpu, ladder = model.device.type == "cpu", any(layer.ladder for layer in spec.layers)
    # A ladder's sums are hidden as they are; on a GPU what is measured here would be the time to ask for it.
    shares_from = 0 if setup.sharded_norm else None
    if setup.sharded_norm is None and groups.tp is not None and on_cpu and not ladder:
        shares_from = fewest_in_shares(
            groups.tp,
            lambda tokens, in_shares: _try(setup, model, make(shares_from=0 if in_shares else None), tokens),
            hidden_size=model.spec.hidden_size,
            dtype=model.dtype,
            most_tokens=most_tokens,
            device=model.device,
            also=groups.ep,
        )
    split = None
    if setup.overlap:
        layers = make(shares_from=shares_from)
        split = measure_split(
            group,
            lambda tokens, cuts, meter: _try(setup, model, layers, tokens, cuts, meter),
            collectives=2 * model.spec.num_layers,
            bytes_per_token=spent,
            element_bytes=model.dtype.itemsize,
            most_tokens=most_tokens,
            device=model.device,
            also=also,
        )
    meter = None
    if on_cpu:
        meter = (
            split.meter if split is not None else wire_meter(group, bytes_per_token=spent, estimates=ladder, also=also)
        )
    _forget_loads(model)
    return make(split=split, shares_from=shares_from, meter=meter)


def _ring_meter(model: Decoder, groups: MeshGroups) -> OverlapMeter | None:
    if groups.sp is None or model.device.type != "cpu":
        return None
    spec = model.spec
    return ring_meter(groups.sp, bytes_per_token=2 * spec.num_kv_heads * spec.head_dim * model.dtype.itemsize)


def _try(
    setup: RankSetup,
    model: Decoder,
    layers: StepForward,
    tokens: int,
    cuts: Cuts | None = None,
    meter: OverlapMeter | None = None,
) -> None:
    """Make a pass over one row of made-up tokens; the cache's first block is written to."""
    rows = StepRows(
        token_ids_T=torch.zeros(tokens, dtype=torch.int64),
        starts=np.zeros(1, np.int32),
        counts=np.full(1, tokens, np.int32),
        prompt_lengths=np.full(1, tokens, np.int32),
        block_tables=np.zeros((1, -(-tokens // setup.block_size)), np.int32),
    )
    hidden_TH = torch.zeros((tokens, model.received_size), dtype=model.dtype, device=model.device)
    layers.run_cut(rows, hidden_TH, cuts, meter)


def rank_device(setup: RankSetup, rank: int) -> torch.device:
    """Return where a rank computes: on a GPU of its own where there are several ranks.

    Raises: ConfigError when this process sees none
    """
    if setup.device == "cuda" and setup.mesh.size > 1:
        visible = torch.cuda.device_count()
        if not visible:
            raise ConfigError("device", f"the replica computes on GPUs, and torch sees none where rank {rank} is")
        # Whoever starts a rank may show it no other than its own.
        return torch.device("cuda", 0 if visible == 1 else rank)
    return torch.device(setup.device)
