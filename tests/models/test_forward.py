"""The batch of a step against a plain loop over rows and tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from slipstream.runtime.models.checkpoint import CheckpointReader
from slipstream.runtime.models.forward import build_forward_batch
from slipstream.runtime.models.kv_cache import KvCache
from slipstream.runtime.models.model_spec import DynamicRope, ModelSpec
from slipstream.runtime.models.registry import read_model_spec
from slipstream.runtime.models.weights import read_parameters
from slipstream.tests.models.checkpoints import make_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3_mixed_layers", tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def spec(qwen: Path) -> ModelSpec:
    return read_model_spec(qwen)


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_positions_slots_lengths_and_fresh_blocks(seed: int, spec: ModelSpec, block_size: int) -> None:
    rope = DynamicRope(theta=1e4, head_dim=spec.head_dim, factor=2.0, max_positions=32)
    spec = dataclasses.replace(spec, rope=rope)
    random = np.random.default_rng(seed)
    starts, counts = random.integers(0, 40, 9, dtype=np.int32), random.integers(1, 30, 9, dtype=np.int32)
    prompts = random.integers(1, 60, 9, dtype=np.int32)
    tables = random.integers(0, 1000, (9, 70), dtype=np.int32)
    batch = build_forward_batch(
        token_ids=torch.zeros(int(counts.sum()), dtype=torch.int64),
        starts=starts,
        counts=counts,
        prompt_lengths=prompts,
        block_tables=tables,
        block_size=block_size,
        spec=spec,
        dtype=torch.float32,
        device=CPU,
    )
    positions, slots, lengths, fresh = [], [], [], []
    for row in range(9):
        span = range(starts[row], starts[row] + counts[row])
        for position in span:
            positions.append(position)
            slots.append(tables[row, position // block_size] * block_size + position % block_size)
            lengths.append(max(prompts[row], position + 1))
            if position % block_size == 0 and position + block_size > span.stop:
                fresh.append(tables[row, position // block_size])
    assert batch.positions_T.tolist() == positions
    assert batch.slot_mapping_T.tolist() == slots
    assert batch.rope_lengths_T is not None
    assert batch.rope_lengths_T.tolist() == lengths
    assert batch.fresh_blocks_F.tolist() == fresh
    assert batch.longest == max(positions) + 1
    assert set(batch.attention) == {9, None}


def test_lengths_are_left_out_where_they_do_not_matter(spec: ModelSpec) -> None:
    one = np.array([1], dtype=np.int32)
    batch = build_forward_batch(
        token_ids=torch.zeros(1, dtype=torch.int64),
        starts=one,
        counts=one,
        prompt_lengths=one,
        block_tables=np.zeros((1, 1), dtype=np.int32),
        block_size=16,
        spec=spec,
        dtype=torch.float32,
        device=CPU,
    )
    assert batch.rope_lengths_T is None


def test_token_ids_must_match_the_rows(spec: ModelSpec) -> None:
    one = np.array([1], dtype=np.int32)
    with pytest.raises(ValueError, match="1 tokens in all came with 2"):
        build_forward_batch(
            token_ids=torch.zeros(2, dtype=torch.int64),
            starts=one,
            counts=one,
            prompt_lengths=one,
            block_tables=np.zeros((1, 1), dtype=np.int32),
            block_size=16,
            spec=spec,
            dtype=torch.float32,
            device=CPU,
        )


def test_cache_sizes_agree_with_placement(spec: ModelSpec) -> None:
    cache = KvCache.allocate(spec, num_blocks=5, block_size=8, dtype=torch.bfloat16, device=CPU)
    assert (cache.num_blocks, cache.block_size) == (5, 8)
    assert cache.bytes == 5 * 8 * spec.facts().kv_bytes_per_token(2)


def load_parameters(
    path: Path, spec: ModelSpec, *, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    read = read_parameters(path, spec, dtype=dtype, device=device)
    return {parameter.name: tensor for parameter, tensor in read if isinstance(tensor, torch.Tensor)}


def test_weights_in_memory_agree_with_placement(qwen: Path, spec: ModelSpec) -> None:
    parameters = load_parameters(qwen, spec, dtype=torch.float16, device=CPU)
    assert sum(tensor.numel() for tensor in parameters.values()) * 2 == spec.facts().weight_bytes(2)


def test_a_region_of_a_tensor_can_be_read_alone(qwen: Path, spec: ModelSpec) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    with CheckpointReader.open(qwen) as reader:
        whole = torch.empty(reader.tensors[name].shape)
        reader.read_into(name, whole)
        part = torch.empty((16, 7), dtype=torch.bfloat16)
        reader.read_into(name, part, region=(slice(8, 24), slice(3, 10)))
    assert torch.equal(part, whole[8:24, 3:10].bfloat16())


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_stacked_experts_on_disk_fill_the_same_parameters(tmp_path: Path, name: str) -> None:
    directory = make_checkpoint(name, tmp_path)
    spec = read_model_spec(directory)
    separate = load_parameters(directory, spec, dtype=torch.float32, device=CPU)
    stored = load_file(directory / "model.safetensors")
    stacked = {key: value for key, value in stored.items() if ".experts." not in key}
    for layer in range(spec.num_layers):
        block = f"model.layers.{layer}.mlp"
        router = stacked.pop(f"model.layers.{layer}.block_sparse_moe.gate.weight", None)
        if router is not None:
            stacked[f"{block}.gate.weight"] = router
        for projection in ("gate_up", "down"):
            experts = separate[f"layers.{layer}.mlp.{projection}"]
            stacked[f"{block}.experts.{projection}_proj"] = experts.clone()
    save_file(stacked, directory / "model.safetensors")
    again = load_parameters(directory, spec, dtype=torch.float32, device=CPU)
    assert again.keys() == separate.keys()
    assert all(torch.equal(again[key], separate[key]) for key in separate)
