"""What goes wrong while requests run: full, draining, too late, engine lost, client gone. Nothing is left behind."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from slipstream.runtime.gateway.admission import Admission
from slipstream.runtime.gateway.errors import BusyRefusal, Draining, HttpRefusal
from slipstream.runtime.gateway.settings import RequestLimits
from slipstream.runtime.messages import FinishReason
from slipstream.sdk.errors import Overloaded
from slipstream.tests.gateway.harness import Setup, asynchronous, parse_events, serving, until

Messages = list[dict[str, Any]]


class Connection:
    """A client of the application below HTTP, which can leave when it likes, or never read."""

    def __init__(self, setup: Setup, body: dict[str, Any], path: str = "/v1/completions") -> None:
        self._left = asyncio.Event()
        self._content: list[bytes] = [json.dumps(body).encode()]
        self.sent: Messages = []
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "headers": [(b"content-type", b"application/json")], "client": ("test", 1), "server": ("test", 80),
        }  # fmt: skip
        self.task = asyncio.create_task(setup.app(scope, self._receive, self._send))

    def leave(self) -> None:
        self._left.set()

    async def _receive(self) -> dict[str, Any]:
        if self._content:
            return {"type": "http.request", "body": self._content.pop(), "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()


def assert_nothing_left(setup: Setup) -> None:
    assert not setup.engine.live and setup.gateway.admission.in_flight == 0


@pytest.mark.parametrize("prompt", ["x", ["x", "y", "z"]])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens_before", [0, 3])
@asynchronous
async def test_a_client_that_leaves_aborts(prompt: Any, stream: bool, tokens_before: int) -> None:
    async with serving() as setup:
        setup.engine.hold.clear()
        setup.engine.hold_after = tokens_before
        connection = Connection(setup, {"prompt": prompt, "stream": stream, "max_tokens": 50})
        prompts = 3 if isinstance(prompt, list) else 1
        await until(lambda: len(setup.engine.live) == prompts)
        if stream and tokens_before:
            await until(lambda: len(connection.sent) > 1)
        assert setup.gateway.admission.in_flight == prompts
        connection.leave()
        await connection.task
        assert len(setup.engine.aborted) == prompts
        assert_nothing_left(setup)
        text = (await setup.client.get("/metrics")).text
        assert 'slipstream_requests_total{endpoint="/v1/completions",outcome="cancelled"} 1.0' in text
        assert f"slipstream_aborted_total {prompts}.0" in text


@asynchronous
async def test_a_full_gateway_says_when_to_come_back() -> None:
    async with serving(limits=RequestLimits(max_concurrent_requests=2, max_waiting_requests=0)) as setup:
        setup.engine.hold.clear()
        running = [Connection(setup, {"prompt": "x"}) for _ in range(2)]
        await until(lambda: len(setup.engine.live) == 2)
        answer = await setup.post("/v1/completions", {"prompt": "x"})
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_error"
        setup.engine.hold.set()
        for connection in running:
            await connection.task
            assert connection.status == 200
        assert (await setup.post("/v1/completions", {"prompt": "x"})).status_code == 200
        answer = await setup.post("/v1/completions", {"prompt": ["x"] * 3})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt"
        assert_nothing_left(setup)


@asynchronous
async def test_a_full_engine_says_so_before_a_stream_begins() -> None:
    async with serving() as setup:
        setup.engine.refusal = Overloaded("the queue is full")
        for stream in (False, True):
            answer = await setup.post("/v1/completions", {"prompt": "x", "stream": stream})
            assert answer.status_code == 429 and "retry-after" in answer.headers
        assert_nothing_left(setup)


@asynchronous
async def test_a_draining_gateway_finishes_what_runs() -> None:
    async with serving() as setup:
        setup.engine.hold.clear()
        running = Connection(setup, {"prompt": "x", "stream": True, "max_tokens": 3})
        await until(lambda: bool(setup.engine.live))
        setup.gateway.admission.close()
        answer = await setup.post("/v1/completions", {"prompt": "x"})
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "draining"
        assert (await setup.client.get("/ready")).status_code == 503
        assert (await setup.client.get("/health")).status_code == 200
        setup.engine.hold.set()
        await running.task
        assert running.text.endswith("data: [DONE]\n\n")
        assert_nothing_left(setup)


@asynchronous
async def test_what_a_stop_cuts_says_so() -> None:
    async with serving() as setup:
        setup.engine.hold.clear()
        setup.engine.hold_after, setup.engine.fail_after = 1, 2
        running = Connection(setup, {"prompt": "x", "stream": True, "max_tokens": 9})
        await until(lambda: len(running.sent) > 1)
        setup.gateway.admission.close()
        setup.engine.hold.set()
        await running.task
        assert json.loads(parse_events(running.text)[-1])["error"]["code"] == "draining"
        assert_nothing_left(setup)


@asynchronous
async def test_no_engine_yet() -> None:
    async with serving(attached=False) as setup:
        answer = await setup.post("/v1/completions", {"prompt": "x"})
        assert answer.status_code == 503 and "retry-after" in answer.headers
        assert (await setup.client.get("/ready")).status_code == 503
        assert (await setup.client.get("/v1/models")).status_code == 200
        assert "slipstream_engine_up 0.0" in (await setup.client.get("/metrics")).text
        setup.replica.attach(setup.engine, setup.engine.facts)
        assert (await setup.client.get("/ready")).status_code == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@asynchronous
async def test_an_error_in_mid_stream_is_its_last_event(path: str) -> None:
    async with serving() as setup:
        setup.engine.finish_reason = FinishReason.ERROR
        body = {"prompt": "x"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "x"}]}
        answer = await setup.post(path, {**body, "stream": True, "max_tokens": 50})
        assert answer.status_code == 200
        *_, last = parse_events(answer.text)
        assert json.loads(last)["error"]["code"] == "engine_error"
        whole = await setup.post(path, {**body, "max_tokens": 50})
        assert whole.status_code == 500 and whole.json()["error"]["code"] == "engine_error"
        assert_nothing_left(setup)


@pytest.mark.parametrize("how", ["lost", "given up"])
@asynchronous
async def test_a_lost_engine_is_waited_for(how: str) -> None:
    async with serving() as setup:
        ids = setup.say("one engine begins, and the next one goes on")
        if how == "lost":
            setup.engine.fail_after = 5
        else:
            setup.engine.script, setup.engine.finish_reason = ids[:5], FinishReason.ABORT
        max_tokens = 99 if how == "lost" else 5
        body = {"prompt": "x", "max_tokens": max_tokens, "stream": True, "return_token_ids": True}
        running = Connection(setup, body)
        await until(lambda: bool(setup.engine.requests) and not setup.engine.live)
        setup.replica.detach()
        setup.engine.fail_after = setup.engine.finish_reason = None
        setup.engine.script = [*ids, *setup.engine.facts.eos_token_ids]
        setup.replica.attach(setup.engine, replace(setup.engine.facts, epoch="scripted-2"))
        await running.task
        *events, done = parse_events(running.text)
        assert done == "[DONE]"
        tokens = [token for event in events for token in json.loads(event)["choices"][0]["token_ids"]]
        assert tokens == setup.engine.script[:max_tokens]
        (generated,) = setup.engine.requests[-1].generated
        assert generated is not None and generated.tolist() == ids[: 5 if how == "lost" else 4]
        assert (await setup.client.get("/metrics")).text.count("slipstream_requests_moved_total 1.0") == 1
        assert_nothing_left(setup)


@asynchronous
async def test_an_end_that_was_lost_is_known_from_the_tokens() -> None:
    for max_tokens, reason in ((5, "length"), (99, "stop")):
        async with serving() as setup:
            ids = setup.say("done")
            setup.engine.script = [*ids, *([ids[0]] * (5 - len(ids)))] if reason == "length" else setup.engine.script
            setup.engine.lose_ends = True
            body = {"prompt": "x", "max_tokens": max_tokens, "return_token_ids": True}
            (choice,) = (await setup.completion(**body))["choices"]
            assert choice["finish_reason"] == reason and len(setup.engine.requests) == 1
            assert setup.engine.script is not None and choice["token_ids"] == setup.engine.script
            assert_nothing_left(setup)


@asynchronous
async def test_a_sample_that_the_engine_gave_up_is_no_answer() -> None:
    async with serving() as setup:
        setup.engine.finish_reason = FinishReason.ERROR
        answer = await setup.post("/v1/completions", {"prompt": "x", "max_tokens": 3})
        assert answer.status_code == 500 and "choices" not in answer.json()


@pytest.mark.parametrize("stream", [False, True])
@asynchronous
async def test_deadlines_answer(stream: bool) -> None:
    async with serving(limits=RequestLimits(request_timeout_s=0.05)) as setup:
        setup.engine.hold.clear()
        answer = await setup.post("/v1/completions", {"prompt": "x", "stream": stream})
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "deadline_exceeded"
        setup.engine.hold_after = 2
        answer = await setup.post("/v1/completions", {"prompt": "x", "stream": True, "max_tokens": 9})
        assert json.loads(parse_events(answer.text)[-1])["error"]["code"] == "deadline_exceeded"
        assert_nothing_left(setup)


@asynchronous
async def test_a_body_that_does_not_come() -> None:
    async with serving(limits=RequestLimits(body_timeout_s=0.05)) as setup:
        connection = Connection(setup, {})
        connection._content = []
        await connection.task
        assert connection.status == 408
        assert (b"connection", b"close") in connection.sent[0]["headers"]
        assert_nothing_left(setup)


@asynchronous
async def test_readiness_is_proven_and_holds_for_a_while() -> None:
    async with serving(ready_cache_s=1000.0, ready_timeout_s=0.05) as setup:
        setup.engine.hold.clear()
        answer = await setup.client.get("/ready")
        assert answer.status_code == 503 and answer.json()["problem"]
        setup.engine.hold.set()
        answers = await asyncio.gather(*(setup.client.get("/ready") for _ in range(5)))
        assert [answer.status_code for answer in answers] == [200] * 5
        # One probe that failed, one that five callers shared; neither is left at the engine.
        assert len(setup.engine.requests) == 2
        assert_nothing_left(setup)


@asynchronous
async def test_a_clients_token_proves_readiness() -> None:
    async with serving(ready_cache_s=1000.0) as setup:
        await setup.completion(prompt="x")
        assert (await setup.client.get("/ready")).status_code == 200
        assert len(setup.engine.requests) == 1


def test_admission_counts_prompts() -> None:
    admission = Admission(capacity=10)
    ticket = admission.enter(now_s=0.0)
    admission.grow(ticket, 9)
    other = admission.enter(now_s=0.0)
    with pytest.raises(BusyRefusal) as refused:
        admission.enter(now_s=0.0)
    assert refused.value.retry_after_s >= 1
    with pytest.raises(HttpRefusal):
        admission.grow(other, 11)
    admission.leave(ticket, now_s=100.0)
    assert admission.in_flight == 1
    # Requests that take longer leave less often: whoever asks for much waits longer.
    full = admission.enter(now_s=0.0)
    with pytest.raises(BusyRefusal) as busy:
        admission.grow(full, 10)
    assert busy.value.retry_after_s >= refused.value.retry_after_s
    admission.leave(other, now_s=100.0)
    admission.leave(full, now_s=100.0)
    assert admission.in_flight == 0
    admission.draining = True
    with pytest.raises(Draining):
        admission.enter(now_s=0.0)
