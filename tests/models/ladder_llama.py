"""A small Llama with ladder layers, written plainly: what our decoder is compared with. And checkpoints for both.

A ladder layer's attention reads the residual without the MLP before it, and its MLP without its attention.

Shapes: T tokens, H hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as functional
from safetensors.torch import load_file
from torch import Tensor

from slipstream.tests.models.checkpoints import make_checkpoint


def make_ladder_checkpoint(directory: Path, ladder_layers: int | list[int]) -> Path:
    """Write a checkpoint of five layers, of which some are ladders, as the paper's authors name them."""
    make_checkpoint("parallel_dense", directory)
    file = directory / "config.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    fields |= {
        "architectures": ["LlamaLadderForCausalLM"],
        "model_type": "llamaLadder",
        "ladder_layers": ladder_layers,
    }
    file.write_text(json.dumps(fields), encoding="utf-8")
    return directory


class LadderLlama:
    """The model in a directory, in float32."""

    def __init__(self, directory: Path) -> None:
        self._fields = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        self._weights = load_file(directory / "model.safetensors")
        layers, given = self._fields["num_hidden_layers"], self._fields["ladder_layers"]
        self._ladders = set(given) if isinstance(given, list) else set(range(layers - given, layers))

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Return the logits after every token. Shapes: [tokens, vocabulary] float32"""
        weights = self._weights
        residual_TH = weights["model.embed_tokens.weight"][torch.tensor(token_ids)]
        # The residual as it was before the last module.
        before_TH = residual_TH
        for index in range(self._fields["num_hidden_layers"]):
            for module, norm in ((self._attention, "input"), (self._mlp, "post_attention")):
                read_TH = before_TH if index in self._ladders else residual_TH
                normed_TH = self._norm(read_TH, f"model.layers.{index}.{norm}_layernorm")
                before_TH, residual_TH = residual_TH, residual_TH + module(index, normed_TH)
        return self._norm(residual_TH, "model.norm") @ weights["lm_head.weight"].T

    def continuation(self, prompt: Sequence[int], count: int) -> list[int]:
        """Return the most likely tokens, one after the other."""
        token_ids = list(prompt)
        for _ in range(count):
            token_ids.append(int(self.logits(token_ids)[-1].argmax()))
        return token_ids[len(prompt) :]

    def _norm(self, x_TH: Tensor, name: str) -> Tensor:
        variance_T1 = x_TH.pow(2).mean(-1, keepdim=True)
        return x_TH * torch.rsqrt(variance_T1 + self._fields["rms_norm_eps"]) * self._weights[f"{name}.weight"]

    def _linear(self, x_TH: Tensor, name: str) -> Tensor:
        return functional.linear(x_TH, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _attention(self, index: int, x_TH: Tensor) -> Tensor:
        name = f"model.layers.{index}.self_attn"
        heads, kv_heads = self._fields["num_attention_heads"], self._fields["num_key_value_heads"]
        q, k, v = (
            self._linear(x_TH, f"{name}.{part}_proj").unflatten(-1, (-1, x_TH.shape[1] // heads)).transpose(0, 1)
            for part in "qkv"
        )
        q, k = _rotate(q), _rotate(k)
        k, v = (part.repeat_interleave(heads // kv_heads, dim=0) for part in (k, v))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self._linear(attended.transpose(0, 1).flatten(1), f"{name}.o_proj")

    def _mlp(self, index: int, x_TH: Tensor) -> Tensor:
        name = f"model.layers.{index}.mlp"
        gate, up = self._linear(x_TH, f"{name}.gate_proj"), self._linear(x_TH, f"{name}.up_proj")
        return self._linear(functional.silu(gate) * up, f"{name}.down_proj")


def _rotate(x: Tensor) -> Tensor:
    """Rotate [heads, tokens, size] by position, base 10,000."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1])[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
