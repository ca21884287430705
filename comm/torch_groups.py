"""The groups of a rank, on torch.distributed: NCCL between GPUs, gloo between CPUs.

Ranks meet at a ``Rendezvous``, a store that rank 0, or whoever started the ranks, hosts. Each group is a process group
of its own over a part of that store; torch's global group is not used. So groups can be closed and opened again in
living processes, with other ranks in the place of lost ones: under the next generation's number, which everybody who
takes part has been told. The store is needed only while groups are opened.

Reading order: this, then ``gloo_group`` and ``gloo_wire``, ``nccl_group``.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import distributed

from .collectives import Collectives
from .errors import CommError, CommMisuse, CommTimeout, PeerLost
from .gloo_group import GlooGroup
from .local_groups import local_group
from .mesh import MeshPlace
from .nccl_group import NcclGroup
from .timeouts import timeout
from .wire_threads import started_threads_yield

# torch's stubs know its stores and process groups in part only; they pass through here as they are.
_torch: Any = distributed
Store = Any

_BACKLOG = 1024
"""Ranks that may knock at once."""


class Rendezvous:
    """A store in which ranks find one another."""

    def __init__(self, store: Store) -> None:
        self._store: Store = store
        self.address = store.host
        self.port = store.port

    @classmethod
    def host(cls, address: str, port: int = 0, *, timeout_s: float) -> Rendezvous:
        """Open a store in this process, for ranks to join at an address of this host; port 0 is any free one.

        It is reached at that address and no other.

        Raises: CommMisuse when the address or the port cannot be had
        """
        try:
            listening = _listen(address, port)
        except OSError as error:
            raise CommMisuse(f"rendezvous: cannot listen on {address}:{port}: {error.strerror}") from error
        port = listening.getsockname()[1]
        # The store has no password and, left to itself, listens on every address; the socket is its own from here on.
        return cls(
            _torch.TCPStore(
                address,
                port,
                is_master=True,
                wait_for_workers=False,
                timeout=timeout(timeout_s),
                master_listen_fd=listening.detach(),
            )
        )

    @classmethod
    def join(cls, address: str, port: int, *, timeout_s: float) -> Rendezvous:
        """Connect to a store.

        Raises: CommTimeout when nobody hosts it in time
        """
        try:
            return cls(
                _torch.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout(timeout_s))
            )
        except RuntimeError as error:
            raise CommTimeout(
                f"rendezvous: nobody answered at {address}:{port} within {timeout_s} s: {_first_line(error)}"
            ) from error

    def store(self, prefix: str, *, timeout_s: float) -> Store:
        """Return a part of the store.

        Units: timeout_s, how long a look-up waits for what it looks for
        """
        if self._store is None:
            raise CommMisuse("rendezvous: it was closed; open another")
        part = _torch.PrefixStore(prefix, self._store)
        part.set_timeout(timeout(timeout_s))
        return part

    def close(self) -> None:
        """Leave, and where it is hosted, end it: groups that are open stay. Idempotent."""
        self._store = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RankGroups:
    """The groups that a rank is in; one of a single rank talks to nobody."""

    world: Collectives
    stage: Collectives
    pp: Collectives
    sp: Collectives
    ep: Collectives
    tp: Collectives

    def close(self) -> None:
        """Close all of them; the other ranks' fail."""
        for group in (self.world, self.stage, self.pp, self.sp, self.ep, self.tp):
            group.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSettings:
    """How groups are opened; the same on all ranks, but for the addresses.

    Units: timeout_s, what an operation may take unless its wait says otherwise; open_timeout_s, how long a rank waits
    for the others to open theirs; clock, in seconds, monotonic
    """

    clock: Callable[[], float]
    host_address: str
    """An address of this host that the other ranks reach."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    timeout_s: float = 30.0
    open_timeout_s: float = 60.0
    wire_yields: bool = True
    """Whether gloo's threads leave the CPU to those that run (``wire_threads``): best where ranks share few cores; off,
    long transfers go on at full speed beside threads that compute without a pause."""


def open_groups(
    place: MeshPlace, rendezvous: Rendezvous, settings: GroupSettings, *, generation: int = 0
) -> RankGroups:
    """Open the groups of a rank; returns when all ranks of the mesh have.

    A generation's number serves once: groups that are opened again, whether they were open or not, need the next.

    Raises: CommTimeout when some rank did not come; PeerLost when one was lost meanwhile
    """
    axes = {
        "world": tuple(range(place.shape.size)),
        "stage": place.stage_ranks,
        "pp": place.pp_ranks,
        "sp": place.sp_ranks,
        "ep": place.ep_ranks,
        "tp": place.tp_ranks,
    }
    opened: dict[str, Collectives] = {}
    try:
        # In the same order everywhere: ranks that share one group wait for each other there and nowhere else.
        for axis, ranks in axes.items():
            name = f"{axis}[{','.join(map(str, ranks))}]"
            prefix = f"slipstream/{generation}/{name}"
            opened[axis] = open_group(
                rendezvous, settings, name=name, prefix=prefix, rank=ranks.index(place.rank), size=len(ranks)
            )
        opened["world"].barrier(settings.open_timeout_s)
    except BaseException:
        for group in opened.values():
            group.close()
        raise
    return RankGroups(**opened)


def open_group(
    rendezvous: Rendezvous, settings: GroupSettings, *, name: str, prefix: str, rank: int, size: int
) -> Collectives:
    """Open one group; returns when all of its ranks have.

    Raises: as ``open_groups``
    """
    if size == 1:
        return local_group(1, name=name, timeout_s=settings.timeout_s)[0]
    store = rendezvous.store(prefix, timeout_s=settings.open_timeout_s)
    try:
        if settings.device.type == "cuda":
            return NcclGroup.open(
                store,
                settings.device,
                name=name,
                rank=rank,
                size=size,
                timeout_s=settings.timeout_s,
                clock=settings.clock,
            )
        return _open_gloo(store, settings, name=name, rank=rank, size=size)
    except RuntimeError as error:
        raise _opening_failed(error, name=name, rank=rank, size=size, timeout_s=settings.open_timeout_s) from error


def _open_gloo(store: Store, settings: GroupSettings, *, name: str, rank: int, size: int) -> GlooGroup:
    with started_threads_yield() if settings.wire_yields else nullcontext():
        # A device of its own for every group: a thread that carries its bytes, beside those of other groups.
        options = _torch.ProcessGroupGloo._Options()
        options._devices = [_torch.ProcessGroupGloo.create_device(hostname=settings.host_address)]
        options._timeout = timeout(settings.open_timeout_s)
        # Gloo's workers carry its own collectives, which are not used.
        options._threads = 1
        gloo = _torch.ProcessGroupGloo(store, rank, size, options)
    return GlooGroup(gloo, name=name, rank=rank, size=size, timeout_s=settings.timeout_s, clock=settings.clock)


def _listen(address: str, port: int) -> socket.socket:
    family, kind, protocol, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.bind(where)
        listening.listen(_BACKLOG)
    except OSError:
        listening.close()
        raise
    return listening


def _opening_failed(error: RuntimeError, *, name: str, rank: int, size: int, timeout_s: float) -> CommError:
    text = _first_line(error)
    late = "timeout" in text.lower() or "timed out" in text.lower()
    where = f"group {name}: open at rank {rank} of {size}"
    if late:
        return CommTimeout(f"{where}: some rank did not come within {timeout_s} s: {text}")
    return PeerLost(f"{where}: {text}")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
