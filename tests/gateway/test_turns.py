"""Full gateways: who waits, whose turn is next, and what is told to those that wait in vain."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from slipstream.runtime.gateway.settings import RequestLimits
from slipstream.tests.gateway.harness import Setup, asynchronous, serving, until

KEYS = ("many-requests", "few-requests")


def asking(setup: Setup, key: str = KEYS[0], **body: Any) -> asyncio.Task[httpx.Response]:
    body = {"prompt": key, "max_tokens": 2} | body
    headers = {"authorization": f"Bearer {key}"}
    return asyncio.create_task(setup.client.post("/v1/completions", json=body, headers=headers))


@asynchronous
async def test_a_key_with_few_requests_does_not_wait_for_one_with_many() -> None:
    limits = RequestLimits(max_concurrent_requests=1, max_waiting_requests=20)
    async with serving(api_keys=KEYS, limits=limits) as setup:
        setup.engine.hold.clear()
        many = [asking(setup) for _ in range(10)]
        await until(lambda: setup.gateway.admission.waiting == 9)
        few = asking(setup, KEYS[1])
        await until(lambda: setup.gateway.admission.waiting == 10)
        assert "slipstream_gateway_waiting 10.0" in (await setup.client.get("/metrics")).text
        setup.engine.hold.set()
        assert (await few).status_code == 200
        assert sum(task.done() for task in many) <= 3
        assert {(await task).status_code for task in many} == {200}
        assert (setup.gateway.admission.in_flight, setup.gateway.admission.waiting) == (0, 0)


@asynchronous
async def test_one_key_cannot_keep_others_out_of_the_queue() -> None:
    limits = RequestLimits(max_concurrent_requests=1, max_waiting_requests=3)
    async with serving(api_keys=KEYS, limits=limits) as setup:
        setup.engine.hold.clear()
        many = [asking(setup) for _ in range(4)]
        await until(lambda: setup.gateway.admission.waiting == 3)
        refused = await asking(setup)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        few = asking(setup, KEYS[1])
        await until(lambda: any(task.done() for task in many))
        setup.engine.hold.set()
        assert (await few).status_code == 200
        assert sorted([(await task).status_code for task in many]) == [200, 200, 200, 429]


@asynchronous
async def test_nobody_waits_for_ever() -> None:
    limits = RequestLimits(max_concurrent_requests=1, turn_timeout_s=0.05)
    async with serving(api_keys=KEYS, limits=limits) as setup:
        setup.engine.hold.clear()
        running = asking(setup)
        await until(lambda: bool(setup.engine.live))
        answer = await asking(setup)
        assert answer.status_code == 429 and "turn" in answer.json()["error"]["message"]
        assert setup.gateway.admission.waiting == 0
        setup.engine.hold.set()
        assert (await running).status_code == 200


@asynchronous
async def test_a_stop_tells_those_that_wait() -> None:
    async with serving(api_keys=KEYS, limits=RequestLimits(max_concurrent_requests=1)) as setup:
        setup.engine.hold.clear()
        running = asking(setup)
        await until(lambda: bool(setup.engine.live))
        waiting = asking(setup)
        await until(lambda: setup.gateway.admission.waiting == 1)
        setup.gateway.admission.close()
        answer = await waiting
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "draining"
        setup.engine.hold.set()
        assert (await running).status_code == 200


@asynchronous
async def test_a_client_that_leaves_gives_its_place_up() -> None:
    async with serving(api_keys=KEYS, limits=RequestLimits(max_concurrent_requests=1)) as setup:
        setup.engine.hold.clear()
        running = asking(setup)
        await until(lambda: bool(setup.engine.live))
        waiting = asking(setup)
        await until(lambda: setup.gateway.admission.waiting == 1)
        waiting.cancel()
        await until(lambda: setup.gateway.admission.waiting == 0)
        setup.engine.hold.set()
        assert (await running).status_code == 200
