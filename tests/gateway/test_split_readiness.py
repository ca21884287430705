"""Readiness of pools: the way from prefill to decode is proven, and requests are answered while it is broken."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from slipstream.sdk.errors import EngineUnavailable
from slipstream.tests.gateway.harness import asynchronous, until
from slipstream.tests.gateway.test_split_requests import Pools, asked, pools

SPLIT, WHOLE = (f'slipstream_ready_path{{path="{path}"}}' for path in ("split", "whole"))


async def ready(world: Pools) -> dict[str, Any]:
    answer = await world.client.get("/ready")
    assert answer.status_code == 200, answer.text
    world.assert_nothing_left()
    return answer.json()


@asynchronous
async def test_a_probe_is_computed_by_one_and_goes_on_at_the_other() -> None:
    async with pools(ready_cache_s=1000.0) as world:
        answers = await asyncio.gather(*(world.client.get("/ready") for _ in range(4)))
        assert [answer.json() for answer in answers] == [{"status": "ready"}] * 4
        # One probe that four callers shared, short as its prompt is.
        assert asked(world.of("p")) == asked(world.of("d")) == 1
        assert sum(len(engine.tickets) for engine in world.of("d")) == 1
        assert (await world.metric(SPLIT), await world.metric(WHOLE)) == (1, 0)
        # Clients' hand-offs are counted, probes are not.
        assert await world.metric('slipstream_hand_offs_total{ending="committed"}') == 0
        world.assert_nothing_left()


@asynchronous
async def test_a_clients_token_that_was_handed_over_proves_the_way() -> None:
    async with pools(ready_cache_s=1000.0) as world:
        world.assert_answered(await world.ask())
        before = asked(list(world.engines.values()))
        assert await ready(world) == {"status": "ready"}
        assert asked(list(world.engines.values())) == before


@pytest.mark.parametrize("body", [{"prompt": [1, 2, 3]}, {"ending": "bad_checksum"}])
@asynchronous
async def test_a_token_that_one_replica_drew_alone_does_not_prove_it(body: dict[str, Any]) -> None:
    async with pools(ready_cache_s=1000.0) as world:
        ending = body.pop("ending", "committed")
        for engine in world.of("p"):
            engine.hand_off_ending = ending
        assert (await world.ask(**body)).status_code == 200
        assert (await world.metric(SPLIT), await world.metric(WHOLE)) == (0, 1)
        for engine in world.of("p"):
            engine.hand_off_ending = "committed"
        before = asked(world.of("p"))
        assert await ready(world) == {"status": "ready"}
        assert asked(world.of("p")) == before + 1


@pytest.mark.parametrize("how", ["ending", "lost", "hangs", "refuses"])
@asynchronous
async def test_what_still_answers_is_ready_and_degraded(how: str) -> None:
    async with pools(ready_cache_s=1000.0, ready_timeout_s=0.4) as world:
        for engine in world.of("p"):
            match how:
                case "ending":
                    engine.hand_off_ending = "bad_checksum"
                case "lost":
                    engine.fail_after = 1
                case "hangs":
                    engine.hold.clear()
                case "refuses":
                    engine.refusal = EngineUnavailable("not now")
        told = await ready(world)
        assert told["status"] == "ready" and "from p-" in told["degraded"], told
        assert (await world.metric(SPLIT), await world.metric(WHOLE)) == (0, 1)
        # Both prefill replicas were tried, and what was begun was aborted on either side.
        tried = world.of("d") if how == "refuses" else [*world.of("p"), *world.of("d")]
        assert all(asked([engine]) >= 1 for engine in tried)
        before = asked(list(world.engines.values()))
        assert await ready(world) == told, "what was found holds for a while"
        assert asked(list(world.engines.values())) == before


@asynchronous
async def test_one_pair_that_works_is_enough() -> None:
    async with pools(ready_cache_s=0.0) as world:
        world.of("p")[0].refusal = EngineUnavailable("not now")
        for _ in range(4):
            assert await ready(world) == {"status": "ready"}
        assert len(world.of("p")[1].requests) == 4


@asynchronous
async def test_pairs_that_failed_too_often_are_left_alone() -> None:
    async with pools(ready_cache_s=0.0) as world:
        for engine in world.of("p"):
            engine.hand_off_ending = "bad_checksum"
        for _ in range(20):
            assert "degraded" in await ready(world)
        assert await world.metric("slipstream_open_breakers") == 4
        before = asked(world.of("p"))
        for _ in range(5):
            assert "no pair" in (await ready(world))["degraded"]
        assert asked(world.of("p")) == before


@asynchronous
async def test_nobody_computes_prompts_for_others() -> None:
    async with pools(ready_cache_s=0.0) as world:
        assert await ready(world) == {"status": "ready"}
        for engine in world.of("p"):
            engine.lost.set_result(EngineUnavailable("gone"))
            engine.unreachable = True
        await until(lambda: world.gateway.replicas.states()["lost"] == 2)
        assert "no pair" in (await ready(world))["degraded"]


@asynchronous
async def test_who_does_not_decode_is_not_ready() -> None:
    async with pools(ready_cache_s=1000.0, ready_timeout_s=0.2) as world:
        for engine in world.of("d"):
            engine.hold.clear()
        answer = await world.client.get("/ready")
        assert answer.status_code == 503 and answer.json()["problem"]
        assert (await world.metric(SPLIT), await world.metric(WHOLE)) == (0, 0)
        world.assert_nothing_left()


@asynchronous
async def test_a_probe_that_is_left_is_aborted_at_both() -> None:
    async with pools() as world:
        for engine in world.of("p"):
            engine.hold.clear()
        probe = asyncio.create_task(world.gateway.readiness.look())
        await until(lambda: asked(world.of("p")) == asked(world.of("d")) == 1)
        probe.cancel()
        await asyncio.gather(probe, return_exceptions=True)
        world.assert_nothing_left()
        assert sum(len(engine.aborted) for engine in world.engines.values()) == 2
