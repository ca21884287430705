"""The other ranks of a replica as threads of this process, over groups of threads: the whole replica without a wire."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

from slipstream.comm.collectives import Collectives
from slipstream.comm.groups import MeshGroups
from slipstream.comm.local_groups import BytesSent, local_group
from slipstream.comm.mesh import MeshShape
from slipstream.runtime.messages import StepPlan, StepResult
from slipstream.runtime.worker.rank import Rank, RankSetup, build_rank

LOAD_TIMEOUT_S = 60.0
STEP_TIMEOUT_S = 60.0


def local_mesh(shape: MeshShape, *, timeout_s: float = 30.0, bytes_sent: BytesSent | None = None) -> list[MeshGroups]:
    """Return the groups of every rank of a mesh."""
    made: dict[tuple[str, tuple[int, ...]], list[Collectives]] = {}

    def seat(axis: str, ranks: tuple[int, ...], rank: int) -> Collectives | None:
        if len(ranks) == 1:
            return None
        if (axis, ranks) not in made:
            made[axis, ranks] = local_group(len(ranks), name=axis, timeout_s=timeout_s, bytes_sent=bytes_sent)
        return made[axis, ranks][ranks.index(rank)]

    places = [shape.place(rank) for rank in range(shape.size)]
    return [
        MeshGroups(
            place=place,
            tp=seat("tp", place.tp_ranks, place.rank),
            ep=seat("ep", place.ep_ranks, place.rank),
            pp=seat("pp", place.pp_ranks, place.rank),
            sp=seat("sp", place.sp_ranks, place.rank),
        )
        for place in places
    ]


class ThreadPeers:
    """All ranks but the first, each with an executor of its own in this process."""

    def __init__(self, setup: RankSetup) -> None:
        shape = setup.mesh
        all_groups = local_mesh(shape)
        self.groups = all_groups[0]
        self._loader = ThreadPoolExecutor(max_workers=shape.size)
        self._loading = [self._loader.submit(build_rank, setup, groups) for groups in all_groups[1:]]
        self._ranks: list[Rank] = []
        self._steps: deque[list[Future[StepResult]]] = deque()
        self._speakers = shape.place(0).pp_ranks[1:]

    def wait_ready(self) -> None:
        self._ranks = [loading.result(LOAD_TIMEOUT_S) for loading in self._loading]

    def send(self, plan: StepPlan) -> None:
        self._steps.append([rank.executor.submit(plan) for rank in self._ranks])

    def result(self, plan: StepPlan) -> list[StepResult]:
        results = [step.result(STEP_TIMEOUT_S) for step in self._steps.popleft()]
        assert all(result.step == plan.step for result in results)
        return [results[rank - 1] for rank in self._speakers]

    def why(self) -> str | None:
        errors = [step.exception(0.0) for step in (self._steps[0] if self._steps else []) if step.done()]
        return next((str(error) for error in errors if error is not None), None)

    def close(self) -> None:
        for rank in self._ranks:
            rank.executor.close()
        self._loader.shutdown(wait=False, cancel_futures=True)
