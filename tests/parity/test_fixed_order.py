"""``deterministic`` over ranks: the tokens and log-probabilities of one rank, bit for bit, on every mesh.

Prompts are cut into chunks, preempted and found in the prefix cache; ranks are threads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from slipstream import LLM, ConfigError
from slipstream.tests.kernels.native_ways import torch_alone
from slipstream.tests.llm.test_deterministic import bits
from slipstream.tests.models.checkpoints import make_checkpoint
from slipstream.tests.parity.test_parallel_parity import OPTIONS, PARAMS, asked, options_of

pytestmark = pytest.mark.usefixtures("ranks_are_threads")

DENSE = [{"tp": 2}, {"tp": 4}, {"tp": 2, "pp": 2}, {"tp": 4, "pp": 3}]
EXPERTS = [{"tp": 2}, {"tp": 4}, {"ep": 2}, {"tp": 2, "ep": 2}, {"tp": 2, "ep": 2, "pp": 2}]
Bits = list[Any]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda name: make_checkpoint(name, tmp_path_factory.mktemp(name) / name))


@pytest.fixture(scope="module")
def alone(checkpoint: Callable[[str], Path]) -> Callable[..., Bits]:
    @cache
    def generated(name: str, dtype: str, quantization: str = "none") -> Bits:
        return generate(checkpoint(name), dtype=dtype, quantization=quantization)

    return generated


def generate(path: Path, **options: Any) -> Bits:
    """Return what comes of the prompts, the first time and when the prefix cache has them: the same bits."""
    with LLM(str(path), **{**OPTIONS, "deterministic": True, **options}) as llm:
        first = bits(llm.generate(asked(), PARAMS))
        assert bits(llm.generate(asked(), PARAMS)) == first, "the second time"
    return first


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("degrees", DENSE, ids=str)
def test_dense_models(
    degrees: dict[str, int], dtype: str, checkpoint: Callable[[str], Path], alone: Callable[..., Bits]
) -> None:
    found = generate(checkpoint("parallel_dense"), dtype=dtype, **options_of(degrees))
    assert found == alone("parallel_dense", dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("degrees", EXPERTS, ids=str)
def test_experts(
    degrees: dict[str, int], dtype: str, checkpoint: Callable[[str], Path], alone: Callable[..., Bits]
) -> None:
    found = generate(checkpoint("parallel_experts"), dtype=dtype, **options_of(degrees))
    assert found == alone("parallel_experts", dtype)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("parallel_experts", {"tensor_parallel_size": 2, "enable_expert_parallel": True}),
        ("parallel_experts", {"tensor_parallel_size": 2, "expert_parallel_size": 2, "expert_exchange": "gather"}),
        ("parallel_experts", {"tensor_parallel_size": 2, "expert_parallel_size": 2, "expert_exchange": "all_to_all"}),
        ("parallel_experts", {"tensor_parallel_size": 2, "sharded_norm": True}),
        ("parallel_dense", {"tensor_parallel_size": 4, "sharded_norm": True}),
        ("parallel_dense", {"tensor_parallel_size": 2, "overlap": True}),
        ("parallel_dense", {"tensor_parallel_size": 2, "sequence_parallel_size": 2}),
        ("qwen3", {"tensor_parallel_size": 2}),
        ("llama_mqa", {"tensor_parallel_size": 8}),
    ],
    ids=str,
)
def test_other_ways(
    name: str, options: dict[str, Any], checkpoint: Callable[[str], Path], alone: Callable[..., Bits]
) -> None:
    assert generate(checkpoint(name), dtype="bfloat16", **options) == alone(name, "bfloat16")


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantized_models(quantization: str, checkpoint: Callable[[str], Path], alone: Callable[..., Bits]) -> None:
    options = {"dtype": "bfloat16", "quantization": quantization, "tensor_parallel_size": 2}
    assert generate(checkpoint("parallel_dense"), **options) == alone("parallel_dense", "bfloat16", quantization)


@pytest.mark.parametrize("name", ["parallel_dense", "parallel_experts"])
def test_by_torchs_operations(name: str, checkpoint: Callable[[str], Path]) -> None:
    with torch_alone():
        expected = generate(checkpoint(name), dtype="bfloat16")
        assert generate(checkpoint(name), dtype="bfloat16", tensor_parallel_size=2) == expected


@pytest.mark.parametrize(
    ("name", "options", "field", "problem"),
    [
        ("llama_three_per_group", {"tensor_parallel_size": 6}, "tensor_parallel_size", "use 1, 2, 4 or 8"),
        ("llama", {"dtype": "float16"}, "deterministic", "needs float32 or bfloat16"),
    ],
)
def test_what_is_refused(
    name: str, options: dict[str, Any], field: str, problem: str, checkpoint: Callable[[str], Path]
) -> None:
    with pytest.raises(ConfigError, match=problem) as refused:
        LLM(str(checkpoint(name)), **{**OPTIONS, "deterministic": True, **options})
    assert refused.value.field == field
