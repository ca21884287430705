"""Requests that really go from one driver process to another: the same tokens as one engine, and no block lost."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from slipstream.runtime.messages import EngineRequest, FinishReason
from slipstream.runtime.rpc.client import GrpcEngineClient
from slipstream.runtime.worker.exit_status import EXIT_DRAINED
from slipstream.sdk.errors import EngineUnavailable
from slipstream.sdk.structured import StructuredOutputsParams
from slipstream.tests.contracts.engine_client import Answer, answer
from slipstream.tests.engine.builders import request
from slipstream.tests.gateway.server_process import make_model
from slipstream.tests.handoff.driver_processes import Driver, drivers
from slipstream.tests.handoff.split_ways import Way, all_free, load_of, send_from, until, wait_at
from slipstream.tests.text.tiny_tokenizers import byte_level

PATIENCE_S = 120.0
PROMPTS = [[3 + (7 * row + index) % 150 for index in range(length)] for row, length in enumerate((3, 20, 65, 130))]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "yy", "zzz"]}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def replicas(model: Path) -> Iterator[dict[str, Driver]]:
    """Two that prefill, one of them cut over two ranks, and two that decode, likewise; they may use what there is."""
    wanted = [
        (f"{role}{degree}", role, "auto", f"--tensor-parallel-size={degree}", f"--block-size={block}")
        for role, degree, block in (("prefill", 1, 16), ("prefill", 2, 8), ("decode", 1, 16), ("decode", 2, 16))
    ]
    with drivers(model, *wanted, ("tcp", "prefill", "tcp")) as started:
        yield {driver.name: driver for driver in started}


@dataclass
class Pair:
    """A driver that computes prompts and one that goes on, with a client of each."""

    prefill: Driver
    decode: Driver
    to_prefill: GrpcEngineClient
    to_decode: GrpcEngineClient


@asynccontextmanager
async def meet(prefill: Driver, decode: Driver) -> AsyncIterator[Pair]:
    """Meet two drivers, and make sure at the end that no block of either is lost."""
    async with prefill.client() as to_prefill, decode.client() as to_decode:
        yield Pair(prefill, decode, to_prefill, to_decode)
        await asyncio.gather(all_free(to_prefill), all_free(to_decode))


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await test

    asyncio.run(bounded())


def requests(name: str, **more: Any) -> list[EngineRequest]:
    """Return requests: greedy ones and seeded ones, with log-probabilities and without, one with a schema."""
    plain = [
        request(
            f"{name}-{row}",
            prompt,
            seed=row,
            max_tokens=14,
            temperature=0.8 * (row % 2),
            logprobs=2 if row > 1 else None,
            cache_salt=name,
            **more,
        )
        for row, prompt in enumerate(PROMPTS)
    ]
    constraint = StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True)
    return [
        *plain,
        request(
            f"{name}-json",
            PROMPTS[1],
            seed=5,
            max_tokens=40,
            temperature=0.9,
            cache_salt=name,
            stop_ids=(byte_level().token_to_id("<|im_end|>"),),
            structured_outputs=constraint,
        ),
    ]


async def split(two: Pair, one: EngineRequest) -> tuple[Way, Way]:
    """Have a request computed by two drivers."""
    waits = wait_at(two.to_decode, one, one.request_id)
    sent = await send_from(two.to_prefill, one, two.decode.send_to(one.request_id))
    return sent, await waits


async def split_all(two: Pair, wanted: Sequence[EngineRequest]) -> list[tuple[Way, Way]]:
    return list(await asyncio.gather(*(split(two, one) for one in wanted)))


async def of_one_engine(client: GrpcEngineClient, wanted: Sequence[EngineRequest]) -> list[Answer]:
    """Return what one engine makes of requests, with nothing cached."""
    alone = [replace(one, request_id=f"alone-{one.request_id}", cache_salt=f"alone-{one.cache_salt}") for one in wanted]
    return list(await asyncio.gather(*(answer(client, one, timeout_s=PATIENCE_S) for one in alone)))


def check(done: Sequence[tuple[Way, Way]], expected: Sequence[Answer]) -> None:
    """Hold what came of split requests against what one engine makes of them."""
    for (sent, got), one in zip(done, expected, strict=True):
        assert sent.error is None and got.error is None
        assert sent.report is not None and sent.report.ending == "committed", sent.report
        assert sent.tokens == one.tokens[0][:1]
        assert got.tokens == one.tokens[0] and got.answer.reasons == one.reasons
        for entry, other in zip(got.answer.logprobs[0], one.logprobs[0], strict=True):
            assert entry.token_ids.tolist() == other.token_ids.tolist()
            assert entry.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize("decode", ["decode1", "decode2"])
@pytest.mark.parametrize("prefill", ["prefill1", "prefill2", "tcp"])
def test_the_same_tokens_as_one_engine(replicas: dict[str, Driver], prefill: str, decode: str) -> None:
    """Over shared memory and over tcp, between any degrees and block sizes, all requests at once."""

    async def test() -> None:
        async with meet(replicas[prefill], replicas[decode]) as two:
            wanted = requests(f"{prefill}-{decode}")
            before = load_of(two.to_prefill).kv_bytes_out
            done = await split_all(two, wanted)
            check(done, await of_one_engine(two.to_decode, wanted))
            reports = [sent.report for sent, _ in done]
            assert all(report is not None and report.bytes_moved > 0 for report in reports)
            moved = sum(report.bytes_moved for report in reports if report is not None)
            await until(lambda: load_of(two.to_prefill).kv_bytes_out - before == moved)

    run(test())


def test_the_answer_keeps_to_its_schema(replicas: dict[str, Driver]) -> None:
    async def test() -> None:
        async with meet(replicas["prefill1"], replicas["decode2"]) as two:
            one = requests("schema")[-1]
            _, got = await split(two, one)
            assert got.answer.reasons == {0: FinishReason.STOP}
            jsonschema.validate(json.loads(byte_level().decode(got.tokens)), SCHEMA)

    run(test())


def test_what_either_side_has_cached_is_used(replicas: dict[str, Driver]) -> None:
    async def test() -> None:
        async with meet(replicas["prefill1"], replicas["decode1"]) as two:
            [*_, long, _] = requests("cached")
            expected = await of_one_engine(two.to_decode, [long])
            # Where it is computed alone: nothing is computed twice, all is moved.
            await answer(two.to_prefill, replace(long, request_id="warm"), timeout_s=PATIENCE_S)
            first = await split(two, long)
            check([first], expected)
            # Now it is there as well: only the block of its last tokens is moved.
            second = await split(two, replace(long, request_id="cached-again"))
            check([second], expected)
            assert first[0].report is not None and second[0].report is not None
            assert 0 < second[0].report.bytes_moved * 10 < first[0].report.bytes_moved
            assert second[1].answer.cached_tokens == 128

    run(test())


def test_aborts_and_going_on_leave_nothing_behind(replicas: dict[str, Driver]) -> None:
    async def test() -> None:
        async with meet(replicas["prefill2"], replicas["decode1"]) as two:
            wanted = [replace(one, max_tokens=60) for one in requests("ended")[:4]]
            expected = await of_one_engine(two.to_decode, wanted)
            ways = []
            for turn, one in enumerate(wanted):
                waits = wait_at(two.to_decode, one, one.request_id)
                sent = send_from(two.to_prefill, one, two.decode.send_to(one.request_id))
                ways.append((waits, sent))
                # Both have to have been asked before either is told otherwise.
                await until(lambda: two.to_decode.live_requests > 0 and two.to_prefill.live_requests > 0)
                if turn == 0:
                    waits.cancel()
                elif turn == 1:
                    sent.cancel()
                    await two.to_decode.go_on(one.request_id)
                elif turn == 2:
                    await two.to_decode.go_on(one.request_id)
            for (waits, sent), one in zip(ways[1:], expected[1:], strict=True):
                assert (await waits).tokens == one.tokens[0]
                if not sent.cancelled() and not sent.cancelling():
                    ended = await sent
                    assert ended.report is not None and ended.tokens in ([], one.tokens[0][:1])
            await ways[0][1]

    run(test())


def test_whoever_is_killed_takes_no_blocks_of_others_along(model: Path) -> None:
    async def test(prefill: Driver, decode: Driver, other: Driver) -> None:
        long = [3 + index % 150 for index in range(230)]
        wanted = [request(f"k{row}", [row, *long], seed=row, max_tokens=8, temperature=0.5) for row in range(12)]
        async with meet(prefill, decode) as two, other.client() as to_other:
            # The one that decodes is killed while KV comes.
            waits = [wait_at(to_other, one, one.request_id) for one in wanted]
            sent = [send_from(two.to_prefill, one, other.send_to(one.request_id)) for one in wanted]
            await asyncio.wait(sent, return_when=asyncio.FIRST_COMPLETED)
            other.process.kill()
            for each in waits:
                assert isinstance((await each).error, EngineUnavailable) or (await each).answer.reasons
            endings = [way.report.ending for way in await asyncio.gather(*sent) if way.report is not None]
            assert len(endings) == len(wanted) and "committed" in endings
            await all_free(two.to_prefill)
            # Its requests go elsewhere; then the one that computes prompts is killed.
            expected = await of_one_engine(two.to_decode, wanted)
            waits = [wait_at(two.to_decode, one, one.request_id) for one in wanted]
            sent = [send_from(two.to_prefill, one, decode.send_to(one.request_id)) for one in wanted]
            await asyncio.wait(sent, return_when=asyncio.FIRST_COMPLETED)
            prefill.process.kill()
            lost = await asyncio.gather(*sent)
            assert any(isinstance(way.error, EngineUnavailable) for way in lost)
            for one in wanted:
                await two.to_decode.go_on(one.request_id)
            for each, alone in zip(waits, expected, strict=True):
                assert (await each).tokens == alone.tokens[0]
            await all_free(two.to_decode)

            # What waits for KV is waited for by a drain, too.
            held = wait_at(two.to_decode, wanted[0], "drained")
            await until(lambda: load_of(two.to_decode).awaiting == 1)
            os.kill(decode.process.pid, signal.SIGTERM)
            await until(lambda: load_of(two.to_decode).draining)
            assert decode.process.poll() is None
            await two.to_decode.go_on(wanted[0].request_id)
            assert (await held).tokens == expected[0].tokens[0]
            assert await asyncio.to_thread(decode.exit_status) == EXIT_DRAINED

    options = ("--max-num-batched-tokens=16", "--num-gpu-blocks-override=512")
    with drivers(model, ("p", "prefill", "tcp", *options), ("d", "decode", "tcp"), ("other", "decode", "tcp")) as (
        prefill,
        decode,
        other,
    ):
        run(test(prefill, decode, other))
