"""A process that is a rank: it opens groups and runs scenarios as it is told, over a socket that it was given.

Commands and answers are lines of JSON. A scenario is named ``module:function``; what it raises is answered, and the
process lives on.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import traceback
from typing import IO, Any

import torch

from slipstream.comm.collectives import Collectives
from slipstream.comm.mesh import MeshShape
from slipstream.comm.torch_groups import GroupSettings, RankGroups, Rendezvous, open_group, open_groups
from slipstream.runtime.clock import monotonic_clock
from slipstream.tests.multinode.namespaces import Host


class Line:
    """A socket that carries lines of JSON, one object each."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self._lines: IO[bytes] = end.makefile("rb")

    def put(self, message: dict[str, Any]) -> None:
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def get(self) -> dict[str, Any] | None:
        """Return the next message; None when the other end is gone."""
        line = self._lines.readline()
        if not line:
            return None
        message: dict[str, Any] = json.loads(line)
        return message


class Rank:
    """What a rank's process holds between commands."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.rendezvous: Rendezvous | None = None
        self.groups: dict[str, Collectives] = {}
        self.mesh: RankGroups | None = None

    def host(self, *, address: str) -> int:
        self.rendezvous = Rendezvous.host(address, timeout_s=20.0)
        return self.rendezvous.port

    def join(self, *, address: str, port: int, timeout_s: float = 20.0) -> None:
        self.rendezvous = Rendezvous.join(address, port, timeout_s=timeout_s)

    def open(
        self, *, name: str, generation: int, rank: int, size: int, address: str, timeout_s: float, open_timeout_s: float
    ) -> None:
        assert self.rendezvous is not None
        self.groups[name] = open_group(
            self.rendezvous,
            _settings(address, timeout_s, open_timeout_s),
            name=name,
            prefix=f"{generation}/{name}",
            rank=rank,
            size=size,
        )

    def open_mesh(self, *, pp: int, ep: int, tp: int, rank: int, generation: int, address: str) -> None:
        assert self.rendezvous is not None
        place = MeshShape(pp=pp, ep=ep, tp=tp).place(rank)
        self.mesh = open_groups(place, self.rendezvous, _settings(address, 20.0, 20.0), generation=generation)

    def run(self, *, name: str, scenario: str, seed: int) -> object:
        return find(scenario)(self.groups[name], seed)

    def act(self, *, act: str, **arguments: Any) -> object:
        """Run a function that takes this rank: what no scenario of one group is."""
        return find(act)(self, **arguments)

    def tell(self, event: str) -> None:
        """Tell the test where this rank is."""
        self.line.put({"event": event})

    def close(self) -> None:
        for group in self.groups.values():
            group.close()
        self.groups.clear()
        if self.mesh is not None:
            self.mesh.close()
            self.mesh = None

    def leave(self) -> None:
        if self.rendezvous is not None:
            self.rendezvous.close()
            self.rendezvous = None


def _settings(address: str, timeout_s: float, open_timeout_s: float) -> GroupSettings:
    return GroupSettings(
        clock=monotonic_clock, host_address=address, timeout_s=timeout_s, open_timeout_s=open_timeout_s
    )


def find(name: str) -> Any:
    """Return a function by its module and name."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _answer(rank: Rank, command: dict[str, Any]) -> dict[str, Any]:
    began_s = monotonic_clock()
    try:
        result = getattr(rank, command.pop("do"))(**command)
        return {"result": result, "took_s": monotonic_clock() - began_s}
    except Exception as error:
        return {
            "error": type(error).__name__,
            "message": str(error),
            "traceback": traceback.format_exc(),
            "took_s": monotonic_clock() - began_s,
        }


def serve(end: socket.socket, host: Host | None) -> None:
    """Be a rank, on a host of its own if one is given, until the other end of the socket is closed."""
    if host is not None:
        host.enter()
    # Gloo writes a line about every connection to the standard output.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    line = Line(end)
    rank = Rank(line)
    line.put({"event": "ready"})
    while (command := line.get()) is not None:
        line.put(_answer(rank, command))
