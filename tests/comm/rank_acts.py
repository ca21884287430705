"""What rank processes do in tests of meshes and of faults: functions of a rank, named to it by the test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import distributed

from slipstream.comm.collectives import Collectives, Work
from slipstream.comm.mesh import MeshShape
from slipstream.comm.nccl_group import NcclGroup
from slipstream.comm.open_mesh import open_mesh_groups
from slipstream.comm.timeouts import timeout
from slipstream.comm.torch_groups import GroupSettings
from slipstream.runtime.clock import monotonic_clock
from slipstream.tests.comm.rank_process import Rank, find


def all_axes(rank: Rank) -> dict[str, list[int]]:
    """Return which ranks of the world are in each group, as the groups themselves say."""
    assert rank.mesh is not None
    groups = rank.mesh
    me = torch.tensor([groups.world.rank])
    return {axis: getattr(groups, axis).all_gather(me).wait().tolist() for axis in ("world", "stage", "pp", "ep", "tp")}


def levels_over_hosts(rank: Rank, *, place: int, ranks_per_host: int, generation: int, address: str) -> list[list[int]]:
    """Open a mesh of four expert ranks on hosts; return which ranks are in each level, as the groups say."""
    assert rank.rendezvous is not None
    settings = GroupSettings(clock=monotonic_clock, host_address=address, timeout_s=20.0, open_timeout_s=20.0)
    mesh_place = MeshShape(ep=4, ranks_per_host=ranks_per_host).place(place)
    groups = open_mesh_groups(mesh_place, rank.rendezvous, settings, generation=generation)
    # The rank closes what it has here when the test says so.
    rank.groups.update({group.name: group for group in (*groups.expert_levels, *groups.opened)})
    me = torch.tensor([place])
    return [level.all_gather(me).wait().tolist() for level in groups.expert_levels]


def as_if_over_nccl(rank: Rank, *, scenarios: list[str], seed: int, place: int, size: int, generation: int) -> None:
    """Run scenarios on a group over NCCL whose process group is gloo's: torch gives both the same calls."""
    assert rank.rendezvous is not None
    store = rank.rendezvous.store(f"as-if-nccl/{generation}", timeout_s=20.0)
    process_group: Any = distributed.ProcessGroupGloo
    gloo = process_group(store, place, size, timeout(20.0))
    group = NcclGroup(
        gloo, torch.device("cpu"), name="nccl", rank=place, size=size, timeout_s=20.0, clock=monotonic_clock
    )
    for scenario in scenarios:
        find(scenario)(group, seed)
    group.close()


def start_and_wait(rank: Rank, *, operation: str, numbers: int) -> None:
    """Start an operation, tell of it, and wait for its end."""
    works = OPERATIONS[operation](rank.groups["group"], numbers)
    rank.tell("started")
    for work in works:
        work.wait()


def start_when_told(rank: Rank, *, operation: str, numbers: int) -> None:
    """As ``start_and_wait``, from a rank that has nothing to tell."""
    for work in OPERATIONS[operation](rank.groups["group"], numbers):
        work.wait()


def _all_reduce(group: Collectives, numbers: int) -> Sequence[Work]:
    return [group.all_reduce(torch.ones(numbers))]


def _all_to_all(group: Collectives, numbers: int) -> Sequence[Work]:
    counts = [numbers // group.size] * group.size
    return [group.all_to_all(torch.ones(sum(counts)), send_counts=counts, receive_counts=counts)]


def _round(group: Collectives, numbers: int) -> Sequence[Work]:
    """Every rank sends to the next one and receives from the one before."""
    right, left = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    return [group.receive(torch.empty(numbers), source=left), group.send(torch.ones(numbers), to=right)]


OPERATIONS: dict[str, Callable[[Collectives, int], Sequence[Work]]] = {
    "all_reduce": _all_reduce,
    "all_to_all": _all_to_all,
    "point_to_point": _round,
}
