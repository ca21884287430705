"""``LLM`` as a user meets it, on the bundled checkpoint: text, chats, streams, stop strings, errors, clean-up."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slipstream import LLM, ConfigError, InvalidRequest, RequestOutput, SamplingParams
from slipstream.sdk.results import StreamOutput

DEMO_MODEL = Path(__file__).resolve().parents[2] / "examples" / "demo_model"
PROMPTS = ["def read(path):\n", "class Queue:\n    def __init__(self", "import os\n\n\ndef main("]
GREEDY = SamplingParams(temperature=0.0, max_tokens=40)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(DEMO_MODEL, dtype="float32", max_num_seqs=16, max_model_len=512) as model:
        yield model


def assert_idle(llm: LLM) -> None:
    scheduler = llm._engine.scheduler
    scheduler.check_integrity()
    assert not scheduler.has_work and scheduler.pool.available == scheduler.pool.num_blocks


def test_results_come_in_the_order_of_the_prompts_with_everything_filled_in(llm: LLM) -> None:
    outputs = llm.generate(PROMPTS, GREEDY)
    assert [output.prompt for output in outputs] == PROMPTS
    tokenizer = llm.get_tokenizer()
    assert tokenizer is not None
    for output in outputs:
        sample = output.outputs[0]
        assert output.finished and sample.finish_reason in ("length", "stop")
        assert output.prompt_token_ids == tokenizer.encode(output.prompt or "")
        assert sample.text == tokenizer.decode(sample.token_ids, skip_special_tokens=True)
        metrics = output.metrics
        assert metrics.first_scheduled_time_s is not None and metrics.finished_time_s is not None
        assert metrics.arrival_time_s <= metrics.first_scheduled_time_s <= (metrics.first_token_time_s or 0)
        assert (metrics.ttft_s or 0) <= (metrics.latency_s or 0)
        assert (metrics.tpot_s(len(sample.token_ids)) or 0) > 0
    assert_idle(llm)


def test_every_form_of_a_prompt_gives_the_same(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    assert tokenizer is not None
    ids = tokenizer.encode(PROMPTS[0])
    forms: list[Any] = [PROMPTS[0], {"prompt": PROMPTS[0]}, {"prompt_token_ids": ids}, ids]
    texts = {llm.generate(form, GREEDY)[0].outputs[0].text for form in forms}
    assert len(texts) == 1
    assert {output.outputs[0].text for output in llm.generate(forms, [GREEDY] * 4)} == texts


def collect(pieces: Iterator[StreamOutput]) -> dict[tuple[str, int], tuple[str, list[int]]]:
    texts: dict[tuple[str, int], str] = defaultdict(str)
    tokens: dict[tuple[str, int], list[int]] = defaultdict(list)
    ended: list[tuple[str, int]] = []
    for piece in pieces:
        key = (str(piece.output.prompt), piece.index)
        assert key not in ended, "a piece after the last one"
        texts[key] += piece.text
        tokens[key] += piece.token_ids
        if piece.finish_reason is not None:
            ended.append(key)
    assert sorted(ended) == sorted(texts)
    return {key: (texts[key], tokens[key]) for key in texts}


def test_a_stream_adds_up_to_the_whole(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=0.9, seed=5, max_tokens=50, stop=["return", "\n\n"])
    whole = llm.generate(PROMPTS, params)
    streamed = collect(llm.stream(PROMPTS, params))
    for output in whole:
        for sample in output.outputs:
            assert streamed[str(output.prompt), sample.index] == (sample.text, sample.token_ids)
    assert_idle(llm)


def test_stop_strings_end_the_text_and_never_leak(llm: LLM) -> None:
    free = llm.generate(PROMPTS, GREEDY)
    for output in free:
        text = output.outputs[0].text
        for begin in range(3, min(24, len(text) - 4), 5):
            stop = text[begin : begin + 4]
            found = text.index(stop)
            stopped = llm.generate(str(output.prompt), SamplingParams(temperature=0.0, max_tokens=40, stop=stop))[0]
            sample = stopped.outputs[0]
            assert sample.text == text[:found]
            assert (sample.finish_reason, sample.stop_reason) == ("stop", stop)
            kept = SamplingParams(temperature=0.0, max_tokens=40, stop=stop, include_stop_str_in_output=True)
            assert llm.generate(str(output.prompt), kept)[0].outputs[0].text == text[: found + len(stop)]
            seen = "".join(
                piece.text
                for piece in llm.stream(str(output.prompt), SamplingParams(temperature=0.0, max_tokens=40, stop=stop))
            )
            assert seen == text[:found]
    assert_idle(llm)


def test_a_stop_id_ends_the_tokens_and_stays_out_of_the_text(llm: LLM) -> None:
    free = llm.generate(PROMPTS[0], GREEDY)[0].outputs[0]
    stop_id = free.token_ids[7]
    first = free.token_ids.index(stop_id)
    params = SamplingParams(temperature=0.0, max_tokens=40, stop_token_ids=[stop_id])
    sample = llm.generate(PROMPTS[0], params)[0].outputs[0]
    assert sample.token_ids == free.token_ids[: first + 1]
    assert (sample.finish_reason, sample.stop_reason) == ("stop", stop_id)
    tokenizer = llm.get_tokenizer()
    assert tokenizer is not None and sample.text == tokenizer.decode(sample.token_ids[:-1], skip_special_tokens=True)


def test_a_chat_goes_through_the_template_and_ends_with_its_end_token(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Write the function `add(a, b)`."}]
    output = llm.chat(messages, GREEDY)[0]
    assert output.prompt is not None and "Write the function" in output.prompt
    assert output.prompt_token_ids == llm.render_chat(messages)["prompt_token_ids"]
    two = llm.chat([messages, messages], GREEDY)
    assert [other.outputs[0].text for other in two] == [output.outputs[0].text] * 2


def test_the_prefix_cache_is_seen_in_the_result(llm: LLM) -> None:
    llm.reset_prefix_cache()
    prompt = "import collections\n" * 12
    cold, warm = (llm.generate(prompt, GREEDY)[0] for _ in range(2))
    assert cold.num_cached_tokens == 0 and warm.num_cached_tokens > 16
    assert cold.outputs[0].token_ids == warm.outputs[0].token_ids
    salted = llm.generate({"prompt": prompt, "cache_salt": "tenant"}, GREEDY)[0]
    assert salted.num_cached_tokens == 0


def test_max_tokens_none_goes_up_to_the_models_length() -> None:
    with LLM(DEMO_MODEL, max_model_len=64) as small:
        output = small.generate("x = 1\n", SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True))[0]
        assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 64
        assert output.outputs[0].finish_reason == "length"


def test_leaving_a_stream_early_frees_everything(llm: LLM) -> None:
    pieces = llm.stream(PROMPTS, SamplingParams(max_tokens=400, ignore_eos=True, n=2))
    for _ in range(5):
        next(pieces)
    pieces.close()
    assert_idle(llm)


def test_a_stream_may_pause_while_another_call_runs(llm: LLM) -> None:
    expected = llm.generate(PROMPTS[0], GREEDY)[0].outputs[0].text
    pieces = llm.stream(PROMPTS[0], GREEDY)
    text = next(pieces).text
    assert llm.generate(PROMPTS[1], GREEDY)[0].finished
    assert text + "".join(piece.text for piece in pieces) == expected


def test_threads_share_an_engine(llm: LLM) -> None:
    expected = [output.outputs[0].text for output in llm.generate(PROMPTS, GREEDY)]
    results: dict[int, list[RequestOutput]] = {}

    def work(place: int) -> None:
        results[place] = llm.generate(PROMPTS, GREEDY)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    for outputs in results.values():
        assert [output.outputs[0].text for output in outputs] == expected
    assert len(results) == 4
    assert_idle(llm)


def test_more_requests_than_the_queue_holds_wait_outside() -> None:
    with LLM(DEMO_MODEL, max_num_seqs=2, max_queued_requests=1, max_model_len=64) as small:
        outputs = small.generate(["a = "] * 9, SamplingParams(max_tokens=3, temperature=0.0))
    assert len(outputs) == 9 and all(output.finished for output in outputs)


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ("", "prompt"),
        (7, "prompts"),
        ([3.5], "prompt"),
        ({"text": "x"}, "prompt"),
        ({"cache_salt": "x"}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": "x", "cache_salt": ""}, "cache_salt"),
        ({"prompt_token_ids": "12"}, "prompt_token_ids"),
        ({"prompt_token_ids": []}, "prompt"),
        ({"prompt_token_ids": [1, -1]}, "prompt_token_ids"),
        ({"prompt_token_ids": [1, 10**9]}, "prompt_token_ids"),
        ({"prompt_token_ids": [1, True]}, "prompt_token_ids"),
        ({"prompt_token_ids": [1, 2.0]}, "prompt_token_ids"),
        ({"prompt_token_ids": [5] * 512}, "prompt"),
    ],
)
def test_a_bad_prompt_is_refused_by_name_before_any_work(llm: LLM, prompt: Any, field: str) -> None:
    for call in (llm.generate, llm.stream):
        with pytest.raises(InvalidRequest) as refused:
            call(["x = 1", prompt] if field != "prompts" else prompt, GREEDY)
        assert refused.value.field == field
    assert_idle(llm)


@pytest.mark.parametrize(
    ("params", "field"),
    [
        (SamplingParams(stop_token_ids=[10**6]), "stop_token_ids"),
        (SamplingParams(logit_bias={10**6: 1.0}), "logit_bias"),
        (SamplingParams(n=17), "n"),
        ([SamplingParams()] * 3, "sampling_params"),
        ({"temperature": 1}, "sampling_params"),
    ],
)
def test_parameters_that_do_not_fit_the_model_are_refused_by_name(llm: LLM, params: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        llm.generate("x = 1", params)
    assert refused.value.field == field
    assert_idle(llm)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_num_sequences": 4}, "max_num_sequences"),
        ({"dtype": "int8"}, "dtype"),
        ({"device": "tpu"}, "device"),
        ({"max_model_len": 0}, "max_model_len"),
        ({"max_model_len": 10**6}, "max_model_len"),
        ({"block_size": -1}, "block_size"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 32}, "max_num_batched_tokens"),
        ({"scheduling_policy": "lottery"}, "scheduling_policy"),
        ({"kv_cache_memory_bytes": 1000}, "kv_cache_memory_bytes"),
        ({"max_model_len": 512, "num_gpu_blocks_override": 4}, "max_model_len"),
        ({"kv_cache_memory_bytes": 1, "num_gpu_blocks_override": 4}, "num_gpu_blocks_override"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size"),
        ({"tensor_parallel_size": 3}, "tensor_parallel_size"),
        ({"sequence_parallel_size": 0}, "sequence_parallel_size"),
        ({"expert_parallel_size": 2, "enable_expert_parallel": True}, "expert_parallel_size"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"step_timeout_s": 0}, "step_timeout_s"),
        ({"long_prefill_token_threshold": -3}, "long_prefill_token_threshold"),
    ],
)
def test_a_bad_option_is_refused_by_name(options: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError) as refused:
        LLM(DEMO_MODEL, **options)
    assert refused.value.field == field


def test_a_misspelt_option_is_corrected() -> None:
    with pytest.raises(ConfigError, match="did you mean 'max_num_seqs'"):
        LLM(DEMO_MODEL, max_num_seq=4)


def test_closing_twice_is_fine_and_using_a_closed_model_says_so() -> None:
    model = LLM(DEMO_MODEL, max_model_len=64)
    model.close()
    model.close()
    with pytest.raises(Exception, match="closed"):
        model.generate("x")
