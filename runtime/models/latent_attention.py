"""The attention of one layer to the latents of its sequence, over the paged cache (``kernels.latent_attention``).

Keys and values are never made: what makes them of a latent is folded into queries and results, so that the cache has
one row a token for all heads, the normalized latent and beside it the rotated part of the keys.

Shapes: T tokens, N query heads, P plain and R rotated numbers of a query, L latent size, W = L + R, V value size, H
hidden size.
Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...comm.overlap import Parts
from ...kernels.latent_attention import latent_attention
from ...kernels.mla_span import MlaOptions
from ...kernels.norm import rms_norm
from ...kernels.quantize_rows import ByteRows
from ...kernels.rope_kv import apply_rope_, write_kv
from .attention import AttentionInputs
from .head_products import HeadProducts
from .linear import Linear
from .model_spec import LatentSpec, ModelSpec
from .parameters import Parameters
from .residual import normalized_for


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """``down`` makes the queries' latent, where there is one, and the cached one with the keys' rotated part.

    Shapes: query_norm_Q [query rank], None where queries are made of the hidden state; latent_norm_L [kv rank];
    keys_up multiplies [T, N, P] to [T, N, L], values_up [T, N, L] to [T, N, V]
    """

    down: Linear
    query_norm_Q: Tensor | None
    queries: Linear
    latent_norm_L: Tensor
    keys_up: HeadProducts
    values_up: HeadProducts
    out: Linear
    num_heads: int
    latent: LatentSpec
    options: MlaOptions

    @classmethod
    def take(
        cls, spec: ModelSpec, latent: LatentSpec, parameters: Parameters, name: str, *, deterministic: bool
    ) -> LatentAttention:
        """Return the attention called ``name``."""
        has_query_rank = latent.query_rank is not None
        return cls(
            down=parameters.linear(f"{name}.down"),
            query_norm_Q=parameters.tensor(f"{name}.query_norm") if has_query_rank else None,
            queries=parameters.linear(f"{name}.queries"),
            latent_norm_L=parameters.tensor(f"{name}.latent_norm"),
            keys_up=parameters.heads(f"{name}.keys_up"),
            values_up=parameters.heads(f"{name}.values_up", transposed=True),
            out=parameters.linear(f"{name}.out"),
            num_heads=spec.num_heads,
            latent=latent,
            options=MlaOptions(scale=latent.scale, latent=latent.kv_rank, deterministic=deterministic),
        )

    @property
    def takes(self) -> torch.dtype | None:
        """As of ``Linear``; where two products read the hidden state, what both take."""
        one = self.query_norm_Q is not None or self.queries.takes == self.down.takes
        return self.down.takes if one else None

    def parts(self, hidden_TH: Tensor | ByteRows, layer_cache: Tensor, inputs: AttentionInputs) -> Parts:
        """Write the tokens' latents, attend, and return [tokens, hidden size]."""
        yield from ()
        down_TD = self.down(hidden_TH)
        own_TW = down_TD[:, -self.latent.width :]
        self._write(own_TW, layer_cache, inputs)
        if self.query_norm_Q is not None:
            query_rank = self.query_norm_Q.shape[0]
            hidden_TH = normalized_for(
                self.queries.takes, down_TD[:, :query_rank], self.query_norm_Q, self.latent.norm_epsilon
            )
        q_TNW = self._absorbed(self.queries(hidden_TH), inputs)
        attended_TNL = latent_attention(q_TNW, layer_cache, inputs.attention[None], self.options)
        values_TNV = self.values_up(attended_TNL)
        return self.out(values_TNV.flatten(1))

    def _write(self, own_TW: Tensor, layer_cache: Tensor, inputs: AttentionInputs) -> None:
        """Write the tokens' rows of the cache; ``own_TW``: as they come from the product."""
        rank = self.latent.kv_rank
        row_T1W = own_TW.new_empty((own_TW.shape[0], 1, self.latent.width))
        row_T1W[:, 0, :rank] = rms_norm(own_TW[:, :rank], self.latent_norm_L, self.latent.norm_epsilon)
        self._rotate_into(own_TW[:, None, rank:], row_T1W[:, :, rank:], inputs)
        write_kv(row_T1W, inputs.kv_rows, layer_cache)

    def _absorbed(self, q_TX: Tensor, inputs: AttentionInputs) -> Tensor:
        """Return the queries as the latents are attended to with, [tokens, heads, W]."""
        plain, rank = self.latent.plain_dim, self.latent.kv_rank
        q_TNX = q_TX.view(-1, self.num_heads, self.latent.query_dim)
        q_TNW = q_TX.new_empty((*q_TNX.shape[:2], self.latent.width))
        q_TNW[..., :rank] = self.keys_up(q_TNX[..., :plain])
        self._rotate_into(q_TNX[..., plain:], q_TNW[..., rank:], inputs)
        return q_TNW

    def _rotate_into(self, x_TNR: Tensor, out_TNR: Tensor, inputs: AttentionInputs) -> None:
        """Write rotated numbers; pairs that stand side by side end up half a row apart, in queries as in keys."""
        if self.latent.interleaved:
            x_TNR = x_TNR.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        out_TNR.copy_(x_TNR)
        apply_rope_(out_TNR, inputs.cos_TD, inputs.sin_TD)
