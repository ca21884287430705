"""Requests split over scripted replicas: the same tokens, each once, whatever becomes of the hand-off."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest

from slipstream.comm.kv.transfer import Ending
from slipstream.placement.plan import Role
from slipstream.runtime.clock import monotonic_clock
from slipstream.runtime.gateway import attempts
from slipstream.runtime.gateway.app import create_app
from slipstream.runtime.gateway.gateway import Gateway, make_gateway
from slipstream.runtime.gateway.replica import ModelText, model_text
from slipstream.runtime.gateway.replica_set import ReplicaSet
from slipstream.runtime.gateway.request import WayLimits
from slipstream.runtime.gateway.settings import GatewaySettings, RequestLimits
from slipstream.runtime.models.generation_defaults import GenerationDefaults
from slipstream.runtime.reconcile.views import View
from slipstream.runtime.rpc.engine_client import EngineFacts
from slipstream.runtime.rpc.view_source import InProcessViewWatch, ViewBoard
from slipstream.sdk.errors import EngineUnavailable, SlipstreamError
from slipstream.tests.fakes.scripted_engine import ScriptedEngine
from slipstream.tests.fakes.views import replica
from slipstream.tests.gateway.harness import asynchronous, make_tokenizer, until

PROMPT = list(range(5, 45))
ROLES = {"p-1": Role.PREFILL, "p-2": Role.PREFILL, "d-3": Role.DECODE, "d-4": Role.DECODE}


class WatchedEngine(ScriptedEngine):
    """A scripted replica of a cluster, which a test can lose."""

    def __init__(self, name: str) -> None:
        super().__init__(vocab_size=256)
        prefills = ROLES[name] is Role.PREFILL
        self.facts = replace(
            self.facts, epoch=f"epoch of {name}", replica=name, role=ROLES[name].value, sends_kv=prefills,
            receives_kv=not prefills,
        )  # fmt: skip
        self.unreachable = False
        self.lost: asyncio.Future[SlipstreamError] = asyncio.get_running_loop().create_future()

    async def connect(self, *, timeout_s: float) -> EngineFacts:
        if self.unreachable:
            raise EngineUnavailable("nobody answers")
        return await super().connect(timeout_s=timeout_s)

    @property
    def live_requests(self) -> int:
        return len(self.live)

    async def wait_lost(self) -> SlipstreamError:
        return await asyncio.shield(self.lost)


@dataclass
class Pools:
    """A gateway before two that prefill and two that decode."""

    gateway: Gateway
    client: httpx.AsyncClient
    engines: dict[str, WatchedEngine]

    def of(self, kind: str) -> list[WatchedEngine]:
        return [engine for name, engine in self.engines.items() if name.startswith(kind)]

    async def ask(self, *, max_tokens: int = 6, **body: Any) -> httpx.Response:
        body = {"prompt": PROMPT, "max_tokens": max_tokens, "return_token_ids": True} | body
        return await self.client.post("/v1/completions", json=body)

    async def metric(self, name: str) -> float:
        lines = (await self.client.get("/metrics")).text.splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(f"{name} ")), 0.0)

    def assert_answered(self, answer: httpx.Response, *, max_tokens: int = 6) -> None:
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["token_ids"] == PROMPT[:max_tokens]
        self.assert_nothing_left()

    def assert_nothing_left(self) -> None:
        assert not any(engine.live for engine in self.engines.values())
        assert self.gateway.admission.in_flight == 0


@asynccontextmanager
async def pools(**settings: Any) -> AsyncIterator[Pools]:
    engines = {name: WatchedEngine(name) for name in ROLES}
    addresses = {f"host:{name[-1]}": engine for name, engine in engines.items()}
    for engine in engines.values():
        engine.peers = dict(addresses)
    text = model_text(make_tokenizer(), GenerationDefaults())

    async def read_model(model: str, generation: int) -> ModelText:
        return text

    board = ViewBoard()
    replicas = ReplicaSet(
        InProcessViewWatch(board),
        make_client=lambda address: addresses[address],
        read_model=read_model,
        clock=monotonic_clock,
        jitter=lambda pause_s: pause_s * 0.01,
        linger_s=0.0,
        split_from_tokens=16,
    )
    settings.setdefault("limits", RequestLimits(request_timeout_s=20.0))
    chosen = GatewaySettings(served_model_names=("m",), **settings)
    gateway = make_gateway(chosen, replicas, clock=monotonic_clock, wall_clock=lambda: 1_700_000_000.0)
    transport = httpx.ASGITransport(create_app(gateway), raise_app_exceptions=False)
    following = asyncio.create_task(replicas.run())
    try:
        board.publish(
            View(
                epoch=1,
                begun=True,
                replicas=tuple(replica(name, f"host:{name[-1]}", role=role) for name, role in ROLES.items()),
            )
        )
        await until(lambda: replicas.states()["attached"] == len(ROLES))
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            yield Pools(gateway, client, engines)
    finally:
        await replicas.stop(timeout_s=0.0)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


def asked(engines: list[WatchedEngine]) -> int:
    return sum(len(engine.requests) for engine in engines)


@pytest.mark.parametrize("body", [{}, {"stream": True}, {"logprobs": 1}])
@asynchronous
async def test_a_long_prompt_is_split_and_counted(body: dict[str, Any]) -> None:
    async with pools() as world:
        answer = await world.ask(**body)
        if "stream" not in body:
            world.assert_answered(answer)
        else:
            assert answer.text.count('"token_ids"') >= 6 and answer.text.endswith("data: [DONE]\n\n")
        assert asked(world.of("p")) == asked(world.of("d")) == 1
        assert await world.metric('slipstream_hand_offs_total{ending="committed"}') == 1
        assert await world.metric("slipstream_kv_bytes_moved_total") == 1000
        assert await world.metric("slipstream_kv_wire_seconds_total") == 1
        assert await world.metric("slipstream_kv_hidden_seconds_total") == 0.75
        assert await world.metric("slipstream_requests_moved_total") == 0


@asynchronous
async def test_a_hand_off_is_counted_also_when_its_report_comes_after_the_answer() -> None:
    async with pools() as world:
        for engine in world.of("p"):
            engine.reports.clear()
        answer = await world.ask()
        assert answer.json()["choices"][0]["token_ids"] == PROMPT[:6]
        assert await world.metric('slipstream_hand_offs_total{ending="committed"}') == 0
        assert len(world.gateway.afterwards) == 1
        for engine in world.of("p"):
            engine.reports.set()
        await until(lambda: not len(world.gateway.afterwards))
        assert await world.metric('slipstream_hand_offs_total{ending="committed"}') == 1
        world.assert_nothing_left()


@pytest.mark.parametrize("body", [{"prompt": [1, 2, 3]}, {"n": 2}, {"max_tokens": 1}, {"prompt_logprobs": 1}])
@asynchronous
async def test_what_is_not_to_be_split_stays_whole(body: dict[str, Any]) -> None:
    async with pools() as world:
        assert (await world.ask(**body)).status_code == 200
        assert (asked(world.of("p")), asked(world.of("d"))) == (0, 1)
        world.assert_nothing_left()


@asynchronous
async def test_a_request_has_one_trace_everywhere() -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    async with pools() as world:
        headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
        body = {"prompt": PROMPT, "max_tokens": 6}
        answer = await world.client.post("/v1/completions", json=body, headers=headers)
        assert [engine.trace_ids for engine in world.engines.values() if engine.trace_ids] == [[trace], [trace]]
        version, back, span, flags = answer.headers["traceparent"].split("-")
        assert (version, back, flags) == ("00", trace, "01") and span != "b7ad6b7169203331"


@pytest.mark.parametrize("ending", [*(each for each in Ending if each is not Ending.COMMITTED), None])
@asynchronous
async def test_a_hand_off_that_fails_costs_no_token(ending: Ending | None) -> None:
    async with pools() as world:
        for engine in world.of("p"):
            engine.hand_off_ending = None if ending is None else ending.value
        world.assert_answered(await world.ask())
        if ending is None:
            # A client has its first token: whoever goes on is told it.
            assert any(request.generated for engine in world.of("d") for request in engine.requests)
        else:
            assert sum(len(engine.gone_on) for engine in world.of("d")) == 1
            assert await world.metric("slipstream_gone_on_total") == 1


@pytest.mark.parametrize("when", ["at once", "after its token"])
@asynchronous
async def test_a_lost_sender_costs_no_token(when: str) -> None:
    async with pools() as world:
        for engine in world.of("p"):
            engine.fail_after = 0 if when == "at once" else 1
        world.assert_answered(await world.ask())
        assert await world.metric('slipstream_hand_offs_total{ending="lost"}') >= 1


@asynchronous
async def test_the_other_sender_takes_over_the_ticket() -> None:
    async with pools() as world:
        first, second = world.of("p")
        first.refusal = EngineUnavailable("lost")
        for _ in range(4):
            world.assert_answered(await world.ask())
        # Where the first was asked first, the second sends under the same ticket, or whoever waits goes on by itself.
        assert len(second.requests) >= 2 and not asked([first])
        tickets = sum(len(engine.tickets) for engine in world.of("d"))
        assert tickets == 4 and await world.metric("slipstream_requests_moved_total") == 0


def test_a_sender_that_stalls_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "_LIMITS", WayLimits(stall_s=0.1))

    @asynchronous
    async def stalls() -> None:
        async with pools() as world:
            for engine in world.of("p"):
                engine.hold.clear()
            running = asyncio.create_task(world.ask())
            await until(lambda: asked(world.of("p")) == 1)
            world.assert_answered(await running)
            # Whether another one is asked first is the router's to say; in the end whoever waited goes on by itself.
            resent = await world.metric("slipstream_hand_offs_resent_total")
            assert await world.metric("slipstream_gone_on_total") == 1
            assert sum(len(engine.aborted) for engine in world.of("p")) == asked(world.of("p")) == 1 + resent

    stalls()


@asynchronous
async def test_a_lost_receiver_costs_no_token() -> None:
    async with pools() as world:
        for engine in world.of("d"):
            engine.fail_after = 3
        running = asyncio.create_task(world.ask())
        await until(lambda: asked(world.of("d")) == 2)
        for engine in world.of("d"):
            engine.fail_after = None
        world.assert_answered(await running)
        assert await world.metric("slipstream_requests_moved_total") >= 1


@asynchronous
async def test_a_client_that_leaves_ends_it_everywhere() -> None:
    async with pools() as world:
        for engine in world.of("p"):
            engine.hold.clear()
        running = asyncio.create_task(world.ask())
        await until(lambda: any(engine.live for engine in world.of("p")))
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await until(lambda: world.gateway.admission.in_flight == 0)
        world.assert_nothing_left()
        assert sum(len(engine.aborted) for engine in world.engines.values()) == 2


@asynchronous
async def test_random_failures_cost_no_token(seed: int) -> None:
    draw = random.Random(seed)
    async with pools() as world:
        running = [asyncio.create_task(world.ask(max_tokens=draw.randrange(1, 20))) for _ in range(60)]
        while not all(task.done() for task in running):
            engine = draw.choice(list(world.engines.values()))
            engine.fail_after = draw.choice((None, 0, 1, 5))
            engine.refusal = draw.choice((None, None, EngineUnavailable("lost")))
            engine.hand_off_ending = draw.choice(("committed", "no_room", "peer_lost", None))
            for _ in range(draw.randrange(20)):
                await asyncio.sleep(0)
            engine.fail_after, engine.refusal, engine.hand_off_ending = None, None, "committed"
            for _ in range(draw.randrange(100)):
                await asyncio.sleep(0)
        wholes = 0
        for answer in [await task for task in running]:
            assert answer.status_code == 200 or answer.json()["error"]["code"] == "engine_unavailable", answer.text
            if answer.status_code == 200:
                (choice,) = answer.json()["choices"]
                assert choice["finish_reason"] == "length"
                assert choice["token_ids"] == PROMPT[: len(choice["token_ids"])]
                wholes += 1
        assert wholes >= 50, wholes
        world.assert_nothing_left()
