"""Which tensors of a checkpoint make up which parameter of the decoder.

Owns the names on disk, in both layouts of experts (one tensor per expert, or all stacked), and the fused
layout in memory: q|k|v and gate|up as one matrix, experts stacked. Reads nothing.

Shapes: H hidden size, I intermediate size, E experts.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from .model_spec import DenseMlpSpec, ModelSpec, MoeSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One tensor on disk and its place in a parameter: rows from ``first_row`` on, of one expert if it names
    one.
    """

    tensor: str
    shape: tuple[int, ...]
    first_row: int = 0
    expert: int | None = None

    def place_in(self, parameter: Tensor) -> Tensor:
        """Return the view of ``parameter`` that this piece fills."""
        part = parameter if self.expert is None else parameter[self.expert]
        if self.shape == tuple(part.shape):
            return part
        return part[self.first_row : self.first_row + self.shape[0]]


class Role(Enum):
    """What the decoder does with a parameter: multiplies with it, once or expert by expert, or uses its numbers."""

    TENSOR = "tensor"
    LINEAR = "linear"
    EXPERTS = "experts"
    HEAD = "head"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter of the decoder and the pieces that fill it completely."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    role: Role = Role.TENSOR


def parameter_layout(spec: ModelSpec, stored: Container[str]) -> tuple[Parameter, ...]:
    """Return every parameter of the decoder; ``stored`` (names on disk) decides between the layouts of
    experts.
    """
    embedding = (spec.vocab_size, spec.hidden_size)
    parameters = [_whole("embedding", "model.embed_tokens.weight", *embedding)]
    for index, layer in enumerate(spec.layers):
        name, disk = f"layers.{index}", f"model.layers.{index}"
        parameters.append(_whole(f"{name}.input_norm", f"{disk}.input_layernorm.weight", spec.hidden_size))
        parameters.append(_whole(f"{name}.mlp_norm", f"{disk}.post_attention_layernorm.weight", spec.hidden_size))
        parameters += _attention(spec, f"{name}.attention", f"{disk}.self_attn")
        match layer.mlp:
            case DenseMlpSpec():
                parameters += _dense_mlp(spec, layer.mlp, f"{name}.mlp", f"{disk}.mlp")
            case MoeSpec():
                parameters += _moe(spec, layer.mlp, f"{name}.mlp", disk, stored)
    parameters.append(_whole("final_norm", "model.norm.weight", spec.hidden_size))
    if not spec.tie_word_embeddings:
        parameters.append(_whole("head", "lm_head.weight", *embedding, role=Role.HEAD))
    return tuple(parameters)


def is_ignorable(tensor: str, spec: ModelSpec) -> bool:
    """Say whether a stored tensor holds nothing of its own: old rotary buffers, the head of a tied model."""
    return tensor.endswith(".rotary_emb.inv_freq") or (spec.tie_word_embeddings and tensor == "lm_head.weight")


def _whole(name: str, tensor: str, *shape: int, role: Role = Role.TENSOR) -> Parameter:
    return Parameter(name=name, shape=shape, pieces=(Piece(tensor=tensor, shape=shape),), role=role)


def _fused(name: str, tensors: tuple[tuple[str, int], ...], *columns: int, role: Role = Role.TENSOR) -> Parameter:
    pieces, first_row = [], 0
    for tensor, rows in tensors:
        pieces.append(Piece(tensor=tensor, shape=(rows, *columns), first_row=first_row))
        first_row += rows
    return Parameter(name=name, shape=(first_row, *columns), pieces=tuple(pieces), role=role)


def _linear(
    name: str, disk: str, projections: tuple[tuple[str, int], ...], columns: int, *, bias: bool
) -> list[Parameter]:
    weights = tuple((f"{disk}.{projection}.weight", rows) for projection, rows in projections)
    biases = tuple((f"{disk}.{projection}.bias", rows) for projection, rows in projections)
    parameters = [_fused(f"{name}.weight", weights, columns, role=Role.LINEAR)]
    return [*parameters, _fused(f"{name}.bias", biases)] if bias else parameters


def _attention(spec: ModelSpec, name: str, disk: str) -> list[Parameter]:
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    qkv = (("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size))
    parameters = _linear(f"{name}.qkv", disk, qkv, spec.hidden_size, bias=spec.qkv_bias)
    parameters += _linear(f"{name}.out", disk, (("o_proj", spec.hidden_size),), q_size, bias=spec.o_bias)
    if spec.qk_norm:
        parameters.append(_whole(f"{name}.q_norm", f"{disk}.q_norm.weight", spec.head_dim))
        parameters.append(_whole(f"{name}.k_norm", f"{disk}.k_norm.weight", spec.head_dim))
    return parameters


def _dense_mlp(spec: ModelSpec, mlp: DenseMlpSpec, name: str, disk: str) -> list[Parameter]:
    size = mlp.intermediate_size
    gate_up = (("gate_proj", size), ("up_proj", size))
    parameters = _linear(f"{name}.gate_up", disk, gate_up, spec.hidden_size, bias=spec.mlp_bias)
    return parameters + _linear(f"{name}.down", disk, (("down_proj", spec.hidden_size),), size, bias=spec.mlp_bias)


def _moe(spec: ModelSpec, mlp: MoeSpec, name: str, disk: str, stored: Container[str]) -> list[Parameter]:
    hidden, size, experts = spec.hidden_size, mlp.intermediate_size, mlp.num_experts
    gate_up_shape, down_shape = (experts, 2 * size, hidden), (experts, hidden, size)
    if f"{disk}.mlp.experts.gate_up_proj" in stored:
        return [
            _whole(f"{name}.router", f"{disk}.mlp.gate.weight", experts, hidden),
            _whole(f"{name}.gate_up", f"{disk}.mlp.experts.gate_up_proj", *gate_up_shape, role=Role.EXPERTS),
            _whole(f"{name}.down", f"{disk}.mlp.experts.down_proj", *down_shape, role=Role.EXPERTS),
        ]
    if spec.architecture == "MixtralForCausalLM":
        block, (gate, up, down) = f"{disk}.block_sparse_moe", ("w1", "w3", "w2")
    else:
        block, (gate, up, down) = f"{disk}.mlp", ("gate_proj", "up_proj", "down_proj")
    gate_up_pieces: list[Piece] = []
    down_pieces: list[Piece] = []
    for expert in range(experts):
        prefix = f"{block}.experts.{expert}"
        for first_row, projection in ((0, gate), (size, up)):
            tensor = f"{prefix}.{projection}.weight"
            gate_up_pieces.append(Piece(tensor=tensor, shape=(size, hidden), first_row=first_row, expert=expert))
        down_pieces.append(Piece(tensor=f"{prefix}.{down}.weight", shape=(hidden, size), expert=expert))
    return [
        _whole(f"{name}.router", f"{block}.gate.weight", experts, hidden),
        Parameter(name=f"{name}.gate_up", shape=gate_up_shape, pieces=tuple(gate_up_pieces), role=Role.EXPERTS),
        Parameter(name=f"{name}.down", shape=down_shape, pieces=tuple(down_pieces), role=Role.EXPERTS),
    ]
