"""What outlives the controller: numbers are claimed once, the highest is remembered, the rest goes."""

from __future__ import annotations

from dataclasses import replace

from slipstream.placement.plan import Degrees, Role
from slipstream.placement.topology import DeviceRef
from slipstream.runtime.controller.ledger import Deployment, Gang, Ledger
from slipstream.runtime.reconcile.desired import Desired, Generation
from slipstream.runtime.reconcile.observed import ReplicaId, ReplicaSpec
from slipstream.runtime.reconcile.views import View
from slipstream.tests.fakes.memory_store import MemoryStore


def gang(incarnation: int) -> Gang:
    id = ReplicaId(pool="p", incarnation=incarnation)
    spec = ReplicaSpec(id=id, role=Role.MIXED, generation=Generation(), degrees=Degrees())
    return Gang(spec=spec, devices=(DeviceRef(node="a", index=0),), numbers=("f00",))


def test_of_two_controllers_one_gets_a_number() -> None:
    store = MemoryStore()
    first, second = Ledger(store, deployment="d"), Ledger(store, deployment="d")
    assert first.claim_gang(gang(1)) and not second.claim_gang(gang(1))
    assert second.claim_gang(gang(5)) and not first.claim_gang(gang(3))
    assert first.claim_view(View(epoch=1)) and not second.claim_view(View(epoch=1, begun=True))
    assert second.view() == View(epoch=1)


def test_the_highest_number_is_remembered_when_everything_is_gone() -> None:
    ledger = Ledger(MemoryStore(), deployment="d")
    for number in (1, 2, 13):
        ledger.claim_gang(gang(number))
        ledger.keep_gang(replace(gang(number), gone=True))
    assert list(ledger.gangs()) == [13]
    assert not ledger.claim_gang(gang(13)) and ledger.claim_gang(gang(14))


def test_only_the_last_view_and_wish_are_kept() -> None:
    store = MemoryStore()
    ledger = Ledger(store, deployment="d")
    assert ledger.deployment() == Deployment() and ledger.view() == View()
    for number in range(1, 20):
        assert ledger.claim_view(View(epoch=number))
        assert ledger.keep_deployment(Deployment(desired=Desired(partial=bool(number % 2))))
    assert ledger.view().epoch == 19 and ledger.deployment().desired.partial
    assert len(store.values) == 2


def test_deployments_do_not_meet() -> None:
    store = MemoryStore()
    one, other = Ledger(store, deployment="one"), Ledger(store, deployment="one-more")
    one.claim_gang(gang(3))
    other.claim_gang(gang(1))
    one.forget()
    assert not one.gangs() and list(other.gangs()) == [1]
