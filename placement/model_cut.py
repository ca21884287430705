"""What one rank has of a model, as sizes: its layers, heads, columns, experts and tokens of the vocabulary.

Owns the same rules as ``runtime/models/sharding.py`` (a test holds the two together), for the rank that has most.
``Cut`` is asked by the memory model and by the cost model, so that both speak of the same rank.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from .model_sizes import DenseMlp, ExpertMlp, GroupedAttention, LatentAttention, Layer, ModelSizes
from .plan import Degrees

_COLUMN_UNIT = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A matrix that a rank multiplies rows with: ``inputs`` x ``outputs``."""

    inputs: int
    outputs: int

    @property
    def numbers(self) -> int:
        """The matrix's numbers."""
        return self.inputs * self.outputs


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A model under degrees of parallelism, seen from the rank of each stage that has most."""

    model: ModelSizes
    degrees: Degrees

    def problem(self) -> str | None:
        """Say why the model cannot be cut so; None where it can."""
        model, degrees = self.model, self.degrees
        if model.attention.heads % degrees.tp:
            return f"tp={degrees.tp} does not divide the {model.attention.heads} attention heads"
        if isinstance(model.attention, GroupedAttention):
            kv_heads = model.attention.kv_heads
            if kv_heads % degrees.tp and degrees.tp % kv_heads:
                return f"tp={degrees.tp} neither divides the {kv_heads} KV heads nor is a multiple of them"
        if min(model.vocabulary, *(layer.mlp.intermediate for layer in model.layers)) < degrees.tp:
            return f"tp={degrees.tp} is more than a layer has columns"
        if degrees.pp > len(model.layers):
            return f"pp={degrees.pp} is more than the {len(model.layers)} layers"
        if (degrees.ep > 1 or degrees.experts_over_tp) and not model.experts:
            return "the model has no experts to spread"
        if self.expert_ranks > max(1, model.experts):
            return f"{self.expert_ranks} ranks are more than the {model.experts} experts of a layer"
        return None

    @property
    def expert_ranks(self) -> int:
        """The ranks that experts are spread over."""
        return self.degrees.tp if self.degrees.experts_over_tp else self.degrees.ep

    def stage(self, stage: int) -> tuple[tuple[Layer, int], ...]:
        """Return the kinds of layers that a stage has, and how many of each."""
        return self._stages[stage]

    @cached_property
    def _stages(self) -> tuple[tuple[tuple[Layer, int], ...], ...]:
        layers, degree = self.model.layers, self.degrees.pp
        base, extra = divmod(len(layers), degree)
        firsts = [stage * base + min(stage, extra) for stage in range(degree + 1)]
        return tuple(tuple(Counter(layers[firsts[stage] : firsts[stage + 1]]).items()) for stage in range(degree))

    @cached_property
    def stage_counts(self) -> tuple[tuple[int, int], ...]:
        """One of each kind of stage, and how many there are of it."""
        last = self.degrees.pp - 1
        kinds: dict[object, list[int]] = {}
        for stage in range(self.degrees.pp):
            kinds.setdefault((stage == 0, stage == last, self.stage(stage)), []).append(stage)
        return tuple((alike[0], len(alike)) for alike in kinds.values())

    @property
    def distinct_stages(self) -> tuple[int, ...]:
        """One of each kind of stage: those between the first and the last that are alike count once."""
        return tuple(stage for stage, _ in self.stage_counts)

    @property
    def heads(self) -> int:
        """The rank's query heads."""
        return self.model.attention.heads // self.degrees.tp

    @property
    def vocabulary(self) -> int:
        """The rank's tokens of the embedding and of the head."""
        return -(-self.model.vocabulary // self.degrees.tp)

    @cached_property
    def attention_products(self) -> tuple[Product, ...]:
        """The linear layers of a layer's attention."""
        hidden = self.model.hidden
        match self.model.attention:
            case GroupedAttention(head_dim=head_dim):
                fused = (self.heads + 2 * self._kv_heads) * head_dim
                return (
                    Product(inputs=hidden, outputs=fused),
                    Product(inputs=self.heads * head_dim, outputs=hidden),
                )
            case LatentAttention() as latent:
                query = self.heads * (latent.plain_dim + latent.rotary_dim)
                # What compresses is on every rank, what expands to heads is cut.
                queries = (
                    (Product(inputs=hidden, outputs=query),)
                    if latent.query_rank is None
                    else (
                        Product(inputs=hidden, outputs=latent.query_rank),
                        Product(inputs=latent.query_rank, outputs=query),
                    )
                )
                return (
                    *queries,
                    Product(inputs=hidden, outputs=latent.kv_rank + latent.rotary_dim),
                    Product(inputs=latent.kv_rank, outputs=self.heads * (latent.plain_dim + latent.value_dim)),
                    Product(inputs=self.heads * latent.value_dim, outputs=hidden),
                )

    def mlp_products(self, mlp: DenseMlp | ExpertMlp) -> tuple[Product, ...]:
        """Return the linear layers of an MLP, or of each of the rank's experts."""
        whole = isinstance(mlp, ExpertMlp) and self.degrees.experts_over_tp
        columns = mlp.intermediate if whole else self._columns(mlp.intermediate)
        return self._gated(columns)

    def shared_products(self, mlp: ExpertMlp) -> tuple[Product, ...]:
        """Return the linear layers of the experts that every token goes to."""
        return self._gated(self._columns(mlp.shared_intermediate)) if mlp.shared_intermediate else ()

    def slots(self, mlp: ExpertMlp) -> int:
        """Return the experts of a layer that the rank has."""
        return -(-mlp.experts // self.expert_ranks)

    @property
    def kv_bytes_per_token(self) -> int:
        """The bytes of a position, over the layers of the stage that has most."""
        return max(self.kv_layer_bytes * self._num_layers(stage) for stage in self.distinct_stages)

    @property
    def kv_layer_bytes(self) -> int:
        """The bytes that the rank keeps of a position in one layer."""
        match self.model.attention:
            case GroupedAttention(head_dim=head_dim):
                return 2 * self._kv_heads * head_dim * self.model.cached_bytes
            case LatentAttention(kv_rank=kv_rank, rotary_dim=rotary_dim):
                return (kv_rank + rotary_dim) * self.model.cached_bytes

    def _num_layers(self, stage: int) -> int:
        return sum(count for _, count in self.stage(stage))

    @property
    def _kv_heads(self) -> int:
        attention = self.model.attention
        assert isinstance(attention, GroupedAttention), "latent attention has no KV heads"
        return max(1, attention.kv_heads // self.degrees.tp)

    def _columns(self, size: int) -> int:
        degree = self.degrees.tp
        unit = _COLUMN_UNIT if size % _COLUMN_UNIT == 0 and size // _COLUMN_UNIT >= degree else 1
        return -(-(size // unit) // degree) * unit

    def _gated(self, columns: int) -> tuple[Product, ...]:
        hidden = self.model.hidden
        return Product(inputs=hidden, outputs=2 * columns), Product(inputs=columns, outputs=hidden)
