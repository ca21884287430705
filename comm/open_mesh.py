"""The groups of a rank of a replica, opened over torch.distributed."""

from __future__ import annotations

from .groups import MeshGroups
from .mesh import MeshPlace
from .torch_groups import GroupSettings, Rendezvous, open_groups


def open_mesh_groups(place: MeshPlace, rendezvous: Rendezvous, settings: GroupSettings) -> MeshGroups:
    """Open a rank's groups; returns when all ranks of the mesh have.

    Raises: as ``open_groups``
    """
    opened = open_groups(place, rendezvous, settings)
    return MeshGroups(
        place=place,
        tp=opened.tp if place.shape.tp > 1 else None,
        ep=opened.ep if place.shape.ep > 1 else None,
        pp=opened.pp if place.shape.pp > 1 else None,
        sp=opened.sp if place.shape.sp > 1 else None,
        opened=(opened.world, opened.stage, opened.pp, opened.sp, opened.ep, opened.tp),
    )
