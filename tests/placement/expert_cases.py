"""Problems of expert placement that several tests draw: loads, and a shape that every policy can place."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Loads and a shape that every policy can place.

    Shapes: loads [layers][experts]
    """

    loads: list[list[float]]
    num_slots: int
    num_ranks: int
    ranks_per_host: int
    num_groups: int

    @property
    def num_experts(self) -> int:
        return len(self.loads[0])


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    hosts = draw(st.integers(1, 3))
    ranks_per_host = draw(st.integers(1, 4))
    groups_per_host = draw(st.integers(1, 3))
    group_size = draw(st.integers(1, 4))
    experts = hosts * groups_per_host * group_size
    ranks = hosts * ranks_per_host
    slots_per_rank = draw(st.integers(-(-experts // ranks), experts // hosts))
    load = st.one_of(st.just(0.0), st.floats(1e-6, 1e6), st.integers(0, 20))
    loads = draw(
        st.lists(st.lists(load, min_size=experts, max_size=experts), min_size=1, max_size=3),
    )
    return Problem(
        loads=[[float(value) for value in layer] for layer in loads],
        num_slots=slots_per_rank * ranks,
        num_ranks=ranks,
        ranks_per_host=ranks_per_host,
        num_groups=hosts * groups_per_host,
    )
