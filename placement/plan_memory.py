"""How much memory a rank needs: weights as they are cut, temporaries, buffers, and what is left for the KV cache.

Owns the arithmetic. The base (a process with its libraries, a device's context) is an argument, because it is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from .model_cut import Cut
from .model_sizes import ExpertMlp, GroupedAttention, LatentAttention

_MIB = 1 << 20

GPU_BASE_BYTES = 1100 * _MIB
"""Context, libraries' workspaces and communicators of a process on a GPU, where nobody has measured it."""

GPU_ATTENTION_BYTES = 128 * _MIB
"""Workspace of attention on a GPU: partial results of spans of keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What an engine is set up for, as far as its memory goes; ``utilization`` is the share of memory that it may use.

    ``max_kv_bytes``: a bound on the cache of its own.
    """

    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    max_model_len: int | None = None
    block_size: int = 16
    utilization: float = 0.9
    max_kv_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryTraits:
    """What a kind of device adds to the numbers of a model.

    ``packs_head``: a head that shares its numbers with the embedding is kept a second time, packed.
    ``attention_bytes``: what attention keeps beside its result, and for each position of the longest sequence.
    """

    base_bytes: int = GPU_BASE_BYTES
    packs_head: bool = False
    attention_bytes: int = GPU_ATTENTION_BYTES
    attention_bytes_per_position: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """What the fullest rank of a replica needs, and how much KV it can keep.

    Units: bytes; kv_tokens, positions
    """

    base: int
    weights: int
    activations: int
    buffers: int
    kv_bytes_per_token: int
    kv_tokens: int

    @property
    def without_kv(self) -> int:
        """All but the cache."""
        return self.base + self.weights + self.activations + self.buffers

    @property
    def kv_bytes(self) -> int:
        """The cache."""
        return self.kv_tokens * self.kv_bytes_per_token


def rank_memory(cut: Cut, limits: EngineLimits, *, device_bytes: int, traits: MemoryTraits) -> RankMemory:
    """Return what the fullest rank needs; its KV is what fits beside that, in whole blocks, possibly nothing."""
    weights = max(weight_bytes(cut, stage, packs_head=traits.packs_head) for stage in cut.distinct_stages)
    length = limits.max_model_len or cut.model.longest
    attention = traits.attention_bytes + int(traits.attention_bytes_per_position * length)
    activations = activation_bytes(cut, limits, attention_bytes=attention)
    buffers = buffer_bytes(cut, limits)
    per_token = cut.kv_bytes_per_token
    left = int(device_bytes * limits.utilization) - traits.base_bytes - weights - activations - buffers
    if limits.max_kv_bytes is not None:
        left = min(left, limits.max_kv_bytes)
    useful = -(-length // limits.block_size) * limits.max_num_seqs
    blocks = min(useful, max(0, left) // (per_token * limits.block_size))
    return RankMemory(
        base=traits.base_bytes,
        weights=weights,
        activations=activations,
        buffers=buffers,
        kv_bytes_per_token=per_token,
        kv_tokens=blocks * limits.block_size,
    )


def weight_bytes(cut: Cut, stage: int, *, packs_head: bool = False) -> int:
    """Return the bytes of weights that a rank of a stage holds."""
    model = cut.model
    linear = small = 0
    for layer, count in cut.stage(stage):
        numbers = sum(product.numbers for product in cut.attention_products)
        each = sum(product.numbers for product in cut.mlp_products(layer.mlp))
        if isinstance(layer.mlp, ExpertMlp):
            numbers += each * cut.slots(layer.mlp) + sum(p.numbers for p in cut.shared_products(layer.mlp))
            small += count * model.hidden * layer.mlp.experts
        else:
            numbers += each
        linear += count * numbers
        biases = model.attention.biases // cut.degrees.tp if isinstance(model.attention, GroupedAttention) else 0
        small += count * (2 * model.hidden + biases)
    table = cut.vocabulary * model.hidden
    first, last = stage == 0, stage == cut.degrees.pp - 1
    if first:
        small += table
    if last:
        small += model.hidden
        # A head of its own, or the embedding's numbers where the first stage, or another layout, has them.
        if not model.tied or not first or packs_head:
            linear += table
    return int(linear * model.weight_bytes) + small * model.number_bytes


def activation_bytes(cut: Cut, limits: EngineLimits, *, attention_bytes: int) -> int:
    """Return the bytes of temporaries at the fullest moment of the largest step.

    Hidden states and the residual live through a layer; beside them either attention's values or the MLP's.
    """
    model, tokens = cut.model, limits.max_num_batched_tokens
    hidden = model.hidden
    attention = sum(product.outputs for product in cut.attention_products)
    if isinstance(model.attention, LatentAttention):
        # Keys and values are expanded to heads for a chunk.
        attention += cut.heads * (model.attention.plain_dim + model.attention.rotary_dim + model.attention.value_dim)
    else:
        attention += cut.heads * model.attention.head_dim
    widest = attention
    for layer in {layer for stage in cut.distinct_stages for layer, _ in cut.stage(stage)}:
        gate_up, down = cut.mlp_products(layer.mlp)
        # Gate and up, their product, and what comes out.
        wide = gate_up.outputs + down.inputs + hidden
        if isinstance(layer.mlp, ExpertMlp):
            rows = -(-layer.mlp.top_k // min(layer.mlp.top_k, cut.expert_ranks))
            wide = rows * (gate_up.outputs + down.inputs + 2 * hidden) + 2 * hidden
            wide += sum(product.outputs for product in cut.shared_products(layer.mlp))
        widest = max(widest, wide)
    layers = tokens * (2 * hidden + widest) * model.number_bytes + attention_bytes
    # Logits in the model's type and in float32, for all that may draw at once, and gathered over the ranks.
    rows = min(limits.max_num_seqs, tokens)
    gathered = model.vocabulary if cut.degrees.tp > 1 else 0
    logits = rows * (cut.vocabulary * (model.number_bytes + 4) + gathered * 4)
    return max(layers, logits + tokens * hidden * model.number_bytes)


def buffer_bytes(cut: Cut, limits: EngineLimits) -> int:
    """Return the bytes of what lives as long as the engine: rotations by position, and what ranks exchange through."""
    model = cut.model
    ranks = cut.degrees.ranks
    exchange = 2 * limits.max_num_batched_tokens * model.hidden * model.number_bytes if ranks > 1 else 0
    rotary = model.attention.head_dim if isinstance(model.attention, GroupedAttention) else model.attention.rotary_dim
    length = limits.max_model_len or model.longest
    return exchange + 2 * length * rotary * model.number_bytes
