"""A gateway before a cluster of its test's making: real engines in this process, views on a board, cuts at will."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from fastapi import FastAPI

from slipstream.runtime.clock import monotonic_clock
from slipstream.runtime.gateway.app import create_app
from slipstream.runtime.gateway.gateway import Gateway, make_gateway
from slipstream.runtime.gateway.replica import ModelText, model_text
from slipstream.runtime.gateway.replica_set import ReplicaSet
from slipstream.runtime.gateway.settings import GatewaySettings, RequestLimits
from slipstream.runtime.messages import EngineRequest
from slipstream.runtime.models.generation_defaults import GenerationDefaults
from slipstream.runtime.rpc.engine_client import EngineFacts, EngineLoadReport
from slipstream.runtime.rpc.in_process import InProcessEngineClient
from slipstream.runtime.rpc.session import EngineHost
from slipstream.runtime.rpc.view_source import InProcessViewWatch, ViewBoard
from slipstream.sdk.errors import CheckpointError, EngineUnavailable
from slipstream.tests.fakes.engine_bench import EngineBench, engine_bench
from slipstream.tests.fakes.oracle_executor import expected_tokens
from slipstream.tests.fakes.views import view
from slipstream.tests.gateway.harness import make_tokenizer, until

SEED = 7


class CutClient(InProcessEngineClient):
    """A client whose connection a test can cut; ``stale``: it hears no news of its replica's load."""

    def __init__(self, host: EngineHost, node: Node) -> None:
        super().__init__(host)
        self._node = node
        self.asked: list[EngineRequest] = []
        self.cut_off = False
        self.stale: EngineLoadReport | None = None

    async def _connect(self) -> EngineFacts:
        if not self._node.reachable:
            raise EngineUnavailable("nobody answers")
        return await super()._connect()

    def generate(self, request: EngineRequest, **options: Any):
        self.asked.append(request)
        return super().generate(request, **options)

    def load(self) -> EngineLoadReport | None:
        return self.stale or super().load()

    @property
    def newest(self) -> EngineLoadReport:
        """The newest report, which must have come."""
        load = super().load()
        assert load is not None
        return load

    def cut(self) -> None:
        if self._task is not None:
            self.cut_off = True
            self._task.cancel()


@dataclass
class Node:
    """Where a replica runs."""

    bench: EngineBench
    clients: list[CutClient]
    reachable: bool = True

    @property
    def asked(self) -> list[EngineRequest]:
        """All requests that came here."""
        return [request for client in self.clients for request in client.asked]

    @property
    def session(self) -> CutClient:
        """The session that was opened last."""
        return self.clients[-1]

    def lose(self, *, for_good: bool = True) -> None:
        """Cut all connections; for good, no other one is made."""
        self.reachable = not for_good
        for client in self.clients:
            if not client.cut_off:
                client.cut()


class World:
    """A cluster as one gateway sees it. Replica ``p-1`` is at ``host:1``."""

    def __init__(self, stack: ExitStack, *, request_timeout_s: float) -> None:
        self._stack = stack
        self.board = ViewBoard()
        self.nodes: dict[str, Node] = {}
        self.texts = {"oracle": model_text(make_tokenizer(), GenerationDefaults())}
        self.read: list[tuple[str, int]] = []
        self.ready = 0
        self.replicas = ReplicaSet(
            InProcessViewWatch(self.board),
            make_client=self._make_client,
            read_model=self._read_model,
            clock=monotonic_clock,
            jitter=lambda pause_s: pause_s * 0.01,
            linger_s=0.0,
            on_ready=self._note_ready,
        )
        settings = GatewaySettings(
            served_model_names=("m",),
            ready_cache_s=0.001,
            limits=RequestLimits(request_timeout_s=request_timeout_s),
        )
        self.gateway: Gateway = make_gateway(
            settings, self.replicas, clock=monotonic_clock, wall_clock=lambda: 1_700_000_000.0
        )
        self.app: FastAPI = create_app(self.gateway)
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://gateway")

    def start(self, *names: str, gate_open: bool = True, **says: Any) -> list[Node]:
        """Let replicas run, which no view has yet."""
        for name in names:
            bench = self._stack.enter_context(
                engine_bench(gate_open=gate_open, says={"epoch": f"epoch of {name}", **says})
            )
            self.nodes[name] = Node(bench=bench, clients=[])
        return [self.nodes[name] for name in names]

    def publish(self, *names: str, model: int = 1) -> None:
        """Publish the next view, of these replicas."""
        epoch = self.board.newest.epoch + 1
        assert self.board.publish(view(epoch, {name: address_of(name) for name in names}, model=model))

    async def serve(self, *names: str) -> list[Node]:
        """Start replicas, publish them alone, and wait until all are attached."""
        nodes = self.start(*names)
        self.publish(*names)
        await self.until_states(attached=len(names))
        return nodes

    async def until_states(self, **counts: int) -> None:
        """Wait until so many replicas are in these states and none in others."""
        await until(lambda: {state: count for state, count in self.replicas.states().items() if count} == counts)

    async def ask(self, *prompt: int, max_tokens: int = 8, **body: Any) -> httpx.Response:
        """Send a request; its answer has token ids."""
        body = {
            "prompt": list(prompt or (1, 2)),
            "max_tokens": max_tokens,
            "seed": SEED,
            "return_token_ids": True,
        } | body
        return await self.client.post("/v1/completions", json=body)

    def asking(self, *prompt: int, **body: Any) -> asyncio.Task[httpx.Response]:
        """Send a request, and do not wait."""
        return asyncio.create_task(self.ask(*prompt, **body))

    async def metric(self, name: str) -> float:
        """Return a metric's value."""
        lines = (await self.client.get("/metrics")).text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))

    def _make_client(self, address: str) -> CutClient:
        node = next(node for name, node in self.nodes.items() if address_of(name) == address)
        node.clients.append(CutClient(node.bench.loop, node))
        return node.session

    async def _read_model(self, model: str, generation: int) -> ModelText:
        self.read.append((model, generation))
        if model not in self.texts:
            raise CheckpointError(f"{model}/tokenizer.json", "does not exist")
        return self.texts[model]

    def _note_ready(self) -> None:
        self.ready += 1


def address_of(name: str) -> str:
    """Return where a replica is, by its name."""
    return f"host:{name.rpartition('-')[2]}"


def assert_answered(answer: httpx.Response, *prompt: int, max_tokens: int = 8) -> None:
    """Check that an answer is whole, and has the tokens that any replica would have drawn."""
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert choice["token_ids"] == expected_tokens(list(prompt or (1, 2)), SEED, max_tokens)


def error_of(answer: httpx.Response) -> str:
    """Return the code of an error that may be tried again."""
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1, answer.text
    return answer.json()["error"]["code"]


@asynccontextmanager
async def cluster(*, request_timeout_s: float = 600.0) -> AsyncIterator[World]:
    """A gateway that follows views; at the end nothing may run on any replica."""
    with ExitStack() as stack:
        world = World(stack, request_timeout_s=request_timeout_s)
        following = asyncio.create_task(world.replicas.run())
        try:
            async with world.client:
                yield world
            assert world.gateway.admission.in_flight == 0
            if following.done():
                following.result()
        finally:
            for node in world.nodes.values():
                node.bench.gate.open()
            await world.replicas.stop(timeout_s=0.0)
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
