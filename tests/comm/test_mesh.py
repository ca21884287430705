"""The mesh: every rank has one place, and every group is the same seen from each of its ranks."""

from __future__ import annotations

import itertools

import pytest

from slipstream.comm.mesh import MeshShape


@pytest.mark.parametrize(("pp", "sp", "ep", "tp"), list(itertools.product([1, 2, 3], [1, 3], [1, 2, 4], [1, 2])))
def test_groups_partition_the_ranks_and_agree(pp: int, sp: int, ep: int, tp: int) -> None:
    shape = MeshShape(pp=pp, sp=sp, ep=ep, tp=tp)
    stage = sp * ep * tp
    places = [shape.place(rank) for rank in range(shape.size)]
    assert [place.rank for place in places] == list(range(shape.size))
    sizes = {"tp_ranks": tp, "ep_ranks": ep, "sp_ranks": sp, "pp_ranks": pp, "stage_ranks": stage}
    for axis, size in sizes.items():
        for place in places:
            group = getattr(place, axis)
            assert len(set(group)) == size
            assert place.rank in group
            assert all(getattr(places[other], axis) == group for other in group)
    assert places[0].tp_ranks == tuple(range(tp)), "neighbours"
    assert [place.is_first_stage for place in places].count(True) == stage
    assert [place.is_last_stage for place in places].count(True) == stage


def test_degrees_and_ranks_that_cannot_be_are_named() -> None:
    with pytest.raises(ValueError, match="tp must be at least 1, got 0"):
        MeshShape(tp=0)
    with pytest.raises(ValueError, match="rank 4 is not in a mesh of 4"):
        MeshShape(pp=2, tp=2).place(4)
