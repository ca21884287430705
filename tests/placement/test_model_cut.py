"""What the planner thinks that a rank holds, against what the runtime really cuts, and models' published sizes."""

from __future__ import annotations

import pytest

from slipstream.comm.mesh import MeshShape
from slipstream.placement.model_cut import Cut
from slipstream.placement.model_sizes import DenseMlp, ExpertMlp, GroupedAttention, Layer, ModelSizes
from slipstream.placement.plan import Degrees
from slipstream.placement.plan_memory import EngineLimits, MemoryTraits, rank_memory, weight_bytes
from slipstream.runtime.models.model_spec import DenseMlpSpec, LayerSpec, ModelSpec, MoeSpec, RopeSpec
from slipstream.runtime.models.sharding import Shard
from slipstream.tests.placement.planning_cases import deepseek_v3, llama_3_8b, llama_3_70b

DENSE, MIXTURE = DenseMlp(intermediate=1000), ExpertMlp(experts=10, top_k=2, intermediate=96)
DEGREES = [
    Degrees(),
    Degrees(tp=2),
    Degrees(tp=4),
    Degrees(tp=8),
    Degrees(pp=3),
    Degrees(tp=2, pp=2),
    Degrees(ep=3),
    Degrees(tp=2, ep=4),
    Degrees(tp=4, experts_over_tp=True),
]


def spec_of(model: ModelSizes) -> ModelSpec:
    """Return the runtime's description of the same model."""
    assert isinstance(model.attention, GroupedAttention)
    layers = tuple(
        LayerSpec(
            window=layer.window,
            mlp=DenseMlpSpec(intermediate_size=layer.mlp.intermediate)
            if isinstance(layer.mlp, DenseMlp)
            else MoeSpec(
                num_experts=layer.mlp.experts,
                top_k=layer.mlp.top_k,
                intermediate_size=layer.mlp.intermediate,
                normalize_top_k=True,
            ),
        )
        for layer in model.layers
    )
    return ModelSpec(
        architecture="made up",
        vocab_size=model.vocabulary,
        hidden_size=model.hidden,
        num_layers=len(model.layers),
        num_heads=model.attention.heads,
        num_kv_heads=model.attention.kv_heads,
        head_dim=model.attention.head_dim,
        rms_norm_eps=1e-6,
        tie_word_embeddings=model.tied,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        rope=RopeSpec(theta=10000.0, head_dim=model.attention.head_dim),
        layers=layers,
        max_position_embeddings=model.longest,
        dtype="bfloat16",
        eos_token_ids=(),
        bos_token_id=None,
    )


def numbers_of_rank(model: ModelSizes, spec: ModelSpec, degrees: Degrees, rank: int) -> tuple[int, int]:
    """Return the numbers of weights that the runtime's shard has, and the numbers of KV a position."""
    place = MeshShape(pp=degrees.pp, ep=degrees.ep, tp=degrees.tp).place(rank)
    shard = Shard(place=place, experts_over_tp=degrees.experts_over_tp)
    local = shard.local_spec(spec)
    hidden, head_dim = spec.hidden_size, spec.head_dim
    total = 0
    for layer in local.layers:
        total += hidden * head_dim * (2 * local.num_heads + 2 * local.num_kv_heads) + 2 * hidden
        if isinstance(layer.mlp, MoeSpec):
            each = 3 * hidden * layer.mlp.intermediate_size
            total += each * len(shard.experts(layer.mlp.num_experts)) + hidden * layer.mlp.num_experts
        else:
            total += 3 * hidden * layer.mlp.intermediate_size
    table = len(shard.vocabulary(spec.vocab_size)) * hidden
    if place.is_first_stage:
        total += table
    if place.is_last_stage:
        total += hidden + (table if not (model.tied and place.is_first_stage) else 0)
    return total, local.num_layers * 2 * local.num_kv_heads * head_dim


@pytest.mark.parametrize("degrees", DEGREES, ids=str)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_the_fullest_rank_holds_what_the_runtime_gives_it(degrees: Degrees, tied: bool, kv_heads: int) -> None:
    model = ModelSizes(
        name="made up",
        hidden=64,
        vocabulary=1001,
        attention=GroupedAttention(heads=8, kv_heads=kv_heads, head_dim=16),
        layers=(Layer(mlp=DENSE), Layer(mlp=MIXTURE), Layer(mlp=MIXTURE), Layer(mlp=MIXTURE), Layer(mlp=DENSE)),
        tied=tied,
        longest=512,
    )
    spec, cut = spec_of(model), Cut(model=model, degrees=degrees)
    assert cut.problem() is None
    held = [numbers_of_rank(model, spec, degrees, rank) for rank in range(degrees.ranks)]
    planned = max(weight_bytes(cut, stage) for stage in range(degrees.pp))
    assert planned == 2 * max(numbers for numbers, _ in held)
    assert cut.kv_bytes_per_token == 2 * max(kv for _, kv in held)


def test_whole_models_have_their_published_sizes() -> None:
    """Billions of parameters as their authors give them; the third keeps 8-bit weights."""
    for model, billions in ((llama_3_8b(), 8.03), (llama_3_70b(), 70.6)):
        held = weight_bytes(Cut(model=model, degrees=Degrees()), 0)
        assert held / 2e9 == pytest.approx(billions, rel=0.003)
    held = weight_bytes(Cut(model=deepseek_v3(), degrees=Degrees()), 0)
    assert held / 1e9 == pytest.approx(671 + 1.9, rel=0.005)
    # 512 + 64 numbers a layer, whatever the heads.
    assert deepseek_v3().kv_bytes_per_token() == 61 * 576 * 2


@pytest.mark.parametrize(
    ("degrees", "word"),
    [
        (Degrees(tp=3), "attention heads"),
        (Degrees(pp=33), "layers"),
        (Degrees(ep=2), "experts"),
        (Degrees(tp=16), None),
        (Degrees(tp=32), None),
    ],
)
def test_degrees_that_a_model_cannot_have_are_refused_with_the_reason(degrees: Degrees, word: str | None) -> None:
    problem = Cut(model=llama_3_8b(), degrees=degrees).problem()
    assert (problem is None) if word is None else (problem is not None and word in problem)


def test_the_cache_gets_what_is_left_and_never_more_than_it_can_use() -> None:
    cut = Cut(model=llama_3_8b(), degrees=Degrees())
    memory = rank_memory(cut, EngineLimits(), device_bytes=80 << 30, traits=MemoryTraits())
    assert memory.without_kv + memory.kv_bytes <= 0.9 * (80 << 30)
    assert memory.without_kv + memory.kv_bytes > 0.9 * (80 << 30) - 16 * memory.kv_bytes_per_token
    few = rank_memory(cut, EngineLimits(max_num_seqs=2), device_bytes=80 << 30, traits=MemoryTraits())
    assert few.kv_tokens == 2 * 8192
    none = rank_memory(cut, EngineLimits(), device_bytes=8 << 30, traits=MemoryTraits())
    assert none.kv_tokens == 0
