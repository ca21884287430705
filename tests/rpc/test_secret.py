"""The cluster's secret over TCP: every method behind the door, both ways; and none on a socket's path."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from slipstream.runtime.clock import monotonic_clock
from slipstream.runtime.rpc import wire
from slipstream.runtime.rpc.backoff import no_jitter
from slipstream.runtime.rpc.client import GrpcEngineClient
from slipstream.runtime.rpc.door import PROOF_KEY, visit
from slipstream.runtime.rpc.errors import SecretRefused
from slipstream.runtime.rpc.generated import cluster_pb2, engine_pb2, secret_pb2
from slipstream.runtime.rpc.server import EngineServer
from slipstream.runtime.rpc.session import PROTOCOL_VERSION
from slipstream.runtime.rpc.view_server import ViewServer
from slipstream.runtime.rpc.view_source import ViewBoard
from slipstream.runtime.rpc.view_watch import ViewWatch
from slipstream.sdk.errors import EngineUnavailable
from slipstream.tests.contracts.engine_client import answer
from slipstream.tests.contracts.view_source import PATIENCE_S, give_up, run, until
from slipstream.tests.engine.builders import request
from slipstream.tests.fakes.engine_bench import engine_bench
from slipstream.tests.fakes.oracle_executor import expected_tokens
from slipstream.tests.fakes.views import view

SECRET = b"one secret of sixteen bytes"
OTHER = b"another of sixteen bytes"


@asynccontextmanager
async def engine(secret: bytes | None = SECRET, address: str = "127.0.0.1:0") -> AsyncIterator[str]:
    with engine_bench() as bench:
        server = EngineServer(bench.loop, address, secret=secret)
        shown = await server.start()
        try:
            yield shown
        finally:
            await server.stop(grace_s=0.0)


@asynccontextmanager
async def views(secret: bytes | None = SECRET) -> AsyncIterator[str]:
    board = ViewBoard()
    board.publish(view(1))
    server = ViewServer(board, "127.0.0.1:0", secret=secret, heartbeat_s=0.05)
    shown = await server.start()
    try:
        yield shown
    finally:
        await server.stop()


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    """Return how a call ended, of which nothing may have come."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call if hasattr(call, "__await__") else call.read())
    return caught.value.code(), caught.value.details() or ""


def methods() -> list[tuple[str, str, bool, bool]]:
    """Return service, method, and whether either side streams, of all that the protocols know."""
    found = []
    for module in (engine_pb2, cluster_pb2, secret_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                found.append((service.full_name, method.name, method.client_streaming, method.server_streaming))
    return found


def test_the_protocols_have_the_methods_that_are_served() -> None:
    assert {(service, method) for service, method, _, _ in methods()} == {
        (wire.SERVICE, wire.FACTS),
        (wire.SERVICE, wire.SESSION),
        (wire.CLUSTER_SERVICE, wire.WATCH),
        (wire.SECRET_SERVICE, wire.CHALLENGE),
    }


def open_call(channel: grpc.aio.Channel, service: str, method: str, metadata: Any = ()) -> Any:
    kinds: dict[tuple[bool, bool], Any] = {
        (False, False): channel.unary_unary, (False, True): channel.unary_stream, (True, True): channel.stream_stream,
    }  # fmt: skip
    streams = next((ours, theirs) for name, each, ours, theirs in methods() if (name, each) == (service, method))
    stub = kinds[streams](f"/{service}/{method}")
    return stub(metadata=metadata) if streams[0] else stub(b"", metadata=metadata)


@pytest.mark.parametrize("proof", [None, b"", b"short", bytes(200)], ids=["none", "empty", "short", "long"])
def test_every_method_is_behind_the_door_but_the_challenge(proof: bytes | None) -> None:
    async def test() -> None:
        async with engine() as engine_at, views() as views_at:
            behind = [each for each in methods() if each[0] != wire.SECRET_SERVICE]
            assert len(behind) == 3
            for service, method, _, _ in behind:
                address = views_at if service == wire.CLUSTER_SERVICE else engine_at
                async with grpc.aio.insecure_channel(address) as channel:
                    metadata = () if proof is None else ((PROOF_KEY, proof),)
                    status, details = await refused(open_call(channel, service, method, metadata))
                    assert status is grpc.StatusCode.UNAUTHENTICATED and "SLIPSTREAM_SECRET" in details

    run(test())


def test_health_needs_no_secret_and_reflection_is_not_offered() -> None:
    async def test() -> None:
        async with engine() as address, grpc.aio.insecure_channel(address) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            reply = await health.Check(health_pb2.HealthCheckRequest(service=""))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
            reflect: Any = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
            status, _ = await refused(reflect())
            assert status is grpc.StatusCode.UNIMPLEMENTED

    run(test())


def test_requests_go_both_ways_with_the_secret() -> None:
    async def test() -> None:
        async with engine() as address:
            client = GrpcEngineClient(address, secret=SECRET)
            await client.connect(timeout_s=PATIENCE_S)
            got = await answer(client, request("r", [1, 2], max_tokens=20))
            assert got.tokens[0] == expected_tokens([1, 2], 0, 20)
            await client.close()

    run(test())


@pytest.mark.parametrize(
    ("served", "called", "problem"),
    [
        (SECRET, None, "only calls of its own cluster are taken: set SLIPSTREAM_SECRET"),
        (SECRET, OTHER, "the secret is not the server's: give both the same SLIPSTREAM_SECRET"),
        (None, SECRET, "the server asks for no secret: set SLIPSTREAM_SECRET there too"),
    ],
    ids=["missing", "wrong", "unasked"],
)
def test_those_who_do_not_share_it_do_not_meet(served: bytes | None, called: bytes | None, problem: str) -> None:
    async def test() -> None:
        async with engine(served) as address:
            client = GrpcEngineClient(address, secret=called)
            with pytest.raises(SecretRefused, match=problem) as caught:
                await client.connect(timeout_s=PATIENCE_S)
            assert not caught.value.retryable and isinstance(caught.value, EngineUnavailable)
            await client.close()
        async with views(served) as address:
            source = ViewWatch([address], clock=monotonic_clock, jitter=no_jitter, secret=called, first_pause_s=0.01)
            async with aclosing(source.views()) as watching:
                first = asyncio.ensure_future(anext(watching))
                await until(lambda: problem in source.problem)
                assert not first.done()
                await give_up(first)

    run(test())


def test_a_refused_watch_is_said_once_and_goes_on_when_the_secret_is_right(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with views(OTHER) as address:
            source = ViewWatch([address], clock=monotonic_clock, jitter=lambda _: 0.0, secret=SECRET)
            watching = source.views()
            first = asyncio.ensure_future(anext(watching))
            await until(lambda: "the secret is not" in source.problem)
            await asyncio.wait((first,), timeout=0.2)
        board = ViewBoard()
        board.publish(view(4))
        server = ViewServer(board, address, secret=SECRET)
        await server.start()
        assert (await first).epoch == 4
        await watching.aclose()
        await server.stop()

    run(test())
    assert sum("the secret is not" in record.message for record in caplog.records) == 1


def test_a_replayed_proof_is_refused() -> None:
    async def test() -> None:
        async with engine() as address, grpc.aio.insecure_channel(address) as channel:
            visiting = await visit(channel, SECRET, wait_for_ready=True)
            heard = visiting.metadata(wire.FACTS)
            assert await open_call(channel, wire.SERVICE, wire.FACTS, heard)
            for method, problem in ((wire.FACTS, "answered before"), (wire.SESSION, "the secret is not the server's")):
                status, details = await refused(open_call(channel, wire.SERVICE, method, heard))
                assert status is grpc.StatusCode.UNAUTHENTICATED and problem in details
            async with engine() as elsewhere, grpc.aio.insecure_channel(elsewhere) as other:
                status, details = await refused(open_call(other, wire.SERVICE, wire.FACTS, heard))
                assert status is grpc.StatusCode.UNAUTHENTICATED and "not this server's" in details

    run(test())


def test_a_server_that_cannot_answer_is_not_spoken_to() -> None:
    """It hands out challenges and lets everybody in, to hear what is sent; nothing is."""

    async def test() -> None:
        heard: list[bytes] = []

        async def challenge(data: bytes, context: Any) -> bytes:
            return secret_pb2.ChallengeReply(challenge=bytes(56)).SerializeToString()

        async def facts(data: bytes, context: Any) -> bytes:
            return engine_pb2.FactsReply(protocol_version=PROTOCOL_VERSION, epoch="x", role="mixed").SerializeToString()

        async def session(requests: Any, context: Any) -> None:
            async for data in requests:
                heard.append(data)

        server = grpc.aio.server()
        own: Any = {"Challenge": grpc.unary_unary_rpc_method_handler(challenge)}
        methods_: Any = {
            "Facts": grpc.unary_unary_rpc_method_handler(facts),
            "Session": grpc.stream_stream_rpc_method_handler(session),
        }
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(wire.SECRET_SERVICE, own),
                grpc.method_handlers_generic_handler(wire.SERVICE, methods_),
            )
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        client = GrpcEngineClient(f"127.0.0.1:{port}", secret=SECRET)
        with pytest.raises(SecretRefused, match="who answers does not know the secret"):
            await client.connect(timeout_s=PATIENCE_S)
        await client.close()
        await server.stop(0)
        assert heard == []

    run(test())


def test_a_sockets_path_needs_no_secret() -> None:
    async def test() -> None:
        with tempfile.TemporaryDirectory(prefix="slip") as folder:
            async with engine(SECRET, str(Path(folder) / "engine.sock")) as address:
                for secret in (None, OTHER):
                    client = GrpcEngineClient(address, secret=secret)
                    await client.connect(timeout_s=PATIENCE_S)
                    await client.close()

    run(test())
