"""Talk about KV with peers that are no driver of ours, or that hang, or say too much."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from slipstream.comm.kv.transfer import Finish, Granted
from slipstream.runtime.rpc.codec_kv import encode_from_receiver, encode_from_sender
from slipstream.runtime.rpc.door import Door
from slipstream.runtime.rpc.errors import SecretRefused
from slipstream.runtime.rpc.kv_client import GrpcKvTalker
from slipstream.runtime.rpc.kv_outlet import KvOutlet
from slipstream.runtime.rpc.kv_server import KvTalkMethods
from slipstream.runtime.rpc.listening import listen
from slipstream.runtime.rpc.wire import SERVER_OPTIONS
from slipstream.sdk.errors import EngineUnavailable
from slipstream.tests.contracts.view_source import run, until
from slipstream.tests.fakes.kv_talkers import FROM_RECEIVER, FROM_SENDER, TRANSFER, NotingEar, NotingHost, facts

SHORT_S = 0.1
SECRET = b"a secret of the whole cluster"
GREETING = encode_from_sender(facts("p-1", 7))


@asynccontextmanager
async def hosted(host: NotingHost, *, secret: bytes | None = None, **options: Any) -> AsyncIterator[str]:
    """Serve a host alone, on loopback where there is a secret; yield the target."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    door = Door(secret)
    server.add_generic_rpc_handlers((KvTalkMethods(host, door, **options).handlers(), *door.methods()))
    with tempfile.TemporaryDirectory(prefix="slip") as folder:
        target = f"unix:{Path(folder) / 'd.sock'}" if secret is None else "127.0.0.1:0"
        shown = await listen(server, target)
        try:
            yield shown
        finally:
            await server.stop(0)


@asynccontextmanager
async def calling(address: str) -> AsyncIterator[Any]:
    """Yield a bare call to a host."""
    async with grpc.aio.insecure_channel(f"unix:{address}") as channel:
        talk: Any = channel.stream_stream("/slipstream.v1.KvTalk/Talk")
        yield talk()


async def ends_as(call: Any) -> tuple[grpc.StatusCode, str]:
    while True:
        try:
            if not isinstance(await call.read(), bytes):
                break
        except grpc.aio.AioRpcError:
            break
    return await call.code(), await call.details()


@pytest.mark.parametrize(
    ("said", "status", "text"),
    [
        ([b"\xff\xff"], "INVALID_ARGUMENT", "KvFromSender"),
        ([encode_from_sender(FROM_SENDER[0])], "INVALID_ARGUMENT", "what you are"),
        ([GREETING, GREETING], "INVALID_ARGUMENT", "second time"),
        ([GREETING, b"\xff\xff"], "INVALID_ARGUMENT", "KvFromSender"),
        ([], "UNAVAILABLE", "nothing was said"),
        ([encode_from_sender(facts("p-1", model="another"))], "FAILED_PRECONDITION", "model"),
    ],
    ids=["garbage", "no facts", "facts twice", "garbage later", "silence", "another model"],
)
def test_a_caller_that_is_no_driver_of_ours_is_told_so_and_no_other_line_ends(
    said: list[bytes], status: str, text: str
) -> None:
    async def test() -> None:
        host, ear = NotingHost(), NotingEar()
        async with hosted(host, greet_timeout_s=SHORT_S) as address:
            good = GrpcKvTalker(asyncio.get_running_loop()).call(replica="d-1", address=address, ours=ear.ours, ear=ear)
            # On a slow machine a good driver may be too late for such a short time-out, and comes again.
            await until(lambda: len(host.lines) > len(host.gone) and bool(ear.lives))
            line = host.lines[-1]
            async with calling(address) as call:
                for data in said:
                    await call.write(data)
                code, details = await ends_as(call)
            assert code.name == status and text in details
            assert good.say(FROM_SENDER[0])
            await until(lambda: (line, FROM_SENDER[0]) in host.heard)
            assert line not in host.gone
            good.close()

    run(test())


def test_one_line_too_many_is_refused_and_there_is_room_again() -> None:
    async def test() -> None:
        host = NotingHost()
        async with hosted(host, max_lines=1) as address, calling(address) as first:
            await first.write(GREETING)
            await until(lambda: len(host.lines) == 1)
            async with calling(address) as second:
                code, details = await ends_as(second)
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED and "1 drivers" in details
            first.cancel()
            await until(lambda: len(host.gone) == 1)
            async with calling(address) as third:
                await third.write(GREETING)
                await until(lambda: len(host.lines) == 2)

    run(test())


def test_a_caller_that_does_not_read_is_let_go() -> None:
    async def test() -> None:
        host = NotingHost()
        async with hosted(host, write_timeout_s=SHORT_S) as address, calling(address) as call:
            await call.write(GREETING)
            await until(lambda: len(host.lines) == 1)
            # More than connections hold by themselves.
            large = Granted(transfer=TRANSFER, generation=1, blocks=tuple(range(1 << 16)), first_token=0)
            for _ in range(100):
                host.lines[0].say(large)
            await until(lambda: bool(host.gone))
            assert not host.lines[0].say(FROM_RECEIVER[1])
            call.cancel()

    run(test())


def test_what_waits_to_be_written_is_bounded() -> None:
    async def test() -> None:
        outlet = KvOutlet(asyncio.get_running_loop(), encode_from_sender, max_bytes=2000)
        said = [outlet.say(FROM_SENDER[0]) for _ in range(100)]
        assert said[0] and not said[-1]
        assert len(await outlet.get()) == sum(said)
        assert outlet.say(FROM_SENDER[0]), "there is room again"
        outlet.close()
        assert not outlet.say(FROM_SENDER[0]) and await outlet.get() == []

    run(test())


def test_what_cannot_be_put_into_bytes_is_dropped_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        outlet = KvOutlet(asyncio.get_running_loop(), encode_from_sender)
        assert not outlet.say(Finish(transfer=TRANSFER, generation=1, hand_off=bytes(5 << 20)))
        assert outlet.say(FROM_SENDER[0])
        assert await outlet.get() == [encode_from_sender(FROM_SENDER[0])]

    run(test())
    assert "hand_off" in caplog.text


# ------------------------------------------------------------------ servers that are none of ours


@asynccontextmanager
async def answering(said: list[bytes]) -> AsyncIterator[str]:
    """Serve what anybody may say in a driver's place, and then silence."""

    async def talk(requests: AsyncIterator[bytes], context: Any) -> None:
        await anext(aiter(requests))
        for data in said:
            await context.write(data)
        await asyncio.get_running_loop().create_future()

    server = grpc.aio.server()
    handlers: Any = {"Talk": grpc.stream_stream_rpc_method_handler(talk)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("slipstream.v1.KvTalk", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


THEIRS = encode_from_receiver(facts("d-1"))


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ([], "did not answer"),
        ([b"\xff\xff"], "KvFromReceiver"),
        ([encode_from_receiver(FROM_RECEIVER[0])], "before what it is"),
        ([THEIRS, THEIRS], "second time"),
        ([THEIRS, b"\xff\xff"], "KvFromReceiver"),
        ([THEIRS, bytes((16 << 20) + 1)], "RESOURCE_EXHAUSTED"),
    ],
    ids=["silence", "garbage", "no facts", "facts twice", "garbage later", "too large"],
)
def test_a_server_that_is_no_driver_of_ours_is_left_and_tried_again(said: list[bytes], problem: str) -> None:
    async def test() -> None:
        ear = NotingEar()
        async with answering(said) as address:
            talker = GrpcKvTalker(
                asyncio.get_running_loop(),
                answer_timeout_s=20.0 if said else SHORT_S,
                first_pause_s=0.01,
                longest_pause_s=0.01,
            )
            caller = talker.call(replica="d-1", address=address, ours=ear.ours, ear=ear)
            await until(lambda: len(ear.losses) == 2)
            assert all(isinstance(error, EngineUnavailable) and problem in str(error) for error in ear.losses)
            assert len(ear.lives) >= 2 * (THEIRS in said) and not ear.heard
            caller.close()
            await caller.wait_closed()

    run(test())


def test_an_ear_that_fails_loses_its_connection_and_hears_why(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(NotingEar):
        def hear(self, message: Any) -> None:
            raise ZeroDivisionError("its own fault")

    async def test() -> None:
        host, ear = NotingHost(), Failing()
        async with hosted(host) as address:
            talker = GrpcKvTalker(asyncio.get_running_loop(), first_pause_s=0.01)
            caller = talker.call(replica="d-1", address=address, ours=ear.ours, ear=ear)
            await until(lambda: bool(host.lines))
            host.lines[0].say(FROM_RECEIVER[0])
            await until(lambda: bool(ear.losses))
            assert isinstance(ear.losses[0], ZeroDivisionError)
            await until(lambda: len(host.lines) == 2 and len(host.gone) == 1)
            caller.close()

    run(test())
    assert "talk about KV failed" in caplog.text


# ------------------------------------------------------------------ the cluster's secret


def was_refused(ear: NotingEar) -> bool:
    return any(isinstance(loss, SecretRefused) for loss in ear.losses)


@pytest.mark.parametrize("ours", [SECRET, b"another secret, long enough", None])
def test_over_tcp_both_have_to_know_the_secret(ours: bytes | None) -> None:
    async def test() -> None:
        host, ear = NotingHost(), NotingEar()
        async with hosted(host, secret=SECRET) as address:
            talker = GrpcKvTalker(asyncio.get_running_loop(), secret=ours, first_pause_s=0.01)
            caller = talker.call(replica="d-1", address=address, ours=ear.ours, ear=ear)
            # Who has no secret greets at once, perhaps as it is refused: gRPC then tells of a broken write alone, and
            # the next try of why.
            await until(lambda: bool(host.lines) or was_refused(ear))
            if ours == SECRET:
                assert host.lines and not ear.losses
            else:
                assert was_refused(ear) and not host.lines and not ear.lives
                assert all(isinstance(loss, EngineUnavailable) for loss in ear.losses)
            caller.close()

    run(test())


def test_a_server_that_asks_for_no_secret_is_not_told_anything() -> None:
    async def test() -> None:
        ear = NotingEar()
        async with answering([THEIRS]) as address:
            talker = GrpcKvTalker(asyncio.get_running_loop(), secret=SECRET, first_pause_s=0.01)
            caller = talker.call(replica="d-1", address=address, ours=ear.ours, ear=ear)
            await until(lambda: bool(ear.losses))
            assert isinstance(ear.losses[0], SecretRefused) and not ear.lives
            caller.close()

    run(test())
