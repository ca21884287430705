"""The groups that one rank talks to, by the axes of the mesh."""

from __future__ import annotations

from dataclasses import dataclass

from .collectives import Collectives
from .mesh import MeshPlace, MeshShape


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshGroups:
    """A rank's place and its groups; None along an axis with one rank, where there is nothing to say.

    A group's ranks count as in the place's tuples. ``expert_levels``: where experts are spread over several hosts, the
    levels of their exchange (``host_levels``). ``opened``: what is closed with them.
    """

    place: MeshPlace
    tp: Collectives | None = None
    ep: Collectives | None = None
    pp: Collectives | None = None
    sp: Collectives | None = None
    expert_levels: tuple[Collectives, ...] = ()
    opened: tuple[Collectives, ...] = ()

    def close(self) -> None:
        """End every group, here; the other ranks' fail. Idempotent."""
        for group in (self.tp, self.ep, self.pp, self.sp, *self.expert_levels, *self.opened):
            if group is not None:
                group.close()


ALONE = MeshGroups(place=MeshShape().place(0))
"""A rank without others."""
