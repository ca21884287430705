"""A gateway before several replicas that come, go, drain and are lost: nothing is lost with them, and nothing lies."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from dataclasses import replace
from typing import Any

import httpx
import pytest

from slipstream.placement.plan import Role
from slipstream.runtime.gateway.replica import model_text
from slipstream.runtime.models.generation_defaults import GenerationDefaults
from slipstream.runtime.reconcile.views import View
from slipstream.tests.fakes.oracle_executor import expected_tokens
from slipstream.tests.fakes.views import replica
from slipstream.tests.gateway.harness import asynchronous, make_tokenizer, parse_events, until
from slipstream.tests.gateway.replica_world import SEED, assert_answered, cluster, error_of


@asynchronous
async def test_requests_are_spread() -> None:
    async with cluster() as world:
        nodes = await world.serve("p-1", "p-2", "p-3")
        answers = await asyncio.gather(*(world.ask(number) for number in range(1, 31)))
        for number, answer in enumerate(answers, start=1):
            assert_answered(answer, number)
        counts = [len(node.asked) for node in nodes]
        assert sum(counts) == 30 and min(counts) >= 5, counts
        assert world.ready == 3


@asynchronous
async def test_the_busy_one_is_spared() -> None:
    async with cluster() as world:
        busy, idle = world.start("p-1", "p-2")
        world.publish("p-1", "p-2")
        await world.until_states(attached=2)
        busy.session.stale = replace(busy.session.newest, running=20)
        for number in range(1, 11):
            assert_answered(await world.ask(number), number)
        assert (len(busy.asked), len(idle.asked)) == (0, 10)


@asynchronous
async def test_what_runs_on_a_replica_that_left_the_view_ends_there() -> None:
    async with cluster() as world:
        (old,) = world.start("p-1", gate_open=False)
        world.publish("p-1")
        await world.until_states(attached=1)
        running = [world.asking(number) for number in (1, 2, 3)]
        await until(lambda: old.session.live_requests == 3)

        (new,) = world.start("p-2")
        world.publish("p-2")
        await world.until_states(attached=1, leaving=1)
        for number in (4, 5):
            assert_answered(await world.ask(number), number)
        assert (len(old.asked), len(new.asked)) == (3, 2)

        old.bench.gate.open()
        for number, task in enumerate(running, start=1):
            assert_answered(await task, number)
        await world.until_states(attached=1)
        assert len(old.clients) == 1 and await world.metric("slipstream_requests_moved_total") == 0


@asynchronous
async def test_a_replica_that_comes_back_into_the_view_was_never_left() -> None:
    async with cluster() as world:
        (node,) = world.start("p-1", gate_open=False)
        world.publish("p-1")
        await world.until_states(attached=1)
        running = world.asking(1)
        await until(lambda: node.session.live_requests == 1)
        world.publish()
        await world.until_states(leaving=1)
        assert error_of(await world.ask(2)) == "engine_unavailable"
        world.publish("p-1")
        await world.until_states(attached=1)
        node.bench.gate.open()
        assert_answered(await running, 1)
        assert_answered(await world.ask(2), 2)
        assert len(node.clients) == 1 and world.ready == 1


@asynchronous
async def test_without_a_replica_requests_are_told_to_come_again() -> None:
    async with cluster() as world:
        assert error_of(await world.ask()) == "engine_unavailable"
        assert "the controller has not been heard yet" in (await world.ask()).json()["error"]["message"]
        ready = await world.client.get("/ready")
        assert ready.status_code == 503 and "not been heard" in ready.json()["problem"]
        assert (await world.client.get("/v1/models")).json()["data"][0]["max_model_len"] is None
        world.publish()
        await until(lambda: world.replicas.states()["attached"] == 0)
        assert "view 1 has none" in (await world.ask()).json()["error"]["message"]
        await world.serve("p-1")
        assert_answered(await world.ask())
        assert (await world.client.get("/ready")).status_code == 200
        assert (await world.client.get("/v1/models")).json()["data"][0]["max_model_len"] == 256


@asynchronous
async def test_ready_is_proven_by_a_token_of_any_replica() -> None:
    async with cluster() as world:
        hung, good = world.start("p-1", gate_open=False)[0], world.start("p-2")[0]
        world.publish("p-1", "p-2")
        await world.until_states(attached=2)
        probes = [asyncio.create_task(world.client.get("/ready")) for _ in range(2)]
        await until(lambda: len(hung.asked) + len(good.asked) >= 1)
        hung.lose()
        assert [(await probe).status_code for probe in probes].count(200) >= 1
        assert len(good.asked) >= 1


# ------------------------------------------------------------------ lost


@pytest.mark.parametrize("body", [{}, {"n": 3}, {"logprobs": 2}, {"stream": True}, {"repetition_penalty": 1.5}])
@asynchronous
async def test_a_lost_replicas_requests_go_on_with_what_they_have(body: dict[str, Any]) -> None:
    async with cluster() as world:
        first, second = world.start("p-1", "p-2", gate_open=False)
        world.publish("p-1", "p-2")
        await world.until_states(attached=2)
        first.bench.gate.open()
        second.bench.gate.open()
        alone = [await world.ask(number, max_tokens=60, **body) for number in (1, 2, 3, 4)]
        first.bench.gate.close()
        second.bench.gate.close()
        before = world.gateway.metrics.tokens._tokens
        running = [world.asking(number, max_tokens=60, **body) for number in (1, 2, 3, 4)]
        await until(lambda: first.session.live_requests + second.session.live_requests == 4)
        # How many each one has is the router's to say.
        lost, other = sorted((first, second), key=lambda node: -node.session.live_requests)
        moved = lost.session.live_requests
        lost.bench.gate.allow(4)
        await until(lambda: world.gateway.metrics.tokens._tokens > before)
        lost.lose()
        other.bench.gate.open()
        answers = await asyncio.gather(*running)
        for answer, unbroken in zip(answers, alone, strict=True):
            assert answer.status_code == 200 and said(answer) == said(unbroken)
        assert await world.metric("slipstream_requests_moved_total") == moved >= 2
        assert any(any(tokens is not None and len(tokens) for tokens in each.generated) for each in other.asked)
        await world.until_states(attached=1, lost=1)
        assert_answered(await world.ask(9), 9)
        lost.reachable = True
        lost.bench.gate.open()
        await world.until_states(attached=2)
        # The same incarnation, met again: it has not started anew.
        assert world.ready == 2


@pytest.mark.parametrize("stream", [False, True])
@asynchronous
async def test_a_request_that_was_lost_unheard_goes_to_another_replica(stream: bool) -> None:
    async with cluster() as world:
        first, second = world.start("p-1", "p-2", gate_open=False)
        world.publish("p-1", "p-2")
        await world.until_states(attached=2)
        running = world.asking(1, stream=stream)
        await until(lambda: first.session.live_requests + second.session.live_requests == 1)
        there, other = (first, second) if first.asked else (second, first)
        there.lose()
        await until(lambda: other.session.live_requests == 1)
        other.bench.gate.open()
        answer = await running
        if stream:
            assert answer.text.endswith("data: [DONE]\n\n") and '"error"' not in answer.text
        else:
            assert_answered(answer, 1)
        assert [request.seed for request in (*there.asked, *other.asked)] == [SEED, SEED]
        assert await world.metric("slipstream_requests_moved_total") == 1


@asynchronous
async def test_it_goes_to_another_one_as_often_as_it_takes() -> None:
    async with cluster() as world:
        nodes = world.start("p-1", "p-2", "p-3", gate_open=False)
        world.publish("p-1", "p-2", "p-3")
        await world.until_states(attached=3)
        running = world.asking(1)
        for _ in range(2):
            await until(lambda: any(node.reachable and node.session.live_requests for node in nodes))
            next(node for node in nodes if node.reachable and node.session.live_requests).lose()
        for node in nodes:
            node.bench.gate.open()
        assert_answered(await running, 1)
        assert sum(len(node.asked) for node in nodes) == 3


@asynchronous
async def test_without_another_one_it_waits_for_one() -> None:
    async with cluster() as world:
        (node,) = world.start("p-1", gate_open=False)
        world.publish("p-1")
        await world.until_states(attached=1)
        running = world.asking(1, max_tokens=20)
        await until(lambda: node.session.live_requests == 1)
        node.bench.gate.allow(4)
        await until(lambda: world.gateway.metrics.tokens._tokens >= 1)
        node.lose()
        await world.until_states(lost=1)
        world.start("p-2")
        world.publish("p-2")
        assert_answered(await running, 1, max_tokens=20)


@asynchronous
async def test_without_another_one_in_its_time_it_ends_by_name() -> None:
    async with cluster(request_timeout_s=0.5) as world:
        (node,) = world.start("p-1", gate_open=False)
        world.publish("p-1")
        await world.until_states(attached=1)
        running = world.asking(1)
        await until(lambda: node.session.live_requests == 1)
        node.lose()
        assert error_of(await running) == "engine_unavailable"


@asynchronous
async def test_a_draining_replica_is_left_out_and_what_it_refuses_goes_elsewhere() -> None:
    async with cluster() as world:
        draining, other = await world.serve("p-1", "p-2")
        # The gateway has not heard of it yet.
        draining.session.stale = draining.session.newest
        other.session.stale = replace(other.session.newest, running=5)
        assert await draining.session.drain(timeout_s=5.0)
        assert_answered(await world.ask(1), 1)
        assert (len(draining.asked), len(other.asked)) == (1, 1)
        assert await world.metric("slipstream_requests_moved_total") == 1
        draining.session.stale = None
        await until(lambda: draining.session.newest.draining)
        for number in (2, 3, 4):
            assert_answered(await world.ask(number), number)
        assert (len(draining.asked), len(other.asked)) == (1, 4)
        # A lone one that drains takes nothing either.
        world.publish("p-1")
        await world.until_states(attached=1)
        assert error_of(await world.ask(5)) == "engine_unavailable"


def said(answer: httpx.Response) -> dict[int, Any]:
    """Return all that an answer says of each sample, however it came."""
    if not answer.text.startswith("data: "):
        return {choice["index"]: choice for choice in answer.json()["choices"]}
    events = [json.loads(event) for event in parse_events(answer.text)[:-1]]
    found: dict[int, Any] = {}
    for choice in (choice for event in events for choice in event["choices"]):
        before = found.setdefault(choice["index"], {"text": "", "token_ids": []})
        before["text"] += choice["text"]
        before["token_ids"] += choice["token_ids"]
    return found


# ------------------------------------------------------------------ models


@asynchronous
async def test_each_request_is_made_for_the_model_of_its_replica() -> None:
    async with cluster(request_timeout_s=3.0) as world:
        world.texts["newer"] = model_text(make_tokenizer(), GenerationDefaults(temperature=0.25))
        (old,) = await world.serve("p-1")
        world.start("p-2", model="newer", max_model_len=64)
        world.publish("p-1")
        world.board.publish(
            View(epoch=9, begun=True, replicas=(replica("p-1", "host:1"), replica("p-2", "host:2", model=2)))
        )
        await world.until_states(attached=2)
        new = world.nodes["p-2"]
        for number in range(1, 7):
            await world.ask(number)
        assert {request.params.temperature for request in old.asked} == {1.0}
        assert {request.params.temperature for request in new.asked} == {0.25}
        assert world.read == [("oracle", 1), ("newer", 2)]
        # A request of one model does not go on with another.
        (hung,) = world.start("p-3", gate_open=False)
        world.board.publish(
            View(epoch=10, begun=True, replicas=(replica("p-3", "host:3"), replica("p-2", "host:2", model=2)))
        )
        await until(lambda: world.replicas.states()["attached"] == 2 and bool(hung.clients))
        new.session.stale = replace(new.session.newest, running=50)
        running = world.asking(1)
        await until(lambda: hung.session.live_requests == 1)
        hung.lose()
        assert error_of(await running) == "engine_unavailable"


@asynchronous
async def test_a_replica_whose_model_cannot_be_read_is_skipped(caplog: pytest.LogCaptureFixture) -> None:
    async with cluster() as world:
        (good,) = world.start("p-1")
        (odd,) = world.start("p-2", model="/elsewhere")
        world.publish("p-1", "p-2")
        await world.until_states(attached=1, skipped=1)
        for number in (1, 2, 3):
            assert_answered(await world.ask(number), number)
        assert (len(good.asked), len(odd.asked)) == (3, 0)
        text = (await world.client.get("/metrics")).text
        assert 'slipstream_replicas{state="skipped"} 1.0' in text
        assert 'slipstream_replicas{state="attached"} 1.0' in text
        # Tried again, and said once.
        await until(lambda: world.read.count(("/elsewhere", 1)) >= 3)
        said = [record.message for record in caplog.records if "p-2" in record.message and record.levelno >= 30]
        assert said == [
            "replica p-2 at host:2 is skipped: its model cannot be read by this gateway: "
            "/elsewhere/tokenizer.json: does not exist"
        ]
        world.texts["/elsewhere"] = world.texts["oracle"]
        await world.until_states(attached=2)


@asynchronous
async def test_another_replica_at_an_old_address_is_not_taken_for_it() -> None:
    async with cluster() as world:
        world.start("p-1", replica="q-5")
        world.publish("p-1")
        await world.until_states(lost=1)
        assert error_of(await world.ask()) == "engine_unavailable"
        world.start("p-2", replica="p-2")
        world.publish("p-2")
        await world.until_states(attached=1)
        assert_answered(await world.ask())


@asynchronous
async def test_a_replica_that_only_prefills_gets_no_requests() -> None:
    async with cluster() as world:
        world.start("p-1", "p-2")
        roles = (replica("p-1", "host:1", role=Role.PREFILL), replica("p-2", "host:2", role=Role.DECODE))
        world.board.publish(View(epoch=1, begun=True, replicas=roles))
        await world.until_states(attached=2)
        for _ in range(5):
            assert_answered(await world.ask())
        assert not world.nodes["p-1"].asked


@asynchronous
async def test_a_full_replica_says_so_itself() -> None:
    async with cluster() as world:
        (node,) = await world.serve("p-1")
        node.session.stale = replace(node.session.newest, queue_room=0)
        # What the router goes by is old: the engine knows whether it has room, and what never fits.
        assert_answered(await world.ask(1), 1)
        refused = await world.ask(*range(1, 90), max_tokens=4, n=17)
        assert refused.status_code == 400, refused.text


# ------------------------------------------------------------------ all at once


@asynchronous
async def test_whatever_happens_each_request_that_began_is_answered_right(
    seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    draw = random.Random(seed)
    async with cluster() as world:
        alive = ["p-1", "p-2"]
        await world.serve(*alive)
        running: list[tuple[int, asyncio.Task]] = []
        for event in range(60):
            for _ in range(draw.randrange(3)):
                prompt = draw.randrange(1, 90)
                running.append((prompt, world.asking(prompt, max_tokens=draw.choice((1, 20)))))
            match draw.choice(("wait", "join", "leave", "lose", "cut")):
                case "join" if len(alive) < 4:
                    alive.append(f"p-{10 + event}")
                    world.start(alive[-1])
                    world.publish(*alive)
                case "leave" if len(alive) > 1:
                    alive.pop(draw.randrange(len(alive)))
                    world.publish(*alive)
                case "lose" if len(alive) > 1:
                    world.nodes[alive.pop(draw.randrange(len(alive)))].lose()
                    world.publish(*alive)
                case "cut":
                    world.nodes[draw.choice(alive)].lose(for_good=False)
            for _ in range(draw.randrange(20)):
                await asyncio.sleep(0)
        answered = 0
        for prompt, task in running:
            answer = await task
            if answer.status_code != 200:
                # Nobody was there when it came: it has not begun.
                assert error_of(answer) == "engine_unavailable" and "no replica" in answer.json()["error"]["message"]
                continue
            answered += 1
            (choice,) = answer.json()["choices"]
            count = len(choice["token_ids"])
            assert count in (1, 20) and choice["token_ids"] == expected_tokens([prompt], SEED, count)
        assert answered
        await world.until_states(attached=len(alive))
        assert_answered(await world.ask())
        assert not caplog.records
