"""One replica over two hosts: the tokens of one rank, no address but the hosts' own, and what a cut link does."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from slipstream.runtime.clock import monotonic_clock
from slipstream.runtime.worker.exit_status import EXIT_ENGINE_FAILED
from slipstream.tests.models.checkpoints import make_checkpoint
from slipstream.tests.multinode.namespaces import Host, hosts, missing
from slipstream.tests.worker.engine_calls import ask, ask_in_process
from slipstream.tests.worker.placed_ranks import Keeper, Rank, introduce, keepers

NOTICED_S = 20.0
"""Of silence, after which the kernel says that a connection is lost (``comm/sockets.py``), and what ending takes."""

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


@pytest.fixture
def replica(network: tuple[Host, ...], model: Path) -> Iterator[tuple[list[Keeper], str]]:
    """A rank on each host, started and ready, and the driver's socket, which this process reaches too."""
    with tempfile.TemporaryDirectory(prefix="slip") as folder:
        socket = str(Path(folder) / "engine.sock")
        where = [Rank(host.address, host) for host in network]
        options = ("--tensor-parallel-size=2", "--socket", socket, "--comm-timeout=3")
        with keepers(model, where, *options) as ranks:
            order = introduce(ranks)
            assert order["bus"].startswith(f"{network[0].address}:")
            assert order["rendezvous_host"] == network[0].address
            ranks[0].hear("ready")
            yield ranks, socket


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


def test_a_replica_over_two_hosts_gives_the_tokens_of_one_rank_and_uses_their_own_addresses_alone(
    network: tuple[Host, ...], model: Path, replica: tuple[list[Keeper], str]
) -> None:
    ranks, socket = replica
    alone = ask_in_process(model, dtype="float32", max_model_len=512, num_threads=1, max_num_seqs=8)
    assert ask(socket) == alone
    for host, other in (network, network[::-1]):
        found = connections(host)
        assert any(state == LISTENS for _, _, state in found)
        assert (host.address, other.address, ESTABLISHED) in found
        assert {own for own, _, _ in found} == {host.address}
        assert {peer for _, peer, _ in found} <= {host.address, other.address, "0.0.0.0"}


def test_a_cut_link_ends_the_driver_by_name_though_nothing_runs(
    network: tuple[Host, ...], replica: tuple[list[Keeper], str]
) -> None:
    ranks, _ = replica
    began_s = monotonic_clock()
    network[1].cut()
    try:
        assert ranks[0].exit_status() == EXIT_ENGINE_FAILED
        took_s = monotonic_clock() - began_s
        assert "rank 1 is gone" in ranks[0].output
        assert took_s < NOTICED_S, f"it took {took_s:.1f} s"
        # Who is cut off finds that out too, and holds its node's device no longer.
        assert ranks[1].exit_status() == EXIT_ENGINE_FAILED
    finally:
        network[1].heal()
    print(f"a cut link is noticed: {took_s:.1f} s")
