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

GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=1)
FILTERED = SamplingParams(
    temperature=0.9, seed=3, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.2, max_tokens=4, ignore_eos=True
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

EVERY_LAYER = {"_add_rms_norm_kernel": 2}
"""Launches of a decoding step in each layer, by kernel."""

MODES: dict[str, dict[str, Any]] = {
    "at once": {"enable_prefix_caching": False},
    "in chunks": {"enable_prefix_caching": False, "long_prefill_token_threshold": 5},
    "behind cached prefixes": {},
}


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
    path, given = checkpoint(name), prompts(seed)
    by_torch = generate(path, GREEDY, given, kernels="torch")
    for mode, options in MODES.items():
        with counted() as launches:
            by_triton = generate(path, GREEDY, given, kernels="triton", **options)
        assert launches, "nothing was launched"
        assert tokens_of(by_triton) == tokens_of(by_torch), mode
        if not options:
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
    """A decoding step by the table's own choice of Triton: each layer's operations are one kernel each."""
    path = checkpoint("llama_biases")
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    several = replace(params, max_tokens=3)
    counts = []
    for each in (params, several):
        with counted() as launches:
            generate(path, each, [[3, 4, 5]], kernels="triton", enable_prefix_caching=False)
        counts.append(launches)
    # Each of the two requests of ``generate`` has one decoding step more.
    step = {name: (counts[1][name] - counts[0][name]) // 2 for name in counts[1]}
    layers = 2
    assert {name: step[name] for name in EVERY_LAYER} == {name: count * layers for name, count in EVERY_LAYER.items()}


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
