"""Watching over gRPC when something is in the way: servers that go, come back, hang, lie, or are many."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest

from slipstream.runtime.clock import monotonic_clock
from slipstream.runtime.reconcile.views import View
from slipstream.runtime.rpc.backoff import no_jitter
from slipstream.runtime.rpc.codec_views import MAX_VIEW_BYTES, decode_view, encode_watch
from slipstream.runtime.rpc.view_server import ViewServer
from slipstream.runtime.rpc.view_source import ViewBoard
from slipstream.runtime.rpc.view_watch import ViewWatch
from slipstream.sdk.errors import ConfigError
from slipstream.tests.contracts.view_source import PATIENCE_S, give_up, run, until, views_until
from slipstream.tests.fakes.views import view

SHORT_S = 0.2


@asynccontextmanager
async def published(board: ViewBoard, address: str = "127.0.0.1:0", **options: Any) -> AsyncIterator[tuple[str, Any]]:
    """Serve a board; yield the address and the server."""
    server = ViewServer(board, address, **{"heartbeat_s": 0.05, **options})
    shown = await server.start()
    try:
        yield shown, server
    finally:
        await server.stop()


def watch(*addresses: str, **options: Any) -> ViewWatch:
    return ViewWatch(addresses, **{"clock": monotonic_clock, "jitter": no_jitter, "first_pause_s": 0.01, **options})


def board_of(epoch: int) -> ViewBoard:
    board = ViewBoard()
    board.publish(view(epoch))
    return board


def test_a_server_that_comes_back_at_its_address_is_heard_again() -> None:
    async def test() -> None:
        async with AsyncExitStack() as stack:
            async with published(board_of(1)) as (address, _):
                source = watch(address)
                views = await stack.enter_async_context(aclosing(source.views()))
                assert (await anext(views)).epoch == 1
                assert source.problem == ""
            next_view = asyncio.ensure_future(anext(views))
            await until(lambda: source.problem != "")
            async with published(board_of(2), address):
                assert (await next_view).epoch == 2
                assert source.problem == ""

    run(test())


def test_a_server_may_come_later() -> None:
    async def test() -> None:
        async with published(board_of(1)) as (address, _):
            pass
        async with aclosing(watch(address).views()) as views:
            first = asyncio.ensure_future(anext(views))
            await asyncio.wait((first,), timeout=SHORT_S)
            assert not first.done()
            async with published(board_of(3), address):
                assert (await first).epoch == 3

    run(test())


def test_epochs_never_go_back_whoever_answers(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        old, new = board_of(3), board_of(7)
        async with published(old) as (behind, server):
            async with published(new) as (ahead, _):
                source = watch(ahead, behind)
                views = source.views()
                assert (await anext(views)).epoch == 7
            later = asyncio.ensure_future(anext(views))
            await until(lambda: server.watchers == 1 and "epoch 3" in source.problem)
            assert not later.done()
            old.publish(view(7, {"p-1": "another:7"}))
            old.publish(view(8))
            assert (await later).epoch == 8
            await views.aclose()

    run(test())
    assert sum("epoch 3, and 7 is known" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize(
    # Only what is under test is short: a good server on a slow machine may be late in any other way.
    ("silent", "timeouts"),
    [
        ("never answers", {"answer_timeout_s": SHORT_S, "silence_s": PATIENCE_S}),
        ("falls silent", {"answer_timeout_s": PATIENCE_S, "silence_s": SHORT_S}),
    ],
)
def test_a_server_that_hangs_is_left_for_another(silent: str, timeouts: dict[str, float]) -> None:
    async def test() -> None:
        async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await reader.read()
            finally:
                writer.close()

        async with AsyncExitStack() as stack:
            if silent == "never answers":
                listener = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
                await stack.enter_async_context(listener)
                hung = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
            else:
                hung, _ = await stack.enter_async_context(published(board_of(1), heartbeat_s=PATIENCE_S))
            good, _ = await stack.enter_async_context(published(board_of(2)))
            source = watch(hung, good, **timeouts)
            async with aclosing(source.views()) as views:
                assert [each.epoch for each in await views_until(views, 2)][-1] == 2

    run(test())


def test_a_server_that_has_no_news_is_heard_all_the_same() -> None:
    async def test() -> None:
        board = board_of(1)
        async with published(board, heartbeat_s=0.01) as (address, server):
            source = watch(address, silence_s=SHORT_S)
            async with aclosing(source.views()) as views:
                await anext(views)
                more = asyncio.ensure_future(anext(views))
                # Longer than the silence that it bears, on the one stream that it has.
                await asyncio.wait((more,), timeout=2 * SHORT_S)
                assert not more.done() and source.problem == "" and server.watchers == 1
                board.publish(view(2))
                assert (await more).epoch == 2

    run(test())


async def serve_bytes(data: bytes, options: Any = ()) -> tuple[grpc.aio.Server, str]:
    """Serve what any server may send in a watch's place."""

    async def send(request: bytes, context: Any) -> None:
        await context.write(data)
        await asyncio.get_running_loop().create_future()

    server = grpc.aio.server(options=options)
    handlers: Any = {"Watch": grpc.unary_stream_rpc_method_handler(send)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("slipstream.v1.Cluster", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("data", "problem"),
    [(b"\xff\xff\xff", "what came is no view"), (bytes(MAX_VIEW_BYTES + 1), "RESOURCE_EXHAUSTED")],
    ids=["garbage", "too large"],
)
def test_what_is_no_view_is_refused_and_tried_elsewhere(data: bytes, problem: str) -> None:
    async def test() -> None:
        hostile, address = await serve_bytes(data)
        source = watch(address)
        async with aclosing(source.views()) as views:
            first = asyncio.ensure_future(anext(views))
            await until(lambda: problem in source.problem)
            assert not first.done()
            await give_up(first)
        async with published(board_of(1)) as (good, _), aclosing(watch(address, good).views()) as views:
            assert (await anext(views)).epoch == 1
        await hostile.stop(0)

    run(test())


def test_one_watcher_too_many_is_refused_and_gets_in_when_another_leaves() -> None:
    async def test() -> None:
        async with published(board_of(1), max_watchers=1) as (address, server):
            first, second = watch(address), watch(address)
            holding = first.views()
            await anext(holding)
            async with aclosing(second.views()) as views:
                waiting = asyncio.ensure_future(anext(views))
                await until(lambda: "1 watch already" in second.problem)
                assert server.watchers == 1 and not waiting.done()
                await holding.aclose()
                assert (await waiting).epoch == 1

    run(test())


class WatchedBoard(ViewBoard):
    """A board that knows which view was taken last, to be sent."""

    taken = 0

    @property
    def newest(self) -> View:
        self.taken = super().newest.epoch
        return super().newest


def test_a_watcher_that_does_not_read_costs_one_view_and_gets_the_newest() -> None:
    async def fill(board: WatchedBoard, large: View) -> int:
        """Publish until the connection is full: nothing more is taken from the board then. Return the last epoch."""
        for epoch in itertools.count(2):
            board.publish(replace(large, epoch=epoch))
            try:
                async with asyncio.timeout(SHORT_S):
                    while board.taken < epoch:
                        await asyncio.sleep(0)
            except TimeoutError:
                return epoch
        raise AssertionError("numbers end")

    async def test() -> None:
        board = WatchedBoard()
        large = view(1, {f"p-{number}": 200 * "x" for number in range(500)})
        board.publish(large)
        async with (
            published(board, heartbeat_s=PATIENCE_S) as (address, server),
            grpc.aio.insecure_channel(address) as channel,
        ):
            open_watch: Any = channel.unary_stream("/slipstream.v1.Cluster/Watch")
            call = open_watch(encode_watch(0))
            await until(lambda: server.watchers == 1)
            full = await fill(board, large)
            last = full + 200
            for epoch in range(full + 1, last + 1):
                board.publish(replace(large, epoch=epoch))
            epochs: list[int] = []
            while not epochs or epochs[-1] < last:
                epochs.append(decode_view(await call.read()).epoch)
            # What the connection held when it was full, perhaps one that was taken since, and then the newest.
            assert epochs == sorted(epochs) and len(epochs) <= full + 1
            call.cancel()

    run(test())


def test_a_watcher_that_never_reads_is_let_go() -> None:
    async def test() -> None:
        board = ViewBoard()
        board.publish(view(1, {f"p-{number}": 200 * "x" for number in range(500)}))
        async with (
            published(board, heartbeat_s=0.001, write_timeout_s=SHORT_S) as (address, server),
            grpc.aio.insecure_channel(address) as channel,
        ):
            open_watch: Any = channel.unary_stream("/slipstream.v1.Cluster/Watch")
            call = open_watch(encode_watch(0))
            await until(lambda: server.watchers == 1)
            await until(lambda: server.watchers == 0)
            call.cancel()

    run(test())


def test_what_stands_in_the_way_is_said_once_a_change(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with published(board_of(1)) as (address, _):
            pass
        source = watch(address, longest_pause_s=0.01)
        async with aclosing(source.views()) as views:
            first = asyncio.ensure_future(anext(views))
            await until(lambda: source.problem.startswith(address))
            await asyncio.wait((first,), timeout=SHORT_S)
            async with published(board_of(1), address):
                await first

    with caplog.at_level(logging.INFO):
        run(test())
    said = [record.message for record in caplog.records if record.name.endswith("view_watch")]
    assert len(said) == 2 and "UNAVAILABLE" in said[0] and said[1] == "views are heard", said


def test_pauses_are_jittered_by_what_is_given() -> None:
    async def test() -> None:
        async with published(board_of(1)) as (address, _):
            pass
        asked: list[float] = []

        def jitter(pause_s: float) -> float:
            asked.append(pause_s)
            return 0.0

        source = ViewWatch([address], clock=monotonic_clock, jitter=jitter, first_pause_s=1.0, longest_pause_s=5.0)
        async with aclosing(source.views()) as views:
            first = asyncio.ensure_future(anext(views))
            await until(lambda: len(asked) >= 5)
            await give_up(first)
        assert asked[:5] == [1.0, 2.0, 4.0, 5.0, 5.0]

    run(test())


@pytest.mark.parametrize("address", ["localhost", ":9000", "host:http", "host:99999"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    async def test() -> None:
        with pytest.raises(ConfigError, match="address"):
            ViewServer(ViewBoard(), address)

    run(test())


def test_a_watch_needs_an_address() -> None:
    with pytest.raises(ConfigError, match="watch: give at least one address"):
        watch()


def test_a_server_listens_where_it_was_told_and_nowhere_else() -> None:
    async def test() -> None:
        async with published(board_of(1)) as (address, _):
            port = address.rpartition(":")[2]
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.2", int(port))
            with pytest.raises(ConfigError, match="cannot listen"):
                await ViewServer(ViewBoard(), address).start()

    run(test())


def test_a_view_that_is_too_large_ends_its_watches_and_says_so() -> None:
    async def test() -> None:
        board = board_of(1)
        async with published(board) as (address, _):
            source = watch(address)
            async with aclosing(source.views()) as views:
                await anext(views)
                more = asyncio.ensure_future(anext(views))
                board.publish(view(2, {f"p-{number}": "host:1" for number in range(9000)}))
                await until(lambda: "replicas are more than" in source.problem)
                assert not more.done()
                board.publish(view(3))
                assert (await more).epoch == 3

    run(test())
