"""guidellm against the server: no request fails, and its token counts are the server's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slipstream.tests.clients.environments import ClientEnvironment, client_environment
from slipstream.tests.gateway.server_process import Server, eventually, running_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4000)]

REQUIREMENTS = ("torch==2.13.0", "guidellm==0.8.1")
MODEL = Path(__file__).resolve().parents[2] / "examples" / "demo_model"
RUN_TIMEOUT_S = 300.0
REQUESTS = 16
PROMPT_TOKENS = 48
OUTPUT_TOKENS = 16


@pytest.fixture(scope="module")
def environment(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> ClientEnvironment:
    return client_environment(pytestconfig, "guidellm", REQUIREMENTS, tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def server(environment: ClientEnvironment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(MODEL, tmp_path_factory.mktemp("log") / "server.log") as running:
        yield running


def count(requests: list[dict[str, Any]], field: str) -> int:
    return sum(request[field] for request in requests)


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
def test_a_short_run_counts_as_the_server_does(
    endpoint: str, environment: ClientEnvironment, server: Server, tmp_path: Path
) -> None:
    names = ("slipstream_prompt_tokens_total", "slipstream_output_tokens_total")
    before = [server.metric(name) for name in names]
    report = tmp_path / "report.json"
    environment.run(
        "guidellm",
        [
            *("run", "--backend", f"kind=openai_http,target={server.url},model=demo_model,request_format={endpoint}"),
            *("--tokenizer", f"kind=huggingface_auto,model={MODEL}"),
            *("--data", f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}"),
            *("--profile", "kind=constant,rate=4", "--constraint", f"kind=max_requests,count={REQUESTS}"),
            *("--output", f"kind=json,path={report}", "--disable-progress"),
        ],
        cwd=tmp_path,
        timeout_s=RUN_TIMEOUT_S,
    )
    (benchmark,) = json.loads(report.read_text(encoding="utf-8"))["benchmarks"]
    requests = benchmark["requests"]
    good = requests["successful"]
    assert (len(good), len(requests["errored"]), len(requests["incomplete"])) == (REQUESTS, 0, 0)
    assert all(request["output_tokens"] == OUTPUT_TOKENS for request in good)
    # A chat's prompt has its template too; the words are as many as were asked for.
    assert all(request["prompt_tokens"] >= PROMPT_TOKENS for request in good)
    assert all(request["time_to_first_token_ms"] > 0 for request in good)
    found = [server.metric(name) - earlier for name, earlier in zip(names, before, strict=True)]
    assert found == [count(good, "prompt_tokens"), count(good, "output_tokens")]
    eventually(server.everything_is_free, within_s=1.0, what="all blocks free at the end")
