"""The server against peers that are no gateway of ours, and what stands beside the engine service."""

from __future__ import annotations

import asyncio
import stat
import tempfile
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from slipstream.runtime.rpc.client import GrpcEngineClient
from slipstream.runtime.rpc.codec import encode_command
from slipstream.runtime.rpc.codec_events import decode_event
from slipstream.runtime.rpc.generated import engine_pb2 as pb
from slipstream.runtime.rpc.server import EngineServer
from slipstream.runtime.rpc.session import Closed, Event, Rejected, StepNews, Submit
from slipstream.runtime.worker.driver import DriverLimits
from slipstream.sdk.errors import ConfigError, EngineUnavailable, InvalidRequest
from slipstream.tests.contracts.engine_client import PATIENCE_S, all_is_free, answer
from slipstream.tests.engine.builders import request
from slipstream.tests.fakes.engine_bench import EngineBench, engine_bench
from slipstream.tests.fakes.oracle_executor import expected_tokens


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await test

    asyncio.run(bounded())


@asynccontextmanager
async def served(
    *, write_timeout_s: float = 30.0, **options: Any
) -> AsyncIterator[tuple[EngineBench, str, grpc.aio.Channel]]:
    """Serve an engine, with a bare channel to it."""
    with tempfile.TemporaryDirectory(prefix="slip") as folder, engine_bench(**options) as bench:
        server = EngineServer(bench.loop, str(Path(folder) / "engine.sock"), write_timeout_s=write_timeout_s)
        address = await server.start()
        try:
            async with grpc.aio.insecure_channel(f"unix:{address}") as channel:
                yield bench, address, channel
        finally:
            bench.gate.open()
            await server.stop(grace_s=0.0)


def session_of(channel: grpc.aio.Channel) -> Any:
    stub: Any = channel.stream_stream("/slipstream.v1.Engine/Session")
    return stub()


async def next_event(call: Any) -> Event:
    data = await call.read()
    assert isinstance(data, bytes), f"the stream ended: {data}"
    return decode_event(data)


async def until_end(call: Any) -> tuple[list[Event], grpc.StatusCode, str]:
    """Read everything a stream still brings; return it with the status it ended with."""
    found: list[Event] = []
    try:
        while isinstance(data := await call.read(), bytes):
            found.append(decode_event(data))
    except grpc.aio.AioRpcError:
        pass
    return found, await call.code(), await call.details()


def submit(key: int, **changes: Any) -> bytes:
    return encode_command(Submit(key=key, request=request(f"r{key}", [1, 2], **changes), timeout_s=PATIENCE_S))


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff", b"", pb.ClientMessage(abort=pb.Abort()).SerializeToString()])
def test_garbage_ends_its_session_by_name_and_no_other(garbage: bytes) -> None:
    async def test() -> None:
        async with served() as (_, address, channel):
            client = GrpcEngineClient(address)
            await client.connect(timeout_s=PATIENCE_S)
            call = session_of(channel)
            await call.write(submit(1, max_tokens=200))
            await call.write(garbage)
            found, status, details = await until_end(call)
            assert status == grpc.StatusCode.INVALID_ARGUMENT and details
            assert isinstance(found[-1], Closed) and isinstance(found[-1].error, InvalidRequest)
            assert await all_is_free(client)
            await client.close()

    run(test())


def test_a_submit_that_cannot_be_read_is_refused_alone() -> None:
    async def test() -> None:
        async with served() as (_, _address, channel):
            call = session_of(channel)
            await next_event(call)
            bad = pb.ClientMessage.FromString(submit(1))
            bad.submit.params.n = 0
            await call.write(bad.SerializeToString())
            while not isinstance(refused := await next_event(call), Rejected):
                pass
            assert isinstance(refused.error, InvalidRequest)
            assert (refused.key, refused.error.field) == (1, "n")
            await call.write(submit(2, max_tokens=1))
            news = await next_event(call)
            while not (isinstance(news, StepNews) and news.endings):
                news = await next_event(call)
            assert news.endings[0].key == 2
            call.cancel()

    run(test())


def test_a_key_that_is_in_use_is_refused() -> None:
    async def test() -> None:
        async with served(gate_open=False) as (bench, _, channel):
            call = session_of(channel)
            await call.write(submit(1, max_tokens=240))
            bench.gate.allow(1)
            while not isinstance(await next_event(call), StepNews):
                pass
            await call.write(submit(1))
            # Commands are looked at between steps, and every step brings news.
            bench.gate.allow(1)
            while not isinstance(event := await next_event(call), Rejected):
                bench.gate.allow(isinstance(event, StepNews))
            assert event.key == 1 and "key" in str(event.error)
            call.cancel()

    run(test())


def test_a_message_too_large_ends_the_session() -> None:
    async def test() -> None:
        async with served() as (_, address, channel):
            call = session_of(channel)
            await next_event(call)
            await call.write(bytes((16 << 20) + 1))
            _, status, _ = await until_end(call)
            assert status != grpc.StatusCode.OK
            client = GrpcEngineClient(address)
            await client.connect(timeout_s=PATIENCE_S)
            assert await all_is_free(client)
            await client.close()

    run(test())


def test_a_gateway_that_leaves_without_a_word_has_its_requests_aborted() -> None:
    async def test() -> None:
        async with served(gate_open=False) as (bench, address, channel):
            leavers = [session_of(channel) for _ in range(3)]
            for call in leavers:
                await call.write(submit(1, max_tokens=200))
                await next_event(call)
            bench.gate.allow(3)
            leavers[0].cancel()
            await leavers[1].done_writing()
            await channel.close()
            bench.gate.open()
            client = GrpcEngineClient(address)
            await client.connect(timeout_s=PATIENCE_S)
            await answer(client, request("r", [1], max_tokens=240))
            assert await all_is_free(client)
            await client.close()

    run(test())


def test_a_gateway_that_does_not_read_loses_its_session() -> None:
    async def test() -> None:
        async with served(write_timeout_s=0.1, limits=DriverLimits(max_unread=20_000)) as (_, address, channel):
            call = session_of(channel)
            # Never read: connection buffers fill first, then the bounded outbox, then the session is over.
            client = GrpcEngineClient(address)
            await client.connect(timeout_s=PATIENCE_S)
            # The session may be over before all is written.
            with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                for key in range(1, 65):
                    await call.write(submit(key, max_tokens=250, logprobs=60))
            got = await answer(client, request("other", [1], max_tokens=20))
            assert got.tokens[0] == expected_tokens([1], 0, 20)
            # Before anything is read: what runs is far more than all buffers take.
            async with asyncio.timeout(PATIENCE_S):
                while not await all_is_free(client):
                    pass
            _, status, details = await until_end(call)
            # gRPC may tell a writer of its own failed write in place of why the stream ended.
            told = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL)
            assert status in told, (status, details)
            await client.close()

    run(test())


def test_one_gateway_too_many_is_refused() -> None:
    async def test() -> None:
        async with served(limits=DriverLimits(max_sessions=1)) as (_, address, channel):
            call = session_of(channel)
            await next_event(call)
            client = GrpcEngineClient(address)
            with pytest.raises(EngineUnavailable, match="RESOURCE_EXHAUSTED"):
                await client.connect(timeout_s=PATIENCE_S)
            await client.close()
            call.cancel()

    run(test())


def test_health_and_reflection() -> None:
    async def test() -> None:
        with tempfile.TemporaryDirectory(prefix="slip") as folder, engine_bench() as bench:
            server = EngineServer(bench.loop, str(Path(folder) / "engine.sock"))
            address = await server.start()
            assert stat.S_IMODE(Path(address).stat().st_mode) & 0o077 == 0, "the socket is this user's alone"
            async with grpc.aio.insecure_channel(f"unix:{address}") as channel:
                health: Any = health_pb2_grpc.HealthStub(channel)
                for serving in (True, False):
                    await server.set_serving(serving)
                    for service in ("", "slipstream.v1.Engine"):
                        reply = await health.Check(health_pb2.HealthCheckRequest(service=service))
                        assert (reply.status == health_pb2.HealthCheckResponse.SERVING) == serving
                reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type]
                asked = reflection.ServerReflectionInfo(
                    iter([reflection_pb2.ServerReflectionRequest(list_services="")])
                )
                listed = (await asked.read()).list_services_response.service
                assert {"slipstream.v1.Engine", "grpc.health.v1.Health"} <= {service.name for service in listed}
                asked.cancel()
            await server.stop(grace_s=0.0)

    run(test())


def test_a_port_that_is_taken_is_refused() -> None:
    async def test() -> None:
        with engine_bench() as bench:
            first = EngineServer(bench.loop, "127.0.0.1:0")
            address = await first.start()
            assert int(address.rpartition(":")[2]) > 0
            with pytest.raises(ConfigError, match="address"):
                await EngineServer(bench.loop, address).start()
            client = GrpcEngineClient(address)
            assert await client.connect(timeout_s=PATIENCE_S) == bench.loop.facts
            await client.close()
            await first.stop(grace_s=0.0)

    run(test())
