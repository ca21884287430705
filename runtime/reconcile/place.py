"""Decides where missing replicas start: at once, when room has been made, or not at all, and then says what is missing.

Nothing starts on a cordoned node, and devices there are no room. A replica that has to leave one makes room on the
nodes that are left to it only if another of its pool serves meanwhile.

Pools take turns, so that each has its first replica before any has its second. For each replica in turn devices are
looked for among those that are free, then among those that will be, then by draining old replicas that it replaces.
What one finds the later ones do not get, even while it waits: devices that were freed for one pool are not taken by
another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ...placement.plan import ReplicaPlace, Shortage
from ...placement.topology import DeviceRef
from .adopt import Phase, Replica
from .desired import PoolWish
from .give_way import give_way
from .round import Round
from .surplus import COMING, LIVING, is_held, old, partners, release, serving_beside, surplus, why_to_go


@dataclass(frozen=True, slots=True, kw_only=True)
class _Start:
    place: ReplicaPlace


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wait:
    """Its place is not free yet. ``turn``: nor has anybody been asked for it, because another goes first."""

    turn: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _MakeRoom:
    victims: tuple[Replica, ...]


_Choice = _Start | _Wait | _MakeRoom | Shortage


def place_missing(round: Round) -> None:
    """Start what is missing where it fits."""
    ground = _Ground.of(round)
    choices = [(pool, _choose(round, ground, pool)) for pool in _missing(round)]
    begins = not round.observed.view.begun and not any(True for _ in round.among(*LIVING, Phase.DRAINING))
    lacks = any(isinstance(choice, Shortage) for _, choice in choices)
    if begins and lacks and not round.desired.partial:
        choices = [(pool, _held_back(choice)) for pool, choice in choices if isinstance(choice, Shortage)]
    lacking = {pool.name for pool, choice in choices if isinstance(choice, Shortage)}
    moving = _moving(round)
    for pool, chosen in choices:
        choice = _unless_old_would_stop(round, pool, chosen, lacking)
        if isinstance(choice, _Start | _MakeRoom) or choice == _Wait():
            moving.add(pool.name)
        match choice:
            case _Start(place=place) if not round.backs_off(pool):
                round.start(pool, place)
            case _MakeRoom(victims=victims) if not round.backs_off(pool):
                for victim in victims:
                    release(round, victim, _why_room(round, victim, pool))
            case Shortage() as shortage:
                round.shortages.append(shortage)
            case _:
                pass
    stuck = {shortage.pool for shortage in round.shortages} - moving
    for pool in round.desired.pools:
        if pool.name in stuck:
            give_way(round, pool)


def _moving(round: Round) -> set[str]:
    """Return the pools of which a replica is on its way in or out."""
    return {replica.id.pool for replica in round.among(Phase.DRAINING, Phase.STOPPING, *COMING)}


def _missing(round: Round) -> Iterator[PoolWish]:
    """Yield a pool for every replica that it lacks, in the order in which they get their places."""
    turns = [
        (number, index)
        for index, pool in enumerate(round.desired.pools)
        for number in range(len(round.current(pool, *LIVING)), pool.replicas)
    ]
    for _, index in sorted(turns):
        yield round.desired.pools[index]


@dataclass(slots=True)
class _Ground:
    """Devices and who may have them.

    ``open``: on nodes where something may start. Of them ``free``: nobody's; ``soon``: of replicas that end. ``shut``:
    nobody's, on cordoned nodes. ``given``: promised in this round. ``places``: of each pool's replicas, those promised
    among them. ``changing``: pools of which a replica is on its way in or out.
    """

    open: frozenset[DeviceRef]
    free: frozenset[DeviceRef]
    soon: frozenset[DeviceRef]
    shut: frozenset[DeviceRef]
    changing: set[str]
    held: tuple[Replica, ...]
    given: set[DeviceRef] = field(default_factory=set)
    places: dict[str, list[ReplicaPlace]] = field(default_factory=dict)

    @classmethod
    def of(cls, round: Round) -> _Ground:
        """Return the ground of a round."""
        there = round.open_devices()
        used = frozenset(seen.device for seen in round.observed.ranks)
        ending = list(round.among(Phase.DRAINING, Phase.STOPPING, Phase.BROKEN))
        return cls(
            open=there,
            free=there - used,
            soon=there & frozenset(device for replica in ending for device in replica.devices),
            shut=frozenset(round.observed.topology.devices()) - there - used,
            changing=_moving(round),
            held=tuple(replica for replica in surplus(round) if is_held(round, replica)),
            places={
                pool.name: [replica.place for replica in round.current(pool, *LIVING)] for pool in round.desired.pools
            },
        )


def _choose(round: Round, ground: _Ground, pool: PoolWish) -> _Choice:
    changing = pool.name in ground.changing
    # Whatever comes of it, until this replica serves no other old one makes room.
    ground.changing.add(pool.name)
    found = _fit(round, ground, pool, ground.free)
    if isinstance(found, ReplicaPlace):
        return _Start(place=found)
    room = ground.free | ground.soon
    found = _fit(round, ground, pool, room)
    if isinstance(found, ReplicaPlace):
        return _Wait()
    victims: list[Replica] = []
    for victim in _candidates(round, ground, pool):
        if not _may_make_room(round, pool, victim, victims):
            continue
        victims.append(victim)
        room |= victim.devices & ground.open
        found = _fit(round, ground, pool, room)
        if isinstance(found, ReplicaPlace):
            devices = frozenset(found.devices)
            # One at a time: the others serve meanwhile, and all of them if the new generation does not come up.
            if changing:
                return _Wait(turn=True)
            return _MakeRoom(victims=tuple(victim for victim in victims if victim.devices & devices))
    return _because_of_cordons(round, ground, pool, room, found)


def _candidates(round: Round, ground: _Ground, pool: PoolWish) -> list[Replica]:
    """Return the replicas that may make room for a pool, those first that nobody asked to keep."""
    ours = [replica for replica in old(round, pool) if replica not in ground.held]
    return [*ground.held, *sorted(ours, key=lambda replica: _only_cordoned(round, pool, replica))]


def _only_cordoned(round: Round, pool: PoolWish, replica: Replica) -> bool:
    """Whether a replica is as wanted but for its node: nobody has asked for another in its place at any price."""
    mine = replica.id.pool == pool.name and replica.spec.generation == pool.generation
    return mine and not round.is_leaving(replica)


def _may_make_room(round: Round, pool: PoolWish, victim: Replica, victims: list[Replica]) -> bool:
    if not _only_cordoned(round, pool, victim):
        return True
    first = not any(_only_cordoned(round, pool, other) for other in victims)
    return first and any(other not in victims for other in serving_beside(round, victim))


def _because_of_cordons(
    round: Round, ground: _Ground, pool: PoolWish, room: frozenset[DeviceRef], found: Shortage
) -> Shortage:
    """Return a shortage, with the cordoned nodes in its words if there would be room on them."""
    cordoned = round.desired.cordoned
    if not cordoned:
        return found
    own = [device for replica in old(round, pool) for device in replica.devices if device.node in cordoned]
    there = round.policy.assign(
        round.observed.topology,
        (room | ground.shut | frozenset(own)) - ground.given,
        pool.degrees,
        pool.constraint,
        pool=pool.name,
        others=ground.places[pool.name],
    )
    if isinstance(there, Shortage):
        return found
    nodes = ", ".join(sorted({device.node for device in there.devices} & cordoned))
    return replace(found, why=f"{found.why}; there would be room if {nodes} were not cordoned")


def _fit(round: Round, ground: _Ground, pool: PoolWish, devices: frozenset[DeviceRef]) -> ReplicaPlace | Shortage:
    """Find a place for a replica, and promise it."""
    found = round.policy.assign(
        round.observed.topology,
        devices - ground.given,
        pool.degrees,
        pool.constraint,
        pool=pool.name,
        others=ground.places[pool.name],
    )
    if isinstance(found, ReplicaPlace):
        ground.given.update(found.devices)
        ground.places[pool.name].append(found)
    return found


def _unless_old_would_stop(round: Round, pool: PoolWish, choice: _Choice, lacking: set[str]) -> _Choice:
    """Return a choice, or why not: an old model that serves does not make room for a new one that could not."""
    if isinstance(choice, _MakeRoom):
        without = [partner.name for partner in partners(round, pool) if partner.name in lacking]
        held = [str(victim.id) for victim in choice.victims if is_held(round, victim)]
        if without and held:
            why = f"{', '.join(held)} would have to make room, and serves on because pool {without[0]} finds no place"
            return Shortage(pool=pool.name, needed=pool.degrees.ranks, found=0, why=why)
    return choice


def _why_room(round: Round, victim: Replica, pool: PoolWish) -> str:
    if victim.id.pool == pool.name and victim.spec.generation == pool.generation:
        return f"{why_to_go(round, victim)}, and another needs its room"
    return f"it makes room for generation {pool.generation} of pool {pool.name}"


def _held_back(shortage: Shortage) -> Shortage:
    return replace(shortage, why=f"{shortage.why}; nothing was started, because partial is not set")
