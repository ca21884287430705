"""One replica over two hosts: the tokens of one rank, no address but the hosts' own, and what a cut link does."""

from __future__ import annotations

import asyncio
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from slipstream.runtime.clock import monotonic_clock
from slipstream.runtime.rpc.client import GrpcEngineClient
from slipstream.runtime.worker.exit_status import EXIT_ENGINE_FAILED
from slipstream.sdk.errors import EngineUnavailable
from slipstream.tests.contracts.engine_client import finish
from slipstream.tests.engine.builders import request
from slipstream.tests.models.checkpoints import make_checkpoint
from slipstream.tests.multinode.namespaces import Host, hosts, missing
from slipstream.tests.worker.engine_calls import PATIENCE_S, ask, ask_in_process
from slipstream.tests.worker.placed_ranks import Keeper, Rank, introduce, keepers

COMM_TIMEOUT_S = 3

NOTICED_S = 60.0
"""The kernel gives a connection up after 30 s of silence (``comm/sockets.py``); asking and ending take some more."""

LISTENS, ESTABLISHED = "0A", "01"


@pytest.fixture(scope="module")
def network() -> Iterator[tuple[Host, ...]]:
    if (reason := missing()) is not None:
        pytest.skip(reason)
    with hosts(2) as made:
        yield made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("parallel_dense", tmp_path_factory.mktemp("model") / "dense")


@contextmanager
def replica(network: tuple[Host, ...], model: Path, *where: str) -> Iterator[tuple[list[Keeper], str]]:
    """Start a rank on each host; yield them when they are ready, and the driver's address."""
    places = [Rank(host.address, host) for host in network]
    with keepers(model, places, "--tensor-parallel-size=2", f"--comm-timeout={COMM_TIMEOUT_S}", *where) as ranks:
        order = introduce(ranks)
        assert order["bus"].startswith(f"{network[0].address}:")
        assert order["rendezvous_host"] == network[0].address
        yield ranks, ranks[0].hear("ready")["address"]


def connections(host: Host) -> list[tuple[str, str, str]]:
    """Return the TCP sockets of a host: own address, the other's, state."""
    listed = subprocess.run(host.command("cat", "/proc/net/tcp", "/proc/net/tcp6"), capture_output=True, check=True)
    rows = [line.split() for line in listed.stdout.decode().splitlines()]
    return [
        (_address(row[1]), _address(row[2]), row[3])
        for row in rows
        if re.fullmatch(r"[0-9A-F]+:[0-9A-F]{4}", row[1]) is not None
    ]


def _address(written: str) -> str:
    """Return an address as people write it; the last four bytes are all there is to one of version 4 in version 6."""
    last = bytes.fromhex(written.partition(":")[0][-8:])
    return ".".join(str(byte) for byte in reversed(last))


def uses_own_addresses_alone(network: tuple[Host, ...]) -> None:
    for host, other in (network, network[::-1]):
        found = connections(host)
        assert any(state == LISTENS for _, _, state in found)
        assert (host.address, other.address, ESTABLISHED) in found
        assert {own for own, _, _ in found} == {host.address}
        assert {peer for _, peer, _ in found} <= {host.address, other.address, "0.0.0.0"}


def is_noticed(network: tuple[Host, ...], ranks: list[Keeper], said: str) -> float:
    """Wait until both ends of a link that was cut have ended; return how long the driver's took."""
    began_s = monotonic_clock()
    try:
        assert ranks[0].exit_status() == EXIT_ENGINE_FAILED
        took_s = monotonic_clock() - began_s
        assert said in ranks[0].output
        # Who is cut off finds that out too, and holds its node's device no longer.
        assert ranks[1].exit_status() == EXIT_ENGINE_FAILED
    finally:
        network[1].heal()
    print(f"a cut link is noticed: {took_s:.1f} s")
    return took_s


def test_a_replica_over_two_hosts_gives_the_tokens_of_one_rank_and_ends_by_name_when_its_link_is_cut(
    network: tuple[Host, ...], model: Path
) -> None:
    async def cut_off(socket: str) -> None:
        client = GrpcEngineClient(socket)
        await client.connect(timeout_s=PATIENCE_S)
        stream = client.generate(request("long", [1, 2, 3], max_tokens=400), timeout_s=PATIENCE_S)
        first = await anext(stream)
        network[1].cut()
        with pytest.raises(EngineUnavailable, match="rank 1"):
            await finish(stream, first)
        await client.close()

    alone = ask_in_process(model, dtype="float32", max_model_len=512, num_threads=1, max_num_seqs=8)
    # A socket's file is on both sides of a network.
    with (
        tempfile.TemporaryDirectory(prefix="slip") as folder,
        replica(network, model, "--socket", str(Path(folder) / "engine.sock")) as (ranks, socket),
    ):
        assert ask(socket) == alone
        uses_own_addresses_alone(network)
        asyncio.run(asyncio.wait_for(cut_off(socket), PATIENCE_S))
        is_noticed(network, ranks, "rank 1")


@pytest.mark.slow
def test_a_cut_link_ends_a_driver_by_name_though_nothing_runs(network: tuple[Host, ...], model: Path) -> None:
    with replica(network, model, "--listen", f"{network[0].address}:0") as (ranks, address):
        assert address.startswith(f"{network[0].address}:")
        uses_own_addresses_alone(network)
        network[1].cut()
        assert is_noticed(network, ranks, "rank 1 is gone") < NOTICED_S
