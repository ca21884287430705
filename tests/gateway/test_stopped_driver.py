"""A driver that hangs: stopped by SIGSTOP while streams and whole requests run. Deadlines answer; nothing else waits.

A stopped process is the worst kind of loss: its connections stay open and take data, and nobody is told anything.
"""

from __future__ import annotations

import concurrent.futures
import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from slipstream.runtime.gateway.settings import GatewaySettings
from slipstream.tests.gateway.harness import parse_events
from slipstream.tests.gateway.server_process import PATIENCE_S, Server, eventually, make_model, running_server

DEADLINE_S = 2.5
MARGIN_S = 3.0
"""What may be added to a deadline: the gateway's own grace is 2 s, and this machine may be busy."""
READY_TIMEOUT_S = GatewaySettings(served_model_names=("tiny",)).ready_timeout_s
STREAMS = 6
WHOLE = 6
GOOD_REQUEST = {"model": "tiny", "prompt": "The quick", "max_tokens": 12, "temperature": 0.0}
LONG = {"model": "tiny", "prompt": "x", "max_tokens": 1900, "ignore_eos": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One request's end. ``error_code``: OpenAI's, from the body or from the stream's last event."""

    status: int
    error_code: str | None
    took_s: float


def ask(server: Server, body: dict[str, Any]) -> Answered:
    """Send a request and read its answer to the end."""
    started_s = time.monotonic()
    with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client:
        answer = client.post("/v1/completions", json=body)
    took_s = time.monotonic() - started_s
    streamed = answer.headers["content-type"].startswith("text/event-stream")
    last = parse_events(answer.text)[-1] if streamed else answer.text
    told = {} if last == "[DONE]" else json.loads(last)
    return Answered(status=answer.status_code, error_code=told.get("error", {}).get("code"), took_s=took_s)


@contextmanager
def stopped(driver: psutil.Process) -> Iterator[float]:
    """Hold a process; yield since when."""
    driver.send_signal(signal.SIGSTOP)
    eventually(lambda: driver.status() == psutil.STATUS_STOPPED, what="stopped")
    try:
        yield time.monotonic()
    finally:
        driver.send_signal(signal.SIGCONT)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.parametrize("stopped_s", [0.0, pytest.param(10.0, marks=pytest.mark.slow)])
def test_deadlines_answer_while_the_driver_is_stopped(model: Path, tmp_path: Path, stopped_s: float) -> None:
    """The driver stays stopped until all are answered, and at least ``stopped_s``."""
    options = ("--max-num-seqs", "8", "--kv-cache-memory-bytes", "16000000", "--request-timeout-s", str(DEADLINE_S))
    with (
        running_server(model, tmp_path / "server.log", *options) as server,
        concurrent.futures.ThreadPoolExecutor(STREAMS + 2 * WHOLE + 1) as pool,
    ):
        before = server.http.post("/v1/completions", json=GOOD_REQUEST).json()["choices"]
        driver = server.driver()
        early = [pool.submit(ask, server, {**LONG, "stream": place < STREAMS}) for place in range(STREAMS + WHOLE)]
        eventually(lambda: server.metric("slipstream_gateway_in_flight") == len(early), what="all on their way")
        with stopped(driver) as since_s:
            late = [pool.submit(ask, server, {**GOOD_REQUEST, "stream": place % 2 == 0}) for place in range(WHOLE)]
            waiting: list[concurrent.futures.Future[Any]] = [*early, *late]

            def all_answered() -> bool:
                assert server.http.get("/health", timeout=MARGIN_S).status_code == 200
                return all(each.done() for each in waiting)

            eventually(all_answered, within_s=DEADLINE_S + MARGIN_S, what="deadlines while the driver is stopped")
            answers = [each.result() for each in (*early, *late)]
            assert all(each.error_code == "deadline_exceeded" for each in answers), answers
            assert all(each.took_s < DEADLINE_S + MARGIN_S for each in answers), answers
            # None of the late ones can have had a token: they get a status, streams too.
            assert {each.result().status for each in late} == {504}
            assert server.metric("slipstream_gateway_in_flight") == 0
            if stopped_s:
                is_ready = pool.submit(server.is_ready)
                waiting.append(is_ready)
                eventually(
                    lambda: all_answered() and time.monotonic() - since_s >= stopped_s,
                    within_s=READY_TIMEOUT_S + stopped_s + MARGIN_S,
                    what="/ready answers",
                )
                assert not is_ready.result()
            assert driver.status() == psutil.STATUS_STOPPED
        eventually(server.is_ready, what="ready again")
        eventually(server.everything_is_free, within_s=10.0, what="all blocks free: the engine heard of every end")
        assert server.http.post("/v1/completions", json=GOOD_REQUEST).json()["choices"] == before
        assert server.driver().pid == driver.pid, "a driver that hung for a while was replaced"
