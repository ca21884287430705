"""What is measured at start-up: medians, the slowest rank's, the same on all ranks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from slipstream.comm.collectives import Collectives
from slipstream.comm.groups import MeshGroups
from slipstream.comm.local_groups import local_group, run_ranks
from slipstream.comm.mesh import MeshShape
from slipstream.comm.overlap_cost import Curve, PassCost
from slipstream.comm.overlap_measure import (
    Clocks,
    measure_collective,
    measure_curve,
    measure_pass,
    ways_that_gain,
)
from slipstream.tests.fakes.scripted_work import HandClock
from slipstream.tests.fakes.thread_peers import local_mesh

CPU = torch.device("cpu")


class SteppingClock:
    """A clock that moves on by the same each time it is read."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._now_s = 0.0

    def __call__(self) -> float:
        self._now_s += self._step_s
        return self._now_s


def test_what_is_measured_is_the_median_after_a_first_run() -> None:
    clock = HandClock()
    durations = iter([100.0, 1.0, 9.0, 2.0, 100.0, 5.0, 5.0, 4.0])

    def run(size: int) -> None:
        clock.advance(next(durations))

    assert measure_curve(run, [10, 20], clock=clock, repeats=3) == Curve((10.0, 20.0), (2.0, 5.0))


def test_all_ranks_know_the_slowest_ones_times() -> None:
    def run(group: Collectives) -> Curve:
        clock = SteppingClock([1.0, 3.0][group.rank])
        return measure_collective(group, group.all_reduce, [8, 64], clock=clock, device=CPU, repeats=3)

    assert run_ranks(local_group(2), run) == [Curve((8.0, 64.0), (3.0, 3.0))] * 2


def test_ranks_along_another_axis_know_them_too() -> None:
    def run(groups: MeshGroups) -> Curve:
        assert groups.tp is not None
        assert groups.ep is not None
        clock = SteppingClock([1.0, 3.0, 9.0, 5.0][groups.place.rank])
        return measure_collective(
            groups.tp, groups.tp.all_reduce, [8, 64], clock=clock, device=CPU, also=groups.ep, repeats=3
        )

    meshes = local_mesh(MeshShape(ep=2, tp=2))
    with ThreadPoolExecutor(max_workers=4) as threads:
        assert list(threads.map(run, meshes)) == [Curve((8.0, 64.0), (9.0, 9.0))] * 4


def test_a_pass_is_measured_alike_on_all_ranks() -> None:
    def run(group: Collectives) -> PassCost:
        wall = HandClock()
        slowness = 1 + group.rank

        def compute(tokens: int) -> None:
            wall.advance(slowness * (0.5 + tokens))

        def read() -> float:
            wall.advance(0.25)
            return wall()

        return measure_pass(
            group,
            compute,
            [1, 2, 4],
            collectives=6,
            bytes_per_token=16,
            # It works half of the time.
            clocks=Clocks(wall=read, work=lambda: wall() / 2),
            device=CPU,
            repeats=3,
        )

    first, second = run_ranks(local_group(2), run)
    assert first == second
    assert first.compute_s == Curve((1.0, 2.0, 4.0), (3.25, 5.25, 9.25)), "rank 1 is the slower"
    assert first.collective_s == Curve((16.0, 32.0, 64.0), (0.25, 0.25, 0.25))
    assert 0.4 < first.wire_work < 0.6
    assert (first.collectives, first.bytes_per_token) == (6, 16)


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ({64: (0.9, 0.9), 128: (0.8, 0.9), 256: (0.8, 0.7)}, ((64, "a"), (128, "a"), (256, "b"))),
        ({64: (0.9, 0.9), 128: (0.99, 1.1), 256: (0.7, 1.0)}, ((256, "a"),)),
        ({64: (1.1, 1.1), 128: (1.1, 0.9), 256: (0.9, 0.95)}, ((128, "b"), (256, "a"))),
        ({64: (0.5, 0.5), 128: (0.5, 0.5), 256: (1.0, 0.99)}, ()),
    ],
)
def test_a_way_is_taken_where_every_larger_size_gains_too(
    gains: dict[int, tuple[float, float]], expected: tuple[tuple[int, str], ...]
) -> None:
    def run(group: Collectives) -> tuple[tuple[int, str], ...]:
        clock = HandClock()
        # Rank 1 is three times as slow, and alone sees what a way brings: it is its time that counts.
        slowness, seen = (3.0, gains) if group.rank else (1.0, dict.fromkeys(gains, (0.5, 0.4)))

        def step(tokens: int, way: str | None) -> None:
            clock.advance(slowness * tokens * (1.0 if way is None else seen[tokens]["ab".index(way)]))

        return ways_that_gain(group, step, list(gains), lambda tokens: "ab", clock=clock, device=CPU, repeats=3)

    assert run_ranks(local_group(2), run) == [expected] * 2


def test_what_is_not_worth_trying_is_not_tried() -> None:
    tried: list[tuple[int, str | None]] = []

    def run(group: Collectives) -> tuple[tuple[int, str], ...]:
        clock = HandClock()

        def step(tokens: int, way: str | None) -> None:
            tried.append((tokens, way))
            clock.advance(tokens if way is None else tokens / 2)

        ways = {4: "a", 8: "", 16: "a"}
        return ways_that_gain(group, step, [4, 8, 16], ways.__getitem__, clock=clock, device=CPU, repeats=1)

    assert run_ranks(local_group(1), run) == [((16, "a"),)]
    assert set(tried) == {(16, None), (16, "a")}
