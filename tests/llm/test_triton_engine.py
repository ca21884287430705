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
from transformers import DeepseekV3Config, Gemma2Config, GptOssConfig, Qwen3Config, Qwen3MoeConfig

from slipstream import LLM, ConfigError, RequestOutput, SamplingParams
from slipstream.kernels import backends
from slipstream.kernels.launch import HAS_TRITON, KernelConfig, observed_launches
from slipstream.runtime.models.linear import Linear
from slipstream.tests.models.checkpoints import VOCABULARY, Case, random_model

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
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_bias": True,
}
MODELS = {
    "dense": Case(
        config_class=Qwen3Config,
        fields={
            **SIZES,
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "experts": Case(
        config_class=Qwen3MoeConfig,
        fields={**SIZES, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    "caps": Case(
        config_class=Gemma2Config,
        fields={**SIZES, "sliding_window": 9, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "sinks": Case(
        config_class=GptOssConfig,
        fields={
            **SIZES,
            "sliding_window": 9,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "swiglu_limit": 1.5,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 256,
                "truncate": False,
            },
        },
    ),
    "latents": Case(
        config_class=DeepseekV3Config,
        fields={
            **SIZES,
            "num_key_value_heads": 2,
            "q_lora_rank": 20,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 12,
            "qk_rope_head_dim": 16,
            "v_head_dim": 12,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "n_group": 4,
            "topk_group": 2,
        },
    ),
}
"""With norms of heads and biases: one with a window in the first of its layers, one with experts. Then one with caps,
one with sinks, one with latents.
"""

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
            made[name] = tmp_path_factory.mktemp(name)
            random_model(MODELS[name]).save_pretrained(made[name])
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


def test_the_same_tokens_drawn_with_filters(checkpoint: Callable[[str], Path]) -> None:
    edits: dict[str, Any] = {"logit_bias": {5: 2.0, 7: -100.0}, "presence_penalty": 0.3, "frequency_penalty": 0.2}
    drawn = []
    for kernels in ("torch", "triton"):
        with LLM(str(checkpoint("dense")), **OPTIONS, kernels=kernels) as llm:
            (output,) = llm.generate({"prompt_token_ids": [11, 12]}, replace(FILTERED, n=2, **edits))
            drawn.append([list(sample.token_ids) for sample in output.outputs])
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("name", ["dense", "latents"])
def test_deterministic_gives_the_same_bits(name: str, checkpoint: Callable[[str], Path], seed: int) -> None:
    """Alone and at once, or in chunks beside others and behind a cached prefix."""
    draw = random.Random(seed)
    shared = [draw.randrange(3, VOCABULARY) for _ in range(9)]
    given, how = [[*shared, 5], [*shared, 7, 9]], {"kernels": "triton", "deterministic": True}
    params = replace(GREEDY, max_tokens=2)
    alone = generate(checkpoint(name), params, given, max_num_seqs=1, enable_prefix_caching=False, **how)
    among = generate(checkpoint(name), params, given, long_prefill_token_threshold=4, **how)
    assert sum(output.num_cached_tokens or 0 for output in among) >= 8
    assert [bits(output) for output in among] == [bits(output) for output in alone]


def test_two_ranks_compute_by_the_same_kernels(checkpoint: Callable[[str], Path]) -> None:
    """The choice goes to every rank with its setup."""
    path, given = checkpoint("experts"), [[3, 4, 5]]
    by_torch = generate(path, GREEDY, given, kernels="torch", enable_prefix_caching=False)
    ranks = {"tensor_parallel_size": 2, "sharded_norm": False, "enable_prefix_caching": False}
    by_triton = generate(path, GREEDY, given, kernels="triton", **ranks)
    assert tokens_of(by_triton) == tokens_of(by_torch)


def bits(output: RequestOutput) -> list[list[tuple[int, float]]]:
    """Return what tokens were drawn from, so that any rounding shows."""
    tables = output.outputs[0].logprobs or []
    return [sorted((token, entry.logprob) for token, entry in (table or {}).items()) for table in tables]


def test_samples_of_a_prompt_read_its_keys_once(checkpoint: Callable[[str], Path], seed: int) -> None:
    """Behind a whole span of keys that they share, in the layer without a window."""
    draw = random.Random(seed)
    prompt = {"prompt_token_ids": [draw.randrange(3, VOCABULARY) for _ in range(520)]}
    options = {**OPTIONS, "max_model_len": 544, "num_gpu_blocks_override": 96}
    params = SamplingParams(n=4, temperature=1.0, seed=seed, max_tokens=3, ignore_eos=True)
    drawn = []
    for kernels in ("torch", "torch,attention=triton"):
        with counted() as launches, LLM(str(checkpoint("dense")), **options, kernels=kernels) as llm:
            (output,) = llm.generate(prompt, params)
            drawn.append([list(sample.token_ids) for sample in output.outputs])
    assert drawn[0] == drawn[1]
    assert launches["_shared_prefix_kernel"] == 2, "one for each decoding step of four rows"


def test_a_cache_of_8_bits(checkpoint: Callable[[str], Path], seed: int) -> None:
    """Tokens may be others; what the first is drawn from is nearly the same, and prefixes are found as ever."""
    path, given = checkpoint("dense"), prompts(seed)
    exact = generate(path, GREEDY, given, kernels="torch", dtype="bfloat16")
    small = generate(path, GREEDY, given, kernels="triton", dtype="bfloat16", kv_cache_dtype="fp8", **IN_CHUNKS)
    differences = [abs(largest(one) - largest(other)) for one, other in zip(small, exact, strict=True)]
    assert 0 < max(differences) < 1
    assert tokens_of(small[3:]) == tokens_of(small[:3][::-1]), "what the cache had is what would be computed"
    assert sum(output.num_cached_tokens or 0 for output in small) >= 2 * 24


def largest(output: RequestOutput) -> float:
    """Return the log-probability of the first token's best candidate."""
    table = (output.outputs[0].logprobs or [])[0]
    assert table is not None
    return max(entry.logprob for entry in table.values())


def test_what_a_step_launches(checkpoint: Callable[[str], Path]) -> None:
    """A decoding step attends by two kernels in each layer, whatever the number of rows."""
    path, counts = checkpoint("dense"), []
    for tokens in (2, 3):
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        with counted() as launches, LLM(str(path), **OPTIONS, kernels="triton") as llm:
            llm.generate([{"prompt_token_ids": [3, 4, 5 + row]} for row in range(3)], params)
        counts.append(launches)
    step = {name: counts[1][name] - counts[0][name] for name in ATTENTION}
    layers = 2
    assert step == {name: count * layers for name, count in ATTENTION.items()}
    assert counts[0]["_attention_prefill_kernel"] == counts[1]["_attention_prefill_kernel"] == layers


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_norms_and_activations_give_8_bits_at_once(
    quantization: str, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One launch where there were two, of the same bits."""
    path, params = checkpoint("dense"), replace(GREEDY, max_tokens=1)
    kernels = "torch,norm=triton,activation=triton,quantize_rows=triton,linear_w8a8=triton"
    found = []
    for takes in (Linear.takes, None):
        monkeypatch.setattr(Linear, "takes", takes)
        how: dict[str, Any] = {"kernels": kernels, "dtype": "bfloat16", "quantization": quantization}
        with counted() as launches, LLM(str(path), **{**OPTIONS, **how}) as llm:
            outputs = llm.generate({"prompt_token_ids": [3, 4, 5]}, params)
        at_once = {name: launches[name] for name in ("_quantized_norm_kernel", "_silu_and_mul_quantized_kernel")}
        # A step of two layers.
        expected = {"_quantized_norm_kernel": 4, "_silu_and_mul_quantized_kernel": 2}
        assert at_once == (dict.fromkeys(expected, 0) if takes is None else expected)
        found.append([bits(output) for output in outputs])
    assert found[0] == found[1]


def test_latents_are_attended_to_by_their_own_kernels(checkpoint: Callable[[str], Path]) -> None:
    with counted() as launches:
        generate(checkpoint("latents"), GREEDY, [[3, 4, 5]], kernels="triton")
    assert launches["_mla_prefill_kernel"] > 0
    assert launches["_mla_decode_kernel"] > 0
    assert not any(name.startswith(("_attention_prefill", "_attention_decode")) for name in launches)


def test_a_choice_for_one_operation(checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint("dense")
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
            {"kv_cache_dtype": "fp8", "kernels": "triton"},
            "kv_cache_dtype",
            "is for dtype bfloat16, the dtype is float32",
        ),
        (
            {"dtype": "bfloat16", "kv_cache_dtype": "fp8", "kernels": "triton", "sequence_parallel_size": 2},
            "kv_cache_dtype",
            "'fp8' is not for sequence_parallel_size 2",
        ),
    ],
)
def test_what_is_refused(options: dict[str, Any], field: str, why: str, checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError) as caught:
        LLM(str(checkpoint("dense")), **{**OPTIONS, **options})
    assert caught.value.field == field
    assert why in caught.value.problem
