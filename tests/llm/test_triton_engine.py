"""The whole engine by Triton's kernels, in the interpreter: the same tokens as by torch's operations."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slipstream import LLM, ConfigError, RequestOutput, SamplingParams
from slipstream.kernels import backends
from slipstream.kernels.launch import HAS_TRITON, KernelConfig, observed_launches
from slipstream.tests.models.checkpoints import VOCABULARY, make_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, logprobs=1)
FILTERED = SamplingParams(
    temperature=0.9, seed=3, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.2, max_tokens=3, ignore_eos=True
)
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "skip_tokenizer_init": True,
    "max_model_len": 128,
    "num_gpu_blocks_override": 48,
    "block_size": 8,
    "max_num_seqs": 8,
}
MODELS = ("llama_biases", "mistral_window", "qwen3_mixed_layers", "qwen3_moe_normalized")
"""Plain, with a window, with norms of heads and windows in some layers, with experts."""

IN_CHUNKS: dict[str, Any] = {"long_prefill_token_threshold": 11}

ATTENTION = {"_attention_decode_kernel": 1, "_attention_merge_kernel": 1}
"""Launches of a decoding step in each layer, by kernel."""


@pytest.fixture(autouse=True)
def _choice_ends_with_the_test() -> Iterator[None]:
    if not HAS_TRITON:
        pytest.skip("no Triton here: pip install triton")
    yield
    backends.use("auto")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a case's checkpoint, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = make_checkpoint(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


def prompts(seed: int) -> list[list[int]]:
    """Return prompts of mixed lengths, two of which begin alike over some blocks."""
    draw = random.Random(seed)
    shared = [draw.randrange(3, VOCABULARY) for _ in range(25)]
    return [[*shared, 5], [draw.randrange(3, VOCABULARY)], [*shared, 7, 9, 11]]


def generate(path: Path, params: SamplingParams, given: list[list[int]], **options: Any) -> list[RequestOutput]:
    """Return what comes of the prompts together, and then of each again, which may find blocks in the prefix cache."""
    with LLM(str(path), **{**OPTIONS, **options}) as llm:
        batch = [{"prompt_token_ids": tokens} for tokens in given]
        return [*llm.generate(batch, params), *llm.generate(batch[::-1], params)]


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the launches of each kernel."""
    seen: Counter[str] = Counter()

    def see(kernel: Any, config: KernelConfig, arguments: Mapping[str, Any]) -> None:
        seen[kernel.__name__] += 1

    with observed_launches(see):
        yield seen


@pytest.mark.parametrize("name", MODELS)
def test_the_same_tokens_as_by_torch(name: str, checkpoint: Callable[[str], Path], seed: int) -> None:
    """In chunks beside rows that decode, then behind cached prefixes."""
    path, given = checkpoint(name), prompts(seed)
    by_torch = generate(path, GREEDY, given, kernels="torch")
    by_triton = generate(path, GREEDY, given, kernels="triton", **IN_CHUNKS)
    assert tokens_of(by_triton) == tokens_of(by_torch)
    assert sum(output.num_cached_tokens or 0 for output in by_triton) >= 2 * 24


def test_the_same_tokens_drawn_with_filters(checkpoint: Callable[[str], Path], seed: int) -> None:
    path, given = checkpoint("llama_biases"), prompts(seed)
    params = replace(FILTERED, logit_bias={5: 2.0, 7: -100.0}, presence_penalty=0.3, frequency_penalty=0.2, n=2)
    drawn = [
        [
            [list(sample.token_ids) for sample in output.outputs]
            for output in generate(path, params, given, kernels=each)
        ]
        for each in ("torch", "triton")
    ]
    assert drawn[0] == drawn[1]


def test_what_a_step_launches(checkpoint: Callable[[str], Path]) -> None:
    """A decoding step attends by two kernels in each layer, whatever the number of rows."""
    path, counts = checkpoint("llama_biases"), []
    for tokens in (2, 3):
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        with counted() as launches, LLM(str(path), **OPTIONS, kernels="triton") as llm:
            llm.generate([{"prompt_token_ids": [3, 4, 5 + row]} for row in range(3)], params)
        counts.append(launches)
    step = {name: counts[1][name] - counts[0][name] for name in ATTENTION}
    layers = 2
    assert step == {name: count * layers for name, count in ATTENTION.items()}
    assert counts[0]["_attention_prefill_kernel"] == counts[1]["_attention_prefill_kernel"] == layers


def test_a_choice_for_one_operation(checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint("llama_biases")
    with counted() as launches:
        generate(path, GREEDY, [[3, 4, 5]], kernels="torch,norm=triton")
    assert launches
    assert all("norm" in name for name in launches)


@pytest.mark.parametrize(
    ("options", "field", "why"),
    [
        ({"kernels": "cuda"}, "kernels", "'cuda' is no backend: use one of auto, torch, triton"),
        ({"kernels": "conv=triton"}, "kernels", "'conv' is no operation: use one of "),
        ({"kernels": 3}, "kernels", "must be a name, or operation=backend with commas, got 3"),
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype", "must be one of auto, fp8, got 'int8'"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype", "'fp8' is for Triton's kernels, and on cpu attention is not"),
        (
            {"kv_cache_dtype": "fp8", "kernels": "triton", "sequence_parallel_size": 2},
            "kv_cache_dtype",
            "'fp8' is not for sequence_parallel_size 2",
        ),
    ],
)
def test_what_is_refused(options: dict[str, Any], field: str, why: str, checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError) as caught:
        LLM(str(checkpoint("llama_biases")), **{**OPTIONS, **options})
    assert caught.value.field == field
    assert why in caught.value.problem
