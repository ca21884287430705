"""Hosts on this machine: network namespaces with an address each, joined by a switch, with links to shape and to cut.

    with hosts(3) as (a, b, c):
        a.shape(mbit_per_s=300)
        process = subprocess.Popen(b.command("python", "-P", "rank.py", "--address", b.address))
        c.cut()

The switch has a namespace of its own, so that nothing is changed outside; what is left of a run that was killed is
removed by the next. Needs root and Linux: ``missing()`` says what is not there.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "eth0"
"""What every host calls its end of the link."""

_NETWORK = 0x40000000
"""CLONE_NEWNET: what kind of namespace is entered."""

_NOBODY = "02:00:00:00:00:01"
"""A link address that no host has."""

_PREFIX = "slipstream"
_numbers = itertools.count()


def missing() -> str | None:
    """Return why no hosts can be made here, or None when they can."""
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "needs the commands ip and tc (iproute2)"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    try:
        with hosts(1) as (host,):
            host.shape(mbit_per_s=100)
    except subprocess.CalledProcessError as error:
        return f"cannot make network namespaces: {error.stderr.strip()}"
    return None


@dataclass(frozen=True, slots=True)
class Host:
    """A network namespace with one link, to the switch."""

    namespace: str
    address: str
    switch: str
    port: str

    def command(self, *arguments: str) -> list[str]:
        """Return the command line that runs a command on this host; the process is the command's own."""
        return ["ip", "netns", "exec", self.namespace, *arguments]

    def enter(self) -> None:
        """Move this process to the host; threads that it has already stay where they are."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/run/netns/{self.namespace}", "rb") as namespace:
            # os.setns is there from Python 3.12 on.
            if libc.setns(namespace.fileno(), _NETWORK):
                raise OSError(ctypes.get_errno(), f"cannot enter the namespace {self.namespace}")

    def shape(self, *, mbit_per_s: float | None) -> None:
        """Limit what the link carries, in each direction; None lifts the limit."""
        for namespace, device in ((self.namespace, INTERFACE), (self.switch, self.port)):
            if mbit_per_s is None:
                # There is none to delete where none was set: that is as wanted.
                subprocess.run(["tc", "-n", namespace, "qdisc", "del", "dev", device, "root"], capture_output=True)
                continue
            # The bucket holds a millisecond's worth, and two of the largest segments that the kernel hands over.
            burst_bytes = max(int(mbit_per_s * 1e6 / 8 * 1e-3), 2 * 65536)
            _run(
                *("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", "tbf"),
                *("rate", f"{mbit_per_s * 1000:.0f}kbit", "burst", f"{burst_bytes}", "latency", "50ms"),
            )

    def delay(self, *, milliseconds: float) -> None:
        """Keep back what leaves the host, in place of its limit. Raises: CalledProcessError where netem is missing"""
        rule = ("qdisc", "replace", "dev", INTERFACE, "root", "netem", "delay", f"{milliseconds}ms")
        _run("tc", "-n", self.namespace, *rule)

    def cut(self) -> None:
        """Lose everything on the link, without a word to anyone; connections hang until their own deadlines."""
        _run("ip", "-n", self.switch, "link", "set", self.port, "down")

    def heal(self) -> None:
        """Undo ``cut``."""
        _run("ip", "-n", self.switch, "link", "set", self.port, "up")

    def cut_from(self, other: Host) -> None:
        """Lose everything between this host and another, without a word to either; others are reached as before."""
        for one, two in ((self, other), (other, self)):
            # Sent on to nobody: the switch knows of no such port.
            _run(
                *("ip", "-n", one.namespace, "neighbor", "replace", two.address),
                *("lladdr", _NOBODY, "dev", INTERFACE, "nud", "permanent"),
            )

    def heal_from(self, other: Host) -> None:
        """Undo ``cut_from``."""
        for one, two in ((self, other), (other, self)):
            _run("ip", "-n", one.namespace, "neighbor", "del", two.address, "dev", INTERFACE)


@contextmanager
def hosts(count: int, *, mbit_per_s: float | None = None) -> Iterator[tuple[Host, ...]]:
    """Make hosts that reach one another; on leaving, end what still runs on them and remove them."""
    _remove_leftovers()
    stem = f"{_PREFIX}-{os.getpid()}-{next(_numbers)}"
    switch = f"{stem}-switch"
    made = tuple(Host(f"{stem}-host{place}", f"10.77.0.{place + 1}", switch, f"port{place}") for place in range(count))
    try:
        _add_namespace(switch)
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        for host in made:
            _add_namespace(host.namespace)
            _run(
                *("ip", "-n", switch, "link", "add", host.port, "type", "veth"),
                *("peer", "name", INTERFACE, "netns", host.namespace),
            )
            _run("ip", "-n", switch, "link", "set", host.port, "master", "bridge", "up")
            _run("ip", "-n", host.namespace, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            _run("ip", "-n", host.namespace, "link", "set", INTERFACE, "up")
            if mbit_per_s is not None:
                host.shape(mbit_per_s=mbit_per_s)
        yield made
    finally:
        for namespace in (*(host.namespace for host in made), switch):
            _remove(namespace)


def _add_namespace(name: str) -> None:
    _run("ip", "netns", "add", name)
    _run("ip", "-n", name, "link", "set", "lo", "up")


def _remove(namespace: str) -> None:
    """End the processes of a namespace and remove it, if it is there."""
    listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True)
    for pid in map(int, listed.stdout.split()):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    subprocess.run(["ip", "netns", "del", namespace], capture_output=True)


def _remove_leftovers() -> None:
    """Remove what processes made that are no more."""
    for line in _run("ip", "netns", "list").splitlines():
        name = line.split()[0]
        parts = name.split("-")
        if parts[0] == _PREFIX and len(parts) == 4 and not Path("/proc", parts[1]).exists():
            _remove(name)


def _run(*arguments: str) -> str:
    return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
