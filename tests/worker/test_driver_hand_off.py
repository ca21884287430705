"""Requests split between two driver loops, with ranks that copy: tokens, endings, and blocks whatever goes wrong."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from slipstream.comm.kv.transfer import FromSender, Granted, Reserve
from slipstream.runtime.clock import monotonic_clock
from slipstream.runtime.messages import EngineRequest, FinishReason
from slipstream.runtime.rpc.engine_client import (
    BlockChanges,
    SendTo,
)
from slipstream.runtime.rpc.in_process import InProcessEngineClient
from slipstream.runtime.rpc.kv_talk import KvFacts, KvLine
from slipstream.sdk.errors import DeadlineExceeded, EngineUnavailable, InvalidRequest
from slipstream.tests.contracts.engine_client import Answer, same
from slipstream.tests.engine.builders import request
from slipstream.tests.fakes.gated_executor import score
from slipstream.tests.fakes.memory_ranks import TOKEN_BYTES
from slipstream.tests.fakes.oracle_executor import expected_tokens
from slipstream.tests.fakes.split_bench import QUICK, Replica, SplitBench, split_bench
from slipstream.tests.handoff.split_ways import Way, all_free, follow, load_of, send_from, until, wait_at

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


def wait_there(two: Pair, wanted: EngineRequest, ticket: str = "t", timeout_s: float = PATIENCE_S) -> asyncio.Task[Way]:
    return wait_at(two.to_decode, wanted, ticket, timeout_s=timeout_s)


def send_there(two: Pair, wanted: EngineRequest, ticket: str = "t", timeout_s: float = PATIENCE_S) -> asyncio.Task[Way]:
    return send_from(two.to_prefill, wanted, two.decode.send_to(ticket), timeout_s=timeout_s)


async def split(two: Pair, wanted: EngineRequest, ticket: str = "t") -> tuple[Way, Way]:
    """Have a request's prompt computed by one replica, and the rest by the other; the one that is done aborts it."""
    waits = wait_there(two, wanted, ticket)
    sent = await send_there(two, wanted, ticket)
    if sent.report is None:
        waits.cancel()
        return sent, Way(Answer())
    return sent, await waits


async def granted(two: Pair) -> None:
    """Wait until the decode replica has given blocks to a transfer."""
    await until(lambda: bool(two.decode.scheduler.loans))


def ask(
    name: str = "r", prompt: list[int] = PROMPT, *, max_tokens: int = 12, seed: int = 7, **more: Any
) -> EngineRequest:
    return request(name, prompt, max_tokens=max_tokens, seed=seed, **more)


def test_a_request_goes_from_one_replica_to_the_other() -> None:
    async def test() -> None:
        async with pair() as two:
            sent, got = await split(two, ask())
            expected = expected_tokens(PROMPT, 7, 12)
            assert got.tokens == expected and sent.tokens == expected[:1]
            assert got.answer.reasons == {0: FinishReason.LENGTH} and not sent.answer.reasons
            report = sent.report
            assert report is not None and report.ending == "committed"
            assert (report.bytes_moved, report.wire_s, report.hidden_s) == (TOKEN_BYTES * len(PROMPT), 0.25, 0.125)
            await until(lambda: load_of(two.to_prefill).kv_bytes_out == TOKEN_BYTES * len(PROMPT))
            await until(lambda: load_of(two.to_decode).kv_bytes_in == TOKEN_BYTES * len(PROMPT))

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
            for each, (sent, got) in zip(wanted, done, strict=True):
                prompt = each.prompt_token_ids.tolist()
                tokens = expected_tokens(prompt, each.seed, 10, each.stop_ids)
                assert (sent.report is None) == (len(tokens) == 1)
                if sent.report is None:
                    assert sent.answer.reasons == {0: FinishReason.STOP}
                    continue
                assert got.tokens == tokens, each
                for place, entry in enumerate(got.answer.logprobs[0]):
                    assert same(entry, score(tokens[place], len(prompt) + place, 2))

    run(test())


def test_a_request_that_its_first_token_ends_ends_where_its_prompt_was() -> None:
    async def test() -> None:
        async with pair() as two:
            first = expected_tokens(PROMPT, 7, 1)
            for number, wanted in enumerate((ask(max_tokens=1), ask(stop_ids=(first[0],)))):
                waits = wait_there(two, replace(wanted, max_tokens=12), f"t{number}")
                sent = await send_there(two, wanted, f"t{number}")
                assert sent.tokens == first and sent.report is None and sent.answer.reasons
                waits.cancel()

    run(test())


def test_a_request_that_goes_on_where_it_waits_computes_all_there() -> None:
    async def test() -> None:
        async with pair() as two:
            two.bench.net.hold()
            wanted = ask()
            waits, sent = wait_there(two, wanted), send_there(two, wanted)
            await granted(two)
            await two.to_decode.go_on("r")
            assert (await waits).tokens == expected_tokens(PROMPT, 7, 12)
            report = (await sent).report
            assert report is not None and report.ending == "cancelled"

    run(test())


def test_who_goes_on_too_late_changes_nothing() -> None:
    async def test() -> None:
        async with pair() as two:
            wanted = ask(max_tokens=60)
            stream = two.to_decode.generate(wanted, timeout_s=PATIENCE_S, ticket="t")
            sent = send_there(two, wanted)
            got = Answer()
            got.add(await anext(stream))
            await two.to_decode.go_on("r")
            async for event in stream:
                got.add(event)
            assert got.tokens[0] == expected_tokens(PROMPT, 7, 60)
            assert (await sent).error is None

    run(test())


def test_an_abort_where_it_waits_ends_the_transfer_at_both_ends() -> None:
    async def test() -> None:
        async with pair() as two:
            two.bench.net.hold()
            waits, sent = wait_there(two, ask()), send_there(two, ask())
            await granted(two)
            waits.cancel()
            report = (await sent).report
            assert report is not None and report.ending == "cancelled"
            await until(lambda: not two.decode.scheduler.loans)

    run(test())


def test_an_abort_where_it_is_computed_leaves_the_ticket_to_another() -> None:
    """The gateway gave the first prefill replica up; the request still waits under its ticket."""

    async def test() -> None:
        async with pair() as two:
            two.bench.net.hold()
            waits, first = wait_there(two, ask()), send_there(two, ask())
            await granted(two)
            first.cancel()
            await until(lambda: not two.decode.scheduler.loans)
            two.bench.net.let_flow()
            second = await send_there(two, ask("again"))
            assert second.report is not None and second.report.ending == "committed"
            assert (await waits).tokens == expected_tokens(PROMPT, 7, 12)

    run(test())


def test_the_newest_transfer_under_a_ticket_replaces_the_one_before() -> None:
    async def test() -> None:
        async with pair() as two:
            other = two.bench.start("p2", role="prefill")
            to_other = InProcessEngineClient(other.loop)
            await to_other.connect(timeout_s=PATIENCE_S)
            two.bench.net.hold()
            waits, first = wait_there(two, ask()), send_there(two, ask())
            await granted(two)
            second = follow(to_other.generate(ask(), timeout_s=PATIENCE_S, send_to=two.decode.send_to("t")))
            ended = await first
            assert ended.report is not None and ended.report.ending == "stale"
            two.bench.net.let_flow()
            assert (await waits).tokens == expected_tokens(PROMPT, 7, 12)
            ended = await second
            assert ended.report is not None and ended.report.ending == "committed"
            await all_free(to_other)
            await to_other.close()

    run(test())


def test_a_ticket_that_was_used_is_refused_and_one_that_nobody_has_waits_a_bounded_time() -> None:
    async def test() -> None:
        async with pair() as two:
            await split(two, ask())
            used = await send_there(two, ask("again"))
            assert used.report is not None and used.report.ending == "consumed"
            nobody = await send_there(two, ask("nobody"), "unknown")
            assert nobody.report is not None and nobody.report.ending == "no_room"
            again = await wait_there(two, ask("third"))
            assert isinstance(again.error, InvalidRequest) and "ticket" in str(again.error)

    run(test())


def test_kv_of_another_prompt_is_refused() -> None:
    async def test() -> None:
        async with pair() as two:
            waits, sent = wait_there(two, ask()), await send_there(two, ask("r", [*PROMPT, 1]))
            assert sent.report is not None and sent.report.ending == "bad_reference"
            await two.to_decode.go_on("r")
            assert (await waits).tokens == expected_tokens(PROMPT, 7, 12)

    run(test())


def test_deadlines_end_a_request_wherever_it_waits() -> None:
    async def test() -> None:
        async with pair() as two:
            two.bench.net.hold()
            waits, sent = wait_there(two, ask(), timeout_s=0.2), send_there(two, ask(), timeout_s=0.3)
            assert isinstance((await waits).error, DeadlineExceeded)
            ended = await sent
            assert ended.report is not None or isinstance(ended.error, DeadlineExceeded)
            await until(lambda: not two.decode.scheduler.loans and not two.prefill.scheduler.loans)

    run(test())


def test_a_broken_connection_is_tried_again_with_what_is_there() -> None:
    async def test() -> None:
        async with pair() as two:
            two.bench.net.hold()
            waits, sent = wait_there(two, ask()), send_there(two, ask())
            await granted(two)
            two.bench.net.lose("d")
            two.bench.net.lose("p")
            two.bench.net.let_flow()
            assert (await waits).tokens == expected_tokens(PROMPT, 7, 12)
            ended = await sent
            assert ended.report is not None and ended.report.ending == "committed"

    run(test())


def test_a_sender_that_is_gone_costs_a_lease_and_the_request_goes_on_here() -> None:
    async def test() -> None:
        async with pair() as two:
            other = two.bench.start("p2", role="prefill")
            to_other = InProcessEngineClient(other.loop)
            await to_other.connect(timeout_s=PATIENCE_S)
            two.bench.net.hold()
            waits = wait_there(two, ask())
            sent = follow(to_other.generate(ask(), timeout_s=PATIENCE_S, send_to=two.decode.send_to("t")))
            await granted(two)
            two.bench.stop(other)
            assert isinstance((await sent).error, EngineUnavailable)
            await until(lambda: not two.decode.scheduler.loans)
            await two.to_decode.go_on("r")
            assert (await waits).tokens == expected_tokens(PROMPT, 7, 12)

    run(test())


def test_steps_that_hang_at_both_ends_cost_no_lease() -> None:
    """Heartbeats come from the desk's own thread, and it waits for no step."""

    async def test() -> None:
        async with pair() as two:
            # A request of each side's own, whose steps wait for the gate from now on.
            own = [follow(each.generate(ask("own"), timeout_s=PATIENCE_S)) for each in (two.to_prefill, two.to_decode)]
            two.bench.net.hold()
            waits, sent = wait_there(two, ask()), send_there(two, ask())
            await granted(two)
            two.prefill.gate.close()
            two.decode.gate.close()
            begun_s = monotonic_clock()
            await until(lambda: monotonic_clock() > begun_s + 3 * QUICK.lease_s)
            assert two.decode.scheduler.loans and two.prefill.scheduler.loans, "a lease ran out while steps hung"
            for gate in (two.prefill.gate, two.decode.gate):
                gate.open()
            two.bench.net.let_flow()
            assert (await waits).tokens == expected_tokens(PROMPT, 7, 12)
            ended = await sent
            assert ended.report is not None and ended.report.ending == "committed"
            assert [each.error for each in await asyncio.gather(*own)] == [None, None]

    run(test())


def test_a_receiver_that_is_gone_or_was_started_anew_strands_no_blocks() -> None:
    async def test() -> None:
        async with pair() as two:
            other = two.bench.start("d2", role="decode")
            to_other = InProcessEngineClient(other.loop)
            await to_other.connect(timeout_s=PATIENCE_S)
            two.bench.net.hold()
            waits = follow(to_other.generate(ask(), timeout_s=PATIENCE_S, ticket="t"))
            sent = follow(two.to_prefill.generate(ask(), timeout_s=PATIENCE_S, send_to=other.send_to("t")))
            await until(lambda: bool(other.scheduler.loans))
            two.bench.stop(other)
            assert isinstance((await waits).error, EngineUnavailable)
            two.bench.net.let_flow()
            anew = two.bench.start("d2", role="decode")
            ended = await sent
            assert ended.report is not None and ended.report.ending != "committed"
            await until(lambda: not two.prefill.scheduler.loans)
            # Its next life under the same name is another receiver.
            to_anew = InProcessEngineClient(anew.loop)
            await to_anew.connect(timeout_s=PATIENCE_S)
            waits = follow(to_anew.generate(ask("r2"), timeout_s=PATIENCE_S, ticket="t"))
            await follow(two.to_prefill.generate(ask("r2"), timeout_s=PATIENCE_S, send_to=anew.send_to("t")))
            assert (await waits).tokens == expected_tokens(PROMPT, 7, 12)
            await all_free(to_anew)
            await to_anew.close()

    run(test())


@pytest.mark.parametrize("grants", [False, True])
def test_a_receiver_that_hangs_costs_a_bounded_time(grants: bool) -> None:
    """It lets everybody connect, and says nothing more: from the beginning, or once it has given blocks."""

    async def test() -> None:
        async with pair() as two:
            host = HangingHost(replace(two.decode.opened.lines.facts, replica="hangs"), grants=grants)
            two.bench.talker.serve("hangs", host)
            send_to = SendTo(replica="hangs", address="hangs", ticket="t")
            sent = await follow(two.to_prefill.generate(ask(), timeout_s=PATIENCE_S, send_to=send_to))
            assert sent.report is not None and sent.report.ending == "no_answer"
            assert sent.tokens == expected_tokens(PROMPT, 7, 1), "its token needs nobody else"

    run(test())


class HangingHost:
    """A receiving driver that answers the first reservation at most."""

    def __init__(self, facts: KvFacts, *, grants: bool) -> None:
        self.facts = facts
        self._grants = grants

    def greet(self, theirs: KvFacts, line: KvLine) -> None:
        pass

    def hear(self, line: KvLine, message: FromSender) -> None:
        if self._grants and isinstance(message, Reserve):
            self._grants = False
            blocks = tuple(range(-(-message.tokens // 4)))
            line.say(Granted(transfer=message.transfer, generation=message.generation, blocks=blocks, first_token=0))

    def left(self, line: KvLine) -> None:
        pass


def test_what_is_cached_where_it_goes_is_not_sent_again() -> None:
    async def test() -> None:
        async with pair() as two:
            await split(two, ask())
            longer = [*PROMPT, *range(20)]
            sent, got = await split(two, ask("r2", longer), "t2")
            assert got.tokens == expected_tokens(longer, 7, 12)
            # Its first ten blocks are there: the prompt's, which were moved, and nothing of another answer.
            assert sent.report is not None and sent.report.bytes_moved == TOKEN_BYTES * (len(longer) - 40)
            assert got.answer.cached_tokens == 40

    run(test())


def test_little_room_on_either_side_makes_requests_wait_and_loses_none() -> None:
    async def test() -> None:
        async with pair(num_blocks=64, limits=replace(QUICK, max_wait_s=PATIENCE_S)) as two:
            wanted = [ask(f"r{number}", [number, *PROMPT], seed=number, max_tokens=30) for number in range(20)]
            done = await asyncio.gather(*(split(two, each, f"t{each.request_id}") for each in wanted))
            for each, (sent, got) in zip(wanted, done, strict=True):
                assert sent.report is not None and sent.report.ending == "committed"
                assert got.tokens == expected_tokens(each.prompt_token_ids.tolist(), each.seed, 30)

    run(test())


def test_a_request_that_was_begun_elsewhere_is_split_too() -> None:
    async def test() -> None:
        async with pair() as two:
            expected = expected_tokens(PROMPT, 7, 12)
            wanted = replace(ask(), generated=(np.array(expected[:5], dtype=np.int32),))
            sent, got = await split(two, wanted)
            assert sent.tokens == expected[5:6] and got.tokens == expected[5:]

    run(test())


def test_replicas_of_other_models_refuse_one_another_at_once() -> None:
    async def test() -> None:
        async with pair() as two:
            other = two.bench.start("other", model="another")
            client = InProcessEngineClient(other.loop)
            await client.connect(timeout_s=PATIENCE_S)
            waits = follow(client.generate(ask(), timeout_s=PATIENCE_S, ticket="t"))
            sent = await follow(two.to_prefill.generate(ask(), timeout_s=PATIENCE_S, send_to=other.send_to("t")))
            assert sent.report is not None and sent.report.ending == "bad_reference"
            await client.go_on("r")
            assert (await waits).tokens == expected_tokens(PROMPT, 7, 12)
            await client.close()

    run(test())


def test_roles_are_kept() -> None:
    async def test() -> None:
        async with pair() as two:
            back = two.prefill.send_to("t")
            for stream, field in (
                (two.to_decode.generate(ask(), timeout_s=PATIENCE_S, send_to=back), "send_to"),
                (two.to_prefill.generate(ask(), timeout_s=PATIENCE_S, ticket="t"), "ticket"),
            ):
                error = (await follow(stream)).error
                assert isinstance(error, InvalidRequest) and field in str(error)
            itself = await follow(two.to_prefill.generate(ask(), timeout_s=PATIENCE_S, send_to=back))
            assert itself.report is not None and itself.report.ending == "bad_reference"

    run(test())


def test_a_drain_waits_for_transfers_and_for_requests_that_wait() -> None:
    async def test() -> None:
        async with pair() as two:
            two.bench.net.hold()
            waits, sent = wait_there(two, ask()), send_there(two, ask())
            await granted(two)
            drains = [asyncio.create_task(each.drain(timeout_s=PATIENCE_S)) for each in (two.to_prefill, two.to_decode)]
            await until(lambda: load_of(two.to_prefill).draining and load_of(two.to_decode).draining)
            assert not any(each.done() for each in drains)
            two.bench.net.let_flow()
            assert await asyncio.gather(*drains) == [True, True]
            assert sent.done() and (await waits).tokens == expected_tokens(PROMPT, 7, 12)

    run(test())


def test_sessions_are_told_what_is_cached_and_what_changes() -> None:
    async def test() -> None:
        async with pair() as two:
            known: set[bytes] = set()

            def told(changes: BlockChanges) -> None:
                if changes.reset:
                    known.clear()
                known.difference_update(changes.removed)
                known.update(changes.stored)

            await split(two, ask())
            two.to_decode.watch_blocks(told)
            cached = two.decode.scheduler.pool.cached_digests
            await until(lambda: known == {digest[:16] for digest in cached()})
            assert len(known) >= len(PROMPT) // 4
            late: set[bytes] = set()
            third = InProcessEngineClient(two.decode.loop)
            await third.connect(timeout_s=PATIENCE_S)
            third.watch_blocks(lambda changes: late.update(changes.stored))
            for number in range(12):
                # More than there is room for: old blocks are given up.
                await split(two, ask(f"r{number}", [number, *PROMPT], max_tokens=20), f"t{number}")
            await until(lambda: known == {digest[:16] for digest in cached()})
            await until(lambda: known <= late)
            await third.close()

    run(test())


@pytest.mark.parametrize("number", range(6))
def test_a_storm_of_splits_aborts_and_losses(seed: int, number: int) -> None:
    """Whatever happens, each request gets its tokens or a named error, and in the end every block is free."""
    draw = random.Random(f"{seed}/{number}")

    async def one(two: Pair, name: str) -> None:
        prompt = [draw.randrange(90) for _ in range(draw.randint(2, 70))] if draw.random() < 0.7 else PROMPT
        wanted = ask(name, prompt, seed=draw.randrange(9), max_tokens=draw.randint(2, 25))
        expected = expected_tokens(prompt, wanted.seed, wanted.max_tokens)
        waits = wait_there(two, wanted, name)
        sent = send_there(two, wanted, name)
        for _ in range(draw.randrange(400)):
            # Somewhere on the way: a turn of the loop is as long as what happens in it.
            await asyncio.sleep(0)
        match draw.randrange(6):
            case 0:
                waits.cancel()
            case 1:
                sent.cancel()
                await two.to_decode.go_on(name)
            case 2:
                await two.to_decode.go_on(name)
            case 3:
                two.bench.net.lose(draw.choice(("p", "d")))
            case _:
                pass
        ways = await asyncio.gather(sent, return_exceptions=True)
        way = ways[0]
        if isinstance(way, Way):
            assert way.tokens == expected[: len(way.tokens)] and len(way.tokens) <= 1
            if way.report is not None and way.report.ending != "committed":
                await two.to_decode.go_on(name)
        if not waits.cancelled() and not waits.cancelling():
            got = await waits
            assert got.error is None and got.tokens == expected, two.decode.scheduler.story(name)

    async def test() -> None:
        async with pair(num_blocks=draw.choice((64, 128)), limits=replace(QUICK, max_wait_s=5.0)) as two:
            await asyncio.gather(*(one(two, f"r{index}") for index in range(30)))

    run(test())
