"""gpt-oss as it is published, its experts as MXFP4: the same parameters as of a checkpoint of the numbers they mean."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slipstream.comm.mesh import MeshShape
from slipstream.kernels.mxfp4_codes import mxfp4_weight
from slipstream.runtime.cluster.model_sizes_file import read_model_sizes
from slipstream.runtime.models.registry import read_model_spec
from slipstream.runtime.models.sharding import WHOLE, Shard
from slipstream.runtime.models.weights import read_parameters
from slipstream.sdk.errors import CheckpointError
from slipstream.tests.models.checkpoints import CASES, random_model

CPU = torch.device("cpu")
NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def make_twins(directory: Path, seed: int) -> tuple[Path, Path]:
    """Write a checkpoint with random codes, and one with the numbers that they stand for, made one by one."""
    case = CASES["gpt_oss"]
    case = replace(case, fields={**case.fields, "intermediate_size": 96, "num_hidden_layers": 1})
    coded, plain = directory / "coded", directory / "plain"
    for path in (coded, plain):
        random_model(case).save_pretrained(path)
    file, config_file = coded / "model.safetensors", coded / "config.json"
    config = {**json.loads(config_file.read_text()), "quantization_config": {"quant_method": "mxfp4"}}
    config_file.write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    stored, meant = load_file(file), load_file(plain / "model.safetensors")
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj")) and ".experts." in name]:
        experts, inputs, outputs = stored.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(120, 130, blocks.shape[:-1], generator=generator, dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        meant[name] = spelled_out(blocks, scales).transpose(1, 2).contiguous()
    save_file(stored, file)
    save_file(meant, plain / "model.safetensors")
    return coded, plain


def spelled_out(blocks: Tensor, scales: Tensor) -> Tensor:
    numbers = [
        NUMBERS[code & 7] * (-1) ** (code >> 3) * 2.0 ** (scale - 127)
        for block, scale in zip(blocks.flatten(0, -2).tolist(), scales.flatten().tolist(), strict=True)
        for byte in block
        for code in (byte & 15, byte >> 4)
    ]
    return torch.tensor(numbers).view(*scales.shape[:-1], -1)


def parameters(path: Path, shard: Shard) -> dict[str, Tensor]:
    found = {}
    for parameter, loaded in read_parameters(path, read_model_spec(path), dtype=torch.float32, device=CPU, shard=shard):
        assert isinstance(loaded, Tensor)
        found[parameter.name] = loaded
    return found


@pytest.mark.parametrize("mesh", [MeshShape(), MeshShape(tp=2), MeshShape(ep=2), MeshShape(ep=2, tp=2)], ids=str)
def test_parameters_are_what_the_codes_stand_for(mesh: MeshShape, tmp_path: Path, seed: int) -> None:
    coded, plain = make_twins(tmp_path, seed)
    for rank in range(mesh.size):
        shard = Shard(place=mesh.place(rank))
        found, expected = parameters(coded, shard), parameters(plain, shard)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_ranks_share_the_numbers_of_one(tmp_path: Path, seed: int) -> None:
    """Gate, up and their biases are divided alike; a sum's bias is on one rank."""
    _, plain = make_twins(tmp_path, seed)
    whole = parameters(plain, WHOLE)
    first, second = (parameters(plain, Shard(place=MeshShape(tp=2).place(rank))) for rank in range(2))
    name = "layers.0.mlp"
    for part, axis in (("gate_up", 1), ("gate_up_biases", 1), ("down", 2)):
        parts = [each[f"{name}.{part}"] for each in (first, second)]
        if part != "down":
            gates, ups = zip(*(each.chunk(2, dim=1) for each in parts), strict=True)
            parts = [*gates, *ups]
        assert torch.equal(torch.cat(parts, dim=axis), whole[f"{name}.{part}"])
    assert torch.equal(first[f"{name}.down_biases"], whole[f"{name}.down_biases"])
    assert f"{name}.down_biases" not in second


def test_a_cut_within_a_block_is_refused(tmp_path: Path, seed: int) -> None:
    coded, _ = make_twins(tmp_path, seed)
    shard = Shard(place=MeshShape(tp=2).place(1), fixed_order=True)
    with pytest.raises(CheckpointError, match="cannot be cut at 48 and 96, 32 inputs share a scale: use another"):
        parameters(coded, shard)


def test_plans_count_plain_numbers(tmp_path: Path, seed: int) -> None:
    coded, plain = (read_model_sizes(path) for path in make_twins(tmp_path, seed))
    assert replace(coded, name=plain.name) == plain


def test_all_codes() -> None:
    blocks = torch.arange(16, dtype=torch.uint8).repeat(1, 1) * 16
    found = mxfp4_weight(blocks, torch.tensor([128], dtype=torch.uint8))
    halves = [*NUMBERS, *(-number for number in NUMBERS)]
    assert found.tolist() == [number for half in halves for number in (0.0, 2 * half)]
