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
from slipstream.comm.overlap_cost import Curve, PassCost
from slipstream.comm.overlap_split import Cuts
from slipstream.runtime.worker import rank as rank_module
from slipstream.runtime.worker.token_split import TokenSplit
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
        ("parallel_dense", {"tensor_parallel_size": 2, "sequence_parallel_size": 2}),
        ("qwen3", {"tensor_parallel_size": 2}),
        ("llama_mqa", {"tensor_parallel_size": 8}),
        ("gemma2", {"tensor_parallel_size": 2, "sharded_norm": True}),
        ("gpt_oss", {"tensor_parallel_size": 2, "expert_parallel_size": 2}),
        ("deepseek_v3", {"tensor_parallel_size": 2}),
        ("deepseek_v3", {"tensor_parallel_size": 4, "pipeline_parallel_size": 2, "sharded_norm": True}),
        ("deepseek_v3", {"tensor_parallel_size": 2, "expert_parallel_size": 2}),
    ],
    ids=str,
)
def test_other_ways(
    name: str, options: dict[str, Any], checkpoint: Callable[[str], Path], alone: Callable[..., Bits]
) -> None:
    assert generate(checkpoint(name), dtype="bfloat16", **options) == alone(name, "bfloat16")


def test_steps_in_parts(
    checkpoint: Callable[[str], Path], alone: Callable[..., Bits], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A wire as slow as the arithmetic: every step that can be cut is.
    slow = PassCost(
        compute_s=Curve.line(fixed_s=0.0, per_unit_s=1.0),
        collective_s=Curve.line(fixed_s=0.0, per_unit_s=1.0),
        collectives=1,
        bytes_per_token=1.0,
    )
    splits: list[TokenSplit] = []

    def measured(*_: object, **__: object) -> TokenSplit:
        splits.append(TokenSplit(slow, element_bytes=2, pieces=((0, 3),)))
        return splits[-1]

    cuts: list[Cuts] = []
    choose = TokenSplit.cut

    def noted(self: TokenSplit, tokens: int) -> Cuts | None:
        cut = choose(self, tokens)
        cuts.extend([] if cut is None else [cut])
        return cut

    monkeypatch.setattr(rank_module, "measure_split", measured)
    monkeypatch.setattr(TokenSplit, "cut", noted)
    # Steps of many tokens, to have something to cut.
    room = {"num_gpu_blocks_override": 100, "long_prefill_token_threshold": 0, "overlap": True}
    found = generate(checkpoint("parallel_dense"), dtype="bfloat16", tensor_parallel_size=2, **room)
    assert found == alone("parallel_dense", "bfloat16")
    assert cuts, "no step was cut"
    assert all(split.meter.totals.works for split in splits)


def test_without_it_ranks_have_other_bits(checkpoint: Callable[[str], Path], alone: Callable[..., Bits]) -> None:
    """What the tests above compare would show it."""
    found = generate(checkpoint("parallel_dense"), dtype="float32", deterministic=False, tensor_parallel_size=2)
    assert found != alone("parallel_dense", "float32")


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantized_models(quantization: str, checkpoint: Callable[[str], Path], alone: Callable[..., Bits]) -> None:
    options = {"dtype": "bfloat16", "quantization": quantization, "tensor_parallel_size": 2}
    assert generate(checkpoint("parallel_dense"), **options) == alone("parallel_dense", "bfloat16", quantization)


@pytest.mark.parametrize("name", ["parallel_dense", "parallel_experts", "gemma2", "gpt_oss"])
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
