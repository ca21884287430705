"""NIXL's agents within one process: registered memory that is read as theirs is, in steps."""

from __future__ import annotations

import ctypes
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Read:
    """A transfer: what it copies, and how often it is still on its way when somebody looks."""

    pairs: list[tuple[int, int, int]]
    looks: int
    state: str = "PROC"


@dataclass
class FakeAgents:
    """All agents that can reach one another. ``looks``: of every read; ``stuck``: they never end."""

    looks: int = 1
    stuck: bool = False
    by_metadata: dict[bytes, FakeAgent] = field(default_factory=dict)

    def agent(self, name: str) -> FakeAgent:
        return FakeAgent(self, name)


class FakeAgent:
    """One agent; memory that is not registered, at either end, cannot be moved."""

    def __init__(self, agents: FakeAgents, name: str) -> None:
        self.agents = agents
        self.name = name
        self.regions: list[tuple[int, int]] = []
        self.peers: list[str] = []
        self.open: list[Read] = []
        self._metadata = secrets.token_bytes(40)
        agents.by_metadata[self._metadata] = self

    def register_memory(self, reg_list: Sequence[tuple[int, int, int, str]], mem_type: str) -> list[tuple[int, int]]:
        assert mem_type == "DRAM"
        self.regions = [(address, count) for address, count, _, _ in reg_list]
        return self.regions

    def deregister_memory(self, dereg_list: list[tuple[int, int]]) -> None:
        assert dereg_list is self.regions
        self.regions = []
        for read in self.open:
            read.state = "ERR"

    def get_agent_metadata(self) -> bytes:
        return self._metadata

    def add_remote_agent(self, metadata: bytes) -> bytes:
        if metadata not in self.agents.by_metadata:
            raise RuntimeError("nixlInvalidParamError")
        self.peers.append(self.agents.by_metadata[metadata].name)
        return self.peers[-1].encode()

    def remove_remote_agent(self, agent: str) -> None:
        self.peers.remove(agent)

    def get_xfer_descs(self, descs: Any, mem_type: str) -> list[tuple[int, int]]:
        assert mem_type == "DRAM" and (descs[:, 2] == 0).all()
        return [(int(address), int(count)) for address, count, _ in descs]

    def initialize_xfer(
        self, operation: str, local_descs: list[tuple[int, int]], remote_descs: list[tuple[int, int]], remote_agent: str
    ) -> Read:
        assert operation == "READ" and remote_agent in self.peers
        remote = next(each for each in self.agents.by_metadata.values() if each.name == remote_agent)
        for owner, descs in ((self, local_descs), (remote, remote_descs)):
            for address, count in descs:
                if not any(first <= address and address + count <= first + size for first, size in owner.regions):
                    raise RuntimeError("nixlNotFoundError")
        read = Read(
            [(to, at, size) for (to, size), (at, _) in zip(local_descs, remote_descs, strict=True)], self.agents.looks
        )
        self.open.append(read)
        return read

    def transfer(self, handle: Read) -> str:
        return handle.state

    def check_xfer_state(self, handle: Read) -> str:
        if handle.state == "PROC" and not self.agents.stuck:
            handle.looks -= 1
            if handle.looks <= 0:
                for to, at, size in handle.pairs:
                    ctypes.memmove(to, at, size)
                handle.state = "DONE"
        return handle.state

    def release_xfer_handle(self, handle: Read) -> None:
        if handle.state == "PROC":
            raise RuntimeError("nixlRepostActiveError")
        self.open.remove(handle)
