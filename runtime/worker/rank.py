"""One rank's share of an engine: the model's part, its cache and its executor, from one description.

The description is the same for all ranks of a replica and travels as JSON: the driver has worked it out, and no rank
decides anything by itself. The driver builds its own rank from it too.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from ...comm.collectives import Collectives
from ...comm.groups import MeshGroups
from ...comm.mesh import MeshShape
from ...comm.overlap_meter import OverlapMeter
from ...comm.overlap_split import Cuts
from ...placement.experts import ExpertPlacement
from ...sdk.errors import ConfigError
from ..models.decoder import Decoder, load_decoder
from ..models.kv_cache import KvCache
from ..models.linear_format import choose_format
from ..models.model_spec import ModelSpec
from ..models.registry import read_model_spec
from ..models.sharding import Shard
from ..models.weights import read_expert
from .cpu_settings import settle_cpu
from .executor import ModelExecutor, step_thread
from .expert_balance import ExpertBalance
from .grammar import GrammarCompiler
from .sequence_ranks import SequenceRanks, measure_ring
from .step_forward import StepForward, StepRows
from .token_split import TokenSplit, measure_split


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSetup:
    """What every rank of a replica has to know.

    - ``device``: of all ranks; with several of them, ``cuda`` is one GPU each, in the order of the ranks.
    - ``max_slots``, ``max_length``: sequences at once and their longest. ``num_blocks``: of each rank's cache.
    - ``num_threads``: on a CPU, of each rank; None is a share of the cores.
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
    overlap: bool = False
    redundant_experts: int = 0
    expert_balance_steps: int = 0

    @property
    def mesh(self) -> MeshShape:
        """The replica's shape."""
        return MeshShape(pp=self.pp, sp=self.sp, ep=self.ep, tp=self.tp)

    def to_json(self) -> str:
        """Return the setup as one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RankSetup:
        """Return what ``to_json`` was given."""
        values = json.loads(text)
        return cls(**{**values, "eos_token_ids": tuple(values["eos_token_ids"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """A rank that can carry out steps."""

    executor: ModelExecutor
    grammars: GrammarCompiler


def build_rank(setup: RankSetup, groups: MeshGroups) -> Rank:
    """Load a rank's part of the model and make its executor; close that to end everything.

    Raises: ConfigError naming the option; CheckpointError naming the file and the tensor
    """
    path, device = Path(setup.model), rank_device(setup, groups.place.rank)
    spec = read_model_spec(path)
    dtype = getattr(torch, setup.dtype)
    shard = Shard(place=groups.place, experts_over_tp=setup.experts_over_tp, redundant_experts=setup.redundant_experts)
    local_spec = shard.local_spec(spec)
    if device.type == "cpu":
        weight_bytes = local_spec.facts().step_read_bytes(dtype.itemsize)
        settle_cpu(setup.num_threads, weight_bytes=weight_bytes, ranks=setup.mesh.size)
    thread = step_thread()

    def load() -> Decoder:
        return load_decoder(
            path,
            spec,
            dtype=dtype,
            device=device,
            quantization=setup.quantization,
            deterministic=setup.deterministic,
            groups=groups,
            shard=shard,
        )

    try:
        model = thread.submit(load).result()
        cache = KvCache.allocate(
            local_spec, num_blocks=setup.num_blocks, block_size=setup.block_size, dtype=dtype, device=device
        )
        split = None
        group = groups.tp or groups.ep
        if setup.overlap and group is not None:
            split = thread.submit(_measure, setup, model, cache, group).result()
        sequences = thread.submit(_sequences, setup, model, groups).result()
    except BaseException:
        thread.shutdown(wait=False, cancel_futures=True)
        raise
    grammars = GrammarCompiler(
        Path(setup.tokenizer).expanduser() / "tokenizer.json",
        vocab_size=spec.vocab_size,
        eos_token_ids=setup.eos_token_ids,
    )
    executor = ModelExecutor(
        model=model,
        cache=cache,
        block_size=setup.block_size,
        max_slots=setup.max_slots,
        max_length=setup.max_length,
        device=device,
        grammars=grammars,
        thread=thread,
        groups=groups,
        deterministic=setup.deterministic,
        split=split,
        balance=_balance(setup, spec, model, shard),
        sequences=sequences,
    )
    return Rank(executor=executor, grammars=grammars)


def _balance(setup: RankSetup, spec: ModelSpec, model: Decoder, shard: Shard) -> ExpertBalance | None:
    """Return what moves experts while they serve, if that was asked for and the rank has any."""
    layers = model.expert_layers
    if not setup.expert_balance_steps or not layers:
        return None
    counts = {layer.num_experts for layer in layers.values()}
    if len(counts) > 1:
        raise ConfigError("enable_eplb", f"needs as many experts in every layer, the model has {sorted(counts)}")
    first = shard.expert_placement(counts.pop())
    placement = ExpertPlacement.of_ranks(
        [first.experts_by_rank(0)] * len(layers), num_experts=first.num_experts, ranks_per_host=first.ranks_per_host
    )
    linear_format = choose_format(
        setup.quantization, dtype=model.dtype, device=model.device, deterministic=setup.deterministic
    )

    def read(layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        return read_expert(
            setup.model, spec, layer=layer, expert=expert, dtype=model.dtype, device=model.device, shard=shard
        )

    return ExpertBalance(
        layers,
        placement,
        interval=setup.expert_balance_steps,
        read=read,
        prepare=linear_format.prepare,
        device=model.device,
    )


def _sequences(setup: RankSetup, model: Decoder, groups: MeshGroups) -> SequenceRanks:
    """Return the rank's side of what sequence-parallel ranks do together; if there are any, measure their exchange."""
    wire_s = None
    if groups.sp is not None:
        spec = model.spec
        bytes_per_token = 2 * spec.num_kv_heads * spec.head_dim * model.dtype.itemsize
        wire_s = measure_ring(groups.sp, bytes_per_token=bytes_per_token, device=model.device)
    return SequenceRanks(groups.sp, block_size=setup.block_size, wire_s=wire_s)


@torch.inference_mode()
def _measure(setup: RankSetup, model: Decoder, cache: KvCache, group: Collectives) -> TokenSplit:
    """Measure, with the other ranks, what passes and collectives take; the cache's first block is written to."""
    spec = model.spec
    layers = StepForward(model, cache, block_size=setup.block_size, deterministic=setup.deterministic)

    def run(tokens: int, cuts: Cuts | None, meter: OverlapMeter) -> None:
        rows = StepRows(
            token_ids_T=torch.zeros(tokens, dtype=torch.int64, device=model.device),
            starts=np.zeros(1, np.int32),
            counts=np.full(1, tokens, np.int32),
            prompt_lengths=np.full(1, tokens, np.int32),
            block_tables=np.zeros((1, -(-tokens // setup.block_size)), np.int32),
        )
        hidden_TH = torch.zeros((tokens, spec.hidden_size), dtype=model.dtype, device=model.device)
        layers.run_cut(rows, hidden_TH, cuts, meter)

    return measure_split(
        group,
        run,
        collectives=2 * spec.num_layers,
        bytes_per_token=spec.hidden_size * model.dtype.itemsize,
        element_bytes=model.dtype.itemsize,
        most_tokens=min(setup.max_length, setup.num_blocks * setup.block_size),
        device=model.device,
    )


def rank_device(setup: RankSetup, rank: int) -> torch.device:
    """Return where a rank computes: ranks on GPUs have one each, in order."""
    if setup.device == "cuda" and setup.mesh.size > 1:
        return torch.device("cuda", rank)
    return torch.device(setup.device)
