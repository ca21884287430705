"""The controller over three hosts with addresses of their own, and a link between them that is cut and heals."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slipstream.tests.multinode.namespaces import Host, hosts, missing
from slipstream.tests.multinode.raylets import ENVIRONMENT, start_raylet

pytest.importorskip("ray")

PATIENCE_S = 100.0


class Talk:
    """The process on the first host that the test speaks to."""

    def __init__(self, host: Host) -> None:
        command = host.command(sys.executable, "-P", "-m", "slipstream.tests.multinode.ray_controller", host.address)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT, cwd=tempfile.gettempdir()
        )
        self.hear()

    def hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while True:
            ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE_S)
            line = self._process.stdout.readline() if ready else b""
            assert line, "the process on the first host says nothing more"
            if line.startswith(b"{"):
                return json.loads(line)

    def ask(self, **order: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        return self.hear()

    def until(self, what: str, *places: tuple[str, str], short: int = 0) -> dict[str, Any]:
        answer = self.ask(until=[[pool, devices.split()] for pool, devices in places], short=short)
        print(f"{what}: {answer['seconds']} s")
        return answer["status"]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def ranks_on(host: Host) -> list[int]:
    """Return the processes of ranks on a host."""
    listed = subprocess.run(["ip", "netns", "pids", host.namespace], capture_output=True, text=True, check=True)
    found = []
    for pid in map(int, listed.stdout.split()):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except FileNotFoundError:
            continue
        if b"rank_program" in command:
            found.append(pid)
    return found


@pytest.fixture(scope="module")
def network() -> Iterator[tuple[Host, ...]]:
    if (reason := missing()) is not None:
        pytest.skip(reason)
    with hosts(3) as made:
        yield made


def test_a_cut_link_is_a_lost_node_and_what_it_held_is_placed_elsewhere(network: tuple[Host, ...]) -> None:
    a, b, c = network
    raylets = [start_raylet(a, "a", None)]
    talk = None
    try:
        talk = Talk(a)
        talk.ask(want=[["p", 3, 1], ["q", 1, 2]])
        # One after the other: of two that start at once on one machine, one at times does not come up.
        for host, name in ((b, "b"), (c, "c")):
            raylets.append(start_raylet(host, name, a.address))
            assert len(talk.ask(nodes=len(raylets))["status"]["nodes"]) == len(raylets)
        up = talk.until("up over three hosts", ("p", "a/0 a/1 b/0"), ("q", "b/1"), ("q", "c/0"))
        addresses = [replica["address"].partition(":")[0] for replica in up["replicas"]]
        assert sorted(addresses) == [a.address, b.address, c.address]
        assert [len(ranks_on(host)) for host in network] == [2, 2, 1]

        b.cut()
        seen = talk.ask(routed=[["q", ["c/0"]]])
        print(f"a cut link is seen: {seen['seconds']} s")
        short = talk.until("and p is placed anew", ("p", "a/0 a/1 c/1"), ("q", "c/0"), short=1)
        assert short["shortages"][0]["pool"] == "q"
        assert [len(ranks_on(host)) for host in (a, c)] == [2, 2]

        # What runs behind the cut has no place in any view; when it meets the others again it ends.
        b.heal()
        raylets[1].wait(PATIENCE_S)
        raylets.append(start_raylet(b, "b", a.address))
        talk.until("the host is back, and used", ("p", "a/0 a/1 c/1"), ("q", "c/0"), ("q", "b/0"))
        assert len(ranks_on(b)) == 1
        assert talk.ask(down=True)["status"]["replicas"] == []
        assert not any(ranks_on(host) for host in network)
    finally:
        if talk is not None:
            talk.close()
        for raylet in reversed(raylets):
            raylet.kill()
            raylet.wait()
