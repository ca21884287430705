"""Certificates: who is let in over TCP and who is not, by every server and caller of ours, and what wrong files say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest

from slipstream.runtime.clock import monotonic_clock
from slipstream.runtime.rpc.backoff import no_jitter
from slipstream.runtime.rpc.client import GrpcEngineClient
from slipstream.runtime.rpc.inference import AnswerNews, Ask, Caller, ModelFacts, TextLine
from slipstream.runtime.rpc.inference_server import InferenceServer
from slipstream.runtime.rpc.kv_client import GrpcKvTalker
from slipstream.runtime.rpc.server import EngineServer
from slipstream.runtime.rpc.tls import (
    CA_VARIABLE,
    CERT_VARIABLE,
    KEY_VARIABLE,
    MAX_FILE_BYTES,
    NAME_VARIABLE,
    Tls,
    open_channel,
    read_tls,
    tls_from,
)
from slipstream.runtime.rpc.view_server import ViewServer
from slipstream.runtime.rpc.view_source import ViewBoard
from slipstream.runtime.rpc.view_watch import ViewWatch
from slipstream.sdk.errors import ConfigError, EngineUnavailable
from slipstream.tests.contracts.view_source import PATIENCE_S, give_up, run, until
from slipstream.tests.fakes.certificates import Authority, Files
from slipstream.tests.fakes.kv_talkers import NotingEar, NotingHost
from slipstream.tests.fakes.scripted_host import Script, ScriptedHost
from slipstream.tests.fakes.views import view

SECRET = b"a secret of the whole cluster"
SHORT_S = 0.3


def both(files: Files, **changes: Any) -> Tls:
    tls = read_tls(**{"certificate": files.certificate, "key": files.key, "authority": files.authority, **changes})
    assert tls is not None
    return tls


def caller_only(files: Files) -> Tls:
    return both(files, certificate="", key="")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def cluster(authority: Authority) -> Tls:
    return both(authority.issue("node", "127.0.0.1"))


# ------------------------------------------------------------------ who is let in


@pytest.mark.parametrize("secret", [None, SECRET], ids=["", "with a secret"])
def test_an_engine_is_met_over_mutual_tls(cluster: Tls, secret: bytes | None) -> None:
    async def test() -> None:
        host = ScriptedHost(Script("idle"))
        server = EngineServer(host, "127.0.0.1:0", tls=cluster, secret=secret)
        client = GrpcEngineClient(await server.start(), tls=cluster, secret=secret)
        assert await client.connect(timeout_s=PATIENCE_S) == host.facts
        await client.close()
        await server.stop(grace_s=0.0)

    run(test())


def stranger(folder: Path) -> Tls:
    """Return certificates of somebody else's authority."""
    other = folder / "other"
    other.mkdir()
    return both(Authority(other).issue("node", "127.0.0.1"))


@pytest.mark.parametrize("who", ["plain", "without a certificate", "of another authority", "under another name"])
def test_a_caller_that_is_not_verified_or_does_not_verify_us_is_not_let_in(
    authority: Authority, cluster: Tls, tmp_path: Path, who: str
) -> None:
    callers = {
        "plain": lambda: None,
        "without a certificate": lambda: caller_only(authority.issue("caller", "127.0.0.1")),
        "of another authority": lambda: stranger(tmp_path),
        "under another name": lambda: both(authority.issue("caller"), name="elsewhere"),
    }

    async def test() -> None:
        host = ScriptedHost(Script("idle"))
        server = EngineServer(host, "127.0.0.1:0", tls=cluster)
        address = await server.start()
        tls = callers[who]()
        client = GrpcEngineClient(address, tls=tls)
        with pytest.raises(EngineUnavailable, match="did not answer" if tls is None else CA_VARIABLE):
            await client.connect(timeout_s=SHORT_S)
        await client.close()
        assert not host.sessions
        good = GrpcEngineClient(address, tls=cluster)
        await good.connect(timeout_s=PATIENCE_S)
        await good.close()
        await server.stop(grace_s=0.0)

    run(test())


def test_a_server_without_an_authority_asks_callers_for_no_certificate(authority: Authority) -> None:
    async def test() -> None:
        files = authority.issue("server", "127.0.0.1")
        server = EngineServer(ScriptedHost(Script("idle")), "127.0.0.1:0", tls=both(files, authority=""))
        client = GrpcEngineClient(await server.start(), tls=caller_only(files))
        await client.connect(timeout_s=PATIENCE_S)
        await client.close()
        await server.stop(grace_s=0.0)

    run(test())


def test_one_name_may_stand_for_all_hosts(authority: Authority) -> None:
    async def test() -> None:
        files = authority.issue("cluster", "slipstream.internal")
        server = EngineServer(ScriptedHost(Script("idle")), "127.0.0.1:0", tls=both(files))
        address = await server.start()
        nameless = GrpcEngineClient(address, tls=both(files))
        with pytest.raises(EngineUnavailable):
            await nameless.connect(timeout_s=SHORT_S)
        await nameless.close()
        client = GrpcEngineClient(address, tls=both(files, name="slipstream.internal"))
        await client.connect(timeout_s=PATIENCE_S)
        await client.close()
        await server.stop(grace_s=0.0)

    run(test())


def test_a_socket_stays_as_open_as_its_file(cluster: Tls, tmp_path: Path) -> None:
    async def test() -> None:
        server = EngineServer(ScriptedHost(Script("idle")), str(tmp_path / "d.sock"), tls=cluster)
        address = await server.start()
        for tls in (None, cluster):
            client = GrpcEngineClient(address, tls=tls)
            await client.connect(timeout_s=PATIENCE_S)
            await client.close()
        await server.stop(grace_s=0.0)

    run(test())


def test_views_are_watched_over_mutual_tls_and_by_nobody_else(cluster: Tls) -> None:
    async def test() -> None:
        board = ViewBoard()
        board.publish(view(1))
        server = ViewServer(board, "127.0.0.1:0", tls=cluster)
        address = await server.start()
        for tls in (None, cluster):
            source = ViewWatch([address], clock=monotonic_clock, jitter=no_jitter, tls=tls, first_pause_s=0.01)
            async with aclosing(source.views()) as views:
                first = asyncio.ensure_future(anext(views))
                if tls is None:
                    await until(lambda watched=source: "UNAVAILABLE" in watched.problem)  # type: ignore[misc]
                    assert not first.done() and not server.watchers
                    await give_up(first)
                else:
                    assert (await first).epoch == 1
        await server.stop()

    run(test())


def test_drivers_talk_about_kv_over_mutual_tls_and_with_nobody_else(cluster: Tls) -> None:
    async def test() -> None:
        host = NotingHost()
        server = EngineServer(ScriptedHost(None), "127.0.0.1:0", kv=host, tls=cluster)
        address = await server.start()
        loop = asyncio.get_running_loop()
        plain, good = NotingEar(), NotingEar()
        callers = [
            GrpcKvTalker(loop, tls=tls).call(replica="d-1", address=address, ours=ear.ours, ear=ear)
            for ear, tls in ((plain, None), (good, cluster))
        ]
        await until(lambda: bool(plain.losses and good.lives and host.lines))
        assert isinstance(plain.losses[0], EngineUnavailable) and not plain.lives and len(host.lines) == 1
        for caller in callers:
            caller.close()
        await server.stop(grace_s=0.0)

    run(test())


def test_the_public_service_is_behind_certificates_too(cluster: Tls) -> None:
    async def test() -> None:
        server = InferenceServer(NoGateway(), "127.0.0.1:0", max_requests=4, tls=cluster)
        address = await server.start()
        async with open_channel(address, (), cluster) as channel:
            list_models: Any = channel.unary_unary("/slipstream.v1.Inference/ListModels")
            assert await list_models(b"") == b""
        async with open_channel(address, (), None) as channel:
            list_models = channel.unary_unary("/slipstream.v1.Inference/ListModels")
            with pytest.raises(grpc.aio.AioRpcError):
                await list_models(b"")
        await server.stop(grace_s=0.0)

    run(test())


class NoGateway:
    """A gateway that serves nothing, to everybody."""

    def check(self, caller: Caller) -> None:
        pass

    def models(self) -> tuple[ModelFacts, ...]:
        return ()

    def generate(self, ask: Ask, caller: Caller, line: TextLine | None) -> AsyncGenerator[AnswerNews]:
        raise NotImplementedError


def test_health_is_behind_the_certificates_too(cluster: Tls) -> None:
    async def test() -> None:
        server = EngineServer(ScriptedHost(None), "127.0.0.1:0", tls=cluster)
        address = await server.start()
        async with grpc.aio.insecure_channel(address) as channel:
            check: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
            with pytest.raises(grpc.aio.AioRpcError):
                await check(b"")
        await server.stop(grace_s=0.0)

    run(test())


# ------------------------------------------------------------------ files


def test_nothing_named_is_nothing_encrypted() -> None:
    assert tls_from({}) is None
    assert tls_from({NAME_VARIABLE: "slipstream"}) is None


def test_the_environment_names_the_files(authority: Authority) -> None:
    files = authority.issue("node", "127.0.0.1")
    named = {CERT_VARIABLE: files.certificate, KEY_VARIABLE: files.key, CA_VARIABLE: files.authority}
    assert tls_from({**named, NAME_VARIABLE: "slipstream"}) == both(files, name="slipstream")
    assert "PRIVATE" not in repr(tls_from(named)), "a key is shown to nobody"


def test_a_server_needs_more_than_an_authority(authority: Authority) -> None:
    only_authority = tls_from({CA_VARIABLE: authority.path})
    assert only_authority is not None
    with pytest.raises(ConfigError, match=CERT_VARIABLE):
        only_authority.server_credentials()


@pytest.mark.parametrize(
    ("wrong", "variable", "text"),
    [
        ({"key": ""}, KEY_VARIABLE, "node.pem needs its key"),
        ({"certificate": ""}, CERT_VARIABLE, "node.key needs its certificate"),
        ({"certificate": "nowhere.pem"}, CERT_VARIABLE, "nowhere.pem cannot be read"),
        ({"key": "nowhere.key"}, KEY_VARIABLE, "nowhere.key cannot be read"),
        ({"authority": "nowhere.pem"}, CA_VARIABLE, "nowhere.pem cannot be read"),
        ({"certificate": "garbage"}, CERT_VARIABLE, "garbage holds no certificate"),
        ({"key": "garbage"}, KEY_VARIABLE, "garbage holds no key"),
        ({"key": "other.key"}, KEY_VARIABLE, "not that of"),
        ({"certificate": "locked.pem", "key": "locked.key"}, KEY_VARIABLE, "password"),
        ({"authority": "garbage"}, CA_VARIABLE, "garbage holds no certificate"),
        ({"authority": "large"}, CA_VARIABLE, "large is larger than"),
    ],
)
def test_wrong_files_are_named(
    authority: Authority, tmp_path: Path, wrong: dict[str, str], variable: str, text: str
) -> None:
    files = authority.issue("node", "127.0.0.1")
    authority.issue("other", "127.0.0.1")
    authority.issue("locked", "127.0.0.1", password=b"open sesame")
    (tmp_path / "garbage").write_text("-----BEGIN NOTHING-----\n")
    (tmp_path / "large").write_bytes(bytes(MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigError) as caught:
        both(files, **{name: str(tmp_path / path) if path else "" for name, path in wrong.items()})
    assert caught.value.field == variable and text in str(caught.value), caught.value
