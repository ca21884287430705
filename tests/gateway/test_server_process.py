"""The real thing: ``slipstream serve`` in its two processes, driven by OpenAI's own client."""

from __future__ import annotations

import concurrent.futures
import json
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from slipstream import LLM, SamplingParams
from slipstream.tests.gateway.server_process import PATIENCE_S, Server, eventually, make_model, running_server

STREAMS = 50
TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(
        model,
        tmp_path_factory.mktemp("log") / "server.log",
        "--max-num-seqs",
        "16",
        "--kv-cache-memory-bytes",
        "16000000",
    ) as running:
        yield running
        eventually(running.everything_is_free, within_s=1.0, what="all blocks free at the end")


def test_the_same_text_as_in_process(server: Server, model: Path) -> None:
    prompts = ["The quick", "def add(a", "Grüße aus"]
    with LLM(str(model), max_num_seqs=4, kv_cache_memory_bytes=4_000_000) as llm:
        for temperature in (0.0, 0.9):
            params = SamplingParams(max_tokens=24, temperature=temperature, seed=5, n=2)
            expected = [sample.text for output in llm.generate(prompts, params) for sample in output.outputs]
            answer = server.openai.completions.create(
                model="tiny", prompt=prompts, max_tokens=24, temperature=temperature, seed=5, n=2
            )
            assert [choice.text for choice in answer.choices] == expected
            assert answer.usage and answer.usage.completion_tokens <= 6 * 24


def test_completions(server: Server) -> None:
    client = server.openai
    assert [card.id for card in client.models.list()] == ["tiny"]
    body: dict[str, Any] = {"model": "tiny", "prompt": "The quick", "max_tokens": 20, "seed": 3, "logprobs": 2}
    whole = client.completions.create(**body)
    chunks = list(client.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    assert whole.choices[0].logprobs and len(whole.choices[0].logprobs.tokens or []) == 20
    other = client.completions.create(**{**body, "seed": 4})
    assert other.choices[0].text != whole.choices[0].text
    several = client.completions.create(**{**body, "n": 3})
    assert len({choice.text for choice in several.choices}) == 3
    stop = whole.choices[0].text[8:10]
    stopped = client.completions.create(**body, stop=[stop])
    assert stopped.choices[0].finish_reason == "stop" and stop not in stopped.choices[0].text


def test_chat(server: Server) -> None:
    body: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "max_completion_tokens": 16,
        "seed": 1,
    }
    whole = server.openai.chat.completions.create(**body, logprobs=True, top_logprobs=2)
    chunks = list(
        server.openai.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}, tools=TOOLS)
    )
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens == 16
    assert whole.choices[0].message.content is not None
    assert len(whole.choices[0].logprobs.content) == 16
    again = server.openai.chat.completions.create(**body)
    assert again.choices[0].message.content == whole.choices[0].message.content


def test_errors(server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        server.openai.completions.create(model="tiny", prompt="x", temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        server.openai.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError):
        server.openai.completions.create(model="tiny", prompt="x " * 5000)


def test_a_client_that_leaves_frees_everything(server: Server) -> None:
    stream = server.openai.completions.create(
        model="tiny", prompt="x", max_tokens=1900, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert server.metric("slipstream_gateway_in_flight") == 1
    stream.close()
    eventually(server.everything_is_free, within_s=1.0, what="all free after the client left")


def test_tokens_and_description(server: Server) -> None:
    tokens = server.http.post("/tokenize", json={"prompt": "The quick"}).json()
    back = server.http.post("/detokenize", json={"tokens": tokens["tokens"]}).json()
    assert back == {"prompt": "The quick"} and tokens["count"] == len(tokens["tokens"])
    paths = server.http.get("/openapi.json").json()["paths"]
    assert "requestBody" in paths["/v1/chat/completions"]["post"]


def test_the_driver_dies_and_comes_back(server: Server) -> None:
    driver = server.driver()

    def ask(max_tokens: int) -> openai.Stream[openai.types.Completion]:
        return server.openai.completions.create(
            model="tiny",
            prompt="x",
            max_tokens=max_tokens,
            seed=3,
            stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )

    def tokens(events: Iterable[openai.types.Completion]) -> list[int]:
        choices = [event.model_dump()["choices"][0] for event in events]
        return [token for choice in choices for token in choice["token_ids"]]

    unbroken = tokens(ask(600))
    stream = ask(600)
    begun = tokens([next(iter(stream))])
    driver.kill()
    # The next driver goes on with what the first one drew.
    assert begun and begun + tokens(stream) == unbroken
    eventually(server.is_ready, what="ready again")
    assert server.driver().pid != driver.pid
    assert server.openai.completions.create(model="tiny", prompt="x", max_tokens=3).choices[0].finish_reason


def test_a_stop_lets_what_runs_finish(model: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# for tests\na-secret-key\n", encoding="utf-8")
    log = tmp_path / "server.log"
    with running_server(model, log, "--api-key-file", str(keys), "--kv-cache-memory-bytes", "16000000") as server:
        with pytest.raises(openai.AuthenticationError):
            server.openai.models.list()
        client = server.openai.with_options(api_key="a-secret-key")
        streams = [
            client.completions.create(
                model="tiny", prompt="x", max_tokens=800, stream=True, extra_body={"ignore_eos": True}
            )
            for _ in range(STREAMS)
        ]
        driver = server.driver()
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: server.http.get("/ready").status_code == 503, what="draining")
        with pytest.raises(openai.InternalServerError) as refused:
            client.completions.create(model="tiny", prompt="x")
        assert refused.value.status_code == 503
        with concurrent.futures.ThreadPoolExecutor(STREAMS) as pool:
            ended = list(pool.map(lambda stream: [chunk.choices[0] for chunk in stream], streams))
        assert all(choices[-1].finish_reason == "length" for choices in ended)
        assert server.process.wait(PATIENCE_S) == 0
        assert not driver.is_running()
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("{")]
    served = [line for line in lines if line["message"] == "request" and line.get("output_tokens")]
    assert len(served) == STREAMS and all(line["request_id"] and line["output_tokens"] == 800 for line in served)
