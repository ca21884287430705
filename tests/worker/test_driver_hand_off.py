"""Requests split between two driver loops, with ranks that copy: tokens, endings, and blocks whatever goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from slipstream.runtime.messages import EngineRequest, FinishReason
from slipstream.runtime.rpc.engine_client import EngineClient, HandOffReport, RequestEvent
from slipstream.runtime.rpc.in_process import InProcessEngineClient
from slipstream.tests.contracts.engine_client import Answer, same
from slipstream.tests.engine.builders import request
from slipstream.tests.fakes.gated_executor import score
from slipstream.tests.fakes.oracle_executor import expected_tokens
from slipstream.tests.fakes.split_bench import Replica, SplitBench, split_bench

PATIENCE_S = 20.0
PROMPT = [(3 * place) % 90 for place in range(41)]


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await test

    asyncio.run(bounded())


@dataclass
class Pair:
    """A prefill and a decode replica, with a client of each."""

    bench: SplitBench
    prefill: Replica
    decode: Replica
    to_prefill: InProcessEngineClient
    to_decode: InProcessEngineClient


@asynccontextmanager
async def pair(**options: Any) -> AsyncIterator[Pair]:
    """Start both, and make sure at the end that no block of either is lost."""
    with split_bench() as bench:
        prefill, decode = bench.start("p", role="prefill", **options), bench.start("d", role="decode", **options)
        clients = [InProcessEngineClient(each.loop) for each in (prefill, decode)]
        for client in clients:
            await client.connect(timeout_s=PATIENCE_S)
        yield Pair(bench, prefill, decode, *clients)
        bench.net.let_flow()
        for client in clients:
            await all_free(client)
            await client.close()


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something is so; the time that may take is the test's."""
    while not condition():
        await asyncio.sleep(0.005)


async def all_free(client: EngineClient) -> None:
    """Wait until a replica says that it holds nothing."""

    def free() -> bool:
        load = client.load()
        assert load is not None
        busy = load.running + load.waiting + load.awaiting + load.sending + load.receiving
        return not busy and load.blocks_available == load.blocks_total

    await until(free)


async def collect(stream: AsyncIterator[RequestEvent]) -> tuple[Answer, HandOffReport | None]:
    """Read a request's news to their end."""
    got, report = Answer(), None
    async for event in stream:
        got.add(event)
        report = event.hand_off or report
    return got, report


@dataclass
class Split:
    """What came of a request that was split."""

    sent: Answer
    report: HandOffReport | None
    got: Answer


async def split(
    two: Pair, wanted: EngineRequest, ticket: str = "t", *, timeout_s: float = PATIENCE_S, before: float = 0.0
) -> Split:
    """Have a request's prompt computed by one replica, and the rest by the other."""
    waits = asyncio.create_task(collect(two.to_decode.generate(wanted, timeout_s=timeout_s, ticket=ticket)))
    sent, report = await collect(
        two.to_prefill.generate(wanted, timeout_s=timeout_s, send_to=two.decode.send_to(ticket))
    )
    got, none = await waits
    assert none is None, "who receives tells of no hand-off"
    return Split(sent, report, got)


def ask(
    name: str = "r", prompt: list[int] = PROMPT, *, max_tokens: int = 12, seed: int = 7, **more: Any
) -> EngineRequest:
    return request(name, prompt, max_tokens=max_tokens, seed=seed, **more)


def test_a_request_goes_from_one_replica_to_the_other() -> None:
    async def test() -> None:
        async with pair() as two:
            done = await split(two, ask())
            expected = expected_tokens(PROMPT, 7, 12)
            assert done.got.tokens[0] == expected and done.sent.tokens[0] == expected[:1]
            assert done.got.reasons == {0: FinishReason.LENGTH} and not done.sent.reasons
            report = done.report
            assert report is not None and report.ending == "committed"
            assert report.bytes_moved == 8 * len(PROMPT) and report.wire_s == 0.25 and report.hidden_s == 0.125
            loads = two.to_prefill.load(), two.to_decode.load()
            assert loads[0] is not None and loads[1] is not None
            await until(lambda: (load := two.to_prefill.load()) is not None and load.kv_bytes_out == 8 * len(PROMPT))
            await until(lambda: (load := two.to_decode.load()) is not None and load.kv_bytes_in == 8 * len(PROMPT))

    run(test())


def test_many_at_once_with_seeds_scores_and_stop_tokens() -> None:
    async def test() -> None:
        async with pair() as two:
            wanted = []
            for number in range(24):
                prompt = [(number * 5 + place) % 90 for place in range(3 + 5 * number % 60)]
                tokens = expected_tokens(prompt, number, 10)
                stop = (tokens[6],) if number % 3 == 0 else ()
                wanted.append(ask(f"r{number}", prompt, max_tokens=10, seed=number, stop_ids=stop, logprobs=2))
            done = await asyncio.gather(*(split(two, each, f"t{each.request_id}") for each in wanted))
            for each, part in zip(wanted, done, strict=True):
                prompt = each.prompt_token_ids.tolist()
                tokens = expected_tokens(prompt, each.seed, 10, each.stop_ids)
                ended_there = part.report is None
                assert ended_there == (len(tokens) == 1)
                if ended_there:
                    continue
                assert part.got.tokens[0] == tokens, each
                for place, entry in enumerate(part.got.logprobs[0]):
                    assert same(entry, score(tokens[place], len(prompt) + place, 2))

    run(test())
