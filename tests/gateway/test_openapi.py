"""The real server held against its own /openapi.json: what schemathesis makes of it, valid and not, over a socket.

For each operation there are cases that cover its schema one by one (bounds, types, missing and surplus fields, other
methods) and cases that are drawn. No answer is a 5xx, every answer is one that the description knows, and what the
description does not allow is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies as st
from schemathesis.checks import CheckFunction, not_a_server_error
from schemathesis.schemas import APIOperation, BaseSchema
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from slipstream.tests.gateway.harness import parse_events
from slipstream.tests.gateway.server_process import PATIENCE_S, Server, eventually, make_model, running_server

DRAWN = 80
GOOD_REQUEST = {"prompt": "The quick", "max_tokens": 12, "temperature": 0.0}
POSTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x", "response_format": None, "stream_options": None},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "x"}], "response_format": None, "stream_options": None,
        "chat_template_kwargs": None, "tool_choice": None, "top_logprobs": None,
    },
    "/tokenize": {"prompt": "x", "messages": None},
    "/detokenize": {"tokens": [5, 6]},
}  # fmt: skip
"""Path → what no schema can say: ids of this vocabulary, and fields that need one another."""
GETS = ("/v1/models", "/v1/models/{name}", "/health", "/ready", "/metrics")
OPERATIONS = [*(("get", path) for path in GETS), *(("post", path) for path in POSTS)]
MODES = list(schemathesis.GenerationMode)
CHECKS: list[CheckFunction] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder: Path = tmp_path_factory.mktemp("openapi")
    # Short answers: nothing here depends on their length, and a drawn request may ask for 128 of them.
    options = ("--max-num-seqs", "64", "--max-model-len", "32", "--kv-cache-memory-bytes", "16000000")
    with running_server(make_model(folder / "tiny"), folder / "server.log", *options) as running:
        yield running


@pytest.fixture(scope="module")
def description(server: Server) -> BaseSchema:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    # Streams are read to their end: 128 samples of 32 tokens are the most there can be.
    schema.config.max_stream_events = 10_000
    return schema


def hold(case: schemathesis.Case, statuses: Counter[int]) -> None:
    """Send one case and hold the answer against the description."""
    answer = case.call(timeout=PATIENCE_S)
    statuses[answer.status_code] += 1
    case.validate_response(answer, checks=CHECKS)
    if answer.headers.get("content-type", [""])[0].startswith("text/event-stream"):
        # Each event was held against the description above; this one says that the stream is whole.
        assert parse_events(answer.text)[-1] == "[DONE]", answer.text[-1000:]


def drawn_cases(operation: APIOperation) -> st.SearchStrategy[schemathesis.Case]:
    """Draw cases that the schema allows, cases that it does not, and cases that the server must answer besides."""
    anything = [operation.as_strategy(generation_mode=mode) for mode in MODES]
    if operation.path not in POSTS:
        return st.one_of(anything)

    def agree(case: schemathesis.Case) -> schemathesis.Case:
        assert isinstance(case.body, dict)
        case.body = {**case.body, **POSTS[operation.path]}
        return case

    return st.one_of([*anything, operation.as_strategy().map(agree)])


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_the_server_is_as_described(server: Server, description: BaseSchema, method: str, path: str, seed: int) -> None:
    operation: APIOperation = description[path][method]
    driver = server.driver().pid
    before = server.http.post("/v1/completions", json=GOOD_REQUEST).json()["choices"]
    statuses: Counter[int] = Counter()
    covering = description.iter_coverage_cases(
        operation, generation_modes=MODES, generation_config=description.config.generation
    )
    for case in covering:
        hold(case, statuses)

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=DRAWN, suppress_health_check=list(hypothesis.HealthCheck), database=None)
    @hypothesis.given(case=drawn_cases(operation))
    def hold_drawn(case: schemathesis.Case) -> None:
        hold(case, statuses)

    hold_drawn()
    print(f"answers: {sorted(statuses.items())}")
    # Both kinds must have come up for the test to mean anything.
    if path in POSTS:
        assert statuses[200] > 10 and statuses[400] > 10
    assert server.http.post("/v1/completions", json=GOOD_REQUEST).json()["choices"] == before
    eventually(server.everything_is_free, within_s=10.0, what="all blocks free")
    assert server.driver().pid == driver, "the driver was lost on the way"


def test_every_operation_is_described(server: Server) -> None:
    paths = server.http.get("/openapi.json").json()["paths"]
    described = [(method, path) for path, operations in paths.items() for method in operations]
    assert sorted(described) == sorted(OPERATIONS)
