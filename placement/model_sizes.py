"""What a model is made of, as sizes: enough to say how much memory each rank needs and how long each step takes.

Owns the vocabulary of planning. ``ModelFacts`` has totals of a model that we run; this has the parts, also of models
that we do not run. Where the sizes come from is not known here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedAttention:
    """Attention with ``kv_heads`` pairs of keys and values, shared by ``heads`` queries.

    ``biases``: numbers beside the weights of one layer, over all heads.
    """

    heads: int
    kv_heads: int
    head_dim: int
    biases: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Attention whose cache holds one compressed vector per position, for all heads (DeepSeek's MLA).

    ``query_rank`` None: queries are not compressed. ``plain_dim`` and ``rotary_dim``: parts of a query head.
    """

    heads: int
    query_rank: int | None
    kv_rank: int
    plain_dim: int
    rotary_dim: int
    value_dim: int


Attention = GroupedAttention | LatentAttention


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseMlp:
    """A gated MLP that every token goes through."""

    intermediate: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertMlp:
    """Experts, of which each token goes to ``top_k``, and those that every token goes to (``shared_intermediate``)."""

    experts: int
    top_k: int
    intermediate: int
    shared_intermediate: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer; a token attends to the last ``window`` positions, to all before it without one."""

    mlp: DenseMlp | ExpertMlp
    window: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """A model's parts.

    ``linear_dtype``: what linear layers are multiplied in; ``dtype``: of activations, the cache and what else there is.

    Units: weight_bytes, of one number of a linear layer; cache_number_bytes, of one in the cache, None as of any other;
    moved_number_bytes, of one on its way to another replica's cache, None as in this one;
    number_bytes, of one other number
    Raises: ValueError for a model without layers or numbers
    """

    name: str
    hidden: int
    vocabulary: int
    attention: Attention
    layers: tuple[Layer, ...]
    tied: bool = False
    longest: int
    dtype: str = "bfloat16"
    number_bytes: int = 2
    cache_number_bytes: int | None = None
    moved_number_bytes: int | None = None
    linear_dtype: str = "bfloat16"
    weight_bytes: float = 2.0

    def __post_init__(self) -> None:
        if not self.layers or min(self.hidden, self.vocabulary, self.longest, self.attention.heads) < 1:
            raise ValueError(f"model {self.name!r} needs layers, a hidden size, a vocabulary, heads and a length")

    @property
    def cached_bytes(self) -> int:
        """The bytes of a number in the cache."""
        return self.number_bytes if self.cache_number_bytes is None else self.cache_number_bytes

    @property
    def experts(self) -> int:
        """The fewest experts of a layer that has any; 0 where none has."""
        return min((layer.mlp.experts for layer in self.layers if isinstance(layer.mlp, ExpertMlp)), default=0)

    def kv_bytes_per_token(self) -> int:
        """Return the bytes that the cache of a whole model keeps of one position."""
        match self.attention:
            case GroupedAttention(kv_heads=kv_heads, head_dim=head_dim):
                numbers = 2 * kv_heads * head_dim
            case LatentAttention(kv_rank=kv_rank, rotary_dim=rotary_dim):
                numbers = kv_rank + rotary_dim
        return numbers * self.cached_bytes * len(self.layers)

    def moved_bytes_per_token(self) -> int:
        """Return the bytes of one position that go from a replica that computed it to another."""
        moved = self.cached_bytes if self.moved_number_bytes is None else self.moved_number_bytes
        return self.kv_bytes_per_token() // self.cached_bytes * moved
