"""The load of the isolation benchmark, and the gateway it goes through; runs on a host of its own.

``python -P load.py`` reads one line of JSON from standard input (``Order``) and writes one (``Measured``). Some
requests generate all the time, a new one in the place of each that ends; meanwhile prompts come that are long. What is
measured is the time between tokens of those that generate, as a client sees it, and the long prompts' time to first
token.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from slipstream.comm.handshake import secret_from
from slipstream.placement.plan import Degrees, Role
from slipstream.runtime.api_client.client import ApiClient
from slipstream.runtime.api_client.errors import ApiError
from slipstream.runtime.clock import monotonic_clock
from slipstream.runtime.reconcile.desired import Generation
from slipstream.runtime.reconcile.views import PoolView, ReplicaView, View
from slipstream.runtime.rpc.view_server import ViewServer
from slipstream.runtime.rpc.view_source import ViewBoard

MODEL_NAME = "isolation"
_START_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What to measure. ``replicas``: (name, role, address) each; ``gateway``: more arguments for its process.

    Units: lengths in tokens; seconds, of the measured part; every_s, between two long prompts on average
    """

    replicas: list[list[str]]
    address: str
    vocabulary: int
    gateway: list[str]
    generating: int
    short_prompt: int
    generated: int
    long_prompt: int
    every_s: float
    seconds: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Times in seconds: ``gaps_s`` between tokens of requests that generate, ``first_s`` of long prompts."""

    gaps_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    answered: int = 0
    failed: int = 0


class Load:
    """Clients of one gateway."""

    def __init__(self, client: ApiClient, order: Order) -> None:
        self._client = client
        self._order = order
        self._draw = random.Random(order.seed)
        self._measuring = False
        self.measured = Measured()
        self._answered = self._failed = 0

    async def run(self) -> Measured:
        """Warm up, measure, and leave what still runs."""
        order = self._order
        async with asyncio.TaskGroup() as group:
            generating = [group.create_task(self._generate()) for _ in range(order.generating)]
            # Until all generate, and long prompts have been seen once.
            await self._long()
            self._measuring = True
            ends_s = monotonic_clock() + order.seconds
            longs = []
            while (left_s := ends_s - monotonic_clock()) > 0:
                longs.append(group.create_task(self._long()))
                await asyncio.sleep(min(left_s, self._draw.expovariate(1 / order.every_s)))
            self._measuring = False
            for task in (*generating, *longs):
                task.cancel()
        return Measured(
            gaps_s=self.measured.gaps_s,
            first_s=self.measured.first_s,
            answered=self._answered,
            failed=self._failed,
        )

    def _prompt(self, tokens: int) -> list[int]:
        return [self._draw.randrange(self._order.vocabulary) for _ in range(tokens)]

    async def _generate(self) -> None:
        while True:
            body = self._body(self._order.short_prompt, self._order.generated)
            before_s: float | None = None
            try:
                async with aclosing(self._client.stream("completions", body)) as events:
                    async for _ in events:
                        now_s = monotonic_clock()
                        if before_s is not None and self._measuring:
                            self.measured.gaps_s.append(now_s - before_s)
                        before_s = now_s
                self._answered += 1
            except ApiError as error:
                self._fail(error)

    async def _long(self) -> None:
        asked_s = monotonic_clock()
        first = True
        try:
            async with aclosing(self._client.stream("completions", self._body(self._order.long_prompt, 4))) as events:
                async for _ in events:
                    if first and self._measuring:
                        self.measured.first_s.append(monotonic_clock() - asked_s)
                    first = False
            self._answered += 1
        except ApiError as error:
            self._fail(error)

    def _fail(self, error: ApiError) -> None:
        self._failed += 1
        print(f"failed: {error}", file=sys.stderr, flush=True)

    def _body(self, prompt: int, tokens: int) -> dict[str, Any]:
        return {
            "model": MODEL_NAME,
            "prompt": self._prompt(prompt),
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }


async def measure(order: Order, secret: bytes) -> Measured:
    """Publish a view of the replicas, start a gateway that follows it, and put the load on it."""
    async with AsyncExitStack() as stack:
        board = ViewBoard()
        server = ViewServer(board, f"{order.address}:0", secret=secret)
        watched = await server.start()
        stack.push_async_callback(server.stop, grace_s=0.0)
        board.publish(_view(order))
        url = await stack.enter_async_context(_Gateway(order, watched))
        client = await stack.enter_async_context(ApiClient(url, max_connections=order.generating + 256))
        await _until_ready(client, order)
        return await Load(client, order).run()


def _view(order: Order) -> View:
    roles = sorted({role for _, role, _ in order.replicas})
    counts = {role: sum(each[1] == role for each in order.replicas) for role in roles}
    return View(
        epoch=1,
        begun=True,
        pools=tuple(PoolView(name=role, role=Role(role), wanted=counts[role]) for role in roles),
        replicas=tuple(
            ReplicaView(
                replica=name,
                pool=role,
                role=Role(role),
                generation=Generation(),
                degrees=Degrees(),
                address=address,
            )
            for name, role, address in order.replicas
        ),
    )


class _Gateway:
    """A gateway's process; yields its address."""

    def __init__(self, order: Order, watched: str) -> None:
        self._command = [
            *(sys.executable, "-P", "-m", "slipstream.runtime.gateway.cluster_main", "--host", order.address),
            *("--port", "0", "--watch", watched, "--served-model-name", MODEL_NAME, "--log-level", "warning"),
            *("--max-concurrent-requests", "1024", *order.gateway),
        ]

    async def __aenter__(self) -> str:
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), _START_TIMEOUT_S)
        return f"http://{json.loads(line)['address']}"

    async def __aexit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()


async def _until_ready(client: ApiClient, order: Order) -> None:
    """Wait until the gateway answers: every replica is met soon after the first."""
    body = {"model": MODEL_NAME, "prompt": [1] * order.short_prompt, "max_tokens": 2, "ignore_eos": True}
    async with asyncio.timeout(_START_TIMEOUT_S):
        while True:
            try:
                await client.post("completions", body)
                return
            except ApiError:
                await asyncio.sleep(0.1)


def main() -> None:
    """Measure as standard input says."""

    order = Order(**json.loads(sys.stdin.readline()))
    print(json.dumps(asdict(asyncio.run(measure(order, secret_from(os.environ))))), flush=True)


if __name__ == "__main__":
    main()
