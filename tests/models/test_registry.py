"""From config.json to ModelSpec: what each family leaves unsaid, and both ages of the file."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from slipstream.kernels.gate import Gate, GateKind
from slipstream.runtime.models.generation_defaults import GenerationDefaults, read_generation_defaults
from slipstream.runtime.models.model_spec import (
    DenseMlpSpec,
    DynamicRope,
    LinearRope,
    Llama3Rope,
    MoeSpec,
    NormSpec,
    RopeSpec,
    ScoreSpec,
    YarnRope,
)
from slipstream.runtime.models.registry import FAMILIES
from slipstream.sdk.errors import CheckpointError
from slipstream.tests.models.config_files import SpecOf


@pytest.mark.parametrize(
    ("architecture", "kv_heads", "head_dim", "positions", "theta", "epsilon", "bos", "eos"),
    [
        ("LlamaForCausalLM", 32, 8, 2048, 1e4, 1e-6, 1, (2,)),
        ("LlamaLadderForCausalLM", 32, 8, 2048, 1e4, 1e-6, 1, (2,)),
        ("MistralForCausalLM", 8, 8, 131072, 1e4, 1e-6, 1, (2,)),
        ("Qwen2ForCausalLM", 32, 8, 32768, 1e4, 1e-6, None, ()),
        ("Qwen3ForCausalLM", 32, 128, 32768, 1e4, 1e-6, None, ()),
        ("MixtralForCausalLM", 8, 8, 131072, 1e6, 1e-5, 1, (2,)),
        ("Qwen3MoeForCausalLM", 4, 8, 32768, 1e4, 1e-6, None, ()),
        ("Gemma2ForCausalLM", 4, 256, 8192, 1e4, 1e-6, 2, (1,)),
    ],
)
def test_defaults_of_absent_keys(
    spec_of: SpecOf,
    architecture: str,
    kv_heads: int,
    head_dim: int,
    positions: int,
    theta: float,
    epsilon: float,
    bos: int | None,
    eos: tuple[int, ...],
) -> None:
    spec = spec_of(architecture, moe_intermediate_size=64, ladder_layers=0)
    assert (spec.num_kv_heads, spec.head_dim) == (kv_heads, head_dim)
    assert (spec.max_position_embeddings, spec.rms_norm_eps) == (positions, epsilon)
    assert spec.rope == RopeSpec(theta=theta, head_dim=head_dim)
    assert (spec.bos_token_id, spec.eos_token_ids) == (bos, eos)
    assert spec.tie_word_embeddings is (architecture == "Gemma2ForCausalLM")
    assert spec.dtype is None


def test_every_family_is_covered_by_the_defaults_above() -> None:
    assert set(FAMILIES) == {
        "LlamaForCausalLM",
        "LlamaLadderForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "MixtralForCausalLM",
        "Qwen3MoeForCausalLM",
        "Gemma2ForCausalLM",
        "GptOssForCausalLM",
        # test_deepseek_config
        "DeepseekV2ForCausalLM",
        "DeepseekV3ForCausalLM",
    }


@pytest.mark.parametrize(
    ("architecture", "biases", "qk_norm"),
    [
        ("LlamaForCausalLM", (True, True, True), False),
        ("MistralForCausalLM", (False, False, False), False),
        ("Qwen2ForCausalLM", (True, False, False), False),
        ("Qwen3ForCausalLM", (True, True, False), True),
        ("MixtralForCausalLM", (False, False, False), False),
        ("Qwen3MoeForCausalLM", (True, True, False), True),
        ("Gemma2ForCausalLM", (True, True, False), False),
        ("GptOssForCausalLM", (True, True, False), False),
    ],
)
def test_biases_when_the_file_asks_for_all(
    spec_of: SpecOf, architecture: str, biases: tuple[bool, bool, bool], qk_norm: bool
) -> None:
    spec = spec_of(architecture, attention_bias=True, mlp_bias=True, moe_intermediate_size=64)
    assert (spec.qkv_bias, spec.o_bias, spec.mlp_bias) == biases
    assert spec.qk_norm is qk_norm


@pytest.mark.parametrize(
    ("architecture", "fields", "windows"),
    [
        ("LlamaForCausalLM", {"sliding_window": 7}, [None] * 4),
        ("MistralForCausalLM", {}, [4096] * 4),
        ("MistralForCausalLM", {"sliding_window": None}, [None] * 4),
        ("MistralForCausalLM", {"sliding_window": 7}, [7] * 4),
        ("MixtralForCausalLM", {}, [None] * 4),
        ("MixtralForCausalLM", {"sliding_window": 7}, [7] * 4),
        ("Qwen2ForCausalLM", {"sliding_window": 7, "max_window_layers": 0}, [None] * 4),
        ("Qwen2ForCausalLM", {"sliding_window": 7, "use_sliding_window": True}, [None] * 4),
        (
            "Qwen2ForCausalLM",
            {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 3},
            [None, None, None, 7],
        ),
        ("Qwen3ForCausalLM", {"use_sliding_window": True, "max_window_layers": 0}, [4096] * 4),
        (
            "Qwen3ForCausalLM",
            {
                "sliding_window": 7,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            [7, None, 7, None],
        ),
        ("Qwen3MoeForCausalLM", {"sliding_window": 7, "moe_intermediate_size": 8}, [None] * 4),
        (
            "Qwen3MoeForCausalLM",
            {"sliding_window": 7, "use_sliding_window": True, "moe_intermediate_size": 8},
            [7] * 4,
        ),
        ("Gemma2ForCausalLM", {}, [4096, None, 4096, None]),
        ("Gemma2ForCausalLM", {"sliding_window": 7, "layer_types": ["full_attention"] * 4}, [None] * 4),
        ("GptOssForCausalLM", {}, [128, None, 128, None]),
        ("GptOssForCausalLM", {"layer_types": ["sliding_attention"] * 4}, [128] * 4),
        ("GptOssForCausalLM", {"sliding_window": None}, [None] * 4),
    ],
)
def test_windows(spec_of: SpecOf, architecture: str, fields: dict[str, object], windows: list[int | None]) -> None:
    spec = spec_of(architecture, **fields)
    assert [layer.window for layer in spec.layers] == windows
    assert spec.windows == tuple(dict.fromkeys(windows))


@pytest.mark.parametrize(
    ("fields", "dense_layers"),
    [
        ({}, []),
        ({"mlp_only_layers": [0, 3]}, [0, 3]),
        ({"decoder_sparse_step": 2}, [0, 2]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, [0, 1, 2]),
        ({"num_experts": 0}, [0, 1, 2, 3]),
    ],
)
def test_dense_layers_among_expert_layers(spec_of: SpecOf, fields: dict[str, object], dense_layers: list[int]) -> None:
    spec = spec_of("Qwen3MoeForCausalLM", moe_intermediate_size=96, norm_topk_prob=True, **fields)
    dense = DenseMlpSpec(intermediate_size=512)
    moe = MoeSpec(num_experts=128, top_k=8, intermediate_size=96, normalize_top_k=True)
    assert [layer.mlp for layer in spec.layers] == [dense if i in dense_layers else moe for i in range(4)]


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_either_name_of_the_number_of_experts(spec_of: SpecOf, name: str) -> None:
    fields = {name: 16, "moe_intermediate_size": 8}
    mlp = spec_of("Qwen3MoeForCausalLM", **fields).layers[0].mlp
    assert isinstance(mlp, MoeSpec)
    assert mlp.num_experts == 16


def test_gpt_oss_defaults(spec_of: SpecOf) -> None:
    spec = spec_of("GptOssForCausalLM")
    assert (spec.num_kv_heads, spec.head_dim, spec.max_position_embeddings) == (8, 64, 131072)
    rope = YarnRope(
        theta=150_000.0,
        head_dim=64,
        factor=32.0,
        original_max_positions=4096,
        attention_factor=0.1 * math.log(32) + 1,
        beta_fast=32.0,
        beta_slow=1.0,
        truncate=False,
    )
    assert spec.rope == rope
    assert spec.norms == NormSpec(is_wide=True) and spec.dtype == "bfloat16"
    assert spec.scores == ScoreSpec(has_sinks=True) and spec.score_scale == 64**-0.5
    mlp = spec.layers[0].mlp
    assert isinstance(mlp, MoeSpec) and mlp.has_biases and (mlp.num_experts, mlp.top_k) == (128, 4)
    assert mlp.gate == Gate(kind=GateKind.CLAMPED, alpha=1.702, limit=7.0)


@pytest.mark.parametrize(
    ("fields", "caps"),
    [
        ({}, (50.0, 30.0)),
        ({"attn_logit_softcapping": None, "final_logit_softcapping": None}, (None, None)),
        ({"attn_logit_softcapping": 7, "final_logit_softcapping": 5.5}, (7.0, 5.5)),
    ],
)
def test_gemma2_scales_and_caps(
    spec_of: SpecOf, fields: dict[str, object], caps: tuple[float | None, float | None]
) -> None:
    spec = spec_of("Gemma2ForCausalLM", query_pre_attn_scalar=64, hidden_act="gelu_pytorch_tanh", **fields)
    assert (spec.scores.soft_cap, spec.logit_soft_cap) == caps
    assert (spec.score_scale, spec.embedding_scale) == (0.125, 16.0)
    assert spec.norms == NormSpec(is_wide=True, added=1.0, behind=True)
    assert spec.layers[0].mlp == DenseMlpSpec(intermediate_size=512, gate=Gate(kind=GateKind.GELU_TANH))


@pytest.mark.parametrize(
    ("architecture", "fields", "problem"),
    [
        ("Gemma2ForCausalLM", {"hidden_activation": "silu"}, "hidden_activation: 'silu' is not supported"),
        ("Gemma2ForCausalLM", {"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported"),
        ("Gemma2ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention: attention to later"),
        ("Gemma2ForCausalLM", {"layer_types": ["full_attention"]}, "layer_types: 4 layers need as many entries"),
        ("GptOssForCausalLM", {"layer_types": ["linear"] * 4}, "layer_types: 'linear' is not supported"),
        ("GptOssForCausalLM", {"swiglu_limit": 0}, "swiglu_limit: must be a finite number above 0"),
    ],
)
def test_what_is_not_computed_is_refused(
    spec_of: SpecOf, architecture: str, fields: dict[str, object], problem: str
) -> None:
    with pytest.raises(CheckpointError, match=re.escape(problem)):
        spec_of(architecture, **fields)


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"rope_type": "default"}, RopeSpec(theta=7.0, head_dim=8)),
        ({"rope_type": "linear", "factor": 2}, LinearRope(theta=7.0, head_dim=8, factor=2.0)),
        (
            {"rope_type": "dynamic", "factor": 2},
            DynamicRope(theta=7.0, head_dim=8, factor=2.0, max_positions=2048),
        ),
        (
            {"rope_type": "llama3", **LLAMA3},
            Llama3Rope(
                theta=7.0,
                head_dim=8,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_positions=64,
            ),
        ),
        (
            {"rope_type": "yarn", "factor": 1.0},
            YarnRope(
                theta=7.0,
                head_dim=8,
                factor=1.0,
                original_max_positions=2048,
                attention_factor=1.0,
                beta_fast=32.0,
                beta_slow=1.0,
                truncate=True,
            ),
        ),
    ],
)
def test_old_and_new_style_of_rope_are_one(spec_of: SpecOf, scaling: dict[str, object], expected: RopeSpec) -> None:
    inner = {name: value for name, value in scaling.items() if name != "rope_type"}
    styles: list[dict[str, object]] = [
        {"rope_parameters": {**scaling, "rope_theta": 7}},
        {"rope_theta": 7, "rope_scaling": scaling},
        {"rope_theta": 7, "rope_scaling": {**inner, "type": scaling["rope_type"]}},
        {"rope_theta": 7, "rope_parameters": scaling},
        {"rope_scaling": scaling, "rope_parameters": {"rope_type": "linear", "factor": 99}, "rope_theta": 7},
    ]
    for style in styles:
        found = spec_of("LlamaForCausalLM", **style).rope
        assert found == expected, style
        assert type(found) is type(expected)


def test_original_length_beside_the_rope_table_wins(spec_of: SpecOf) -> None:
    rope = spec_of(
        "LlamaForCausalLM",
        rope_scaling={"rope_type": "llama3", **LLAMA3},
        original_max_position_embeddings=32,
    ).rope
    assert isinstance(rope, Llama3Rope)
    assert rope.original_max_positions == 32


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float16"}, "float16"),
        ({"dtype": "float16", "torch_dtype": "float32"}, "float16"),
        ({"dtype": None, "torch_dtype": "torch.float32"}, "float32"),
    ],
)
def test_dtype_of_either_age(spec_of: SpecOf, fields: dict[str, object], dtype: str) -> None:
    assert spec_of("LlamaForCausalLM", **fields).dtype == dtype


@pytest.mark.parametrize(
    ("ladder_layers", "ladders"),
    [(0, ()), (2, (2, 3)), (4, (0, 1, 2, 3)), ([], ()), ([1, 3], (1, 3)), ([3, 1, 3], (1, 3))],
)
@pytest.mark.parametrize("architecture", ["LlamaLadderForCausalLM", "Qwen2ForCausalLM"])
def test_ladder_layers_are_a_list_or_the_last_ones(
    spec_of: SpecOf, architecture: str, ladder_layers: object, ladders: tuple[int, ...]
) -> None:
    spec = spec_of(architecture, ladder_layers=ladder_layers)
    assert tuple(index for index, layer in enumerate(spec.layers) if layer.ladder) == ladders


@pytest.mark.parametrize(
    ("ladder_layers", "problem"),
    [
        (None, "is missing; it is a list of layers, or a number of the last ones"),
        (5, "5 is more than the 4 layers there are"),
        (-1, "must be an integer of at least 0, got -1"),
        (True, "must be an integer of at least 0, got True"),
        ("all", "must be an integer of at least 0, got 'all'"),
        ([0, 4], "must name layers from 0 to 3, got 4"),
        ([-1], "must name layers from 0 to 3, got -1"),
        ([True], "must name layers from 0 to 3, got True"),
        ([1.0], "must name layers from 0 to 3, got 1.0"),
    ],
)
def test_ladder_layers_that_are_none_are_refused(spec_of: SpecOf, ladder_layers: object, problem: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(f"ladder_layers: {problem}")):
        spec_of("LlamaLadderForCausalLM", ladder_layers=ladder_layers)


def test_other_models_need_not_name_ladder_layers(spec_of: SpecOf) -> None:
    assert not any(layer.ladder for layer in spec_of("LlamaForCausalLM").layers)


def test_end_tokens_may_be_several(spec_of: SpecOf) -> None:
    assert spec_of("LlamaForCausalLM", eos_token_id=[5, 7, 5]).eos_token_ids == (5, 7)
    assert spec_of("LlamaForCausalLM", eos_token_id=None).eos_token_ids == ()


def test_prefix_cache_key_only_for_long_prompts_of_dynamic_rope(spec_of: SpecOf) -> None:
    plain = spec_of("LlamaForCausalLM")
    assert plain.prefix_cache_key(10**6) is None
    dynamic = spec_of("LlamaForCausalLM", rope_scaling={"type": "dynamic", "factor": 4.0})
    assert dynamic.rope.depends_on_prompt_length
    assert dynamic.rope.prompt_length_threshold == 2048
    assert dynamic.prefix_cache_key(2048) is None
    assert dynamic.prefix_cache_key(2049) is not None
    assert dynamic.prefix_cache_key(2049) != dynamic.prefix_cache_key(2050)
    assert (plain.max_model_len, dynamic.max_model_len) == (2048, 8192)


def test_active_parameters_leave_out_unused_experts(spec_of: SpecOf) -> None:
    facts = spec_of("MixtralForCausalLM").facts()
    one_expert = 3 * 256 * 512
    assert facts.parameters - facts.active_parameters == 4 * (8 - 2) * one_expert + 1000 * 256


def test_no_generation_config_means_no_suggestions(tmp_path: Path) -> None:
    assert read_generation_defaults(tmp_path) == GenerationDefaults()


def test_generation_config(tmp_path: Path) -> None:
    file = tmp_path / "generation_config.json"
    file.write_text(
        json.dumps(
            {
                "bos_token_id": 1,
                "eos_token_id": [2, 3],
                "pad_token_id": 0,
                "do_sample": True,
                "temperature": 0.6,
                "top_p": 0.9,
                "top_k": 20,
                "repetition_penalty": 1.05,
            }
        )
    )
    assert read_generation_defaults(tmp_path) == GenerationDefaults(
        eos_token_ids=(2, 3),
        bos_token_id=1,
        pad_token_id=0,
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
        top_k=20,
        repetition_penalty=1.05,
    )
    file.write_text('{"temperature": "warm"}')
    with pytest.raises(CheckpointError, match=r"generation_config.json: temperature: must be a number"):
        read_generation_defaults(tmp_path)
