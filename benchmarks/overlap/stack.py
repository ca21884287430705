"""A stack of transformer layers over ranks, with made-up weights, dense or with experts, in pieces that yield.

Tensor-parallel: every rank has a slice of each weight and all tokens. Or, with ``spread``, expert-parallel: every rank
has tokens of its own, whole experts, and all of the rest. It has the products, norms, attention and expert choice of a
model, and no embedding, rotation or head. All weights come from a seed, so any number of ranks hold the same model.

Shapes: T tokens, H hidden size, I intermediate size, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from slipstream.comm.collectives import Collectives
from slipstream.comm.expert_map import even_map
from slipstream.comm.experts import mix
from slipstream.comm.overlap import Parts, Steps
from slipstream.comm.overlap_split import PIECES
from slipstream.comm.reduce_norm import own_share, reduce_add_norm
from slipstream.kernels.activation import silu_and_mul
from slipstream.kernels.attention import PreparedAttention, paged_attention, prepare_attention
from slipstream.kernels.attention_plan import build_attention_plan
from slipstream.kernels.cpu.attention_workspace import AttentionWorkspace
from slipstream.kernels.cpu.linear_packed import linear_packed, pack_weight
from slipstream.kernels.moe_mlp import Product, expert_products, moe_mlp
from slipstream.kernels.moe_route import route
from slipstream.kernels.norm import add_rms_norm, rms_norm
from slipstream.kernels.rope_kv import kv_write_rows, write_kv

HEAD_SIZE = 64
BLOCK_SIZE = 16
EPSILON = 1e-6
_CPU = torch.device("cpu")

Order = Literal["plain", "sharded", "ladder"]
"""``plain``: each block's sum over ranks before the next block. ``sharded``: with norms on shares of the tokens.
``ladder``: a block begins without the sum of the one before it (a model of its own, not the same function)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StackShape:
    """The sizes of a stack; ``intermediate`` is that of the MLP, or of each of ``experts``, which may be ``spread``."""

    hidden: int
    intermediate: int
    layers: int
    experts: int = 0
    top_k: int = 2
    spread: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRange:
    """A part of the tokens of a step: from position ``first`` on."""

    first: int
    tokens: int
    kv_rows: Tensor
    attention: PreparedAttention


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """Shapes: both norms [hidden]; router_EH [experts, hidden], or empty"""

    attention_norm_H: Tensor
    qkv: Product
    out: Product
    mlp_norm_H: Tensor
    router_EH: Tensor
    gate_up: tuple[Product, ...]
    down: tuple[Product, ...]


class Stack:
    """One rank's slice of a stack, and the keys and values of one sequence of at most ``most_tokens``.

    With ``deterministic``, attention gives a token the same bits however the tokens are cut.
    """

    def __init__(
        self, shape: StackShape, *, rank: int, ranks: int, seed: int, most_tokens: int, deterministic: bool = False
    ) -> None:
        self.shape = shape
        self._rank = rank
        # Those that each weight but the experts' is spread over.
        self._slices = 1 if shape.spread else ranks
        self._slots = range(shape.experts)
        if shape.spread:
            share = shape.experts // ranks
            self._slots = range(rank * share, (rank + 1) * share)
        self._heads = shape.hidden // HEAD_SIZE // self._slices
        self._deterministic = deterministic
        blocks = -(-most_tokens // BLOCK_SIZE)
        self._block_table = np.arange(blocks, dtype=np.int32)[None]
        cache = (2, blocks, self._heads, BLOCK_SIZE, HEAD_SIZE)
        self._caches = [torch.zeros(cache) for _ in range(shape.layers)]
        # Each part's attention is prepared before either runs: they must not share what is prepared.
        self._workspaces = [AttentionWorkspace(dtype=torch.float32, device=_CPU) for _ in range(PIECES[-1])]
        self._layers = [self._make_layer(seed * 1000 + layer) for layer in range(shape.layers)]

    def parts(self, tokens: int, cuts: Sequence[int] = ()) -> list[TokenRange]:
        """Return the parts of a step of ``tokens``, cut after so many of them."""
        bounds = [0, *cuts, tokens]
        ranges = zip(bounds, bounds[1:], self._workspaces, strict=False)
        return [self._range(first, last - first, workspace) for first, last, workspace in ranges]

    def pieces(
        self, group: Collectives, x_TH: Tensor, parts: Sequence[TokenRange], order: Order = "plain"
    ) -> list[Parts]:
        """Return the passes of a step's parts, to be run in turns; the results together are [tokens, hidden]."""
        run = self._run_ladder if order == "ladder" else self._run_spread if self.shape.spread else self._run
        return [run(group, x_TH[part.first : part.first + part.tokens], part, order) for part in parts]

    def _run(self, group: Collectives, x_TH: Tensor, part: TokenRange, order: Order) -> Parts:
        sharded = order == "sharded"
        residual = own_share(group, x_TH) if sharded else x_TH
        normed_TH = rms_norm(x_TH, self._layers[0].attention_norm_H, EPSILON)
        # The first layer's norm stands for a final one.
        for index, layer in enumerate(self._layers):
            next_norm_H = self._layers[(index + 1) % len(self._layers)].attention_norm_H
            partial_TH = self._attend(index, normed_TH, part)
            normed_TH, residual = yield from reduce_add_norm(
                group, partial_TH, residual, layer.mlp_norm_H, EPSILON, sharded=sharded
            )
            partial_TH = self._mlp(layer, normed_TH)
            normed_TH, residual = yield from reduce_add_norm(
                group, partial_TH, residual, next_norm_H, EPSILON, sharded=sharded
            )
        return normed_TH

    def _run_spread(self, group: Collectives, x_TH: Tensor, part: TokenRange, order: Order) -> Parts:
        residual_TH = x_TH
        normed_TH = rms_norm(x_TH, self._layers[0].attention_norm_H, EPSILON)
        # Alone, a rank stands in for all others: its experts get as many rows as with them, if all are chosen alike.
        placed = even_map(self.shape.experts if group.size > 1 else len(self._slots), ranks=group.size)
        for index, layer in enumerate(self._layers):
            next_norm_H = self._layers[(index + 1) % len(self._layers)].attention_norm_H
            attended_TH = self._attend(index, normed_TH, part)
            normed_TH, residual_TH = add_rms_norm(attended_TH, residual_TH, layer.mlp_norm_H, EPSILON)
            weights_TA, experts_TA = route(normed_TH, layer.router_EH, top_k=self.shape.top_k, normalize=True)
            products = partial(expert_products, gate_up=layer.gate_up, down=layer.down)
            mixed = yield from mix(
                [group], normed_TH, weights_TA, experts_TA % placed.num_experts, placed=placed, products=products
            )
            normed_TH, residual_TH = add_rms_norm(mixed.output_TH, residual_TH, next_norm_H, EPSILON)
        return normed_TH

    def exchange_only(self, group: Collectives, x_TH: Tensor) -> Steps[None]:
        """Send all tokens to experts that do nothing, and back, once a layer."""
        placed = even_map(self.shape.experts, ranks=group.size)
        layer = self._layers[0]
        weights_TA, experts_TA = route(x_TH, layer.router_EH, top_k=self.shape.top_k, normalize=True)
        for _ in self._layers:
            yield from mix([group], x_TH, weights_TA, experts_TA, placed=placed, products=lambda rows, counts: rows)

    def _run_ladder(self, group: Collectives, x_TH: Tensor, part: TokenRange, order: Order) -> Parts:
        """Source: Ladder-residual (arXiv 2501.06589), section 3"""
        residual_TH, pending = x_TH, None
        for block in range(2 * len(self._layers)):
            index, is_mlp = divmod(block, 2)
            layer = self._layers[index]
            normed_TH = rms_norm(residual_TH, layer.mlp_norm_H if is_mlp else layer.attention_norm_H, EPSILON)
            partial_TH = self._mlp(layer, normed_TH) if is_mlp else self._attend(index, normed_TH, part)
            if pending is not None:
                residual_TH = residual_TH + (yield pending)
            pending = group.all_reduce(partial_TH)
        if pending is not None:
            residual_TH = residual_TH + (yield pending)
        return rms_norm(residual_TH, self._layers[0].attention_norm_H, EPSILON)

    def _attend(self, index: int, normed_TH: Tensor, part: TokenRange) -> Tensor:
        layer, cache = self._layers[index], self._caches[index]
        qkv_TSD = layer.qkv(normed_TH, None).view(part.tokens, -1, HEAD_SIZE)
        write_kv(qkv_TSD[:, self._heads :], part.kv_rows, cache)
        attended_TND = paged_attention(qkv_TSD[:, : self._heads], cache, part.attention, scale=HEAD_SIZE**-0.5)
        return layer.out(attended_TND.view(part.tokens, -1), None)

    def _mlp(self, layer: _Layer, normed_TH: Tensor) -> Tensor:
        if not self.shape.experts:
            return layer.down[0](silu_and_mul(layer.gate_up[0](normed_TH, None)), None)
        weights_TA, experts_TA = route(normed_TH, layer.router_EH, top_k=self.shape.top_k, normalize=True)
        return moe_mlp(normed_TH, weights_TA, experts_TA, layer.gate_up, layer.down)

    def _range(self, first: int, tokens: int, workspace: AttentionWorkspace) -> TokenRange:
        plan = build_attention_plan(
            starts=np.array([first], dtype=np.int32),
            counts=np.array([tokens], dtype=np.int32),
            block_tables=self._block_table,
            block_size=BLOCK_SIZE,
            heads=self._heads,
            kv_heads=self._heads,
            head_size=HEAD_SIZE,
            window=None,
            dtype=torch.float32,
            device=_CPU,
            deterministic=self._deterministic,
        )
        cache = self._caches[0]
        kv_rows = kv_write_rows(
            torch.arange(first, first + tokens),
            num_blocks=cache.shape[1],
            kv_heads=self._heads,
            block_size=BLOCK_SIZE,
        )
        attention = prepare_attention(plan, cache, tokens=tokens, heads=self._heads, workspace=workspace)
        return TokenRange(first=first, tokens=tokens, kv_rows=kv_rows, attention=attention)

    def _make_layer(self, seed: int) -> _Layer:
        generator = torch.Generator().manual_seed(seed)

        def weight(outputs: int, inputs: int) -> Tensor:
            return torch.randn((outputs, inputs), generator=generator) / math.sqrt(inputs)

        def by_columns(outputs: int, inputs: int, *, fused: int) -> Product:
            """This rank's outputs of each of ``fused`` products of equal size."""
            slices = [weight(outputs, inputs).chunk(self._slices)[place] for _ in range(fused)]
            return _product(torch.cat(slices))

        def by_rows(outputs: int, inputs: int) -> Product:
            return _product(weight(outputs, inputs).chunk(self._slices, dim=1)[place])

        place = self._rank if self._slices > 1 else 0
        hidden, intermediate = self.shape.hidden, self.shape.intermediate
        mlps = max(1, self.shape.experts)
        layer = _Layer(
            attention_norm_H=1 + 0.1 * torch.randn(hidden, generator=generator),
            qkv=by_columns(hidden, hidden, fused=3),
            out=by_rows(hidden, hidden),
            mlp_norm_H=1 + 0.1 * torch.randn(hidden, generator=generator),
            router_EH=weight(self.shape.experts, hidden),
            gate_up=tuple(by_columns(intermediate, hidden, fused=2) for _ in range(mlps)),
            down=tuple(by_rows(hidden, intermediate) for _ in range(mlps)),
        )
        if not self.shape.spread:
            return layer
        own = slice(self._slots.start, self._slots.stop)
        return replace(layer, gate_up=layer.gate_up[own], down=layer.down[own])


def _product(weight_OI: Tensor) -> Product:
    packed = pack_weight(weight_OI)

    def multiply(x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        return linear_packed(x_TI, packed, bias_O)

    return multiply
