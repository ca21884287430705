"""Random sequences of what can happen to a deployment, each from one seed, and what must be true when they are over.

python -P -m slipstream.tests.simulation.sequences SEED      prints the story of one sequence
python -P -m slipstream.tests.simulation.sequences --count N runs N of them
"""

from __future__ import annotations

import argparse
import itertools
import logging
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from slipstream.placement.plan import Constraint, Degrees, ReplicaPlace, Role
from slipstream.runtime.controller.rounds import RoundReport, Rounds
from slipstream.runtime.reconcile.actions import StartGang
from slipstream.runtime.reconcile.adopt import Phase, Replica, adopt
from slipstream.runtime.reconcile.desired import Desired, Generation, Limits, PoolWish
from slipstream.runtime.reconcile.memory import Memory
from slipstream.runtime.reconcile.observed import Observed, ReplicaId
from slipstream.runtime.reconcile.round import Assign, Policy
from slipstream.tests.fakes.first_fit import first_fit
from slipstream.tests.simulation.judge import Judge, Violation
from slipstream.tests.simulation.world import ControllerDied, Fate, World

LIMITS = Limits(starting_s=20.0, loading_s=40.0, drain_s=30.0, first_pause_s=1.0, longest_pause_s=8.0, stable_s=30.0)
_ROUNDS_TO_SETTLE = 400
_SETTLING_STEP_S = 5.0
_DEGREES = (Degrees(), Degrees(), Degrees(), Degrees(tp=2), Degrees(tp=2), Degrees(pp=2, tp=2), Degrees(pp=3))
_CONSTRAINTS = (
    *[Constraint()] * 6,
    Constraint(device_types=frozenset({"large"})),
    Constraint(labels={"rack": "a"}),
)


@dataclass(slots=True)
class Tally:
    """What happened in sequences."""

    events: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    starts: int = 0
    drained: int = 0
    cut_short: int = 0
    whole: int = 0
    short: int = 0
    kept_on_cordoned: int = 0
    longest_settling: int = 0


class Sequence:
    """One deployment's life."""

    def __init__(self, seed: int, *, assign: Assign = first_fit, tally: Tally | None = None) -> None:
        self._draw = random.Random(seed)
        self._seed = seed
        self._tally = tally if tally is not None else Tally()
        self._policy = Policy(assign=assign, limits=LIMITS)
        self._judge = Judge(limits=LIMITS, assign=assign)
        self.world = World(draw=self._draw, judge=self._judge, names_lost=self._draw.random() < 0.5)
        self._model, self._cut = itertools.count(1), itertools.count(1)
        self.story: list[str] = []
        for _ in range(self._draw.randint(2, 5)):
            self._node_joins()
        self._desired = Desired(partial=self._draw.random() < 0.7)
        for _ in range(self._draw.randint(1, 3)):
            self._pool_comes()
        self._rounds = self._controller()

    def run(self) -> None:
        """Let things happen, then nothing more, and hold the end against what was wanted. Raises: Violation"""
        try:
            for _ in range(self._draw.randint(8, 30)):
                self._step()
            self._settle()
        except Violation as violation:
            raise Violation(f"seed {self._seed}: {violation}\n" + "\n".join(self.story)) from violation

    # ------------------------------------------------------------------ steps

    def _controller(self) -> Rounds:
        self._judge.forgets()
        return Rounds(self.world, self._policy, self._desired, clock=lambda: self.world.now_s)

    def _step(self) -> None:
        for _ in range(self._draw.choice((0, 1, 1, 1, 2))):
            self._event()
        self.world.pass_time(self._draw.choice((0.0, 1.0, 3.0, 3.0, 8.0)))
        if self._draw.random() < 0.9:
            self._round()

    def _round(self) -> RoundReport | None:
        if self._draw.random() < 0.04:
            self.world.dies_after = self._draw.randint(0, 4)
        if self._draw.random() < 0.1:
            self.world.meanwhile = getattr(self, self._draw.choice(_MEANWHILE))
        self._rounds.desired = self._judge.desired = self._desired
        self._tally.rounds += 1
        try:
            report = self._rounds.run()
        except ControllerDied:
            self._tell("the controller dies in the middle")
            self._rounds = self._controller()
            return None
        finally:
            self.world.dies_after = self.world.meanwhile = None
        for action in report.actions:
            self._tell(f"  {action}")
            self._tally.starts += isinstance(action, StartGang)
        for _, why in report.refused:
            self._tell(f"  refused: {why}")
        return report

    def _event(self) -> None:
        names, weights = zip(*_EVENTS, strict=True)
        (name,) = self._draw.choices(names, weights)
        self._tally.events[name.strip("_")] += 1
        getattr(self, name)()

    def _tell(self, text: str) -> None:
        self.story.append(f"{self.world.now_s:7.1f} {text}")

    # ------------------------------------------------------------------ what happens to the cluster

    def _a_rank_dies(self) -> None:
        if self.world.processes:
            key = self._draw.choice(sorted(self.world.processes))
            self._tell(f"rank {key[1]} of {key[0]} dies")
            self.world.end_process(key, listed=self._draw.random() < 0.5)

    def _a_node_is_lost(self) -> None:
        if up := [name for name, node in self.world.nodes.items() if node.up]:
            name = self._draw.choice(up)
            self._tell(f"node {name} is lost")
            self.world.lose_node(name)

    def _a_node_returns(self) -> None:
        if down := [name for name, node in self.world.nodes.items() if not node.up]:
            name = self._draw.choice(down)
            self._tell(f"node {name} returns")
            self.world.nodes[name].up = True
            self.world.relabel(name, self._draw.choice("ab"))

    def _a_link_is_cut(self) -> None:
        if linked := [name for name, node in self.world.nodes.items() if node.seen]:
            name = self._draw.choice(linked)
            self._tell(f"the link of {name} is cut")
            self.world.nodes[name].linked = False

    def _a_link_heals(self) -> None:
        if cut := [name for name, node in self.world.nodes.items() if not node.linked]:
            name = self._draw.choice(cut)
            self._tell(f"the link of {name} heals")
            self.world.nodes[name].linked = True

    def _node_joins(self) -> None:
        if len(self.world.nodes) < 7:
            devices = self._draw.randint(1, 4)
            taken = frozenset({0}) if self._draw.random() < 0.15 else frozenset[int]()
            name = f"n{len(self.world.nodes)}"
            kind, rack = self._draw.choice(("small", "large")), self._draw.choice("ab")
            self._tell(f"node {name} joins: {devices} {kind}, rack {rack}")
            self.world.add_node(name, devices=devices, device_type=kind, rack=rack, taken=taken)

    def _the_controller_restarts(self) -> None:
        self._tell("the controller restarts")
        self._rounds = self._controller()

    def _starts_go_wrong(self) -> None:
        fates = self._draw.choices((Fate.SLOW, Fate.FAILS, Fate.DIES_LOADING), k=self._draw.randint(1, 3))
        self._tell(f"the next starts: {', '.join(fate.value for fate in fates)}")
        self.world.fates += fates

    def _starts_are_refused(self) -> None:
        self.world.refusals += self._draw.randint(1, 3)

    def _requests_come(self) -> None:
        for replica in self.world.gateway_view.replicas:
            if self.world.request(replica.replica, self._draw.randint(1, 5)) and self._draw.random() < 0.2:
                self.world.drivers[ReplicaId.parse(replica.replica)].stuck = True

    def _the_gateway_hears(self) -> None:
        self.world.gateway_view = self.world.view

    def _a_driver_falls_silent(self) -> None:
        for driver in self.world.drivers.values():
            driver.silent = self._draw.random() < 0.3

    # ------------------------------------------------------------------ what happens to the file

    def _pool_comes(self) -> None:
        if len(self._desired.pools) < 3:
            name = self._draw.choice([name for name in "pqrs" if self._desired.pool(name) is None])
            wish = PoolWish(
                name=name,
                role=self._draw.choice(list(Role)),
                degrees=self._draw.choice(_DEGREES),
                replicas=self._draw.randint(0, 3),
                generation=Generation(model=next(self._model), cut=next(self._cut)),
                constraint=self._draw.choice(_CONSTRAINTS),
            )
            self._write(replace(self._desired, pools=(*self._desired.pools, wish)))

    def _pool_goes(self) -> None:
        if self._desired.pools:
            gone = self._draw.choice(self._desired.pools)
            self._write(replace(self._desired, pools=tuple(pool for pool in self._desired.pools if pool != gone)))

    def _counts_change(self) -> None:
        self._change(lambda pool: replace(pool, replicas=self._draw.randint(0, 4)))

    def _the_cut_changes(self) -> None:
        self._change(
            lambda pool: replace(
                pool,
                degrees=self._draw.choice(_DEGREES),
                constraint=self._draw.choice(_CONSTRAINTS),
                generation=replace(pool.generation, cut=next(self._cut)),
            )
        )

    def _the_model_changes(self) -> None:
        model = next(self._model)
        pools = tuple(replace(pool, generation=replace(pool.generation, model=model)) for pool in self._desired.pools)
        self._write(replace(self._desired, pools=pools))

    def _partial_changes(self) -> None:
        self._write(replace(self._desired, partial=not self._desired.partial))

    def _a_node_is_cordoned(self) -> None:
        cordoned = self._desired.cordoned | {self._draw.choice(sorted(self.world.nodes))}
        self._write(replace(self._desired, cordoned=cordoned))

    def _nodes_are_cordoned_no_more(self) -> None:
        some = frozenset(name for name in sorted(self._desired.cordoned) if self._draw.random() < 0.3)
        self._write(replace(self._desired, cordoned=some))

    def _a_replica_is_to_leave(self) -> None:
        if self.world.sizes:
            # Perhaps one that has gone: a name that nobody has does no harm.
            lately = sorted(str(id) for id in list(self.world.sizes)[-6:])
            leaving = self._desired.leaving | {self._draw.choice(lately)}
            self._write(replace(self._desired, leaving=leaving))

    def _nobody_is_to_leave(self) -> None:
        self._write(replace(self._desired, leaving=frozenset()))

    def _change(self, change) -> None:
        if self._desired.pools:
            chosen = self._draw.choice(self._desired.pools)
            pools = tuple(change(pool) if pool is chosen else pool for pool in self._desired.pools)
            self._write(replace(self._desired, pools=pools))

    def _write(self, desired: Desired) -> None:
        self._desired = desired
        pools = ", ".join(map(_said, desired.pools))
        away = f"cordoned {sorted(desired.cordoned)}, leaving {sorted(desired.leaving)}"
        self._tell(f"the file says: partial {desired.partial}, {pools}; {away}")

    # ------------------------------------------------------------------ the end

    def _settle(self) -> None:
        """Run until nothing changes any more."""
        self._tell("nothing happens any more")
        self.world.settles()
        for rounds in range(_ROUNDS_TO_SETTLE):
            self.world.pass_time(_SETTLING_STEP_S)
            self._rounds.desired = self._judge.desired = self._desired
            report = self._rounds.run()
            self._tally.rounds += 1
            for action in report.actions:
                self._tell(f"  {action}")
            waits = [backoff.until_s(LIMITS) for backoff in self._rounds.memory.backoffs.values()]
            if not report.actions and not self.world.busy and max(waits, default=0.0) <= self.world.now_s:
                self._tally.longest_settling = max(self._tally.longest_settling, rounds)
                self._tally.drained += self._judge.drained_to_the_end
                self._tally.cut_short += self._judge.cut_short
                self._check_end(report)
                return
        raise Violation(f"it has not come to rest within {_ROUNDS_TO_SETTLE} rounds")

    def _check_end(self, report: RoundReport) -> None:
        """Hold what came of it against what was wanted, without asking the deciders."""
        observed, desired = report.observed, self._desired
        short = {shortage.pool for shortage in report.shortages}
        replicas = adopt(observed, Memory(), now_s=self.world.now_s)
        living = [replica for replica in replicas if replica.phase is not Phase.BROKEN]
        for replica in replicas:
            seen = [rank.device.node for rank in replica.ranks if self.world.nodes[rank.device.node].seen]
            if replica.phase is Phase.BROKEN and seen:
                raise Violation(f"ranks of {replica.id} are left over: {replica.why}")
        named = {replica.replica for replica in observed.view.replicas}
        if named != {str(replica.id) for replica in living}:
            raise Violation(f"the view names {named}, there are {[str(replica.id) for replica in living]}")
        if unready := [str(replica.id) for replica in living if replica.phase is not Phase.READY]:
            raise Violation(f"{unready} are not ready")
        self._check_to_go(living, short)
        for pool in desired.pools:
            of_pool = [replica for replica in living if replica.id.pool == pool.name]
            current = [replica for replica in of_pool if self._is_current(replica, pool)]
            held_back = bool(short) and not desired.partial and not observed.view.begun
            if len(current) != pool.replicas and pool.name not in short and not held_back:
                raise Violation(f"pool {pool.name} has {len(current)} of {pool.replicas} and nothing is said of it")
            if len(of_pool) != len(current) and not short:
                raise Violation(f"pool {pool.name} has old replicas left")
            if len(current) >= pool.replicas and pool.name in short:
                raise Violation(f"pool {pool.name} is said to lack what it has")
        if gone := [str(replica.id) for replica in living if desired.pool(replica.id.pool) is None]:
            raise Violation(f"{gone} are of no pool that is wanted")
        self._tally.short += bool(short)
        self._tally.whole += not short
        self._check_shortages(observed, short)

    def _is_current(self, replica: Replica, pool: PoolWish) -> bool:
        to_go = str(replica.id) in self._desired.leaving or self._on_cordoned(replica)
        return replica.spec.generation == pool.generation and not to_go

    def _on_cordoned(self, replica: Replica) -> bool:
        return any(rank.device.node in self._desired.cordoned for rank in replica.ranks)

    def _check_to_go(self, living: list[Replica], short: set[str]) -> None:
        """Who was named has ended; a cordoned node has at most a pool's last replica, for which there is no room."""
        for replica in living:
            if str(replica.id) in self._desired.leaving:
                raise Violation(f"{replica.id} was to leave and has not")
            if not self._on_cordoned(replica):
                continue
            model = replica.spec.generation.model
            alike = [
                other for other in living if other.id.pool == replica.id.pool and other.spec.generation.model == model
            ]
            if len(alike) > 1 or not short:
                raise Violation(f"{replica.id} is left on a cordoned node")
            self._tally.kept_on_cordoned += 1

    def _check_shortages(self, observed: Observed, short: set[str]) -> None:
        """What is said to be missing must be missing."""
        used = {process.device for process in self.world.processes.values()}
        every = observed.topology.devices()
        there = frozenset(device for device in every if device.node not in self._desired.cordoned)
        if not self._desired.partial and not observed.view.begun and not observed.view.replicas:
            if short and self._fits_whole(observed, there):
                raise Violation("everything would fit")
            return
        for pool in self._desired.pools:
            olds = [
                process.device
                for process in self.world.processes.values()
                if process.spec.id.pool == pool.name and process.spec.generation != pool.generation
            ]
            others = {Role.PREFILL: Role.DECODE, Role.DECODE: Role.PREFILL}.get(pool.role)
            if any(other.name in short and other.role is others for other in self._desired.pools):
                # What is old may serve on because the new model could not.
                olds = []
            found = self._policy.assign(
                observed.topology, (there - used) | (there & set(olds)), pool.degrees, pool.constraint
            )
            if pool.name in short and isinstance(found, ReplicaPlace):
                raise Violation(f"pool {pool.name} is short, but {found} would do")

    def _fits_whole(self, observed: Observed, free: frozenset) -> bool:
        turns = sorted(
            (number, index) for index, pool in enumerate(self._desired.pools) for number in range(pool.replicas)
        )
        for _, index in turns:
            pool = self._desired.pools[index]
            found = self._policy.assign(observed.topology, free, pool.degrees, pool.constraint)
            if not isinstance(found, ReplicaPlace):
                return False
            free -= set(found.devices)
        return True


_EVENTS = (
    ("_a_rank_dies", 14),
    ("_a_node_is_lost", 4),
    ("_a_node_returns", 7),
    ("_a_link_is_cut", 6),
    ("_a_link_heals", 7),
    ("_node_joins", 3),
    ("_the_controller_restarts", 8),
    ("_starts_go_wrong", 5),
    ("_starts_are_refused", 3),
    ("_requests_come", 14),
    ("_the_gateway_hears", 10),
    ("_a_driver_falls_silent", 4),
    ("_pool_comes", 2),
    ("_pool_goes", 2),
    ("_counts_change", 8),
    ("_the_cut_changes", 5),
    ("_the_model_changes", 4),
    ("_partial_changes", 1),
    ("_a_node_is_cordoned", 5),
    ("_nodes_are_cordoned_no_more", 4),
    ("_a_replica_is_to_leave", 5),
    ("_nobody_is_to_leave", 1),
)
"""What happens, and how often."""

_MEANWHILE = ("_a_rank_dies", "_a_node_is_lost", "_a_link_is_cut", "_a_link_heals", "_requests_come")
"""What may happen after a round has looked and before it acts."""


def _said(pool: PoolWish) -> str:
    cut, where = pool.degrees, pool.constraint
    limits = ",".join([*where.device_types, *where.labels.values()])
    return f"{pool.name} {pool.role} x{pool.replicas} pp{cut.pp} tp{cut.tp} generation {pool.generation}" + (
        f" on {limits}" if limits else ""
    )


def seeds(first: int, count: int) -> Iterator[int]:
    """Yield the seeds of so many sequences."""
    yield from range(first, first + count)


def main(arguments: list[str] | None = None) -> int:
    """Run one sequence and tell its story, or many."""
    parser = argparse.ArgumentParser(description="Random sequences of failures and changes against the controller.")
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--count", type=int, default=0, help="run so many, from the seed on, and print what happened")
    options = parser.parse_args(arguments)
    logging.getLogger("slipstream.runtime.controller").setLevel(logging.ERROR)
    tally = Tally()
    try:
        for seed in seeds(options.seed, options.count or 1):
            sequence = Sequence(seed, tally=tally)
            sequence.run()
    except Violation as violation:
        print(violation)
        return 1
    print(tally if options.count else "\n".join(sequence.story))
    return 0


if __name__ == "__main__":
    sys.exit(main())
