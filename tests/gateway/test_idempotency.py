"""Requests with keys: sent again they get the same answer, whole or as a stream, and nothing is computed again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from slipstream.runtime.gateway.errors import HttpRefusal
from slipstream.runtime.gateway.idempotency import Claim, KeptAnswers, KeptLimits
from slipstream.runtime.messages import FinishReason
from slipstream.tests.gateway.harness import Setup, asynchronous, serving, until

LIMITS = KeptLimits(max_answers=3, max_bytes=100, max_answer_bytes=60, keep_s=10.0)


def keep(kept: KeptAnswers, key: str, answer: bytes = b"x", *, caller: str = "", now_s: float = 0.0) -> Claim:
    claim = kept.claim(caller, key, b"digest", now_s=now_s)
    claim.add(answer)
    kept.keep(claim, now_s=now_s)
    return claim


def code(kept: KeptAnswers, key: str, digest: bytes = b"digest") -> tuple[int, str | None]:
    with pytest.raises(HttpRefusal) as refused:
        kept.claim("", key, digest, now_s=0.0)
    return refused.value.status, refused.value.code


def test_a_key_has_one_request_and_one_answer() -> None:
    kept = KeptAnswers(LIMITS)
    first = kept.claim("", "k", b"digest", now_s=0.0)
    assert code(kept, "k") == (409, "idempotency_key_in_use")
    assert code(kept, "k", b"other") == (422, "idempotency_key_reused")
    first.add(b"an ")
    first.add(b"answer")
    kept.keep(first, now_s=1.0)
    again = kept.claim("", "k", b"digest", now_s=2.0)
    assert again is first and bytes(again.body or b"") == b"an answer"
    assert code(kept, "k", b"other") == (422, "idempotency_key_reused")
    # Another caller's key of that name is another key.
    assert kept.claim("somebody", "k", b"other", now_s=2.0) is not first


def test_what_failed_frees_its_key() -> None:
    kept = KeptAnswers(LIMITS)
    first = kept.claim("", "k", b"digest", now_s=0.0)
    kept.forget(first)
    second = kept.claim("", "k", b"other", now_s=0.0)
    kept.forget(first)
    assert code(kept, "k", b"other")[0] == 409
    kept.keep(second, now_s=0.0)
    kept.forget(second)
    assert kept.claim("", "k", b"other", now_s=0.0) is second


def test_what_is_kept_is_bounded() -> None:
    kept = KeptAnswers(LIMITS)
    keep(kept, "large", b"x" * 61)
    assert len(kept) == 0
    for number in range(5):
        keep(kept, f"k{number}")
    assert len(kept) == 3 and kept.claim("", "k0", b"digest", now_s=0.0).ended_s is None
    kept = KeptAnswers(LIMITS)
    keep(kept, "a", b"x" * 50)
    keep(kept, "b", b"x" * 50)
    keep(kept, "c", b"x" * 50)
    assert len(kept) == 2
    keep(kept, "later", now_s=9.0)
    assert kept.claim("", "c", b"other", now_s=10.0).ended_s is None
    assert kept.claim("", "later", b"digest", now_s=18.9).ended_s == 9.0


@pytest.mark.parametrize("key", ["", "x" * 256, "ü", "a\tb"])
def test_what_is_no_key_is_refused(key: str) -> None:
    assert code(KeptAnswers(), key)[0] == 400


async def post(setup: Setup, key: str = "k", path: str = "/v1/completions", **body: Any) -> Any:
    body = {"prompt": "x", "max_tokens": 5} | body
    return await setup.client.post(path, json=body, headers={"idempotency-key": key})


@pytest.mark.parametrize("stream", [False, True])
@asynchronous
async def test_sent_again_it_is_answered_again(stream: bool) -> None:
    async with serving() as setup:
        first = await post(setup, stream=stream)
        again = await post(setup, stream=stream)
        assert first.status_code == again.status_code == 200
        assert first.content == again.content and first.headers["content-type"] == again.headers["content-type"]
        assert "idempotent-replayed" not in first.headers and again.headers["idempotent-replayed"] == "true"
        assert len(setup.engine.requests) == 1
        assert (await post(setup, stream=stream, max_tokens=6)).status_code == 422
        assert (await post(setup, "other", stream=stream)).content != first.content
        assert len(setup.engine.requests) == 2 and setup.gateway.admission.in_flight == 0


@asynchronous
async def test_while_it_runs_it_is_not_run_twice() -> None:
    async with serving() as setup:
        setup.engine.hold.clear()
        running = asyncio.create_task(post(setup))
        await until(lambda: bool(setup.engine.live))
        assert (await post(setup)).status_code == 409
        setup.engine.hold.set()
        assert (await running).content == (await post(setup)).content
        assert len(setup.engine.requests) == 1


@asynchronous
async def test_an_error_may_be_tried_again() -> None:
    async with serving() as setup:
        setup.engine.finish_reason = FinishReason.ERROR
        assert (await post(setup)).status_code == 500
        assert "error" in (await post(setup, stream=True)).text
        setup.engine.finish_reason = None
        assert (await post(setup)).status_code == 200
        assert len(setup.engine.requests) == 3


@asynchronous
async def test_keys_are_each_callers_own() -> None:
    async with serving(api_keys=("first-key", "second-key")) as setup:
        answers = []
        for api_key in ("first-key", "second-key", "first-key"):
            headers = {"idempotency-key": "k", "authorization": f"Bearer {api_key}"}
            answers.append(
                await setup.client.post("/v1/completions", json={"prompt": "x", "max_tokens": 3}, headers=headers)
            )
        first, second, again = (answer.content for answer in answers)
        assert first == again != second
