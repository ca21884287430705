"""The other ranks of a replica as threads of this process, over groups of threads: the whole replica without a wire."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

from slipstream.comm.collectives import Collectives
from slipstream.comm.groups import MeshGroups
from slipstream.comm.host_levels import host_levels
from slipstream.comm.local_groups import BytesSent, local_group
from slipstream.comm.mesh import MeshPlace, MeshShape
from slipstream.runtime.handoff.rank_kv import RankKv
from slipstream.runtime.handoff.ranks import KvRanks, LocalKvRanks
from slipstream.runtime.handoff.settings import KvSeat
from slipstream.runtime.messages import StepPlan, StepResult
from slipstream.runtime.worker.rank import Rank, RankSetup, build_rank

LOAD_TIMEOUT_S = 60.0
STEP_TIMEOUT_S = 60.0


SentByGroup = dict[tuple[str, tuple[int, ...]], BytesSent]
"""(axis, ranks) → what passed between the ranks of that group, which count as in the group."""


def local_mesh(
    shape: MeshShape,
    *,
    timeout_s: float = 30.0,
    experts_over_tp: bool = False,
    sent: SentByGroup | None = None,
) -> list[MeshGroups]:
    """Return the groups of every rank of a mesh; ``sent`` is filled with a counter for each group."""
    made: dict[tuple[str, tuple[int, ...]], list[Collectives]] = {}

    def seat(axis: str, ranks: tuple[int, ...], rank: int) -> Collectives | None:
        if len(ranks) == 1:
            return None
        if (axis, ranks) not in made:
            counter = BytesSent() if sent is None else sent.setdefault((axis, ranks), BytesSent())
            made[axis, ranks] = local_group(len(ranks), name=axis, timeout_s=timeout_s, bytes_sent=counter)
        return made[axis, ranks][ranks.index(rank)]

    def levels(place: MeshPlace) -> tuple[Collectives, ...]:
        ranks_by_level = host_levels(place.expert_ranks(over_tp=experts_over_tp), place.rank, shape.ranks_per_host)
        if len(ranks_by_level) == 1:
            return ()
        seats = [
            seat(axis, ranks, place.rank) for axis, ranks in zip(("across", "inside"), ranks_by_level, strict=True)
        ]
        return tuple(one for one in seats if one is not None)

    places = [shape.place(rank) for rank in range(shape.size)]
    return [
        MeshGroups(
            place=place,
            tp=seat("tp", place.tp_ranks, place.rank),
            ep=seat("ep", place.ep_ranks, place.rank),
            pp=seat("pp", place.pp_ranks, place.rank),
            sp=seat("sp", place.sp_ranks, place.rank),
            expert_levels=levels(place),
        )
        for place in places
    ]


class ThreadPeers:
    """All ranks but the first, each with an executor of its own in this process. ``sent``: bytes between ranks."""

    sent: SentByGroup | None = None
    kv_seat: KvSeat | None = None

    def __init__(self, setup: RankSetup) -> None:
        shape = setup.mesh
        all_groups = local_mesh(shape, experts_over_tp=setup.experts_over_tp, sent=self.sent)
        self.groups = all_groups[0]
        self._loader = ThreadPoolExecutor(max_workers=shape.size)
        self._loading = [
            self._loader.submit(build_rank, setup, groups, kv_seat=self.kv_seat) for groups in all_groups[1:]
        ]
        self._ranks: list[Rank] = []
        self._steps: deque[list[Future[StepResult]]] = deque()
        self._speakers = shape.place(0).pp_ranks[1:]

    def meet(self) -> None:
        """Threads load the same files at the same time."""

    def wait_ready(self) -> None:
        self._ranks = [loading.result(LOAD_TIMEOUT_S) for loading in self._loading]

    def kv_ranks(self, own: RankKv) -> KvRanks:
        return LocalKvRanks([own, *(rank.kv for rank in self._ranks if rank.kv is not None)])

    def send(self, plan: StepPlan) -> None:
        self._steps.append([rank.executor.submit(plan) for rank in self._ranks])

    def result(self, plan: StepPlan) -> list[StepResult]:
        results = [step.result(STEP_TIMEOUT_S) for step in self._steps.popleft()]
        assert all(result.step == plan.step for result in results)
        return [results[rank - 1] for rank in self._speakers]

    def check(self) -> None:
        """Threads are not lost."""

    def why(self) -> str | None:
        errors = [step.exception(0.0) for step in (self._steps[0] if self._steps else []) if step.done()]
        return next((str(error) for error in errors if error is not None), None)

    def close(self) -> None:
        for rank in self._ranks:
            rank.executor.close()
        self._loader.shutdown(wait=False, cancel_futures=True)
