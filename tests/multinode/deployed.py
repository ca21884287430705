"""A deployment on hosts of this machine, as its operator and its clients have it: by commands and over HTTP."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from slipstream.comm.handshake import SECRET_VARIABLE
from slipstream.runtime.clock import monotonic_clock
from slipstream.runtime.controller.records import from_json
from slipstream.runtime.operations.status import DeploymentStatus
from slipstream.tests.multinode.namespaces import Host
from slipstream.tests.multinode.raylets import ENVIRONMENT

RANKS = b"slipstream.runtime.worker.main"
GATEWAYS = b"slipstream.runtime.gateway.cluster_main"
CONTROLLER = b"ray::ControllerActor"
PATIENCE_S = 120.0
_COMMAND_TIMEOUT_S = 240.0
_LOOK_PERIOD_S = 0.1
_BUSY_STATUSES = frozenset({429, 500, 502, 503})
"""What a client may be told when a replica is lost under its request; all of them say that it may try again."""


def secret_of(pid: int) -> str:
    """Return the deployment's secret, as one of its processes has it."""
    environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
    (secret,) = [each.partition("=")[2] for each in environment if each.startswith(f"{SECRET_VARIABLE}=")]
    return secret


def processes(host: Host, *words: bytes) -> list[int]:
    """Return the processes on a host in whose command lines all of these stand."""
    listed = subprocess.run(["ip", "netns", "pids", host.namespace], capture_output=True, text=True, check=True)
    found = []
    for pid in map(int, listed.stdout.split()):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if all(word in command for word in words):
            found.append(pid)
    return found


def local_sockets(pid: int) -> list[str]:
    """Return a process's TCP sockets to or from 127.*, as /proc writes their two addresses."""
    own = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with_inode = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(entry) if entry.is_symlink() else "")
        if with_inode is not None:
            own.add(with_inode[1])
    found = []
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        # Addresses are hexadecimal, the last byte first.
        if fields[9] in own and any(address.partition(":")[0].endswith("7F") for address in fields[1:3]):
            found.append(f"{fields[1]} {fields[2]}")
    return found


@dataclass(frozen=True, slots=True)
class Commands:
    """The command line, as it is given on one host."""

    host: Host
    ray: str
    folder: Path

    def run(self, *arguments: str, code: int = 0) -> str:
        """Run ``slipstream ARGUMENTS``; what it prints."""
        began_s = monotonic_clock()
        done = subprocess.run(
            self.host.command(
                *(sys.executable, "-P", "-m", "slipstream.runtime.cli", *arguments, "--address", self.ray)
            ),
            env={**ENVIRONMENT, "XDG_STATE_HOME": str(self.folder)},
            cwd=tempfile.gettempdir(),
            capture_output=True,
            text=True,
            timeout=_COMMAND_TIMEOUT_S,
            check=False,
        )
        print(f"slipstream {arguments[0]}: {monotonic_clock() - began_s:.1f} s, exit code {done.returncode}")
        assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def status(self) -> DeploymentStatus:
        """Return ``slipstream status --json``."""
        return from_json(DeploymentStatus, self.run("status", "--json"))

    def until(self, what: str, check: Callable[[DeploymentStatus], bool]) -> DeploymentStatus:
        """Look until it is so."""
        began_s, never = monotonic_clock(), threading.Event()
        while True:
            seen = self.status()
            if check(seen):
                print(f"{what}: {monotonic_clock() - began_s:.1f} s, with the time that looking takes")
                return seen
            assert monotonic_clock() - began_s < PATIENCE_S, f"{what}: it has not become so: {seen}"
            never.wait(_LOOK_PERIOD_S)


class Views:
    """What the controller tells gateways, as it is told, and when."""

    def __init__(self, host: Host, address: str, secret: str) -> None:
        command = host.command(sys.executable, "-P", "-m", "slipstream.tests.multinode.watch_views", address)
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, env={**ENVIRONMENT, SECRET_VARIABLE: secret}, cwd=tempfile.gettempdir()
        )
        self.now: dict[str, str] = {}
        self._at_s = 0.0

    def until(self, what: str, check: Callable[[dict[str, str]], bool], *, began_s: float) -> float:
        """Wait until those who serve are as they should be; the seconds since something began."""
        deadline_s = monotonic_clock() + PATIENCE_S
        while not check(self.now):
            assert self._process.stdout is not None
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline_s - monotonic_clock()))
            line = self._process.stdout.readline() if ready else b""
            assert line, f"{what}: it has not become so; those who serve are {self.now}"
            told: dict[str, Any] = json.loads(line)
            self.now, self._at_s = told["replicas"], told["at_s"]
        took_s = max(0.0, self._at_s - began_s)
        print(f"{what}: {took_s:.1f} s")
        return took_s

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@dataclass(slots=True)
class Tally:
    """What clients were told."""

    answered: int = 0
    refused: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


@contextmanager
def clients(host: Host, url: str, questions: Sequence[tuple[dict[str, object], str]], *, count: int) -> Iterator[Tally]:
    """Let clients on a host ask all the while, one question after the other, and hold answers against what is right."""
    tally, ending, writing = Tally(), threading.Event(), threading.Lock()

    def ask_all_the_while() -> None:
        with httpx.Client(timeout=PATIENCE_S, trust_env=False) as client:
            asked = 0
            while not ending.is_set():
                body, right = questions[asked % len(questions)]
                asked += 1
                said, text = asked_once(client, url, body)
                with writing:
                    if said is not None:
                        tally.refused.append(said)
                    elif text == right:
                        tally.answered += 1
                    else:
                        tally.wrong.append(text)
                if said is not None:
                    ending.wait(_LOOK_PERIOD_S)

    with ThreadPoolExecutor(count, thread_name_prefix="client", initializer=host.enter) as pool:
        running: list[Future[None]] = [pool.submit(ask_all_the_while) for _ in range(count)]
        try:
            yield tally
        finally:
            ending.set()
            for each in running:
                each.result(PATIENCE_S)


def asked_once(client: httpx.Client, url: str, body: dict[str, object]) -> tuple[str | None, str]:
    """Ask once: why there was no answer, or None; and the answer's text."""
    try:
        reply = client.post(f"{url}/v1/completions", json=body)
    except httpx.TransportError as error:
        return f"{type(error).__name__}: {error}", ""
    if reply.status_code in _BUSY_STATUSES:
        return f"{reply.status_code}: {reply.text}", ""
    reply.raise_for_status()
    return None, reply.json()["choices"][0]["text"]


def ask(host: Host, url: str, bodies: Sequence[dict[str, object]]) -> list[str]:
    """Ask from a host, one after the other; the answers' texts."""

    def run() -> list[str]:
        with httpx.Client(timeout=PATIENCE_S, trust_env=False) as client:
            texts = []
            for body in bodies:
                said, text = asked_once(client, url, body)
                assert said is None, said
                texts.append(text)
            return texts

    with ThreadPoolExecutor(1, initializer=host.enter) as pool:
        return pool.submit(run).result(PATIENCE_S)
