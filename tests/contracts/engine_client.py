"""The contract of ``EngineClient``, as tests: an implementation's test module subclasses this and says how to serve.

Tokens come from the oracle executor, so they can be foretold; a gate before every step holds the engine where a test
wants it. Nothing here sleeps: what is waited for is an event, and everything ends within ``PATIENCE_S``.
"""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from slipstream.runtime.engine.sequence import sample_seed
from slipstream.runtime.messages import EngineRequest, FinishReason, TokenLogprobs
from slipstream.runtime.rpc.engine_client import EngineClient, RequestEvent, SendTo
from slipstream.runtime.rpc.session import EngineHost
from slipstream.sdk.errors import DeadlineExceeded, EngineUnavailable, InvalidRequest, Overloaded
from slipstream.tests.engine.builders import request
from slipstream.tests.fakes.engine_bench import EngineBench, engine_bench
from slipstream.tests.fakes.gated_executor import score
from slipstream.tests.fakes.oracle_executor import VOCABULARY, expected_tokens
from slipstream.tests.fakes.scripted_host import ScriptedHost, impossible_scripts

PATIENCE_S = 20.0


@dataclass
class Served:
    """A host behind a transport: clients of it, not yet connected, and a way to lose it at once."""

    make_client: Callable[[], EngineClient]
    kill: Callable[[], Awaitable[None]]


@dataclass
class Answer:
    """What one request returned."""

    tokens: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=lambda: defaultdict(list))
    reasons: dict[int, FinishReason] = field(default_factory=dict)
    stop_tokens: dict[int, int | None] = field(default_factory=dict)
    scores: dict[int, TokenLogprobs] = field(default_factory=dict)
    cached_tokens: int = 0
    queue_s: list[float] = field(default_factory=list)
    events: int = 0

    def add(self, event: RequestEvent) -> None:
        self.events += 1
        self.cached_tokens += event.cached_tokens
        for part in event.prompt_scores:
            self.scores.update(enumerate(part.entries, start=part.position))
        for sample in event.samples:
            assert sample.index not in self.reasons, f"sample {sample.index} goes on after its end"
            self.tokens[sample.index] += sample.token_ids
            self.logprobs[sample.index] += sample.logprobs
            if sample.finish_reason is not None:
                self.reasons[sample.index] = sample.finish_reason
                self.stop_tokens[sample.index] = sample.stop_token_id
        if event.queue_s is not None:
            self.queue_s.append(event.queue_s)


async def answer(client: EngineClient, wanted: EngineRequest, *, timeout_s: float = PATIENCE_S) -> Answer:
    """Run a request to its end."""
    result = Answer()
    async for event in client.generate(wanted, timeout_s=timeout_s):
        assert event.request_id == wanted.request_id
        result.add(event)
    return result


def same(one: TokenLogprobs, other: TokenLogprobs) -> bool:
    return (
        one.rank == other.rank
        and np.array_equal(one.token_ids, other.token_ids)
        and np.array_equal(one.logprobs, other.logprobs)
    )


async def all_is_free(client: EngineClient) -> bool:
    """Return whether the replica holds nothing, as its load says after a request that came after all the others."""
    await answer(client, request("probe", [1], max_tokens=1))
    load = client.load()
    assert load is not None
    return (load.running, load.waiting, load.blocks_available) == (0, 0, load.blocks_total)


async def first_event(client: EngineClient, wanted: EngineRequest) -> tuple[AsyncIterator[RequestEvent], RequestEvent]:
    """Start a request and wait for its first news."""
    stream = client.generate(wanted, timeout_s=PATIENCE_S)
    return stream, await anext(stream)


async def step_until(
    bench: EngineBench, stream: AsyncIterator[RequestEvent], got: Answer, done: Callable[[], bool]
) -> None:
    """Let single steps through, each answered by news of a request that runs, until something has happened.

    The engine looks at its commands between steps, so what was sent before comes to pass within a few.
    """
    while not done():
        bench.gate.allow(1)
        got.add(await anext(stream))


async def finish(stream: AsyncIterator[RequestEvent], before: RequestEvent | Answer) -> Answer:
    """Read a stream to its end."""
    result = before if isinstance(before, Answer) else Answer()
    if isinstance(before, RequestEvent):
        result.add(before)
    async for event in stream:
        result.add(event)
    return result


class EngineClientContract(ABC):
    """Subclass with a name that pytest collects, and say how a host is served."""

    @abstractmethod
    def serve(self, host: EngineHost) -> AbstractAsyncContextManager[Served]:
        """Put a host behind the transport."""

    @asynccontextmanager
    async def bench(self, **options: Any) -> AsyncIterator[tuple[EngineBench, EngineClient, Served]]:
        """Serve an engine over the oracle, with one client connected."""
        with engine_bench(**options) as bench:
            async with self.serve(bench.loop) as served:
                client = served.make_client()
                await client.connect(timeout_s=PATIENCE_S)
                try:
                    yield bench, client, served
                finally:
                    bench.gate.open()
                    await client.close()

    def run(self, test: Coroutine[Any, Any, None]) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(PATIENCE_S):
                await test

        asyncio.run(bounded())

    # ------------------------------------------------------------------ answers

    def test_facts_and_first_load(self) -> None:
        async def test() -> None:
            async with self.bench() as (bench, _, served):
                other = served.make_client()
                facts = await other.connect(timeout_s=PATIENCE_S)
                assert facts == bench.loop.facts
                load = other.load()
                assert load is not None and load.blocks_available == load.blocks_total and not load.draining
                await other.close()

        self.run(test())

    @pytest.mark.parametrize("ahead", [True, False])
    def test_many_requests_at_once_get_their_own_tokens(self, seed: int, ahead: bool) -> None:
        async def test() -> None:
            draw = random.Random(seed)
            wanted = [
                request(
                    f"r{place}",
                    [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 90))],
                    max_tokens=draw.randint(1, 40),
                    seed=draw.randrange(2**64),
                    stop_ids=tuple(draw.sample(range(VOCABULARY), draw.randint(0, 2))),
                )
                for place in range(60)
            ]
            async with self.bench(ahead=ahead) as (_, client, _served):
                answers = await asyncio.gather(*(answer(client, one) for one in wanted))
                assert await all_is_free(client)
            for one, got in zip(wanted, answers, strict=True):
                right = expected_tokens(one.prompt_token_ids.tolist(), one.seed, one.max_tokens, one.stop_ids)
                assert got.tokens == {0: right}, one.request_id
                stopped = right[-1] in one.stop_ids
                assert got.reasons == {0: FinishReason.STOP if stopped else FinishReason.LENGTH}
                assert got.stop_tokens == {0: right[-1] if stopped else None}
                assert got.queue_s and got.queue_s[0] >= 0

        self.run(test())

    def test_samples_of_one_request(self) -> None:
        async def test() -> None:
            wanted = request("r", range(30), max_tokens=9, seed=7, n=5)
            async with self.bench() as (_, client, _served):
                got = await answer(client, wanted)
            for index in range(5):
                assert got.tokens[index] == expected_tokens(range(30), sample_seed(7, index), 9)
            assert got.reasons == dict.fromkeys(range(5), FinishReason.LENGTH)

        self.run(test())

    def test_tokens_may_be_taken_before_they_are_events(self) -> None:
        async def test() -> None:
            taken: dict[int, list[int]] = defaultdict(list)
            got = Answer()
            offers = 0

            def take(index: int, token_id: int) -> bool:
                nonlocal offers
                offers += 1
                if offers % 3 == 0:
                    return False
                # What was refused is read first: nothing is overtaken.
                assert len(got.tokens[index]) + len(taken[index]) == places[index]
                places[index] += 1
                taken[index].append(token_id)
                return True

            places: dict[int, int] = defaultdict(int)
            wanted = request("r", range(30), max_tokens=40, seed=7, n=2)
            async with self.bench() as (_, client, _served):
                async for event in client.generate(wanted, timeout_s=PATIENCE_S, take_token=take):
                    got.add(event)
                    for sample in event.samples:
                        places[sample.index] += len(sample.token_ids)
            assert taken[0] and got.tokens[0] and got.reasons == dict.fromkeys(range(2), FinishReason.LENGTH)
            for index in range(2):
                right = expected_tokens(range(30), sample_seed(7, index), 40)
                assert sorted(taken[index] + got.tokens[index]) == sorted(right)

        self.run(test())

    def test_what_taking_a_token_raises_ends_its_request_alone(self) -> None:
        async def test() -> None:
            def take(index: int, token_id: int) -> bool:
                raise ValueError("no")

            async with self.bench() as (_, client, _served):
                other = asyncio.create_task(answer(client, request("other", [1, 2], max_tokens=60)))
                with pytest.raises(ValueError, match="no"):
                    async for _event in client.generate(
                        request("r", [1], max_tokens=50), timeout_s=PATIENCE_S, take_token=take
                    ):
                        pass
                assert len((await other).tokens[0]) == 60
                assert await all_is_free(client)

        self.run(test())

    def test_logprobs_of_answer_and_prompt(self) -> None:
        async def test() -> None:
            prompt = [token % VOCABULARY for token in range(150)]
            async with self.bench() as (_, client, _served):
                asking = request("asking", prompt, max_tokens=12, logprobs=3, prompt_logprobs=2)
                plain = request("plain", prompt, max_tokens=12)
                got, without = await asyncio.gather(answer(client, asking), answer(client, plain))
            right = expected_tokens(prompt, 0, 12)
            assert got.tokens[0] == without.tokens[0] == right
            assert not without.logprobs[0] and not without.scores
            wanted = [score(token, len(prompt) + place, 3) for place, token in enumerate(right)]
            assert len(got.logprobs[0]) == len(wanted) and all(map(same, got.logprobs[0], wanted))
            assert sorted(got.scores) == list(range(1, len(prompt)))
            assert all(same(entry, score(prompt[place], place, 2)) for place, entry in got.scores.items())

        self.run(test())

    def test_cached_prefix_is_told(self) -> None:
        async def test() -> None:
            async with self.bench() as (_, client, _served):
                first = await answer(client, request("first", range(40)))
                second = await answer(client, request("second", range(40), n=2))
                load = client.load()
            # All but the prompt's last token can be there; counted once, not once a sample.
            assert first.cached_tokens == 0
            assert 36 <= second.cached_tokens <= 39, second.cached_tokens
            assert load is not None and load.prefix_hits >= 9

        self.run(test())

    def test_a_reader_that_is_late_gets_everything_and_holds_up_nobody(self) -> None:
        async def test() -> None:
            async with self.bench() as (_, client, _served):
                stream, first = await first_event(client, request("late", [1, 2], max_tokens=100))
                others = await asyncio.gather(*(answer(client, request(f"o{i}", [i], max_tokens=50)) for i in range(5)))
                late = await finish(stream, first)
            assert late.tokens[0] == expected_tokens([1, 2], 0, 100)
            assert late.events < 100, "what came meanwhile comes as one"
            assert [other.tokens[0] for other in others] == [expected_tokens([i], 0, 50) for i in range(5)]

        self.run(test())

    # ------------------------------------------------------------------ leaving

    def test_leaving_the_iterator_aborts(self) -> None:
        async def test() -> None:
            async with self.bench(gate_open=False) as (bench, client, _):
                bench.gate.allow(4)
                stream, _first = await first_event(client, request("r", range(20), max_tokens=200, n=3))
                async with aclosing(stream):  # type: ignore[type-var]
                    pass
                bench.gate.open()
                assert await all_is_free(client)

        self.run(test())

    def test_cancelling_the_reader_aborts(self) -> None:
        async def test() -> None:
            async with self.bench(gate_open=False) as (bench, client, _):
                bench.gate.allow(2)
                stream, first = await first_event(client, request("r", range(20), max_tokens=200))
                task = asyncio.create_task(finish(stream, first))
                waiting = asyncio.create_task(answer(client, request("s", range(20), max_tokens=200)))
                await asyncio.wait([task, waiting], timeout=0)
                for each in (task, waiting):
                    each.cancel()
                await asyncio.wait([task, waiting])
                assert task.cancelled() and waiting.cancelled()
                bench.gate.open()
                assert await all_is_free(client)

        self.run(test())

    def test_a_stream_that_is_never_read_was_never_submitted(self) -> None:
        async def test() -> None:
            async with self.bench() as (_, client, _served):
                client.generate(request("r", [1]), timeout_s=PATIENCE_S)
                await answer(client, request("r", [1]))

        self.run(test())

    def test_one_sample_is_aborted_and_the_others_go_on(self) -> None:
        async def test() -> None:
            async with self.bench(gate_open=False) as (bench, client, _):
                bench.gate.allow(3)
                stream, first = await first_event(client, request("r", [5, 6], max_tokens=240, n=2))
                got = Answer()
                got.add(first)
                for _ in range(2):
                    await client.abort_sample("r", 0)
                await step_until(bench, stream, got, lambda: 0 in got.reasons)
                bench.gate.open()
                await finish(stream, got)
                await client.abort_sample("r", 1)
                await client.abort_sample("unheard of", 0)
                assert await all_is_free(client)
            assert got.reasons == {0: FinishReason.ABORT, 1: FinishReason.LENGTH}
            assert got.tokens[1] == expected_tokens([5, 6], sample_seed(0, 1), 240)
            assert 0 < len(got.tokens[0]) < 240
            assert got.tokens[0] == expected_tokens([5, 6], 0, len(got.tokens[0]))

        self.run(test())

    def test_a_deadline_ends_the_request(self) -> None:
        async def test() -> None:
            async with self.bench(gate_open=False) as (bench, client, _):
                with pytest.raises(DeadlineExceeded) as caught:
                    await answer(client, request("r", [1, 2, 3]), timeout_s=0.05)
                assert caught.value.retryable and "'r'" in str(caught.value)
                bench.gate.open()
                assert await all_is_free(client)

        self.run(test())

    def test_closing_a_client_aborts_its_requests_and_no_others(self) -> None:
        async def test() -> None:
            async with self.bench(gate_open=False) as (bench, client, served):
                other = served.make_client()
                await other.connect(timeout_s=PATIENCE_S)
                bench.gate.allow(4)
                # The same name from two gateways is two requests.
                mine, first = await first_event(client, request("r", [1], max_tokens=20))
                theirs = asyncio.create_task(answer(other, request("r", [2], max_tokens=200)))
                await asyncio.wait([theirs], timeout=0)
                await other.close()
                with pytest.raises(EngineUnavailable):
                    await theirs
                bench.gate.open()
                assert (await finish(mine, first)).tokens[0] == expected_tokens([1], 0, 20)

        self.run(test())

    # ------------------------------------------------------------------ refusals

    def test_a_refusal_names_the_field_and_the_session_goes_on(self) -> None:
        bad = {
            "prompt": request("long", [1] * 300),
            "max_tokens": request("long answer", [1] * 200, max_tokens=100),
            "prompt_token_ids": request("unknown token", [1, VOCABULARY]),
            "n": request("many", [1], n=17),
        }

        async def test() -> None:
            async with self.bench() as (_, client, _served):
                for name, wanted in bad.items():
                    with pytest.raises(InvalidRequest) as caught:
                        await answer(client, wanted)
                    assert caught.value.field == name
                    assert not caught.value.retryable
                assert await all_is_free(client)

        self.run(test())

    def test_a_name_in_use_is_refused(self) -> None:
        async def test() -> None:
            async with self.bench(gate_open=False) as (bench, client, _):
                bench.gate.allow(2)
                stream, first = await first_event(client, request("r", [1], max_tokens=8))
                with pytest.raises(InvalidRequest, match="request_id"):
                    await answer(client, request("r", [2]))
                bench.gate.open()
                assert (await finish(stream, first)).tokens[0] == expected_tokens([1], 0, 8)

        self.run(test())

    def test_overload_is_refused_and_passes(self) -> None:
        async def test() -> None:
            async with self.bench(gate_open=False, max_num_seqs=1, max_queued_requests=1) as (bench, client, _):
                bench.gate.allow(2)
                stream, first = await first_event(client, request("running", [1], max_tokens=240))
                got = Answer()
                got.add(first)
                waiting = asyncio.create_task(answer(client, request("waiting", [2])))
                await step_until(bench, stream, got, lambda: getattr(client.load(), "waiting", 0) == 1)
                refused = asyncio.create_task(answer(client, request("refused", [3])))
                await step_until(bench, stream, got, refused.done)
                with pytest.raises(Overloaded) as caught:
                    await refused
                assert caught.value.retryable
                bench.gate.open()
                assert (await finish(stream, got)).tokens[0] == expected_tokens([1], 0, 240)
                assert (await waiting).tokens[0] == expected_tokens([2], 0, 4)
                assert (await answer(client, request("refused", [3]))).tokens[0] == expected_tokens([3], 0, 4)

        self.run(test())

    # ------------------------------------------------------------------ ends

    def test_drain_lets_what_runs_finish_and_refuses_the_rest(self) -> None:
        async def test() -> None:
            async with self.bench(gate_open=False) as (bench, client, served):
                other = served.make_client()
                await other.connect(timeout_s=PATIENCE_S)
                bench.gate.allow(2)
                stream, first = await first_event(client, request("r", [1], max_tokens=240))
                got = Answer()
                got.add(first)
                assert not await client.drain(timeout_s=0.02)
                drain = asyncio.create_task(client.drain(timeout_s=PATIENCE_S))
                await step_until(bench, stream, got, lambda: getattr(client.load(), "draining", False))
                for late in (client, other):
                    refused = asyncio.create_task(answer(late, request("late", [1])))
                    await step_until(bench, stream, got, refused.done)
                    with pytest.raises(EngineUnavailable, match="draining"):
                        await refused
                assert not drain.done()
                bench.gate.open()
                assert (await finish(stream, got)).tokens[0] == expected_tokens([1], 0, 240)
                assert await drain
                load = client.load()
                assert load is not None and load.draining and load.running == 0
                await other.close()

        self.run(test())

    def test_losing_the_replica_ends_every_request(self) -> None:
        async def test() -> None:
            async with self.bench(gate_open=False) as (bench, client, served):
                bench.gate.allow(2)
                stream, first = await first_event(client, request("r", [1], max_tokens=50))
                waiting = asyncio.create_task(answer(client, request("w", [1], max_tokens=50)))
                await asyncio.wait([waiting], timeout=0)
                await served.kill()
                # The step that runs is the last: the engine's thread looks up after it.
                bench.gate.allow(1)
                for end in (finish(stream, first), waiting, answer(client, request("late", [1]))):
                    with pytest.raises(EngineUnavailable) as caught:
                        await end
                    assert caught.value.retryable
                with pytest.raises(EngineUnavailable):
                    await client.drain(timeout_s=PATIENCE_S)

        self.run(test())

    def test_an_engine_that_dies_ends_every_session(self) -> None:
        async def test() -> None:
            async with self.bench(gate_open=False) as (bench, client, served):
                other = served.make_client()
                await other.connect(timeout_s=PATIENCE_S)
                running = [asyncio.create_task(answer(each, request("r", [1]))) for each in (client, other)]
                await asyncio.wait(running, timeout=0)
                bench.gate.fail(RuntimeError("the device is gone"))
                for end in running:
                    with pytest.raises(EngineUnavailable, match="the device is gone"):
                        await end
                await other.close()
                late = served.make_client()
                with pytest.raises(EngineUnavailable, match="the device is gone"):
                    await late.connect(timeout_s=PATIENCE_S)
                await late.close()

        self.run(test())

    def test_a_client_is_used_between_connect_and_close(self) -> None:
        async def test() -> None:
            async with self.bench() as (_, client, served):
                fresh = served.make_client()
                assert fresh.load() is None
                with pytest.raises(EngineUnavailable, match="not connected"):
                    await answer(fresh, request("r", [1]))
                await fresh.close()
                with pytest.raises(EngineUnavailable, match="before"):
                    await client.connect(timeout_s=PATIENCE_S)
                await client.close()
                await client.close()
                with pytest.raises(EngineUnavailable, match="closed"):
                    await answer(client, request("r", [1]))

        self.run(test())

    @pytest.mark.parametrize("script", impossible_scripts(), ids=lambda script: script.name)
    def test_a_peer_that_sends_what_cannot_be_loses_the_session(self, script: Any) -> None:
        async def test() -> None:
            async with self.serve(ScriptedHost(script)) as served:
                client = served.make_client()
                await client.connect(timeout_s=PATIENCE_S)
                send_to = SendTo(replica="d-1", address="d:1", ticket="t") if script.sends_on else None
                wanted = request("r", [1, 2], max_tokens=2)
                with pytest.raises(EngineUnavailable):
                    async for _ in client.generate(wanted, timeout_s=PATIENCE_S, send_to=send_to):
                        pass
                await client.close()

        self.run(test())

    def test_a_replica_that_does_not_open_the_session_is_unavailable(self) -> None:
        async def test() -> None:
            async with self.serve(ScriptedHost(None)) as served:
                client = served.make_client()
                with pytest.raises(EngineUnavailable, match="did not answer"):
                    await client.connect(timeout_s=0.2)
                await client.close()

        self.run(test())
