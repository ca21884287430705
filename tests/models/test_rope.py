"""Rotary angles against those of transformers, at positions where the last bits matter."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from slipstream.runtime.models.model_spec import (
    DynamicRope,
    LinearRope,
    Llama3Rope,
    RopeSpec,
    YarnRope,
)
from slipstream.runtime.models.rope import RotaryPositions

CPU = torch.device("cpu")
POSITIONS = torch.tensor([0, 1, 2, 77, 1023, 1024, 4097, 32_769, 131_071])
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"factor": 4.0, "attention_factor": 1.2, "beta_fast": 20.0, "beta_slow": 2.0}


def reference(theta: float, head_dim: int, **rope: object) -> LlamaRotaryEmbedding:
    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        max_position_embeddings=4096,
        rope_parameters={"rope_theta": theta, **rope},
    )
    return LlamaRotaryEmbedding(config)


def assert_same(found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    half = found[0].shape[-1] // 2
    assert (found[0] - expected[0][0]).abs().max() <= 1e-6
    assert torch.equal(found[1][:, :half], -found[1][:, half:])
    assert (found[1][:, half:] - expected[1][0][:, half:]).abs().max() <= 1e-6


@pytest.mark.parametrize(("theta", "head_dim"), [(1e4, 64), (5e5, 128), (1e6, 6)])
@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_angles_up_to_long_positions(theta: float, head_dim: int, kind: str) -> None:
    fields: dict[str, object] = {"original_max_position_embeddings": 1024}
    spec: RopeSpec
    match kind:
        case "linear":
            fields = {"factor": 3.0}
            spec = LinearRope(theta=theta, head_dim=head_dim, factor=3.0)
        case "llama3":
            fields |= LLAMA3
            spec = Llama3Rope(theta=theta, head_dim=head_dim, original_max_positions=1024, **LLAMA3)
        case "yarn":
            fields |= {**YARN, "truncate": False}
            spec = YarnRope(theta=theta, head_dim=head_dim, original_max_positions=1024, truncate=False, **YARN)
        case _:
            fields = {}
            spec = RopeSpec(theta=theta, head_dim=head_dim)
    positions = RotaryPositions(spec, dtype=torch.float32, device=CPU)
    found = positions.cos_sin(POSITIONS, None, longest=131_072)
    expected = reference(theta, head_dim, rope_type=kind, **fields)(torch.zeros(1), POSITIONS[None])
    assert_same(found, expected)


@pytest.mark.parametrize("length", [1, 4095, 4096, 4097, 9000])
def test_dynamic_angles_for_a_prompt_of_a_length(length: int) -> None:
    spec = DynamicRope(theta=1e4, head_dim=64, factor=4.0, max_positions=4096)
    prompt = torch.arange(length)
    positions = RotaryPositions(spec, dtype=torch.float32, device=CPU)
    found = positions.cos_sin(prompt, torch.full((length,), length), longest=length)
    assert_same(found, reference(1e4, 64, rope_type="dynamic", factor=4.0)(torch.zeros(1), prompt[None]))


def test_dynamic_angles_of_tokens_that_follow_the_prompt() -> None:
    spec = DynamicRope(theta=1e4, head_dim=64, factor=4.0, max_positions=4096)
    positions = RotaryPositions(spec, dtype=torch.float32, device=CPU)
    theirs = reference(1e4, 64, rope_type="dynamic", factor=4.0)
    theirs(torch.zeros(1), torch.arange(4090)[None])
    for position in range(4090, 4102):
        token = torch.tensor([position])
        found = positions.cos_sin(token, token + 1, longest=position + 1)
        assert_same(found, theirs(torch.zeros(1), token[None]))


def test_dynamic_rope_needs_lengths() -> None:
    spec = DynamicRope(theta=1e4, head_dim=64, factor=4.0, max_positions=4096)
    with pytest.raises(ValueError, match="length"):
        RotaryPositions(spec, dtype=torch.float32, device=CPU).cos_sin(POSITIONS, None, longest=1 << 17)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_way_the_table_grew_does_not_show(dtype: torch.dtype) -> None:
    spec = RopeSpec(theta=1e4, head_dim=64)
    at_once = RotaryPositions(spec, dtype=dtype, device=CPU)
    step_by_step = RotaryPositions(spec, dtype=dtype, device=CPU)
    for longest in (1, 1000, 1025, 3000, 5000):
        step_by_step.cos_sin(torch.tensor([longest - 1]), None, longest=longest)
    positions = torch.arange(5000)
    first = at_once.cos_sin(positions, None, longest=5000)
    second = step_by_step.cos_sin(positions, None, longest=5000)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert first[0].dtype == dtype
