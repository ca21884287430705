"""Cordoned nodes and replicas that are to leave, one situation at a time: facts in, actions out."""

from __future__ import annotations

from slipstream.placement.plan import Role
from slipstream.runtime.reconcile.actions import Unroute
from slipstream.runtime.reconcile.desired import Desired
from slipstream.runtime.reconcile.observed import RankState
from slipstream.tests.reconcile.facts import Story, nodes, observed, pool, replica, said, view


def wanted(*pools, cordoned: str = "", leaving: str = "", partial: bool = False) -> Desired:
    return Desired(
        pools=pools, partial=partial, cordoned=frozenset(cordoned.split()), leaving=frozenset(leaving.split())
    )


def test_another_serves_before_a_replica_leaves_a_cordoned_node() -> None:
    p, story, there = pool("p", 2), Story(), nodes("a:1 b:1 c:1")
    first, second = replica("p", 1, "a/0"), replica("p", 2, "b/0", requests=5)
    last, desired = view(1, [p], first, second), wanted(p, cordoned="b")
    assert said(story.round(desired, observed(there, first, second, last=last)).actions) == ["start p-3 on c/0"]
    third = replica("p", 3, "c/0")
    seen = observed(there, first, second, third.loading, last=last)
    assert said(story.round(desired, seen).actions) == []
    decision = story.round(desired, observed(there, first, second, third, last=last))
    assert said(decision.actions) == ["view 2: p-1 p-3", "unroute p-2"]
    (unroute,) = (action for action in decision.actions if isinstance(action, Unroute))
    assert unroute.why == "node b is cordoned"
    last = view(2, [p], first, third)
    drained = replica("p", 2, "b/0").driven(admitting=False)
    assert said(story.round(desired, observed(there, first, drained, third, last=last)).actions) == ["stop p-2 0"]
    decision = story.round(desired, observed(there, first, third, last=last))
    assert said(decision.actions) == [] and not decision.shortages


def test_a_named_replica_is_replaced_wherever_there_is_room() -> None:
    p, there = pool("p", 1), nodes("a:2")
    first = replica("p", 1, "a/0")
    desired, last = wanted(p, leaving="p-1 q-9"), view(1, [p], first)
    story = Story()
    assert said(story.round(desired, observed(there, first, last=last)).actions) == ["start p-2 on a/1"]
    second = replica("p", 2, "a/1")
    decision = story.round(desired, observed(there, first, second, last=last))
    assert said(decision.actions) == ["view 2: p-2", "unroute p-1"]
    assert next(action.why for action in decision.actions if isinstance(action, Unroute)) == "it is named as leaving"


def test_without_room_a_named_replica_goes_first_and_another_takes_its_device() -> None:
    p, story, there = pool("p", 1), Story(), nodes("a:1")
    first = replica("p", 1, "a/0")
    desired = wanted(p, leaving="p-1")
    decision = story.round(desired, observed(there, first, last=view(1, [p], first)))
    assert said(decision.actions) == ["view 2:", "unroute p-1"] and not decision.shortages
    last = view(2, [p])
    seen = observed(there, first.driven(admitting=False), last=last)
    assert said(story.round(desired, seen).actions) == ["stop p-1 0"]
    assert said(story.round(desired, observed(there, last=last, incarnation=1)).actions) == ["start p-2 on a/0"]


def test_a_named_replica_goes_even_if_none_can_take_its_place() -> None:
    p, story = pool("p", 1), Story()
    first = replica("p", 1, "a/0")
    desired = wanted(p, leaving="p-1", cordoned="a")
    decision = story.round(desired, observed(nodes("a:1"), first, last=view(1, [p], first)))
    assert said(decision.actions) == ["view 2:", "unroute p-1"]
    assert "there would be room if a were not cordoned" in decision.shortages[0].why


def test_without_room_cordoned_replicas_go_one_at_a_time_and_the_last_serves_on() -> None:
    p, story, there = pool("p", 3), Story(), nodes("a:3")
    first, second, third = (replica("p", index + 1, f"a/{index}") for index in range(3))
    desired, last = wanted(p, cordoned="a"), view(1, [p], first, second, third)
    decision = story.round(desired, observed(there, first, second, third, last=last))
    assert said(decision.actions) == ["view 2: p-1 p-2", "unroute p-3"]
    assert len(decision.shortages) == 3
    last = view(2, [p], first, second)
    drains = third.driven(admitting=False, requests=1)
    assert said(story.round(desired, observed(there, first, second, drains, last=last)).actions) == []
    decision = story.round(desired, observed(there, first, second, last=last, incarnation=3))
    assert said(decision.actions) == ["view 3: p-1", "unroute p-2"]
    decision = story.round(desired, observed(there, first, last=view(3, [p], first), incarnation=3))
    assert said(decision.actions) == []
    assert decision.shortages[0].why == (
        "1 devices are needed and 0 are free on nodes that the pool may use; there would be room if a were not "
        "cordoned; p-1 serves on, though node a is cordoned: the pool has no other that serves"
    )
    # Uncordoned, what is left is as wanted, and the others come back.
    decision = story.round(wanted(p), observed(there, first, last=view(3, [p], first), incarnation=3))
    assert said(decision.actions) == ["start p-4 on a/1", "start p-5 on a/2"] and not decision.shortages


def test_what_is_missing_for_other_reasons_is_not_put_down_to_cordons() -> None:
    p = pool("p", 1, tp=4)
    decision = Story().round(wanted(p, cordoned="a"), observed(nodes("a:1 b:2")))
    assert said(decision.actions) == ["view 1:"]
    assert "cordoned" not in decision.shortages[0].why


def test_a_deployment_that_cannot_begin_says_which_node_is_cordoned() -> None:
    p = pool("p", 2)
    decision = Story().round(wanted(p, cordoned="a"), observed(nodes("a:1 b:1")))
    assert said(decision.actions) == ["view 1:"]
    assert decision.shortages[0].why.endswith(
        "there would be room if a were not cordoned; nothing was started, because partial is not set"
    )
    decision = Story().round(wanted(p, cordoned="a", partial=True), observed(nodes("a:1 b:1")))
    assert said(decision.actions) == ["view 1:", "start p-1 on b/0"]


def test_what_comes_up_on_a_cordoned_node_ends_at_once() -> None:
    p, story, there = pool("p", 1), Story(), nodes("a:1 b:1")
    comes, last = replica("p", 1, "a/0").loading, view(1, [p])
    decision = story.round(wanted(p, cordoned="a"), observed(there, comes, last=last))
    assert said(decision.actions) == ["stop p-1 0", "start p-2 on b/0"]


def test_a_cordoned_node_that_dies_is_any_node_that_dies() -> None:
    p, across = pool("p", 1, tp=2), replica("p", 1, "a/0 b/0")
    last = view(1, [p], across)
    lost = across.states(RankState.LOST)
    decision = Story().round(wanted(p, cordoned="a"), observed(nodes("b:1 c:2"), lost, last=last))
    assert said(decision.actions) == ["view 2:", "stop p-1 1", "start p-2 on c/0 c/1"]


def test_the_last_that_serves_makes_no_room_for_another_and_one_of_two_does() -> None:
    p, there = pool("p", 2, tp=2), nodes("a:2 b:2")
    first, second = replica("p", 1, "a/0 b/0"), replica("p", 2, "a/1 b/1")
    desired, story = wanted(p, cordoned="a"), Story()
    decision = story.round(desired, observed(there, first, second, last=view(1, [p], first, second)))
    assert said(decision.actions) == ["view 2: p-1", "unroute p-2"]
    # b has two devices; one is free now, the other is the last replica's.
    decision = story.round(desired, observed(there, first, last=view(2, [p], first), incarnation=2))
    assert said(decision.actions) == [] and "p-1 serves on" in decision.shortages[0].why
    # Named, it goes.
    desired = wanted(p, cordoned="a", leaving="p-1")
    decision = story.round(desired, observed(there, first, last=view(2, [p], first), incarnation=2))
    assert said(decision.actions) == ["view 3:", "unroute p-1"]


def test_with_a_new_model_the_old_one_stays_where_it_may() -> None:
    p, d = pool("p", 1, role=Role.PREFILL, model=2), pool("d", 1, role=Role.DECODE, model=2)
    on_a, on_b = (replica("p", index, place, role=Role.PREFILL) for index, place in ((1, "a/0"), (2, "b/0")))
    old_d = replica("d", 3, "b/1", role=Role.DECODE)
    new_p = replica("p", 4, "b/2", role=Role.PREFILL, model=2)
    there, last = nodes("a:1 b:4"), view(1, [p, d], on_a, on_b, old_d, new_p)
    seen = observed(there, on_a, on_b, old_d, new_p.driven(), last=last)
    decision = Story().round(wanted(p, d, cordoned="a"), seen)
    assert "unroute p-1" in said(decision.actions) and "unroute p-2" not in said(decision.actions)


def test_a_prefill_replica_that_is_named_goes_though_the_new_model_cannot_serve_yet() -> None:
    p, d = pool("p", 1, role=Role.PREFILL, model=2), pool("d", 1, role=Role.DECODE, model=2)
    old_p, old_d = replica("p", 1, "a/0", role=Role.PREFILL), replica("d", 2, "a/1", role=Role.DECODE)
    new_p = replica("p", 3, "a/2", role=Role.PREFILL, model=2)
    new_d = replica("d", 4, "a/3", role=Role.DECODE, model=2).loading
    there, last = nodes("a:4"), view(1, [p, d], old_p, old_d, new_p)
    seen = observed(there, old_p, old_d, new_p, new_d, last=last)
    assert said(Story().round(wanted(p, d), seen).actions) == []
    assert said(Story().round(wanted(p, d, leaving="p-1"), seen).actions) == ["view 2: d-2 p-3", "unroute p-1"]
