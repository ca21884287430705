"""The whole engine by Triton's kernels, in the interpreter: the same tokens as by torch's operations."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from slipstream import LLM, RequestOutput, SamplingParams
from slipstream.kernels import backends
from slipstream.kernels.launch import HAS_TRITON, KernelConfig, observed_launches
from slipstream.tests.models.checkpoints import VOCABULARY, make_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=1)
FILTERED = SamplingParams(
    temperature=0.9, seed=3, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.2, max_tokens=6, ignore_eos=True
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
    shared = [draw.randrange(3, VOCABULARY) for _ in range(27)]
    return [
        [draw.randrange(3, VOCABULARY) for _ in range(4)],
        [*shared, 5],
        [draw.randrange(3, VOCABULARY)],
        [*shared, 7, 9, 11],
    ]


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
