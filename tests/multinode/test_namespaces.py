"""Hosts on this machine are gone when they are left, also by a process that was killed."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from slipstream.tests.multinode.namespaces import Host, hosts, missing

NAMESPACES = Path("/run/netns")

MAKE_AND_HANG = """
import sys
from slipstream.tests.multinode.namespaces import hosts
with hosts(2) as made:
    print(" ".join(host.namespace for host in made), flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _can_make_hosts() -> None:
    if (reason := missing()) is not None:
        pytest.skip(reason)


def test_hosts_reach_one_another_and_leave_nothing() -> None:
    with hosts(2) as (one, other):
        listen = (
            "import socket; s = socket.create_server(('', 7)); print('up', flush=True); s.accept()[0].sendall(b'hi')"
        )
        server = subprocess.Popen(other.command(sys.executable, "-P", "-c", listen), stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None and server.stdout.readline() == "up\n"
        ask = f"import socket; print(socket.create_connection(('{other.address}', 7), 10).makefile().read())"
        told = subprocess.run(
            one.command(sys.executable, "-P", "-c", ask), capture_output=True, text=True, check=True, timeout=30
        )
        assert told.stdout == "hi\n"
        server.wait(30)
        server.stdout.close()
        names = {one.namespace, other.namespace, one.switch}
        assert names <= {path.name for path in NAMESPACES.iterdir()}
        # Ended with its host, though nobody else ends it.
        left = subprocess.Popen(one.command("sh", "-c", "echo up; exec sleep 1000"), stdout=subprocess.PIPE, text=True)
        assert left.stdout is not None and left.stdout.readline() == "up\n"
    assert left.wait(30) != 0
    left.stdout.close()
    assert not names & {path.name for path in NAMESPACES.iterdir()}


def test_two_hosts_are_cut_from_one_another_and_not_from_others() -> None:
    # Nobody listens there: who is reached says so.
    reach = "import socket, sys; s = socket.socket(); s.settimeout(0.5); print(s.connect_ex((sys.argv[1], 7)))"

    def reaches(one: Host, other: Host) -> bool:
        asked = subprocess.run(one.command(sys.executable, "-P", "-c", reach, other.address), capture_output=True)
        return asked.stdout == f"{errno.ECONNREFUSED}\n".encode()

    with hosts(3) as (one, other, third):
        assert reaches(one, other)
        one.cut_from(other)
        assert not reaches(one, other) and not reaches(other, one)
        assert reaches(one, third) and reaches(third, other)
        one.heal_from(other)
        assert reaches(one, other) and reaches(other, one)


def test_hosts_of_a_killed_process_are_removed_by_the_next() -> None:
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", MAKE_AND_HANG], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        names = set(process.stdout.readline().split())
        process.kill()
    assert len(names) == 2 and names <= {path.name for path in NAMESPACES.iterdir()}
    with hosts(1):
        assert not names & {path.name for path in NAMESPACES.iterdir()}
