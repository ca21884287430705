"""The real thing: ``slipstream serve --prefill 1 --decode 1``, asked over HTTP, and its drivers killed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from slipstream import LLM, SamplingParams
from slipstream.tests.gateway.server_process import Server, eventually, make_model, running_server

PROMPTS = ["The quick brown fox jumps over the lazy dog and", "def add(first, second):\n    return"]
TOKENS = 200


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    split = ("--prefill", "1", "--decode", "1", "--split-from-tokens", "1")
    log = tmp_path_factory.mktemp("log") / "server.log"
    with running_server(model, log, *split, "--max-num-seqs", "16", "--kv-cache-memory-bytes", "16000000") as running:
        yield running
        eventually(running.everything_is_free, what="all blocks free at the end")


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[tuple[str, float], str]:
    """What one engine answers."""
    answers = {}
    with LLM(str(model), max_num_seqs=4, kv_cache_memory_bytes=4_000_000) as llm:
        for temperature in (0.0, 0.9):
            params = SamplingParams(max_tokens=TOKENS, temperature=temperature, seed=5, ignore_eos=True)
            for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, params, use_tqdm=False), strict=True):
                answers[prompt, temperature] = output.outputs[0].text
    return answers


def driver(server: Server, role: str) -> psutil.Process:
    (found,) = [
        each for each in psutil.Process(server.process.pid).children() if f"--role {role}" in " ".join(each.cmdline())
    ]
    return found


def stream(server: Server, prompt: str, temperature: float) -> Any:
    return server.openai.completions.create(
        model="tiny", prompt=prompt, max_tokens=TOKENS, temperature=temperature, seed=5, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip


def test_a_split_answers_as_one_engine_and_kv_is_moved(server: Server, expected: dict[tuple[str, float], str]) -> None:
    for (prompt, temperature), right in expected.items():
        assert "".join(chunk.choices[0].text for chunk in stream(server, prompt, temperature)) == right
    eventually(lambda: server.metric("slipstream_kv_bytes_moved_total") > 0, what="KV has been moved")


def test_ready_is_the_way_from_one_to_the_other(server: Server) -> None:
    # A pair may still be on its way to one another: requests are answered, and it says what is missing.
    eventually(lambda: server.http.get("/ready").json() == {"status": "ready"}, what="a probe is handed over")
    assert server.metric('slipstream_ready_path{path="split"}') == 1


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_lost_replica_is_replaced_and_its_answers_are_whole(
    server: Server, expected: dict[tuple[str, float], str], role: str
) -> None:
    lost = driver(server, role)
    streams = [(right, stream(server, prompt, temperature)) for (prompt, temperature), right in expected.items()]
    begun = [(right, next(iter(each)).choices[0].text, each) for right, each in streams]
    lost.kill()
    for right, text, rest in begun:
        assert text + "".join(chunk.choices[0].text for chunk in rest) == right
    eventually(lambda: server.metric('slipstream_replicas{state="attached"}') == 2, what="it has been replaced")
    assert driver(server, role).pid != lost.pid
    (right, again) = next((right, stream(server, *key)) for key, right in expected.items())
    assert "".join(chunk.choices[0].text for chunk in again) == right
