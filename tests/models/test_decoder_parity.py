"""The raw decoder through the paged cache against transformers, for every case of ``CASES``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from slipstream.runtime.models.decoder import Decoder, load_decoder
from slipstream.runtime.models.model_spec import ModelSpec
from slipstream.runtime.models.registry import read_model_spec
from slipstream.tests.models.checkpoints import CASES, SHORT, VOCABULARY, make_checkpoint
from slipstream.tests.models.paged import WHOLE, PagedRunner

CPU = torch.device("cpu")
LENGTHS = (150, 61, 5, 97, 1)
TOLERANCE = 1e-4
MIXED = (WHOLE, 1, 7, 64, 1)
# (chunk of each sequence in turn, block size): all chunk and block sizes, and both kinds of row in one batch.
WAYS = [
    ((WHOLE,), 8),
    ((7,), 8),
    ((1,), 16),
    ((7,), 16),
    ((64,), 16),
    ((WHOLE,), 16),
    (MIXED, 16),
    ((64,), 32),
    (MIXED, 32),
]
ALL_WAYS = [(chunks, size) for chunks in ((1,), (7,), (64,), (WHOLE,), MIXED) for size in (8, 16, 32)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """One case: our spec and decoder, the reference model, and its log-probabilities for the prompts."""

    path: Path
    spec: ModelSpec
    decoder: Decoder
    reference: PreTrainedModel
    expected: tuple[Tensor, ...]


def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def reference_model(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=dtype).eval()


def forget_lengths(model: PreTrainedModel) -> None:
    """With dynamic rope the reference keeps the longest length seen until it meets a short prompt."""
    with torch.inference_mode():
        model(torch.zeros((1, 1), dtype=torch.int64))


def reference_logprobs(model: PreTrainedModel) -> tuple[Tensor, ...]:
    expected = []
    for prompt in prompts():
        forget_lengths(model)
        with torch.inference_mode():
            expected.append(model(prompt[None]).logits[0].float().log_softmax(-1))
    return tuple(expected)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Loaded]:
    @cache
    def load_case(name: str) -> Loaded:
        path = make_checkpoint(name, tmp_path_factory.mktemp("checkpoints") / name)
        spec = read_model_spec(path)
        reference = reference_model(path, torch.float32)
        return Loaded(
            path=path,
            spec=spec,
            decoder=load_decoder(path, spec, dtype=torch.float32, device=CPU),
            reference=reference,
            expected=reference_logprobs(reference),
        )

    return load_case


def run(decoder: Decoder, chunks: tuple[int, ...], block_size: int) -> list[Tensor]:
    runner = PagedRunner(decoder, sequences=len(LENGTHS), longest=max(LENGTHS), block_size=block_size)
    return [logits.log_softmax(-1) for logits in runner.prefill(prompts(), chunks)]


def assert_close(found: list[Tensor], expected: tuple[Tensor, ...]) -> None:
    for length, mine, theirs in zip(LENGTHS, found, expected, strict=True):
        assert not mine.isnan().any(), f"prompt of {length} tokens gives values that are not numbers"
        worst = (mine - theirs).abs().max().item()
        assert worst <= TOLERANCE, f"prompt of {length} tokens: log-probabilities differ by {worst:.2e}"


@pytest.mark.parametrize("name", CASES)
def test_logprobs_equal_those_of_transformers(name: str, load: Callable[[str], Loaded]) -> None:
    loaded = load(name)
    for chunks, block_size in WAYS:
        assert_close(run(loaded.decoder, chunks, block_size), loaded.expected)


@pytest.mark.parametrize("name", ["llama", "qwen3_mixed_layers", "llama_dynamic", "deepseek_v3"])
@pytest.mark.parametrize(("chunks", "block_size"), ALL_WAYS)
def test_every_chunk_size_with_every_block_size(
    name: str, chunks: tuple[int, ...], block_size: int, load: Callable[[str], Loaded]
) -> None:
    loaded = load(name)
    assert_close(run(loaded.decoder, chunks, block_size), loaded.expected)


@pytest.mark.parametrize(
    "name",
    ["llama_dynamic", "mistral_window", "qwen3_mixed_layers", "qwen3_moe", "gemma2", "gpt_oss", "deepseek_v3"],
)
@pytest.mark.parametrize("prompt_length", [5, SHORT + 9])
def test_greedy_tokens_equal_those_of_generate(name: str, prompt_length: int, load: Callable[[str], Loaded]) -> None:
    loaded = load(name)
    prompt = prompts()[0][:prompt_length]
    loaded.reference.generation_config.eos_token_id = None
    forget_lengths(loaded.reference)
    expected = loaded.reference.generate(prompt[None], max_new_tokens=64, do_sample=False)[0]
    runner = PagedRunner(loaded.decoder, sequences=1, longest=prompt_length + 64, block_size=16)
    tokens = prompt
    logits = runner.prefill([prompt], [16])[0][-1:]
    for _ in range(64):
        new = logits.argmax(-1)
        logits = runner.step([(0, len(tokens), new)], [prompt_length])
        tokens = torch.cat((tokens, new))
    assert tokens.tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name",
    ["llama_wide_heads", "llama_yarn", "qwen2", "qwen3_mixed_layers", "mixtral", "gemma2", "gpt_oss", "deepseek_v3"],
)
def test_half_precision_is_as_close_to_float32_as_transformers(
    name: str, dtype: torch.dtype, load: Callable[[str], Loaded]
) -> None:
    """The median over all log-probabilities is at most 1.3 times that of transformers in the same type.

    The median, because at a near-tie of experts either side may choose the other one.
    """
    loaded = load(name)
    decoder = load_decoder(loaded.path, loaded.spec, dtype=dtype, device=CPU)
    exact = torch.cat(loaded.expected)
    reference = reference_model(loaded.path, dtype)
    theirs = (torch.cat(reference_logprobs(reference)) - exact).abs().median().item()
    for chunks in ((WHOLE,), (1,), (7,)):
        ours = (torch.cat(run(decoder, chunks, 16)) - exact).abs().median().item()
        assert ours <= 1.3 * theirs, f"chunks of {chunks}: {ours:.4f} from float32, transformers {theirs:.4f}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen3_mixed_layers"])
def test_attention_of_a_row_does_not_depend_on_batch_mates(
    name: str, dtype: torch.dtype, load: Callable[[str], Loaded]
) -> None:
    """Alone or beside others, the same log-probabilities up to the rounding of the matrix products."""
    loaded = load(name)
    decoder = load_decoder(loaded.path, loaded.spec, dtype=dtype, device=CPU)
    together = run(decoder, (7,), 16)
    for index, prompt in enumerate(prompts()):
        runner = PagedRunner(decoder, sequences=1, longest=len(prompt), block_size=16, seed=index)
        alone = runner.prefill([prompt], (7,))[0].log_softmax(-1)
        tolerance = 1e-4 if dtype == torch.float32 else 0.15
        assert (alone - together[index]).abs().max().item() <= tolerance


def test_parameter_counts_equal_those_of_transformers(load: Callable[[str], Loaded]) -> None:
    for name in CASES:
        loaded = load(name)
        counted = sum(parameter.numel() for parameter in loaded.reference.parameters())
        assert loaded.spec.facts().parameters == counted, name
