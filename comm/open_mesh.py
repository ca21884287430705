"""The groups of a rank of a replica, opened over torch.distributed."""

from __future__ import annotations

from .collectives import Collectives
from .groups import MeshGroups
from .host_levels import host_levels
from .mesh import MeshPlace
from .torch_groups import GroupSettings, Rendezvous, open_group, open_groups


def open_mesh_groups(
    place: MeshPlace,
    rendezvous: Rendezvous,
    settings: GroupSettings,
    *,
    experts_over_tp: bool = False,
    generation: int = 0,
) -> MeshGroups:
    """Open a rank's groups; returns when all ranks of the mesh have.

    Raises: as ``open_groups``
    """
    opened = open_groups(place, rendezvous, settings, generation=generation)
    levels: list[Collectives] = []
    try:
        ranks_by_level = host_levels(
            place.expert_ranks(over_tp=experts_over_tp), place.rank, place.shape.ranks_per_host
        )
        if len(ranks_by_level) > 1:
            for axis, ranks in zip(("across hosts", "inside a host"), ranks_by_level, strict=True):
                name = f"experts {axis}[{','.join(map(str, ranks))}]"
                prefix = f"slipstream/{generation}/{name}"
                number = ranks.index(place.rank)
                levels.append(open_group(rendezvous, settings, name=name, prefix=prefix, rank=number, size=len(ranks)))
    except BaseException:
        for group in levels:
            group.close()
        opened.close()
        raise
    return MeshGroups(
        place=place,
        tp=opened.tp if place.shape.tp > 1 else None,
        ep=opened.ep if place.shape.ep > 1 else None,
        pp=opened.pp if place.shape.pp > 1 else None,
        sp=opened.sp if place.shape.sp > 1 else None,
        expert_levels=tuple(levels),
        opened=(opened.world, opened.stage, opened.pp, opened.sp, opened.ep, opened.tp),
    )
