"""The attention of one layer, over the paged cache.

Shapes: T tokens, N query heads, K KV heads, S = N + 2K heads of the fused product, D head size, H hidden
size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...comm.overlap import Parts
from ...kernels.attention import PreparedAttention, paged_attention
from ...kernels.attention_span import AttentionOptions
from ...kernels.norm import normalize_heads_
from ...kernels.quantize_rows import ByteRows
from ...kernels.rope_kv import read_kv, rotate_and_write_
from .linear import Linear
from .model_spec import ModelSpec
from .parameters import Parameters
from .ring_attention import RingInputs, ring_attention


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionInputs:
    """What one step computes once for all layers; ``ring`` where rows are divided over ranks.

    Shapes: cos_TD, sin_TD [tokens, rotated size], that of heads or of a latent's keys; kv_rows [tokens * 2K] int64, of
    latents [tokens]
    """

    cos_TD: Tensor
    sin_TD: Tensor
    kv_rows: Tensor
    attention: Mapping[int | None, PreparedAttention]
    ring: RingInputs | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Shapes: qk_norm_SD [N + K, D], one weight per query and key head; sinks_N [N] float32; None without such."""

    qkv: Linear
    out: Linear
    qk_norm_SD: Tensor | None
    epsilon: float
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    scale: float
    soft_cap: float | None
    sinks_N: Tensor | None

    @classmethod
    def take(cls, spec: ModelSpec, parameters: Parameters, name: str, *, window: int | None) -> Attention:
        """Return the attention called ``name``."""
        qk_norm_SD = None
        if spec.qk_norm:
            q_norm, k_norm = parameters.tensor(f"{name}.q_norm"), parameters.tensor(f"{name}.k_norm")
            qk_norm_SD = torch.cat((q_norm.expand(spec.num_heads, -1), k_norm.expand(spec.num_kv_heads, -1)))
        return cls(
            qkv=parameters.linear(f"{name}.qkv"),
            out=parameters.linear(f"{name}.out"),
            qk_norm_SD=qk_norm_SD,
            epsilon=spec.rms_norm_eps,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            window=window,
            scale=spec.score_scale,
            soft_cap=spec.scores.soft_cap,
            sinks_N=parameters.tensor(f"{name}.sinks") if spec.scores.has_sinks else None,
        )

    @property
    def takes(self) -> torch.dtype | None:
        """As of ``Linear``."""
        return self.qkv.takes

    def parts(self, hidden_TH: Tensor | ByteRows, layer_cache: Tensor, inputs: AttentionInputs) -> Parts:
        """Write the tokens' keys and values, attend, and return [tokens, hidden size]."""
        qkv_TSD = self.qkv(hidden_TH).unflatten(1, (-1, self.head_dim))
        rotated = self.num_heads + self.num_kv_heads
        if self.qk_norm_SD is not None:
            normalize_heads_(qkv_TSD[:, :rotated], self.qk_norm_SD, self.epsilon)
        rotate_and_write_(qkv_TSD, inputs.cos_TD, inputs.sin_TD, inputs.kv_rows, layer_cache, heads=self.num_heads)
        q_TND = qkv_TSD[:, : self.num_heads]
        prepared = inputs.attention[self.window]
        if inputs.ring is None:
            attended_TND = paged_attention(
                q_TND, layer_cache, prepared, scale=self.scale, soft_cap=self.soft_cap, sinks_N=self.sinks_N
            )
        else:
            options = AttentionOptions(
                scale=self.scale, window=self.window, soft_cap=self.soft_cap, sinks_N=self.sinks_N
            )
            kv_TSD = read_kv(inputs.kv_rows, layer_cache)
            attended_TND = yield from ring_attention(q_TND, kv_TSD, layer_cache, prepared, inputs.ring, options)
        return self.out(attended_TND.flatten(1))
