"""What every ``EngineClient`` owes requests that begin at one replica and go on at another, against a scripted host."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from slipstream.runtime.messages import EngineRequest
from slipstream.runtime.rpc.engine_client import BlockChanges, EngineClient, HandOffReport, RequestEvent, SendTo
from slipstream.runtime.rpc.session import (
    Abort,
    BlocksChanged,
    EngineHost,
    Event,
    GoOn,
    HandOffEnded,
    Rejected,
    Submit,
)
from slipstream.sdk.errors import EngineUnavailable, InvalidRequest, Overloaded
from slipstream.tests.contracts.engine_client import PATIENCE_S, Served, answer
from slipstream.tests.contracts.view_source import run, until
from slipstream.tests.engine.builders import request
from slipstream.tests.fakes.scripted_host import Script, ScriptedHost, ending, handed_over, news

SEND_TO = SendTo(replica="d-1", address="10.0.0.2:7", ticket="0123abcd")
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


def digest(number: int) -> bytes:
    return number.to_bytes(16, "big")


async def events_of(client: EngineClient, wanted: EngineRequest, **options: Any) -> list[RequestEvent]:
    return [event async for event in client.generate(wanted, timeout_s=PATIENCE_S, **options)]


def tokens_of(events: list[RequestEvent]) -> list[int]:
    return [token for event in events for sample in event.samples for token in sample.token_ids]


class SplitClientContract(ABC):
    """Subclass it as ``Test...`` and say how a host is served."""

    @abstractmethod
    def serve(self, host: EngineHost) -> AbstractAsyncContextManager[Served]:
        """Put a host behind the transport under test."""

    @asynccontextmanager
    async def met(self, script: Script) -> AsyncIterator[tuple[ScriptedHost, EngineClient]]:
        host = ScriptedHost(script)
        async with self.serve(host) as served:
            client = served.make_client()
            await client.connect(timeout_s=PATIENCE_S)
            yield host, client
            await client.close()

    # ------------------------------------------------------------------ sent on

    def test_one_sent_on_brings_its_token_and_how_the_hand_off_ended(self) -> None:
        async def test() -> None:
            script = Script("sent on", [news([(1, 0, 42)]), handed_over(1)])
            async with self.met(script) as (host, client):
                events = await events_of(client, request("r", [1, 2]), send_to=SEND_TO, trace_id=TRACE_ID)
                assert tokens_of(events) == [42]
                assert [event.hand_off for event in events if event.hand_off] == [handed_over(1).report]
                assert events[-1].hand_off is not None
                assert not any(sample.finish_reason for event in events for sample in event.samples)
                await self.pass_through(host, client)
            submit = host.commands[0]
            assert isinstance(submit, Submit)
            assert (submit.send_to, submit.ticket, submit.trace_id) == (SEND_TO, "", TRACE_ID)
            assert Abort(key=1) not in host.commands, "it is over"

        run(test())

    def test_one_that_ends_with_its_token_ends_where_it_is(self) -> None:
        async def test() -> None:
            async with self.met(Script("over", [news([(1, 0, 42)], endings=[ending(1, 0)])])) as (_, client):
                events = await events_of(client, request("r", [1, 2]), send_to=SEND_TO)
                assert tokens_of(events) == [42] and events[-1].samples[0].finish_reason is not None
                assert all(event.hand_off is None for event in events)

        run(test())

    def test_a_hand_off_that_fails_before_the_token_ends_the_request(self) -> None:
        async def test() -> None:
            report = HandOffReport(ending="no_room", wait_s=0.25)
            async with self.met(Script("no room", [HandOffEnded(key=1, report=report)])) as (_, client):
                events = await events_of(client, request("r", [1, 2]), send_to=SEND_TO)
                assert [event.hand_off for event in events] == [report] and not events[0].samples

        run(test())

    # ------------------------------------------------------------------ waiting for KV

    def test_one_that_waits_gets_its_tokens_when_it_goes_on(self) -> None:
        async def test() -> None:
            gone_on: list[Event] = [news([(1, 0, 5), (1, 0, 6)], endings=[ending(1, 0)])]
            async with self.met(Script("waits", gone_on=gone_on)) as (host, client):
                waiting = asyncio.ensure_future(events_of(client, request("r", [1, 2]), ticket="t-1"))
                await until(lambda: bool(host.commands))
                for name in ("r", "r", "unheard of"):
                    await client.go_on(name)
                assert tokens_of(await waiting) == [5, 6]
                await client.go_on("r")
                await self.pass_through(host, client)
            submit = host.commands[0]
            assert isinstance(submit, Submit) and (submit.send_to, submit.ticket) == (None, "t-1")
            assert host.commands.count(GoOn(key=1)) == 1, "once is enough, and too late is never"

        run(test())

    def test_one_that_waits_for_nothing_is_not_told_to_go_on(self) -> None:
        async def test() -> None:
            async with self.met(Script("plain")) as (host, client):
                plain = asyncio.ensure_future(events_of(client, request("r", [1, 2])))
                await until(lambda: bool(host.commands))
                await client.go_on("r")
                plain.cancel()
                await asyncio.wait([plain])
                await until(lambda: Abort(key=1) in host.commands)
                assert GoOn(key=1) not in host.commands

        run(test())

    async def pass_through(self, host: ScriptedHost, client: EngineClient) -> None:
        """Wait until all that was sent has come: the host sees commands in their order."""
        seen = len(host.commands)
        probe = asyncio.ensure_future(events_of(client, request("probe", [1])))
        await until(lambda: len(host.commands) > seen)
        probe.cancel()
        await asyncio.wait([probe])

    # ------------------------------------------------------------------ what was generated before

    def test_samples_go_on_where_they_were(self) -> None:
        async def test() -> None:
            tokens = [(1, 0, 7), (1, 2, 8), (1, 2, 9)]
            script = Script("goes on", [news(tokens, endings=[ending(1, 0), ending(1, 2)])])
            already = (np.array([1, 2], dtype=np.int32), None, np.array([], dtype=np.int32))
            wanted = replace(request("r", [1, 2], n=3, max_tokens=4), generated=already)
            async with self.met(script) as (host, client):
                got = await answer(client, wanted)
            assert dict(got.tokens) == {0: [7], 2: [8, 9]} and set(got.reasons) == {0, 2}
            submit = host.commands[0]
            assert isinstance(submit, Submit)
            sent = submit.request.generated
            assert [None if each is None else each.tolist() for each in sent] == [[1, 2], None, []]

        run(test())

    @pytest.mark.parametrize(
        "tokens", [[(1, 1, 5)], [(1, 0, 5), (1, 0, 6), (1, 0, 7)]], ids=["of one that is over", "one too many"]
    )
    def test_tokens_beyond_what_is_left_lose_the_session(self, tokens: list[tuple[int, int, int]]) -> None:
        async def test() -> None:
            already = (np.array([1, 2], dtype=np.int32), None)
            wanted = replace(request("r", [1, 2], n=2, max_tokens=4), generated=already)
            async with self.met(Script("too many", [news(tokens)])) as (_, client):
                with pytest.raises(EngineUnavailable):
                    await answer(client, wanted)

        run(test())

    # ------------------------------------------------------------------ refusals

    @pytest.mark.parametrize(
        ("field", "wanted", "options"),
        [
            ("ticket", request("r", [1]), {"send_to": SEND_TO, "ticket": "t"}),
            ("ticket", request("r", [1]), {"ticket": "no ticket"}),
            ("send_to.address", request("r", [1]), {"send_to": replace(SEND_TO, address="")}),
            ("n", request("r", [1], n=2), {"ticket": "t"}),
            ("n", request("r", [1], n=2), {"send_to": SEND_TO}),
            ("trace_id", request("r", [1]), {"trace_id": "mine"}),
            ("generated", replace(request("r", [1]), generated=(None,)), {}),
        ],
    )
    def test_what_does_not_belong_together_is_refused_here(
        self, field: str, wanted: EngineRequest, options: dict[str, Any]
    ) -> None:
        async def test() -> None:
            async with self.met(Script("never asked")) as (host, client):
                with pytest.raises(InvalidRequest) as caught:
                    await events_of(client, wanted, **options)
                assert caught.value.field == field
                await self.pass_through(host, client)
                assert [getattr(command, "key", 0) for command in host.commands][:1] == [1]
                submit = host.commands[0]
                assert isinstance(submit, Submit) and submit.request.request_id == "probe"

        run(test())

    def test_a_refusal_of_one_that_waits_is_told(self) -> None:
        async def test() -> None:
            script = Script("refused", gone_on=[Rejected(key=1, error=Overloaded("full"))])
            async with self.met(script) as (host, client):
                waiting = asyncio.ensure_future(events_of(client, request("r", [1]), ticket="t"))
                await until(lambda: bool(host.commands))
                await client.go_on("r")
                with pytest.raises(Overloaded, match="full"):
                    await waiting

        run(test())

    # ------------------------------------------------------------------ blocks

    def test_blocks_are_told_to_one_who_watches_from_the_beginning(self) -> None:
        async def test() -> None:
            told: list[BlockChanges] = []
            opening = BlockChanges(stored=(digest(1), digest(2)), reset=True)
            script = Script("blocks", opening=[BlocksChanged(changes=opening)])
            host = ScriptedHost(script)
            async with self.serve(host) as served:
                client = served.make_client()
                client.watch_blocks(told.append)
                await client.connect(timeout_s=PATIENCE_S)
                change = BlockChanges(stored=(digest(3),), removed=(digest(1),))
                host.sessions[0].say(BlocksChanged(changes=change))
                await until(lambda: len(told) == 3)
                assert told == [BlockChanges(reset=True), opening, change]
                await client.close()

        run(test())

    def test_one_who_watches_late_is_told_all_that_is_there_and_then_changes(self) -> None:
        async def test() -> None:
            told: list[BlockChanges] = []
            changes = [
                BlockChanges(stored=(digest(9),)),
                BlockChanges(stored=(digest(1), digest(2)), reset=True),
                BlockChanges(stored=(digest(3),), removed=(digest(1), digest(77))),
            ]
            opening: list[Event] = [BlocksChanged(changes=each) for each in changes]
            over = news([(1, 0, 1)], endings=[ending(1, 0)])
            async with self.met(Script("blocks", [over], opening=opening)) as (host, client):
                # Its news come behind the blocks.
                await answer(client, request("r", [1], max_tokens=1))
                client.watch_blocks(told.append)
                assert len(told) == 1 and told[0].reset and not told[0].removed
                assert sorted(told[0].stored) == [digest(2), digest(3)]
                last = BlockChanges(removed=(digest(3),))
                host.sessions[0].say(BlocksChanged(changes=last))
                await until(lambda: len(told) == 2)
                assert told[1] == last

        run(test())
