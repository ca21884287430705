"""Every sampling parameter through the whole engine, against transformers' logits and a plain implementation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slipstream import LLM, SamplingParams
from slipstream.tests.parity.references import Reference, load_reference, prompts
from slipstream.tests.worker.plain_sampling import plain_draw, plain_edits

NEW_TOKENS = 40
STOP = 2

PARAMETERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 1.3},
    "top_p": {"temperature": 0.9, "top_p": 0.7},
    "top_k": {"temperature": 1.1, "top_k": 5},
    "min_p": {"temperature": 1.0, "min_p": 0.2},
    "all filters": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "repetition": {"temperature": 0.0, "repetition_penalty": 1.7},
    "frequency": {"temperature": 0.0, "frequency_penalty": 1.1},
    "presence": {"temperature": 0.7, "presence_penalty": 1.5},
    "logit_bias": {"temperature": 0.6, "logit_bias": {5: 4.0, 9: -100.0, 77: 2.5}},
    "min_tokens": {"temperature": 1.0, "logit_bias": {STOP: 6.0}, "min_tokens": 15},
    "everything": {
        "temperature": 0.9,
        "top_p": 0.95,
        "top_k": 50,
        "min_p": 0.005,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
        "presence_penalty": -0.2,
        "logit_bias": {3: 1.0},
        "min_tokens": 5,
    },
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return load_reference("llama", tmp_path_factory.mktemp("checkpoint"))


def plain_continuation(reference: Reference, prompt: list[int], params: SamplingParams, seed: int) -> list[int]:
    """Generate one token at a time from whole-text logits and the plain sampler."""
    output: list[int] = []
    while len(output) < NEW_TOKENS:
        logits = reference.logits([*prompt, *output])[-1].tolist()
        edited = plain_edits(logits, params, prompt, output, [STOP])
        output.append(plain_draw(edited, params, seed, len(prompt) + len(output)))
        if output[-1] == STOP:
            break
    return output


@pytest.mark.parametrize("name", PARAMETERS)
def test_tokens_equal_the_plain_implementation(name: str, reference: Reference) -> None:
    params = SamplingParams(max_tokens=NEW_TOKENS, seed=99, **PARAMETERS[name])
    asked = prompts(4)
    expected = [plain_continuation(reference, prompt, params, 99) for prompt in asked]
    # Small chunks and few blocks: penalties must survive chunking and preemption.
    options: dict[str, Any] = {
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "max_model_len": 112,
        "num_gpu_blocks_override": 12,
    }
    with LLM(str(reference.path), long_prefill_token_threshold=7, block_size=16, **options) as llm:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in asked], params)
    assert [output.outputs[0].token_ids for output in outputs] == expected


def test_samples_of_a_request_differ_and_repeat(reference: Reference) -> None:
    params = SamplingParams(n=5, temperature=1.0, seed=3, max_tokens=20, ignore_eos=True)
    with LLM(str(reference.path), dtype="float32", skip_tokenizer_init=True) as llm:
        runs = [llm.generate({"prompt_token_ids": prompts(3)[2]}, params)[0] for _ in range(2)]
        single = llm.generate(
            {"prompt_token_ids": prompts(3)[2]}, SamplingParams(seed=3, max_tokens=20, ignore_eos=True)
        )
    tokens = [[tuple(sample.token_ids) for sample in run.outputs] for run in runs]
    assert tokens[0] == tokens[1]
    assert len(set(tokens[0])) == 5
    assert tuple(single[0].outputs[0].token_ids) == tokens[0][0]


def test_logprobs_are_the_models_own_before_any_processing(reference: Reference) -> None:
    params = SamplingParams(
        temperature=0.5, top_k=3, repetition_penalty=1.5, seed=4, logprobs=6, prompt_logprobs=3, max_tokens=12
    )
    prompt = prompts(3)[2]
    with LLM(str(reference.path), dtype="float32", skip_tokenizer_init=True) as llm:
        output = llm.generate({"prompt_token_ids": prompt}, params)[0]
    sample = output.outputs[0]
    rows = reference.logits([*prompt, *sample.token_ids]).log_softmax(-1)
    assert sample.logprobs is not None and output.prompt_logprobs is not None
    tables = [*output.prompt_logprobs[1:], *sample.logprobs]
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(prompt)
    for position, table in enumerate(tables):
        assert table is not None
        row = rows[position]
        actual = [*prompt, *sample.token_ids][position + 1]
        count = 3 if position + 1 < len(prompt) else 6
        top = row.topk(count).indices.tolist()
        assert set(table) == {*top, actual}
        for token, entry in table.items():
            assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
            assert entry.rank == 1 + int((row > row[token]).sum())
    total = sum(sample.logprobs[place][token].logprob for place, token in enumerate(sample.token_ids))
    assert sample.cumulative_logprob == pytest.approx(total, abs=1e-4)


def test_a_model_whose_logits_are_not_numbers_fails_by_name(reference: Reference, tmp_path: Path) -> None:
    """NaN weights: the request ends with an error, never with tokens that mean nothing."""
    reference.model.save_pretrained(tmp_path)
    broken = reference.model.__class__.from_pretrained(tmp_path)
    broken.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    broken.save_pretrained(tmp_path)
    with LLM(str(tmp_path), dtype="float32", skip_tokenizer_init=True) as llm:
        output = llm.generate({"prompt_token_ids": [5, 6, 7]}, SamplingParams(max_tokens=8))[0]
        assert (output.outputs[0].finish_reason, output.outputs[0].token_ids) == ("error", [])
        assert llm._engine.scheduler.pool.available == llm._engine.scheduler.pool.num_blocks


def test_log_probabilities_survive_chunks_and_preemption(reference: Reference) -> None:
    """A prompt that is interrupted and computed again reports each of its positions once, with the same values."""
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, logprobs=2, prompt_logprobs=2, n=2)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts(8)]
    options: dict[str, Any] = {"dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 112}
    with LLM(str(reference.path), **options) as llm:
        plain = llm.generate(asked, params)
    with LLM(str(reference.path), long_prefill_token_threshold=7, num_gpu_blocks_override=10, **options) as llm:
        pressed = llm.generate(asked, params)
    assert sum(output.metrics.preemptions for output in pressed) > 0
    for expected, got in zip(plain, pressed, strict=True):
        assert expected.prompt_logprobs is not None and got.prompt_logprobs is not None
        assert len(got.prompt_logprobs) == len(got.prompt_token_ids)
        pairs = list(zip(expected.prompt_logprobs[1:], got.prompt_logprobs[1:], strict=True))
        for sample, other in zip(expected.outputs, got.outputs, strict=True):
            assert sample.token_ids == other.token_ids
            assert sample.logprobs is not None and other.logprobs is not None
            pairs += zip(sample.logprobs, other.logprobs, strict=True)
        for one, two in pairs:
            assert one is not None and two is not None
            for token in one.keys() & two.keys():
                assert one[token].logprob == pytest.approx(two[token].logprob, abs=1e-4)
