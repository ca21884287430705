"""Requests that really go from one driver process to another: the same tokens as one engine, and no block lost."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest

from slipstream.runtime.messages import EngineRequest
from slipstream.tests.contracts.engine_client import Answer, answer
from slipstream.tests.engine.builders import request
from slipstream.tests.handoff.driver_processes import Driver, drivers
from slipstream.tests.handoff.split_ways import PATIENCE_S, Way, all_free, load_of, send_from, wait_at
from slipstream.tests.models.checkpoints import make_checkpoint

PROMPTS = [[3 + (7 * row + index) % 150 for index in range(length)] for row, length in enumerate((3, 20, 65, 130))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("models"))


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await test

    asyncio.run(bounded())


def wanted(name: str = "w", **more: Any) -> list[EngineRequest]:
    """Return requests: greedy ones and seeded ones, with log-probabilities and without."""
    return [
        request(
            f"{name}{row}",
            prompt,
            seed=row,
            max_tokens=14,
            temperature=0.8 * (row % 2),
            logprobs=2 if row > 1 else None,
            **more,
        )
        for row, prompt in enumerate(PROMPTS)
    ]


async def split(prefill: Driver, decode: Driver, one: EngineRequest, ticket: str | None = None) -> tuple[Way, Way]:
    """Have a request computed by two drivers."""
    name = ticket or f"t-{one.request_id}"
    waits = wait_at(decode.client, one, name)
    sent = await send_from(prefill.client, one, decode.send_to(name))
    return sent, await waits


async def split_all(prefill: Driver, decode: Driver, requests: Sequence[EngineRequest]) -> list[tuple[Way, Way]]:
    return list(await asyncio.gather(*(split(prefill, decode, one) for one in requests)))


def check(done: Sequence[tuple[Way, Way]], expected: Sequence[Answer]) -> None:
    """Hold what came of split requests against what one engine makes of them."""
    for (sent, got), one in zip(done, expected, strict=True):
        assert sent.error is None and got.error is None
        assert sent.report is not None and sent.report.ending == "committed", sent.report
        assert sent.tokens == one.tokens[0][:1]
        assert got.tokens == one.tokens[0] and got.answer.reasons == one.reasons
        for entry, other in zip(got.answer.logprobs[0], one.logprobs[0], strict=True):
            assert entry.token_ids[0] == other.token_ids[0]
            assert entry.logprobs[0] == pytest.approx(float(other.logprobs[0]), abs=1e-4)


async def expected_of(driver: Driver, requests: Sequence[EngineRequest]) -> list[Answer]:
    """Return what a driver makes of requests alone."""
    return list(await asyncio.gather(*(answer(driver.client, one, timeout_s=PATIENCE_S) for one in requests)))


def test_the_same_tokens_as_one_engine(model: Path) -> None:
    async def test() -> None:
        async with drivers(model, ("p", "prefill", ()), ("d", "decode", ())) as (prefill, decode):
            assert prefill.facts.sends_kv and not prefill.facts.receives_kv
            assert decode.facts.receives_kv and decode.facts.role == "decode"
            done = await split_all(prefill, decode, wanted())
            await asyncio.gather(all_free(prefill.client), all_free(decode.client))
            check(done, await expected_of(decode, wanted("again", cache_salt="another")))
            assert load_of(prefill.client).kv_bytes_out > 0

    run(test())
