"""Values travel as JSON and come back equal; what does not fit is refused, with the place."""

from __future__ import annotations

import json

import pytest

from slipstream.placement.plan import Constraint, Degrees, Role
from slipstream.placement.topology import DeviceRef
from slipstream.runtime.controller.launch import Launch, RankOrder, ranks_per_host
from slipstream.runtime.controller.ledger import Deployment, Gang
from slipstream.runtime.controller.links import LinkFigures, MeasuredLink, MeasuredLinks, UnmeasuredLink
from slipstream.runtime.controller.rank_keeper import KeeperReport
from slipstream.runtime.controller.records import BadRecord, from_json, to_json
from slipstream.runtime.reconcile.desired import Desired, Generation, Limits, PoolWish
from slipstream.runtime.reconcile.observed import DriverSeen, RankState, ReplicaId, ReplicaSpec
from slipstream.runtime.reconcile.views import PoolView, ReplicaView, View

ID = ReplicaId(pool="de-code", incarnation=7)
SPEC = ReplicaSpec(id=ID, role=Role.DECODE, generation=Generation(model=2, cut=3), degrees=Degrees(pp=2, tp=4))
POOL = PoolWish(
    name="de-code",
    role=Role.DECODE,
    degrees=SPEC.degrees,
    replicas=2,
    generation=SPEC.generation,
    constraint=Constraint(device_types=frozenset({"a100", "h100"}), labels={"rack": "b"}, spread="host"),
)
VALUES = [
    SPEC,
    Limits(drain_s=5),
    View(
        epoch=4,
        begun=True,
        pools=(PoolView(name="p", role=Role.MIXED, wanted=0),),
        replicas=(
            ReplicaView(
                replica=str(ID), pool="p", role=Role.MIXED, generation=Generation(), degrees=Degrees(), address="x:1"
            ),
        ),
    ),
    Gang(spec=SPEC, devices=(DeviceRef(node="a", index=3),), numbers=("f00",), stopped=frozenset({1, 0})),
    Deployment(desired=Desired(pools=(POOL,), partial=True), launches={"p": Launch(environment={"A": "b"})}),
    RankOrder(spec=SPEC, rank=0, address="10.0.0.1", device=2, launch=Launch(arguments=("--listen", "{address}:0"))),
    KeeperReport(state=RankState.READY, driver=DriverSeen(replica=ID, address="x:1", proven=True, admitting=False)),
    KeeperReport(state=RankState.FAILED, detail="why"),
    Desired(cordoned=frozenset({"a", "b"}), leaving=frozenset({"p-3"})),
    MeasuredLinks(
        began_s=1.5,
        took_s=2,
        addresses={"a": "10.0.0.1"},
        links=(
            MeasuredLink(
                source="a", target="b", figures=LinkFigures(bytes_per_s=1e9, round_trip_s=1e-4, round_trip_p99_s=1e-3)
            ),
        ),
        missing=(UnmeasuredLink(source="b", target="a", why="it does not answer"),),
    ),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_comes_back(value) -> None:
    text = to_json(value)
    assert from_json(type(value), text) == value
    assert "\n" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": "0"}, r"RankOrder.rank: '0' is not what belongs there"),
        ({"rank": None}, r"RankOrder.rank: None is not"),
        ({"color": 1}, r"RankOrder: there is no color"),
        ({"spec": {"id": {"pool": "p"}}}, r"RankOrder.spec.id: .*incarnation"),
        ({"launch": {"arguments": ["a", 3]}}, r"RankOrder.launch.arguments\[1\]: 3 is not"),
    ],
)
def test_what_does_not_fit_is_refused(change, message: str) -> None:
    order = RankOrder(spec=SPEC, rank=0, address="10.0.0.1", device=2, launch=Launch())
    plain = {**json.loads(to_json(order)), **change}
    with pytest.raises(BadRecord, match=message):
        from_json(RankOrder, json.dumps(plain))


def test_text_that_is_no_json_or_no_member_is_refused() -> None:
    with pytest.raises(BadRecord, match="no JSON"):
        from_json(Limits, "{")
    with pytest.raises(BadRecord, match="'odd' is not a valid RankState"):
        from_json(KeeperReport, '{"state": "odd"}')
    with pytest.raises(BadRecord, match="tp must be at least 1"):
        from_json(Degrees, '{"tp": 0}')


def test_an_order_has_its_own_in_the_arguments() -> None:
    launch = Launch(arguments=("--listen", "{address}:0", "--name", "{replica}/{rank}@{device}", "{other}"))
    order = RankOrder(spec=SPEC, rank=5, address="10.0.0.9", device=2, launch=launch)
    assert order.arguments() == ("--listen", "10.0.0.9:0", "--name", "de-code-7/5@2", "{other}")
    hosts = RankOrder(
        spec=SPEC, rank=0, address="h", device=0, launch=Launch(arguments=("{ranks_on_host}/{ranks_per_host}",)),
        ranks_on_host=4, ranks_per_host=2,
    )  # fmt: skip
    assert hosts.arguments() == ("4/2",)


@pytest.mark.parametrize(
    ("nodes", "expected"), [("a", 1), ("aaaa", 4), ("aabb", 2), ("aaab", 1), ("aabbbb", 2), ("abab", 1), ("aaaabb", 2)]
)
def test_into_what_pieces_ranks_can_be_cut_by_their_hosts(nodes: str, expected: int) -> None:
    assert ranks_per_host([DeviceRef(node=node, index=index) for index, node in enumerate(nodes)]) == expected


def test_a_replica_is_named_so_that_it_can_be_read() -> None:
    assert ReplicaId.parse(str(ID)) == ID
