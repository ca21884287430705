"""Which tensors of a checkpoint make up which parameter of the decoder.

Owns the names on disk, in both layouts of experts (one tensor per expert, or all stacked), and the fused
layout in memory: q|k|v and gate|up as one matrix, experts stacked; and which slices of the tensors a rank reads. Reads
nothing.

Shapes: H hidden size, I intermediate size, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass, replace
from enum import Enum

from torch import Tensor

from .model_spec import DenseMlpSpec, LatentSpec, ModelSpec, MoeSpec
from .sharding import WHOLE, Shard

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One tensor on disk, or the ``region`` of it that this rank holds, and its ``place`` in a parameter.

    ``is_turned``: on disk the last two axes are in the other order. ``in_turns``: on that axis, as it
    is on disk, gate and up alternate; in memory one half follows the other.
    """

    tensor: str
    shape: tuple[int, ...]
    region: tuple[slice, ...] = ()
    place: tuple[int | slice, ...] = ()
    is_turned: bool = False
    in_turns: int | None = None

    @property
    def is_as_kept(self) -> bool:
        """Whether the tensor on disk has the order of what is kept."""
        return not self.is_turned and self.in_turns is None

    def as_kept(self, stored: Tensor) -> Tensor:
        """Return the region of the tensor on disk in the order in which it is kept."""
        axis = self.in_turns
        if axis is not None:
            stored = stored.unflatten(axis, (-1, 2)).transpose(axis - 1, axis).flatten(axis - 1, axis)
        return stored.transpose(-1, -2) if self.is_turned else stored

    def place_in(self, parameter: Tensor) -> Tensor:
        """Return the view of ``parameter`` that this piece fills."""
        return parameter[self.place] if self.place else parameter


class Role(Enum):
    """What the decoder does with a parameter: multiplies with it, once, expert by expert or head by head, or uses its
    numbers.

    Products in the roles SUMMED and SUMMED_EXPERTS are added up over the ranks that have the other inputs.
    """

    TENSOR = "tensor"
    LINEAR = "linear"
    SUMMED = "summed"
    EXPERTS = "experts"
    SUMMED_EXPERTS = "summed experts"
    ROUTER = "router"
    HEADS = "heads"
    HEAD = "head"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter of the decoder and the pieces that fill it completely.

    ``is_wide``: it is float32 whatever the others are. ``added``: to each of its numbers as they are stored.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    role: Role = Role.TENSOR
    is_wide: bool = False
    added: float = 0.0


def parameter_layout(spec: ModelSpec, stored: Container[str], shard: Shard = WHOLE) -> tuple[Parameter, ...]:
    """Return every parameter of a rank's decoder; ``spec`` is the whole model's, layers are numbered as the rank has
    them. ``stored`` (names on disk) decides between the layouts of experts.
    """
    place = shard.place
    parameters = []
    if place.is_first_stage or (place.is_last_stage and spec.tie_word_embeddings):
        parameters.append(_vocabulary("embedding", "model.embed_tokens.weight", spec, shard))
    for index, global_index in enumerate(shard.layers(spec)):
        name, disk, layer = f"layers.{index}", f"model.layers.{global_index}", spec.layers[global_index]
        norms = _NORMS_BEHIND if spec.norms.behind else _NORMS
        parameters += [_norm(f"{name}.{norm}", f"{disk}.{tensor}.weight", spec) for norm, tensor in norms.items()]
        if spec.latent is None:
            parameters += _attention(spec, shard, f"{name}.attention", f"{disk}.self_attn")
        else:
            parameters += _latent_attention(spec, spec.latent, shard, f"{name}.attention", f"{disk}.self_attn")
        match layer.mlp:
            case DenseMlpSpec():
                parameters += _dense_mlp(spec, shard, layer.mlp, f"{name}.mlp", f"{disk}.mlp")
            case MoeSpec():
                parameters += _moe(spec, shard, layer.mlp, f"{name}.mlp", disk, stored)
                parameters += _beside_experts(spec, shard, layer.mlp, f"{name}.mlp", f"{disk}.mlp")
    if place.is_last_stage:
        parameters.append(_norm("final_norm", "model.norm.weight", spec))
        if not spec.tie_word_embeddings:
            parameters.append(_vocabulary("head", "lm_head.weight", spec, shard, role=Role.HEAD))
    return tuple(parameters)


_NORMS = {"input_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_NORMS_BEHIND = {
    "input_norm": "input_layernorm",
    "attention_end_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_end_norm": "post_feedforward_layernorm",
}
"""The norms of a layer, and their names on disk; with and without norms behind attention and MLP."""


def _norm(name: str, tensor: str, spec: ModelSpec) -> Parameter:
    whole = _whole(name, tensor, spec.hidden_size)
    return replace(whole, is_wide=spec.norms.is_wide, added=spec.norms.added)


def expert_layout(
    spec: ModelSpec, stored: Container[str], shard: Shard, *, layer: int, expert: int
) -> tuple[Parameter, Parameter]:
    """Return gate|up and down of one expert, [1, ...] each; ``layer`` is counted as the rank has them."""
    global_layer = shard.layers(spec)[layer]
    mlp = spec.layers[global_layer].mlp
    assert isinstance(mlp, MoeSpec), f"layer {global_layer} has no experts"
    assert not mlp.has_biases, "experts with biases stay where they are"
    _, gate_up, down = _moe(
        spec, shard, mlp, f"layers.{layer}.mlp", f"model.layers.{global_layer}", stored, experts=(expert,)
    )
    return gate_up, down


def is_ignorable(tensor: str, spec: ModelSpec) -> bool:
    """Say whether a stored tensor holds nothing that the decoder computes with: old rotary buffers, the head of a tied
    model, layers that draft tokens.
    """
    if spec.architecture == "DeepseekV3ForCausalLM" and (found := _LAYER.match(tensor)):
        return int(found[1]) >= spec.num_layers
    return tensor.endswith(".rotary_emb.inv_freq") or (spec.tie_word_embeddings and tensor == "lm_head.weight")


def _whole(name: str, tensor: str, *shape: int, role: Role = Role.TENSOR) -> Parameter:
    return Parameter(name=name, shape=shape, pieces=(Piece(tensor=tensor, shape=shape),), role=role)


def _vocabulary(name: str, tensor: str, spec: ModelSpec, shard: Shard, *, role: Role = Role.TENSOR) -> Parameter:
    rows = shard.vocabulary(spec.vocab_size)
    return _rows(name, ((tensor, spec.vocab_size, rows),), spec.hidden_size, role=role)


def _rows(name: str, tensors: tuple[tuple[str, int, range], ...], *columns: int, role: Role = Role.TENSOR) -> Parameter:
    """Return a parameter that has ranges of rows of some tensors, one after the other: (name, all rows, range)."""
    pieces, first = [], 0
    for tensor, size, rows in tensors:
        pieces.append(
            Piece(
                tensor=tensor,
                shape=(size, *columns),
                region=_slices(rows, size),
                place=(slice(first, first + len(rows)),),
            )
        )
        first += len(rows)
    return Parameter(name=name, shape=(first, *columns), pieces=tuple(pieces), role=role)


def _slices(part: range, size: int) -> tuple[slice, ...]:
    """Return the region of a first axis, nothing if it is all of it."""
    return () if len(part) == size else (slice(part.start, part.stop),)


def _row_linear(
    name: str, disk: str, projections: tuple[tuple[str, int, range], ...], columns: int, *, bias: bool
) -> list[Parameter]:
    """Return a linear layer of which the rank has some outputs (column-parallel, in Megatron's words)."""
    weights = tuple((f"{disk}.{projection}.weight", size, rows) for projection, size, rows in projections)
    biases = tuple((f"{disk}.{projection}.bias", size, rows) for projection, size, rows in projections)
    parameters = [_rows(f"{name}.weight", weights, columns, role=Role.LINEAR)]
    return [*parameters, _rows(f"{name}.bias", biases)] if bias else parameters


def _column_linear(name: str, disk: str, outputs: int, inputs: int, part: range, *, bias: bool) -> list[Parameter]:
    """Return a linear layer of which the rank has some inputs (row-parallel): its products are summed over ranks."""
    region = () if len(part) == inputs else (slice(None), slice(part.start, part.stop))
    piece = Piece(tensor=f"{disk}.weight", shape=(outputs, inputs), region=region)
    weight = Parameter(name=f"{name}.weight", shape=(outputs, len(part)), pieces=(piece,), role=Role.SUMMED)
    return [weight, _whole(f"{name}.bias", f"{disk}.bias", outputs)] if bias else [weight]


def _attention(spec: ModelSpec, shard: Shard, name: str, disk: str) -> list[Parameter]:
    size, q_size, kv_size = spec.head_dim, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    q_rows, kv_rows = _times(shard.heads(spec), size), _times(shard.kv_heads(spec), size)
    qkv = (("q_proj", q_size, q_rows), ("k_proj", kv_size, kv_rows), ("v_proj", kv_size, kv_rows))
    parameters = _row_linear(f"{name}.qkv", disk, qkv, spec.hidden_size, bias=spec.qkv_bias)
    bias = spec.o_bias and shard.adds_bias
    parameters += _column_linear(f"{name}.out", f"{disk}.o_proj", spec.hidden_size, q_size, q_rows, bias=bias)
    if spec.scores.has_sinks:
        sinks = _rows(f"{name}.sinks", ((f"{disk}.sinks", spec.num_heads, shard.heads(spec)),))
        parameters.append(replace(sinks, is_wide=True))
    if spec.qk_norm:
        parameters.append(_whole(f"{name}.q_norm", f"{disk}.q_norm.weight", size))
        parameters.append(_whole(f"{name}.k_norm", f"{disk}.k_norm.weight", size))
    return parameters


def _latent_attention(spec: ModelSpec, latent: LatentSpec, shard: Shard, name: str, disk: str) -> list[Parameter]:
    """What makes latents is whole on every rank; what belongs to heads is that of the rank's."""
    heads, hidden, rank = shard.heads(spec), spec.hidden_size, latent.query_rank
    down = [("kv_a_proj_with_mqa", latent.width, range(latent.width))]
    source, inputs, norms = "q_proj", hidden, [("latent_norm", "kv_a_layernorm", latent.kv_rank)]
    if rank is not None:
        down.insert(0, ("q_a_proj", rank, range(rank)))
        source, inputs = "q_b_proj", rank
        norms.append(("query_norm", "q_a_layernorm", rank))
    queries = ((source, spec.num_heads * latent.query_dim, _times(heads, latent.query_dim)),)
    values, bias = spec.num_heads * latent.value_dim, spec.o_bias and shard.adds_bias
    return [
        *_row_linear(f"{name}.down", disk, tuple(down), hidden, bias=spec.qkv_bias),
        *_row_linear(f"{name}.queries", disk, queries, inputs, bias=False),
        *(_whole(f"{name}.{norm}", f"{disk}.{stored}.weight", size) for norm, stored, size in norms),
        _of_heads(f"{name}.keys_up", f"{disk}.kv_b_proj.weight", spec, latent, heads, range(latent.plain_dim)),
        _of_heads(
            f"{name}.values_up",
            f"{disk}.kv_b_proj.weight",
            spec,
            latent,
            heads,
            range(latent.plain_dim, latent.plain_dim + latent.value_dim),
        ),
        *_column_linear(f"{name}.out", f"{disk}.o_proj", hidden, values, _times(heads, latent.value_dim), bias=bias),
    ]


def _of_heads(name: str, tensor: str, spec: ModelSpec, latent: LatentSpec, heads: range, rows: range) -> Parameter:
    """Return some rows of each head's part of what makes keys and values of a latent."""
    each = latent.plain_dim + latent.value_dim
    pieces = tuple(
        Piece(
            tensor=tensor,
            shape=(spec.num_heads * each, latent.kv_rank),
            region=(slice(head * each + rows.start, head * each + rows.stop),),
            place=(local,),
        )
        for local, head in enumerate(heads)
    )
    return Parameter(name=name, shape=(len(heads), len(rows), latent.kv_rank), pieces=pieces, role=Role.HEADS)


def _times(part: range, size: int) -> range:
    return range(part.start * size, part.stop * size)


def _dense_mlp(spec: ModelSpec, shard: Shard, mlp: DenseMlpSpec, name: str, disk: str) -> list[Parameter]:
    size, hidden = mlp.intermediate_size, spec.hidden_size
    part = shard.mlp_columns(mlp)
    gate_up = (("gate_proj", size, part), ("up_proj", size, part))
    parameters = _row_linear(f"{name}.gate_up", disk, gate_up, hidden, bias=spec.mlp_bias)
    bias = spec.mlp_bias and shard.adds_bias
    return parameters + _column_linear(f"{name}.down", f"{disk}.down_proj", hidden, size, part, bias=bias)


def _moe(
    spec: ModelSpec,
    shard: Shard,
    mlp: MoeSpec,
    name: str,
    disk: str,
    stored: Container[str],
    experts: tuple[int, ...] | None = None,
) -> list[Parameter]:
    hidden, size, part = spec.hidden_size, mlp.intermediate_size, shard.mlp_columns(mlp)
    experts = shard.experts(mlp.num_experts) if experts is None else experts
    if mlp.has_biases:
        in_blocks = f"{disk}.mlp.experts.gate_up_proj_blocks" in stored
        return _biased_experts(
            mlp, name, f"{disk}.mlp", hidden, experts, part, adds_bias=shard.adds_bias, in_blocks=in_blocks
        )
    if f"{disk}.mlp.experts.gate_up_proj" in stored:
        router = f"{disk}.mlp.gate.weight"
        pieces = _stacked_experts(f"{disk}.mlp.experts", mlp, hidden, experts, part)
    elif spec.architecture == "MixtralForCausalLM":
        router = f"{disk}.block_sparse_moe.gate.weight"
        pieces = _single_experts(f"{disk}.block_sparse_moe.experts", ("w1", "w3", "w2"), size, hidden, experts, part)
    else:
        router = f"{disk}.mlp.gate.weight"
        names = ("gate_proj", "up_proj", "down_proj")
        pieces = _single_experts(f"{disk}.mlp.experts", names, size, hidden, experts, part)
    gate_up, down = (len(experts), 2 * len(part), hidden), (len(experts), hidden, len(part))
    scores = _whole(f"{name}.router.weight", router, mlp.num_experts, hidden, role=Role.ROUTER)
    return [
        replace(scores, is_wide=mlp.router.is_wide),
        Parameter(name=f"{name}.gate_up", shape=gate_up, pieces=pieces[0], role=Role.EXPERTS),
        Parameter(name=f"{name}.down", shape=down, pieces=pieces[1], role=Role.SUMMED_EXPERTS),
    ]


def _beside_experts(spec: ModelSpec, shard: Shard, mlp: MoeSpec, name: str, disk: str) -> list[Parameter]:
    """Return what corrects the choice of experts, and the MLP that every token goes through, where there are any."""
    parameters = []
    if mlp.router.corrected:
        correction = _whole(f"{name}.correction", f"{disk}.gate.e_score_correction_bias", mlp.num_experts)
        parameters.append(replace(correction, is_wide=True))
    if mlp.shared is not None:
        parameters += _dense_mlp(spec, shard, mlp.shared, f"{name}.shared", f"{disk}.shared_experts")
    return parameters


_Pieces = tuple[tuple[Piece, ...], tuple[Piece, ...]]


def _single_experts(
    block: str, names: tuple[str, str, str], size: int, hidden: int, experts: tuple[int, ...], part: range
) -> _Pieces:
    """Return the pieces of gate|up and of down, from one tensor an expert."""
    (gate, up, down), columns = names, slice(part.start, part.stop)
    gate_up_pieces, down_pieces = [], []
    for local, expert in enumerate(experts):
        for first, projection in ((0, gate), (len(part), up)):
            gate_up_pieces.append(
                Piece(
                    tensor=f"{block}.{expert}.{projection}.weight",
                    shape=(size, hidden),
                    region=_slices(part, size),
                    place=(local, slice(first, first + len(part))),
                )
            )
        down_pieces.append(
            Piece(
                tensor=f"{block}.{expert}.{down}.weight",
                shape=(hidden, size),
                region=() if len(part) == size else (slice(None), columns),
                place=(local,),
            )
        )
    return tuple(gate_up_pieces), tuple(down_pieces)


def _biased_experts(
    mlp: MoeSpec,
    name: str,
    disk: str,
    hidden: int,
    experts: tuple[int, ...],
    part: range,
    *,
    adds_bias: bool,
    in_blocks: bool,
) -> list[Parameter]:
    """Return a router and experts with biases: stacked, gate and up of each value in turns. Inputs come before outputs,
    but for weights in blocks.

    Experts whose columns are divided have their last bias on one rank.
    """
    size, count, block, turned = mlp.intermediate_size, mlp.num_experts, f"{disk}.experts", not in_blocks
    both, own, all_of = slice(2 * part.start, 2 * part.stop), slice(part.start, part.stop), slice(None)
    gate_up, down = (
        Piece(
            tensor=f"{block}.gate_up_proj",
            shape=(count, hidden, 2 * size) if turned else (count, 2 * size, hidden),
            region=(all_of, both) if turned else (both,),
            is_turned=turned,
            in_turns=-1 if turned else -2,
        ),
        Piece(
            tensor=f"{block}.down_proj",
            shape=(count, size, hidden) if turned else (count, hidden, size),
            region=(own,) if turned else (all_of, own),
            is_turned=turned,
        ),
    )
    gate_up_biases = Piece(tensor=f"{block}.gate_up_proj_bias", shape=(count, 2 * size), region=(both,), in_turns=-1)
    down_biases = Piece(tensor=f"{block}.down_proj_bias", shape=(count, hidden))
    parameters = [
        _whole(f"{name}.router.weight", f"{disk}.router.weight", count, hidden, role=Role.ROUTER),
        _whole(f"{name}.router.bias", f"{disk}.router.bias", count),
        _by_expert(f"{name}.gate_up", gate_up, experts, 2 * len(part), hidden, role=Role.EXPERTS),
        _by_expert(f"{name}.gate_up_biases", gate_up_biases, experts, 2 * len(part)),
        _by_expert(f"{name}.down", down, experts, hidden, len(part), role=Role.SUMMED_EXPERTS),
    ]
    if adds_bias or len(part) == size:
        parameters.append(_by_expert(f"{name}.down_biases", down_biases, experts, hidden))
    return parameters


def _by_expert(name: str, each: Piece, experts: tuple[int, ...], *shape: int, role: Role = Role.TENSOR) -> Parameter:
    """Return a parameter that has of each expert the region of ``each``, in the order of the experts."""
    pieces = tuple(
        replace(each, region=(slice(expert, expert + 1), *each.region), place=(slice(place, place + 1),))
        for place, expert in enumerate(experts)
    )
    return Parameter(name=name, shape=(len(experts), *shape), pieces=pieces, role=role)


def _stacked_experts(block: str, mlp: MoeSpec, hidden: int, experts: tuple[int, ...], part: range) -> _Pieces:
    """Return the pieces of gate|up and of down, from two tensors with all experts."""
    size, count = mlp.intermediate_size, mlp.num_experts
    gate_up_shape, down_shape = (count, 2 * size, hidden), (count, hidden, size)
    gate_up, down = f"{block}.gate_up_proj", f"{block}.down_proj"
    if len(part) == size and experts == tuple(range(count)):
        return (Piece(tensor=gate_up, shape=gate_up_shape),), (Piece(tensor=down, shape=down_shape),)
    gate_up_pieces, down_pieces = [], []
    for local, expert in enumerate(experts):
        one = slice(expert, expert + 1)
        for first, offset in ((0, 0), (len(part), size)):
            gate_up_pieces.append(
                Piece(
                    tensor=gate_up,
                    shape=gate_up_shape,
                    region=(one, slice(offset + part.start, offset + part.stop)),
                    place=(slice(local, local + 1), slice(first, first + len(part))),
                )
            )
        down_pieces.append(
            Piece(
                tensor=down,
                shape=down_shape,
                region=(one, slice(None), slice(part.start, part.stop)),
                place=(slice(local, local + 1),),
            )
        )
    return tuple(gate_up_pieces), tuple(down_pieces)
