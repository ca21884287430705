"""Requests that are split over two replicas give the tokens of one engine, whatever the two look like.

Real models, real transports, the ranks being threads. A covering set runs by default, every pair of degrees when slow
tests do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from slipstream.runtime.messages import EngineRequest
from slipstream.runtime.rpc.engine_client import EngineClient
from slipstream.runtime.rpc.in_process import InProcessEngineClient
from slipstream.runtime.rpc.kv_in_process import InProcessKvTalker
from slipstream.sdk.structured import StructuredOutputsParams
from slipstream.tests.contracts.engine_client import Answer, answer
from slipstream.tests.engine.builders import request
from slipstream.tests.handoff.split_ways import Way, all_free, send_from, wait_at
from slipstream.tests.handoff.thread_replicas import Degrees, ThreadReplica, thread_replica
from slipstream.tests.models.checkpoints import make_checkpoint

DEMO_MODEL = Path(__file__).resolve().parents[2] / "examples" / "demo_model"
PATIENCE_S = 120.0
TOLERANCE = 1e-4
ALONE = Degrees()
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}, "s": {"enum": ["a", "b"]}}, "required": ["n", "s"]}

Start = Callable[[Path, Degrees, str], ThreadReplica]
Checkpoint = Callable[[str], Path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return cache(lambda name: make_checkpoint(name, tmp_path_factory.mktemp("checkpoints") / name))


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Start each replica once; a pair of the same degrees is a replica and itself, so the second is another."""
    talker = InProcessKvTalker()
    with ExitStack() as stack:
        yield cache(lambda path, degrees, kind: stack.enter_context(thread_replica(talker, path, degrees, kind)))


def asks(salt: str, *, turn: int = 0) -> list[EngineRequest]:
    """Return requests of one tenant: greedy and seeded ones, with log-probabilities and without; those of a later turn
    begin as the first do.
    """
    requests = []
    for row, length in enumerate((1, 8, 40, 77)):
        prompt = [3 + (7 * row + 5 * index) % 150 for index in range(length)] + [11, 12 + turn] * turn
        options: dict[str, Any] = {"temperature": 0.9 * (row % 2), "top_p": 0.95}
        if row > 1:
            options["logprobs"] = 2
        asked = request(f"{salt}-{turn}-{row}", prompt, max_tokens=9, seed=row, cache_salt=salt, **options)
        requests.append(asked)
    return requests


async def split(
    p: ThreadReplica, prefill: EngineClient, d: ThreadReplica, decode: EngineClient, one: EngineRequest
) -> Way:
    """Have a request computed by two replicas; return what a client gets of the second."""
    waits = wait_at(decode, one, one.request_id)
    sent = await send_from(prefill, one, d.send_to(one.request_id))
    got = await waits
    assert sent.error is None and got.error is None, (sent.error, got.error)
    assert sent.report is not None and sent.report.ending == "committed", sent.report
    assert sent.tokens == got.tokens[:1]
    return got


def check(found: Sequence[Answer], expected: Sequence[Answer]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.tokens[0] == theirs.tokens[0] and mine.reasons == theirs.reasons
        for at, other in zip(mine.logprobs[0], theirs.logprobs[0], strict=True):
            assert at.token_ids[0] == other.token_ids[0]
            assert at.logprobs[0] == pytest.approx(float(other.logprobs[0]), abs=TOLERANCE)


async def connected(replica: ThreadReplica) -> InProcessEngineClient:
    client = InProcessEngineClient(replica.loop)
    await client.connect(timeout_s=PATIENCE_S)
    return client


async def whole(client: EngineClient, requests: Sequence[EngineRequest]) -> list[Answer]:
    return list(await asyncio.gather(*(answer(client, one, timeout_s=PATIENCE_S) for one in requests)))


def hold(
    p: ThreadReplica, d: ThreadReplica, alone: ThreadReplica, turns: Sequence[Sequence[EngineRequest]]
) -> list[list[Answer]]:
    """Split requests over two replicas, turn by turn, and hold them against one engine's answers; no block is lost."""

    async def run() -> list[list[Answer]]:
        prefill, decode, one = await connected(p), await connected(d), await connected(alone)
        found = []
        for requests in turns:
            ways = await asyncio.gather(*(split(p, prefill, d, decode, each) for each in requests))
            found.append([way.answer for way in ways])
            check(found[-1], await whole(one, requests))
        await asyncio.gather(all_free(prefill), all_free(decode))
        for client in (prefill, decode, one):
            await client.close()
        return found

    async def bounded() -> list[list[Answer]]:
        async with asyncio.timeout(PATIENCE_S):
            return await run()

    return asyncio.run(bounded())


def check_pair(start: Start, path: Path, prefill: Degrees, decode: Degrees, kind: str) -> None:
    p, d = start(path, prefill, kind), start(path, decode, kind)
    salt = f"{prefill}--{decode}"
    found = hold(p, d, start(path, ALONE, kind), [asks(salt), asks(salt, turn=1)])
    # The decode side has what came in the first turn, up to the last whole block that both prompts have.
    cached = [each.cached_tokens for each in found[1]]
    assert cached[2:] == [length // decode.block_size * decode.block_size for length in (40, 77)]


COVERING = [
    ("parallel_dense", Degrees(tp=4), Degrees(pp=2, chunk=16), "tcp"),
    ("parallel_dense", Degrees(pp=2, chunk=16), Degrees(tp=2, block_size=16), "tcp"),
    ("parallel_dense", Degrees(tp=2, pp=2), Degrees(tp=4), "shm"),
    ("parallel_experts", Degrees(tp=2, chunk=16), Degrees(), "shm"),
    ("parallel_experts", Degrees(), Degrees(tp=2, chunk=16), "tcp"),
    ("deepseek_v3", Degrees(tp=2), Degrees(pp=2, chunk=16, block_size=16), "tcp"),
    ("deepseek_v3", Degrees(pp=2, chunk=16, block_size=16), Degrees(tp=4), "shm"),
]


@pytest.mark.parametrize(("name", "prefill", "decode", "kind"), COVERING, ids=str)
def test_split_requests_give_the_tokens_of_one_engine(
    name: str, prefill: Degrees, decode: Degrees, kind: str, start: Start, checkpoint: Checkpoint
) -> None:
    check_pair(start, checkpoint(name), prefill, decode, kind)


def test_numbers_of_8_bits_on_the_wire_are_half_the_bytes(start: Start, checkpoint: Checkpoint) -> None:
    """What follows may differ from one engine's tokens; the first is drawn before anything is rounded."""
    path = checkpoint("parallel_dense")
    small = Degrees(dtype="bfloat16", wire_dtype="fp8")
    p, d = start(path, small, "tcp"), start(path, replace(small, tp=2, block_size=16), "tcp")
    requests = asks("small")

    async def run() -> None:
        prefill, decode = await connected(p), await connected(d)
        ways = await asyncio.gather(*(split(p, prefill, d, decode, each) for each in requests))
        alone = await whole(prefill, asks("alone"))
        for way, other in zip(ways, alone, strict=True):
            assert way.tokens[0] == other.tokens[0][0] and len(way.tokens) == 9 and way.answer.reasons == other.reasons
        await asyncio.gather(all_free(prefill), all_free(decode))
        for client in (prefill, decode):
            await client.close()

    asyncio.run(asyncio.wait_for(run(), PATIENCE_S))
    assert p.launched.kv is not None and d.launched.kv is not None
    offer, tokens = p.launched.kv.offer, sum(len(each.prompt_token_ids) for each in requests)
    assert offer.dtype == "float8_e4m3fn"
    moved = 2 * offer.layout.layers * offer.layout.kv_heads * offer.head_dim * tokens
    assert (p.launched.kv.moved().bytes_out, d.launched.kv.moved().bytes_in) == (moved, moved)


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_a_prefix_that_only_one_side_has_changes_nothing(side: str, start: Start, checkpoint: Checkpoint) -> None:
    path = checkpoint("parallel_dense")
    p, d = start(path, Degrees(tp=2, pp=2), "shm"), start(path, Degrees(tp=4), "shm")

    async def warm() -> None:
        client = await connected(p if side == "prefill" else d)
        await whole(client, asks(side))
        await client.close()

    asyncio.run(warm())
    sent_before = p.launched.kv.moved().bytes_out if p.launched.kv is not None else 0
    [found] = hold(p, d, start(path, ALONE, "shm"), [asks(side, turn=1)])
    assert [each.cached_tokens for each in found][2:] == ([0, 0] if side == "prefill" else [40, 72])
    assert p.launched.kv is not None and p.launched.kv.moved().bytes_out > sent_before


MATRIX = [Degrees(tp=tp, pp=pp, chunk=16 * tp) for tp, pp in product((1, 2, 4), (1, 2))]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tcp", "shm"])
@pytest.mark.parametrize("name", ["parallel_dense", "parallel_experts"])
@pytest.mark.parametrize("prefill", MATRIX, ids=str)
@pytest.mark.parametrize("decode", MATRIX, ids=str)
def test_every_pair_of_degrees(
    name: str, prefill: Degrees, decode: Degrees, kind: str, start: Start, checkpoint: Checkpoint
) -> None:
    if prefill == decode:
        decode = Degrees(tp=decode.tp, pp=decode.pp, chunk=decode.chunk, block_size=16)
    check_pair(start, checkpoint(name), prefill, decode, kind)


def test_structured_outputs_go_on_where_they_were(start: Start) -> None:
    def asked(turn: int) -> list[EngineRequest]:
        schema = StructuredOutputsParams(json=SCHEMA)
        return [
            request(f"json-{turn}-{seed}", range(9, 40 + turn), max_tokens=40, seed=seed, structured_outputs=schema)
            for seed in range(3)
        ]

    p, d = start(DEMO_MODEL, Degrees(tp=2), "tcp"), start(DEMO_MODEL, Degrees(block_size=16), "tcp")
    hold(p, d, start(DEMO_MODEL, ALONE, "tcp"), [asked(0), asked(1)])
