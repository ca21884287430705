"""The planner benchmark's models: small ones of random weights, made once into a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3Config

_SEED = 0
_COMMON: dict[str, Any] = {
    "max_position_embeddings": 8192,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A model to make: its config and the type that it is run in."""

    config: Any
    fields: dict[str, Any]
    dtype: str


MODELS = {
    "llama-120m-bf16": Made(
        config=LlamaConfig,
        dtype="bfloat16",
        fields=dict(
            hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4,
            intermediate_size=2048, vocab_size=32000, tie_word_embeddings=False,
        ),
    ),
    "qwen3-60m-fp32": Made(
        config=Qwen3Config,
        dtype="float32",
        fields=dict(
            hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, head_dim=64,
            intermediate_size=1536, vocab_size=32000, tie_word_embeddings=True,
        ),
    ),
    "mixtral-150m-bf16": Made(
        config=MixtralConfig,
        dtype="bfloat16",
        fields=dict(
            hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
            intermediate_size=1024, vocab_size=32000, num_local_experts=8, num_experts_per_tok=2, sliding_window=None,
            tie_word_embeddings=False,
        ),
    ),
}  # fmt: skip


def ensure(name: str, folder: Path) -> Path:
    """Return a model's directory, making it if need be."""
    directory, made = folder / name, MODELS[name]
    if (directory / "complete").exists():
        return directory
    print(f"making {directory}", flush=True)
    torch.manual_seed(_SEED)
    config = made.config(**_COMMON, **made.fields, dtype=made.dtype)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, made.dtype))
    model.save_pretrained(directory)
    # Without this file, a directory was left half written by a run that was ended.
    (directory / "complete").touch()
    return directory
