"""The groups that one rank belongs to, by the axes of the mesh."""

from __future__ import annotations

from dataclasses import dataclass

from .collectives import Collectives
from .mesh import MeshPlace, MeshShape


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshGroups:
    """A rank's place and its groups; None along an axis with one rank, where there is nothing to say.

    ``stage``: all ranks of the rank's pipeline stage. A group's ranks count as in the place's tuples.
    """

    place: MeshPlace
    tp: Collectives | None = None
    ep: Collectives | None = None
    pp: Collectives | None = None
    stage: Collectives | None = None

    def close(self) -> None:
        """End every group."""
        for group in (self.tp, self.ep, self.pp, self.stage):
            if group is not None:
                group.close()


ALONE = MeshGroups(place=MeshShape().place(0))
"""A rank without others."""
