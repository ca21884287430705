"""The DeepSeek families' config.json: latent attention, routers, shared experts, and what is refused."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import partial

import pytest

from slipstream.runtime.models.layout import is_ignorable
from slipstream.runtime.models.model_spec import DenseMlpSpec, LatentSpec, MoeSpec, RopeSpec, RouterSpec
from slipstream.sdk.errors import CheckpointError
from slipstream.tests.models.config_files import SpecOf

V2, V3 = "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"

LATENT = LatentSpec(
    query_rank=1536, kv_rank=512, plain_dim=128, rotary_dim=64, value_dim=128, scale=192**-0.5, interleaved=True
)
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 0.707, "mscale_all_dim": 0.5}


@pytest.fixture
def spec_of(spec_of: SpecOf) -> SpecOf:
    """DeepSeek-V2's file always says how many experts a token has."""
    return partial(spec_of, num_experts_per_tok=6)


@pytest.mark.parametrize(("architecture", "positions", "bos", "eos"), [(V2, 2048, 1, (2,)), (V3, 4096, 0, (1,))])
def test_defaults_of_absent_keys(
    spec_of: SpecOf, architecture: str, positions: int, bos: int, eos: tuple[int, ...]
) -> None:
    spec = spec_of(architecture)
    assert spec.latent == LATENT
    assert (spec.num_kv_heads, spec.head_dim) == (1, 576)
    assert spec.rope == RopeSpec(theta=1e4, head_dim=64)
    assert (spec.max_position_embeddings, spec.rms_norm_eps) == (positions, 1e-6)
    assert (spec.bos_token_id, spec.eos_token_ids) == (bos, eos)
    assert (spec.qkv_bias, spec.o_bias, spec.mlp_bias) == (False, False, False)


def test_experts_of_v2(spec_of: SpecOf) -> None:
    mixture = MoeSpec(
        num_experts=64,
        top_k=6,
        intermediate_size=1407,
        normalize_top_k=False,
        router=RouterSpec(is_wide=True),
        shared=DenseMlpSpec(intermediate_size=2 * 1407),
    )
    assert [layer.mlp for layer in spec_of(V2).layers] == [mixture] * 4
    grouped = spec_of(
        V2, topk_method="group_limited_greedy", n_group=8, topk_group=3, routed_scaling_factor=16.0, n_shared_experts=0
    )
    router = RouterSpec(groups=8, top_groups=3, scaling=16.0, is_wide=True)
    assert grouped.layers[0].mlp == replace(mixture, router=router, shared=None)


def test_experts_of_v3(spec_of: SpecOf) -> None:
    dense = DenseMlpSpec(intermediate_size=512)
    mixture = MoeSpec(
        num_experts=256,
        top_k=6,
        intermediate_size=2048,
        normalize_top_k=True,
        router=RouterSpec(
            sigmoid=True, corrected=True, groups=8, top_groups=4, sums_two=True, scaling=2.5, is_wide=True
        ),
        shared=DenseMlpSpec(intermediate_size=2048),
    )
    assert [layer.mlp for layer in spec_of(V3).layers] == [dense, dense, dense, mixture]
    sparse = spec_of(V3, first_k_dense_replace=1, moe_layer_freq=2, n_group=1, topk_group=1)
    router = replace(mixture.router, groups=1, top_groups=1, sums_two=False)
    assert [layer.mlp for layer in sparse.layers] == [dense, dense, replace(mixture, router=router), dense]


def test_queries_without_a_latent_and_pairs_half_a_head_apart(spec_of: SpecOf) -> None:
    spec = spec_of(V3, q_lora_rank=None, rope_interleave=False)
    assert spec.latent == replace(LATENT, query_rank=None, interleaved=False)


def test_scaled_positions_scale_scores_too(spec_of: SpecOf) -> None:
    latent = spec_of(V2, rope_scaling=YARN).latent
    assert latent is not None
    assert latent.scale == pytest.approx(192**-0.5 * (0.1 * 0.5 * math.log(40) + 1) ** 2)
    plain = spec_of(V2, rope_scaling={**YARN, "mscale_all_dim": 0}).latent
    assert plain == LATENT


def test_what_a_position_takes_in_the_cache(spec_of: SpecOf) -> None:
    facts = spec_of(V3).facts()
    assert facts.kv_bytes_per_token(2) == 4 * 576 * 2


def test_layers_that_draft_tokens_are_left_out(spec_of: SpecOf) -> None:
    spec = spec_of(V3)
    assert is_ignorable("model.layers.4.eh_proj.weight", spec)
    assert not is_ignorable("model.layers.3.mlp.gate.weight", spec)
    assert not is_ignorable("model.layers.4.mlp.gate.weight", spec_of(V2))


@pytest.mark.parametrize(
    ("architecture", "fields", "problem"),
    [
        (V2, {"num_experts_per_tok": None}, "num_experts_per_tok: is missing"),
        (V2, {"norm_topk_prob": True}, "norm_topk_prob: true is not supported"),
        (V2, {"topk_method": "noaux_tc"}, "topk_method: 'noaux_tc' is not supported"),
        (V2, {"scoring_func": "sigmoid"}, "scoring_func: 'sigmoid' is not supported; only 'softmax' is"),
        (V2, {"topk_method": "group_limited_greedy"}, "n_group: is missing"),
        (V3, {"scoring_func": "softmax"}, "scoring_func: 'softmax' is not supported; only 'sigmoid' is"),
        (V3, {"topk_method": "greedy"}, "topk_method: 'greedy' is not supported; only 'noaux_tc' is"),
        (V3, {"n_group": 7}, "n_group: 7 groups do not divide the 256 experts"),
        (V3, {"n_group": 256, "topk_group": 8}, "n_group: 256 groups of 256 experts have fewer than two each"),
        (V3, {"topk_group": 9}, "topk_group: 9 is more than the 8 groups there are"),
        (V3, {"n_group": 64, "topk_group": 1}, "num_experts_per_tok: 6 is more than the 4 experts to choose from"),
        (V3, {"kv_lora_rank": 0}, "kv_lora_rank: must be a positive integer, got 0"),
        (V3, {"qk_rope_head_dim": 7}, "rotary positions need an even number, got 7"),
        (V3, {"n_routed_experts": 20_000}, "n_routed_experts: 20000 is more than the 10000 we allow"),
    ],
)
def test_what_is_refused(spec_of: SpecOf, architecture: str, fields: dict[str, object], problem: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(problem)):
        spec_of(architecture, **fields)
