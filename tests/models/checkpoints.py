"""Tiny random checkpoints made with transformers, one for each thing a model of ours can have.

``CASES`` is the table; ``make_checkpoint`` writes a case as save_pretrained does. Every weight is random,
norms and biases too, so that a weight left out or put elsewhere shows in the logits. The seed is part of the
case.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY = 199
SHORT = 48
"""The original length of models with scaled positions: most prompts in the tests are longer."""

Config = dict[str, Any]

_COMMON: Config = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_EXPERTS: Config = {"num_local_experts": 6, "num_experts_per_tok": 2}
_QWEN_EXPERTS: Config = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "head_dim": 16,
}
_GEMMA: Config = {
    "num_hidden_layers": 3,
    "head_dim": 24,
    "query_pre_attn_scalar": 20,
    "sliding_window": 20,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}
"""Caps that many scores and logits reach."""
_GPT_OSS: Config = {
    "num_hidden_layers": 3,
    "head_dim": 32,
    "sliding_window": 20,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "swiglu_limit": 1.5,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "original_max_position_embeddings": SHORT,
        "truncate": False,
    },
}
"""A limit that many gates reach."""
_LATENT: Config = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "first_k_dense_replace": 1,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One checkpoint: a configuration class of transformers, what differs from the common sizes, how it is
    saved.
    """

    config_class: type
    fields: Config
    old_style: bool = False
    shard_size: str = "1GB"
    seed: int = 0


def _case(config_class: type, *, old_style: bool = False, shard_size: str = "1GB", **fields: object) -> Case:
    return Case(
        config_class=config_class,
        fields={**_COMMON, **fields},
        old_style=old_style,
        shard_size=shard_size,
    )


def _rope(kind: str, **fields: object) -> Config:
    return {"rope_type": kind, "rope_theta": 10_000.0, **fields}


CASES: dict[str, Case] = {
    "llama": _case(LlamaConfig),
    "llama_mha": _case(LlamaConfig, num_key_value_heads=4),
    "llama_mqa": _case(LlamaConfig, num_attention_heads=8, num_key_value_heads=1),
    "llama_three_per_group": _case(LlamaConfig, hidden_size=96, num_attention_heads=6, num_key_value_heads=2),
    "llama_wide_heads": _case(LlamaConfig, head_dim=32),
    "llama_narrow_heads": _case(LlamaConfig, head_dim=6),
    "llama_tied": _case(LlamaConfig, tie_word_embeddings=True),
    "llama_biases": _case(LlamaConfig, attention_bias=True, mlp_bias=True),
    "llama_sharded": _case(LlamaConfig, num_hidden_layers=3, shard_size="100KB"),
    "llama_old_style": _case(LlamaConfig, old_style=True, rope_parameters=_rope("default", rope_theta=5e5)),
    "llama_linear": _case(LlamaConfig, rope_parameters=_rope("linear", factor=4.0)),
    "llama_linear_old_style": _case(LlamaConfig, old_style=True, rope_parameters=_rope("linear", factor=3.0)),
    "llama_dynamic": _case(LlamaConfig, rope_parameters=_rope("dynamic", factor=4.0), max_position_embeddings=SHORT),
    "llama_dynamic_old_style": _case(
        LlamaConfig,
        old_style=True,
        rope_parameters=_rope("dynamic", factor=8.0),
        max_position_embeddings=SHORT,
    ),
    "llama_llama3": _case(
        LlamaConfig,
        rope_parameters=_rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=SHORT,
        ),
        head_dim=32,
    ),
    "llama_llama3_old_style": _case(
        LlamaConfig,
        old_style=True,
        rope_parameters=_rope(
            "llama3",
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=8.0,
            original_max_position_embeddings=SHORT,
        ),
        head_dim=32,
    ),
    "llama_yarn": _case(
        LlamaConfig,
        rope_parameters=_rope("yarn", factor=8.0, original_max_position_embeddings=SHORT),
        head_dim=32,
    ),
    "llama_yarn_tuned": _case(
        LlamaConfig,
        rope_parameters=_rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=SHORT,
            beta_fast=16.0,
            beta_slow=0.5,
            mscale=0.9,
            mscale_all_dim=0.4,
            truncate=False,
        ),
        head_dim=32,
    ),
    "llama_yarn_attention_factor": _case(
        LlamaConfig,
        rope_parameters=_rope("yarn", factor=4.0, original_max_position_embeddings=SHORT, attention_factor=1.25),
    ),
    "parallel_dense": _case(LlamaConfig, num_hidden_layers=5, attention_bias=True, mlp_bias=True),
    "mistral_window": _case(MistralConfig, sliding_window=20),
    "mistral_no_window": _case(MistralConfig, sliding_window=None, head_dim=24, tie_word_embeddings=True),
    "mistral_old_style": _case(
        MistralConfig, old_style=True, sliding_window=33, rope_parameters=_rope("default", rope_theta=1e6)
    ),
    "qwen2": _case(Qwen2Config, num_attention_heads=8),
    "qwen2_window_upper_layers": _case(
        Qwen2Config, num_hidden_layers=4, use_sliding_window=True, sliding_window=17, max_window_layers=2
    ),
    "qwen2_yarn_old_style": _case(
        Qwen2Config,
        old_style=True,
        tie_word_embeddings=True,
        rope_parameters=_rope("yarn", factor=4.0, rope_theta=1e6, original_max_position_embeddings=SHORT),
    ),
    "qwen3": _case(Qwen3Config, head_dim=24, tie_word_embeddings=True),
    "qwen3_mixed_layers": _case(
        Qwen3Config,
        head_dim=16,
        num_hidden_layers=4,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    ),
    "mixtral": _case(MixtralConfig, **_EXPERTS),
    "mixtral_window_sharded": _case(
        MixtralConfig, **_EXPERTS, sliding_window=25, head_dim=32, num_key_value_heads=1, shard_size="200KB"
    ),
    "mixtral_old_style": _case(MixtralConfig, **_EXPERTS, old_style=True, rope_parameters=_rope("default")),
    "qwen3_moe": _case(Qwen3MoeConfig, **_QWEN_EXPERTS),
    "qwen3_moe_normalized": _case(
        Qwen3MoeConfig, **_QWEN_EXPERTS, norm_topk_prob=True, attention_bias=True, num_attention_heads=6
    ),
    "qwen3_moe_dense_among": _case(
        Qwen3MoeConfig, **_QWEN_EXPERTS, num_hidden_layers=4, mlp_only_layers=[0, 2], norm_topk_prob=True
    ),
    "qwen3_moe_sparse_step": _case(
        Qwen3MoeConfig,
        **_QWEN_EXPERTS,
        num_hidden_layers=3,
        decoder_sparse_step=2,
        use_sliding_window=True,
        sliding_window=30,
    ),
    "deepseek_v2": _case(DeepseekV2Config, **_LATENT, q_lora_rank=None, n_shared_experts=1, routed_scaling_factor=1.5),
    "deepseek_v2_groups": _case(
        DeepseekV2Config,
        **{**_LATENT, "kv_lora_rank": 24, "qk_rope_head_dim": 8},
        q_lora_rank=28,
        n_shared_experts=2,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters=_rope(
            "yarn", factor=8.0, original_max_position_embeddings=SHORT, mscale=0.7, mscale_all_dim=0.9
        ),
    ),
    "deepseek_v3": _case(DeepseekV3Config, **_LATENT, q_lora_rank=28, n_group=4, topk_group=2, shard_size="100KB"),
    "deepseek_v3_old_style": _case(
        DeepseekV3Config,
        **{**_LATENT, "num_attention_heads": 8, "num_key_value_heads": 8},
        old_style=True,
        q_lora_rank=None,
        n_group=1,
        topk_group=1,
        norm_topk_prob=False,
        rope_interleave=False,
        attention_bias=True,
        tie_word_embeddings=True,
        rope_parameters=_rope(
            "yarn", factor=4.0, original_max_position_embeddings=SHORT, mscale=1.0, mscale_all_dim=1.0
        ),
    ),
    "parallel_experts": _case(
        Qwen3MoeConfig, **_QWEN_EXPERTS, num_hidden_layers=3, norm_topk_prob=True, mlp_only_layers=[1]
    ),
    "gemma2": _case(Gemma2Config, **_GEMMA),
    "gemma2_uncapped_old_style": _case(
        Gemma2Config,
        **{**_GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True},
        old_style=True,
        rope_parameters=_rope("default"),
    ),
    "gemma2_layer_types": _case(
        Gemma2Config,
        **{**_GEMMA, "sliding_window": 9},
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "gpt_oss": _case(GptOssConfig, **_GPT_OSS),
    "gpt_oss_plain": _case(
        GptOssConfig,
        **{**_GPT_OSS, "attention_bias": False, "num_experts_per_tok": 1, "rope_parameters": _rope("default")},
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        swiglu_alpha=1.2,
    ),
}


def make_checkpoint(name: str, directory: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write the case ``name`` to ``directory`` and return it."""
    case = CASES[name]
    model = random_model(case).to(dtype)
    model.config.dtype = dtype
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory, max_shard_size=case.shard_size)
    if case.old_style:
        _write_old_style(directory / "config.json")
    return directory


def random_model(case: Case) -> PreTrainedModel:
    """Return the model of a case with every weight drawn at random."""
    config = case.config_class(**case.fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("norm.weight", "layernorm.weight")):
                # Gemma's norms add one to what is stored.
                parameter.copy_(0.3 * noise + (case.config_class is not Gemma2Config))
            elif name.endswith((".bias", "_bias")):
                parameter.copy_(0.3 * noise)
            elif name.endswith("sinks"):
                parameter.copy_(2 * noise)
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.copy_(0.25 * noise)
            else:
                parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    return model.eval()


def _write_old_style(file: Path) -> None:
    """Rewrite config.json as transformers before version 5 wrote it."""
    fields = json.loads(file.read_text(encoding="utf-8"))
    rope = fields.pop("rope_parameters")
    fields["torch_dtype"] = fields.pop("dtype")
    fields["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    # The first files with scaling said "type", later ones "rope_type".
    key = "type" if kind in ("linear", "dynamic") else "rope_type"
    fields["rope_scaling"] = None if kind == "default" else {key: kind, **rope}
    file.write_text(json.dumps(fields, indent=2), encoding="utf-8")
