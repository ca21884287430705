"""Shards: every part of a model is on the ranks that need it, and nothing twice where sums would count it twice."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch

from slipstream.comm.mesh import MeshShape
from slipstream.runtime.models.layout import parameter_layout
from slipstream.runtime.models.model_spec import ModelSpec, MoeSpec
from slipstream.runtime.models.registry import read_model_spec
from slipstream.runtime.models.sharding import Shard
from slipstream.tests.models.checkpoints import make_checkpoint

MESHES = [
    *(MeshShape(pp=pp, ep=ep, tp=tp) for pp, ep, tp in itertools.product((1, 2, 3), (1, 2, 4), (1, 2, 4))),
    MeshShape(ep=4, tp=2, ranks_per_host=4),
]


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSpec]:
    names = ("parallel_dense", "parallel_experts", "mixtral", "deepseek_v2_groups", "deepseek_v3")
    return {
        name: read_model_spec(make_checkpoint(name, tmp_path_factory.mktemp("checkpoints") / name)) for name in names
    }


def shards(mesh: MeshShape) -> list[Shard]:
    return [Shard(place=mesh.place(rank)) for rank in range(mesh.size)]


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        (name, mesh)
        for name, layers in (
            ("parallel_dense", 5),
            ("parallel_experts", 3),
            ("mixtral", 2),
            ("deepseek_v2_groups", 3),
            ("deepseek_v3", 3),
        )
        for mesh in MESHES
        if mesh.pp <= layers and (mesh.ep == 1 or name != "parallel_dense")
    ],
    ids=str,
)
def test_every_number_of_a_checkpoint_is_read(name: str, mesh: MeshShape, specs: dict[str, ModelSpec]) -> None:
    spec = specs[name]
    whole = {piece.tensor: piece.shape for parameter in parameter_layout(spec, ()) for piece in parameter.pieces}
    read = {tensor: torch.zeros(shape) for tensor, shape in whole.items()}
    for shard in shards(mesh):
        for parameter in parameter_layout(spec, (), shard):
            filled = torch.zeros(parameter.shape)
            for piece in parameter.pieces:
                assert piece.shape == whole[piece.tensor]
                region = read[piece.tensor][piece.region]
                assert piece.place_in(filled).shape == region.shape, (parameter.name, piece)
                region += 1
                piece.place_in(filled).add_(1)
            assert bool((filled == 1).all()), f"{parameter.name} is filled once and completely"
    stage_ranks, repeated = mesh.ep * mesh.tp, Counter[str]()
    for tensor, times in read.items():
        assert int(times.min()) >= 1, tensor
        if tensor.endswith(("o_proj.bias", "down_proj.bias")):
            assert int(times.max()) == mesh.ep, "added once among the ranks of a sum"
        elif ".experts." in tensor:
            repeated[tensor] = int(times.max())
        else:
            assert int(times.max()) <= stage_ranks * (2 if "embed_tokens" in tensor else 1)
    if isinstance(spec.layers[0].mlp, MoeSpec):
        count = spec.layers[0].mlp.num_experts
        slots = -(-count // mesh.ep) * mesh.ep
        # Slots that are left over hold replicas.
        assert sum(repeated.values()) == 3 * slots * sum(isinstance(layer.mlp, MoeSpec) for layer in spec.layers)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_shares_are_whole_and_even(mesh: MeshShape, specs: dict[str, ModelSpec]) -> None:
    spec = specs["parallel_dense"]
    for ranges in (
        [shard.vocabulary(spec.vocab_size) for shard in shards(mesh)],
        [shard.mlp_columns(spec.layers[0].mlp) for shard in shards(mesh)],
        [shard.heads(spec) for shard in shards(mesh)],
    ):
        distinct = sorted(set(ranges), key=lambda part: part.start)
        assert len(distinct) == mesh.tp
        assert [part.start for part in distinct[1:]] == [part.stop for part in distinct[:-1]]
        assert distinct[0].start == 0
    layers = sorted({shard.layers(spec) for shard in shards(mesh)}, key=lambda part: part.start)
    assert [index for part in layers for index in part] == list(range(spec.num_layers))
    assert max(map(len, layers)) - min(map(len, layers)) <= 1


def test_query_heads_find_their_kv_head(specs: dict[str, ModelSpec]) -> None:
    spec = specs["parallel_dense"]
    group = spec.num_heads // spec.num_kv_heads
    for tp in (1, 2, 4):
        for shard in shards(MeshShape(tp=tp)):
            local = shard.local_spec(spec)
            for place, head in enumerate(shard.heads(spec)):
                mine = shard.kv_heads(spec)[place // (local.num_heads // local.num_kv_heads)]
                assert mine == head // group


def test_a_stage_knows_whether_a_ladder_follows(specs: dict[str, ModelSpec]) -> None:
    whole = specs["parallel_dense"]
    layers = tuple(replace(layer, ladder=index in (2, 4)) for index, layer in enumerate(whole.layers))
    spec = replace(whole, layers=layers)
    stages = [Shard(place=MeshShape(pp=3).place(rank)).local_spec(spec) for rank in range(3)]
    assert [[layer.ladder for layer in stage.layers] for stage in stages] == [[False] * 2, [True, False], [True]]
    assert [stage.ladder_follows for stage in stages] == [True, True, False]
