"""Which part of a model one rank holds: ranges of heads, columns, tokens of the vocabulary, experts and layers.

Owns the rules by which parts are cut, and refuses degrees that do not fit. Knows no tensors: the layout turns ranges
into slices of files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...comm.host_levels import ranks_on_a_host
from ...comm.mesh import MeshPlace, MeshShape
from ...placement.expert_plan import first_placement
from ...placement.experts import ExpertPlacement
from ...sdk.errors import ConfigError
from .model_spec import DenseMlpSpec, LayerSpec, ModelSpec, MoeSpec

_COLUMN_UNIT = 32
"""Columns are cut at multiples of so many where that comes out: groups of int4 weights, and whole cache lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What the rank at ``place`` holds of a model; ``WHOLE`` is all of it.

    ``experts_over_tp``: experts are spread over the tp ranks, each of them whole; otherwise they are spread over ep,
    and each one's columns over tp. ``redundant_experts``: slots of a layer, over all ranks, beyond one an expert;
    filled up so that every rank has as many. ``fixed_order``: sums over tp ranks have the bits of one rank's; columns
    are cut where the chunks of such sums are (``kernels.tree_sum``).
    """

    place: MeshPlace
    experts_over_tp: bool = False
    redundant_experts: int = 0
    fixed_order: bool = False

    def layers(self, spec: ModelSpec) -> range:
        """Return the layers of the rank's stage; earlier stages have one more where the number does not divide."""
        return _ceil_share(spec.num_layers, self.place.pp, self.place.shape.pp)

    def heads(self, spec: ModelSpec) -> range:
        """Return the rank's query heads."""
        return _share(spec.num_heads, self.place.tp, self.place.shape.tp)

    def kv_heads(self, spec: ModelSpec) -> range:
        """Return the KV heads of the rank's query heads: one that several ranks share if there are fewer than ranks."""
        degree = self.place.shape.tp
        if spec.num_kv_heads >= degree:
            return _share(spec.num_kv_heads, self.place.tp, degree)
        head = self.place.tp * spec.num_kv_heads // degree
        return range(head, head + 1)

    def mlp_columns(self, mlp: DenseMlpSpec | MoeSpec) -> range:
        """Return the rank's part of an MLP's intermediate values, or of each of its experts'."""
        size = mlp.intermediate_size
        if self.experts_over_tp and isinstance(mlp, MoeSpec):
            return range(size)
        whole_units = size % _COLUMN_UNIT == 0 and size // _COLUMN_UNIT >= self.place.shape.tp
        unit = _COLUMN_UNIT if whole_units and not self.fixed_order else 1
        part = _share(size // unit, self.place.tp, self.place.shape.tp)
        return range(part.start * unit, part.stop * unit)

    def vocabulary(self, size: int) -> range:
        """Return the rank's tokens of the embedding and the head."""
        return _share(size, self.place.tp, self.place.shape.tp)

    @property
    def expert_rank(self) -> int:
        """This rank's place among those that experts are spread over."""
        return self.place.tp if self.experts_over_tp else self.place.ep

    def expert_placement(self, count: int) -> ExpertPlacement:
        """Return where a layer's experts are at the start; all its layers are alike."""
        own = self.place.expert_ranks(over_tp=self.experts_over_tp)
        per_host = ranks_on_a_host(own, self.place.shape.ranks_per_host)
        return first_placement(count, len(own), ranks_per_host=per_host, spare_slots=self.redundant_experts)

    def experts(self, count: int) -> tuple[int, ...]:
        """Return the experts whose weights the rank reads, whole or its columns of them, slot by slot."""
        return self.expert_placement(count).experts_on(0, self.expert_rank)

    @property
    def adds_bias(self) -> bool:
        """Whether a bias behind a sum over ranks is added here: on one rank, once."""
        return self.place.tp == 0

    def local_spec(self, spec: ModelSpec) -> ModelSpec:
        """Return what the rank's decoder looks like: its layers, heads and columns; the vocabulary stays whole.

        Raises: ConfigError as ``check_degrees``
        """
        check_degrees(spec, self.place.shape, experts_over_tp=self.experts_over_tp)
        own = self.layers(spec)
        layers = tuple(self._local_layer(spec.layers[index]) for index in own)
        return replace(
            spec,
            num_layers=len(layers),
            layers=layers,
            num_heads=len(self.heads(spec)),
            num_kv_heads=len(self.kv_heads(spec)),
            ladder_follows=any(layer.ladder for layer in spec.layers[own.stop : own.stop + 1]),
        )

    def _local_layer(self, layer: LayerSpec) -> LayerSpec:
        own = len(self.mlp_columns(layer.mlp))
        if isinstance(layer.mlp, DenseMlpSpec) or layer.mlp.shared is None:
            return replace(layer, mlp=replace(layer.mlp, intermediate_size=own))
        shared = replace(layer.mlp.shared, intermediate_size=len(self.mlp_columns(layer.mlp.shared)))
        return replace(layer, mlp=replace(layer.mlp, intermediate_size=own, shared=shared))


WHOLE = Shard(place=MeshShape().place(0))


def check_degrees(spec: ModelSpec, shape: MeshShape, *, experts_over_tp: bool = False) -> None:
    """Refuse degrees of parallelism that a model cannot be cut into.

    Raises: ConfigError naming the option and the numbers
    """
    tp, kv_heads = shape.tp, spec.num_kv_heads
    if spec.num_heads % tp:
        raise ConfigError("tensor_parallel_size", f"{tp} does not divide the model's {spec.num_heads} attention heads")
    if kv_heads % tp and tp % kv_heads:
        raise ConfigError(
            "tensor_parallel_size", f"{tp} neither divides the model's {kv_heads} KV heads nor is a multiple of them"
        )
    mlps = [layer.mlp for layer in spec.layers]
    shared = [mlp.shared for mlp in mlps if isinstance(mlp, MoeSpec) and mlp.shared is not None]
    smallest = min(spec.vocab_size, *(mlp.intermediate_size for mlp in (*mlps, *shared)))
    if smallest < tp:
        raise ConfigError("tensor_parallel_size", f"{tp} is more than the {smallest} columns of a layer")
    if shape.sp > 1 and spec.latent is not None:
        raise ConfigError(
            "sequence_parallel_size", f"{shape.sp} ranks cannot share prompts of {spec.architecture}: use 1"
        )
    if shape.pp > spec.num_layers:
        raise ConfigError("pipeline_parallel_size", f"{shape.pp} is more than the model's {spec.num_layers} layers")
    experts = [layer.mlp.num_experts for layer in spec.layers if isinstance(layer.mlp, MoeSpec)]
    option, ranks = ("enable_expert_parallel", tp) if experts_over_tp else ("expert_parallel_size", shape.ep)
    if not experts and (experts_over_tp or shape.ep > 1):
        raise ConfigError(option, f"is for models with experts; {spec.architecture} has none")
    if experts and ranks > min(experts):
        raise ConfigError(option, f"{ranks} ranks are more than the {min(experts)} experts of a layer")
    if experts:
        _check_hosts(shape, experts_over_tp=experts_over_tp)


def _check_hosts(shape: MeshShape, *, experts_over_tp: bool) -> None:
    """Refuse hosts on which the ranks of some experts do not lie evenly, or not as the others of their stage do."""
    places = [shape.place(rank) for rank in range(shape.size)]
    for stage in range(shape.pp):
        groups = {place.expert_ranks(over_tp=experts_over_tp) for place in places if place.pp == stage}
        try:
            widths = {ranks_on_a_host(ranks, shape.ranks_per_host) for ranks in groups}
        except ValueError as error:
            raise ConfigError("ranks_per_host", str(error)) from error
        if len(widths) > 1:
            raise ConfigError(
                "ranks_per_host",
                f"{shape.ranks_per_host} puts {' or '.join(map(str, sorted(widths)))} ranks that experts are spread "
                "over on a host; it has to be the same number for all columns of an expert",
            )


def _share(size: int, rank: int, ranks: int) -> range:
    return range(rank * size // ranks, (rank + 1) * size // ranks)


def _ceil_share(size: int, rank: int, ranks: int) -> range:
    base, extra = divmod(size, ranks)
    first = rank * base + min(rank, extra)
    return range(first, first + base + (rank < extra))
