"""The controller's decisions, one situation at a time: facts in, actions out."""

from __future__ import annotations

from slipstream.placement.plan import Role
from slipstream.runtime.reconcile.actions import StopRank
from slipstream.runtime.reconcile.desired import Desired
from slipstream.runtime.reconcile.observed import RankState
from slipstream.tests.reconcile.facts import LIMITS, Story, nodes, observed, pool, replica, said, view


def wanted(*pools, partial: bool = False) -> Desired:
    return Desired(pools=pools, partial=partial)


# ------------------------------------------------------------------ starting


def test_gangs_start_whole_each_rank_on_its_device() -> None:
    p, q = pool("p", 2, tp=2), pool("q", 1)
    decision = Story().round(wanted(p, q), observed(nodes("a:2 b:4")))
    assert said(decision.actions) == [
        "view 1:",
        "start p-1 on a/0 a/1",
        "start q-2 on b/0",
        "start p-3 on b/1 b/2",
    ]
    assert not decision.shortages


def test_a_deployment_begins_whole_or_not_at_all() -> None:
    p, q = pool("p", 1), pool("q", 2, tp=2)
    decision = Story().round(wanted(p, q), observed(nodes("a:4")))
    assert said(decision.actions) == ["view 1:"]
    (shortage,) = decision.shortages
    assert (shortage.pool, shortage.needed, shortage.found) == ("q", 2, 1)
    assert "nothing was started, because partial is not set" in shortage.why


def test_what_fits_is_started_when_the_file_allows_it_and_pools_take_turns() -> None:
    p, q = pool("p", 4), pool("q", 1, tp=2)
    decision = Story().round(wanted(p, q, partial=True), observed(nodes("a:4")))
    assert said(decision.actions)[1:] == ["start p-1 on a/0", "start q-2 on a/1 a/2", "start p-3 on a/3"]
    assert [shortage.pool for shortage in decision.shortages] == ["p", "p"]


def test_once_it_has_served_what_fits_is_repaired() -> None:
    p = pool("p", 3)
    last = view(4, [p])
    decision = Story().round(wanted(p), observed(nodes("a:2"), last=last, incarnation=7))
    assert said(decision.actions) == ["start p-8 on a/0", "start p-9 on a/1"]
    assert len(decision.shortages) == 1


def test_what_comes_up_is_waited_for_and_told_of_when_a_token_has_come_out() -> None:
    p, story, there = pool("p", 1, tp=2), Story(), nodes("a:2")
    up = replica("p", 1, "a/0 a/1")
    last = view(1, [p])
    for facts in (up.loading, up.states(RankState.LOADING), up.silent, up.driven(proven=False)):
        assert said(story.round(wanted(p), observed(there, facts, last=last)).actions) == []
    assert said(story.round(wanted(p), observed(there, up, last=last)).actions) == ["view 2: p-1"]


def test_what_does_not_come_up_in_time_ends_and_the_pauses_grow_to_a_bound() -> None:
    p, story, there = pool("p", 1), Story(), nodes("a:1")
    last, now, pauses = view(1, [p]), 0.0, []
    for incarnation in range(1, 8):
        started = replica("p", incarnation, "a/0").loading.states(RankState.STARTING)
        story.round(wanted(p), observed(there, started, last=last), now_s=now)
        now += LIMITS.starting_s
        decision = story.round(wanted(p), observed(there, started, last=last), now_s=now)
        assert said(decision.actions) == [f"stop p-{incarnation} 0"]
        failed = now
        gone = observed(there, last=last, incarnation=incarnation)
        while not said(story.round(wanted(p), gone, now_s=now).actions):
            now += 0.5
        pauses.append(now - failed)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0]


def test_a_replica_that_fails_at_once_is_paused_for_and_one_that_lived_long_is_not() -> None:
    p, there, last = pool("p", 1), nodes("a:1"), view(1, [pool("p", 1)], replica("p", 1, "a/0"))
    for lived_s, waits in ((LIMITS.stable_s - 1, True), (LIMITS.stable_s, False)):
        story = Story()
        story.round(wanted(p), observed(there, replica("p", 1, "a/0"), last=last))
        decision = story.round(wanted(p), observed(there, last=last, incarnation=1), now_s=lived_s)
        assert said(decision.actions) == ["view 2:"] + ([] if waits else ["start p-2 on a/0"])


# ------------------------------------------------------------------ a new controller, and what is lost


def test_a_new_controller_takes_over_what_lives() -> None:
    p = pool("p", 2)
    first, second = replica("p", 3, "a/0", requests=4), replica("p", 5, "b/0").silent
    seen = observed(nodes("a:1 b:1"), first, second, last=view(9, [p], first, second))
    decision = Story().round(wanted(p), seen)
    assert said(decision.actions) == []


def test_a_driver_that_nobody_has_heard_of_is_not_told_of() -> None:
    p = pool("p", 1)
    decision = Story().round(wanted(p), observed(nodes("a:1"), replica("p", 3, "a/0").silent, last=view(9, [p])))
    assert said(decision.actions) == []


def test_a_lost_rank_takes_its_replica_along_and_another_one_waits_until_the_devices_are_free() -> None:
    p, story, there = pool("p", 1, tp=2), Story(), nodes("a:2")
    whole = replica("p", 1, "a/0 a/1")
    last = view(1, [p], whole)
    story.round(wanted(p), observed(there, whole, last=last))
    broken = whole.states(RankState.READY, RankState.FAILED)
    decision = story.round(wanted(p), observed(there, broken, last=last), now_s=60.0)
    assert said(decision.actions) == ["view 2:", "stop p-1 0", "stop p-1 1"]
    stopped = next(action for action in decision.actions if isinstance(action, StopRank))
    assert stopped.why == "rank 1 failed: its process has ended"
    last = view(2, [p])
    seen = observed(there, whole.without(1), last=last)
    assert said(story.round(wanted(p), seen, now_s=61.0).actions) == ["stop p-1 0"]
    seen = observed(there, last=last, incarnation=1)
    assert said(story.round(wanted(p), seen, now_s=62.0).actions) == ["start p-2 on a/0 a/1"]


def test_a_node_that_is_not_seen_is_replaced_and_its_other_ranks_end() -> None:
    p, across = pool("p", 1, tp=2), replica("p", 1, "a/0 b/0")
    last = view(1, [p], across)
    for listed in (across.states(RankState.READY, RankState.LOST), across.without(1)):
        decision = Story().round(wanted(p), observed(nodes("a:1 c:2"), listed, last=last))
        assert said(decision.actions) == ["view 2:", "stop p-1 0", "start p-2 on c/0 c/1"]


def test_what_comes_back_from_behind_a_cut_is_used_again_or_drained() -> None:
    p, there = pool("p", 1), nodes("a:1 b:1")
    cut, other = replica("p", 1, "a/0"), replica("p", 2, "b/0")
    for replaced in (other.loading, other):
        story = Story()
        last = view(1, [p], cut)
        lost = cut.states(RankState.LOST).silent
        assert said(story.round(wanted(p), observed(nodes("b:1"), lost, last=last)).actions) == [
            "view 2:",
            "start p-2 on b/0",
        ]
        last = view(3, [p], replaced) if replaced is other else view(2, [p])
        decision = story.round(wanted(p), observed(there, cut, replaced, last=last), now_s=5.0)
        if replaced is other:
            # Both serve: the younger is let go of.
            assert said(decision.actions) == ["view 4: p-1", "unroute p-2"]
        else:
            assert said(decision.actions) == ["view 3: p-1", "stop p-2 0"]


def test_nothing_is_placed_on_a_device_that_any_rank_holds() -> None:
    p = pool("p", 1)
    old = replica("gone", 1, "a/0", requests=1).driven(admitting=False)
    decision = Story().round(wanted(p), observed(nodes("a:1"), old, last=view(1, [p])))
    assert said(decision.actions) == [] and not decision.shortages


# ------------------------------------------------------------------ fewer, others, none


def test_a_drain_is_counted_and_ends_when_nothing_is_left() -> None:
    p, story, there = pool("p", 1), Story(), nodes("a:1 b:1")
    busy, idle = replica("p", 1, "a/0", requests=3), replica("p", 2, "b/0", transfers=1)
    last = view(1, [p], busy, idle)
    decision = story.round(wanted(p), observed(there, busy, idle, last=last))
    assert said(decision.actions) == ["view 2: p-1", "unroute p-2"]
    last = view(2, [p], busy)
    steps = [
        ({"admitting": True, "transfers": 0}, ["unroute p-2"]),
        ({"admitting": False, "transfers": 1}, []),
        ({"admitting": False, "transfers": 0, "grants": 2}, []),
        ({"admitting": False, "transfers": 0, "requests": 1}, []),
        ({"admitting": False, "transfers": 0}, ["stop p-2 0"]),
    ]
    for changes, actions in steps:
        seen = observed(there, busy, idle.driven(**changes), last=last)
        assert said(story.round(wanted(p), seen, now_s=1.0).actions) == actions


def test_a_drain_has_a_deadline_and_says_what_was_left() -> None:
    p, story, there = pool("p", 0), Story(), nodes("a:1")
    busy = replica("p", 1, "a/0", requests=3, grants=1)
    story.round(wanted(p), observed(there, busy, last=view(1, [p], busy)))
    drains = busy.driven(admitting=False)
    last = view(2, [p])
    assert said(story.round(wanted(p), observed(there, drains, last=last), now_s=29.9).actions) == []
    decision = story.round(wanted(p), observed(there, drains, last=last), now_s=30.0)
    assert said(decision.actions) == ["stop p-1 0"]
    (stop,) = decision.actions
    assert (
        isinstance(stop, StopRank) and stop.why == "its 30 s to drain are over; left: 3 requests, 1 grants, 0 transfers"
    )


def test_a_new_controller_goes_on_with_a_drain() -> None:
    p, there = pool("p", 1), nodes("a:1 b:1")
    serves, drains = replica("p", 1, "a/0"), replica("p", 2, "b/0", requests=1).driven(admitting=False)
    last, story = view(5, [p], serves), Story()
    assert said(story.round(wanted(p), observed(there, serves, drains, last=last), now_s=100.0).actions) == []
    decision = story.round(wanted(p), observed(there, serves, drains, last=last), now_s=130.0)
    assert said(decision.actions) == ["stop p-2 0"]


def test_what_comes_up_and_is_too_many_ends_at_once() -> None:
    p, story = pool("p", 1), Story()
    serves, comes = replica("p", 1, "a/0", requests=9), replica("p", 2, "b/0").loading
    decision = story.round(wanted(p), observed(nodes("a:1 b:1"), serves, comes, last=view(1, [p], serves)))
    assert said(decision.actions) == ["stop p-2 0"]


def test_without_pools_everything_drains_and_ends() -> None:
    story, there = Story(), nodes("a:1")
    serves = replica("p", 1, "a/0")
    decision = story.round(wanted(), observed(there, serves, last=view(1, [pool()], serves)))
    assert said(decision.actions) == ["view 2:", "unroute p-1"]
    last = view(2, [])
    decision = story.round(wanted(), observed(there, serves.driven(admitting=False), last=last))
    assert said(decision.actions)[-1:] == ["stop p-1 0"]


# ------------------------------------------------------------------ a new generation


def test_an_update_with_room_starts_the_new_before_the_old_goes() -> None:
    p, story, there = pool("p", 1, model=2), Story(), nodes("a:2")
    old, new = replica("p", 1, "a/0"), replica("p", 2, "a/1", model=2)
    last = view(1, [p], old)
    assert said(story.round(wanted(p), observed(there, old, last=last)).actions) == ["start p-2 on a/1"]
    assert said(story.round(wanted(p), observed(there, old, new.loading, last=last)).actions) == []
    decision = story.round(wanted(p), observed(there, old, new, last=last))
    assert said(decision.actions) == ["view 2: p-2", "unroute p-1"]


def test_an_update_without_room_takes_one_at_a_time_and_stops_there_if_the_new_one_fails() -> None:
    p, story, there = pool("p", 2, model=2), Story(), nodes("a:2")
    first, second = replica("p", 1, "a/0"), replica("p", 2, "a/1")
    last = view(1, [p], first, second)
    decision = story.round(wanted(p), observed(there, first, second, last=last))
    assert said(decision.actions) == ["view 2: p-1", "unroute p-2"] and not decision.shortages
    last = view(2, [p], first)
    drained = second.driven(admitting=False)
    assert said(story.round(wanted(p), observed(there, first, drained, last=last)).actions) == ["stop p-2 0"]
    seen = observed(there, first, last=last, incarnation=2)
    assert said(story.round(wanted(p), seen).actions) == ["start p-3 on a/1"]
    new = replica("p", 3, "a/1", model=2)
    for facts in (new.loading, new.loading.states(RankState.FAILED)):
        assert "p-1" not in " ".join(said(story.round(wanted(p), observed(there, first, facts, last=last)).actions))
    seen = observed(there, first, replica("p", 4, "a/1", model=2), last=last)
    assert said(story.round(wanted(p), seen).actions) == ["view 3: p-1 p-4"]
    # One of two is new now, and the other old one may go.
    last = view(3, [p], first, replica("p", 4, "a/1", model=2))
    seen = observed(there, first, replica("p", 4, "a/1", model=2), last=last)
    # The pause after the failure holds for making room too.
    assert said(story.round(wanted(p), seen).actions) == []
    assert said(story.round(wanted(p), seen, now_s=1.0).actions) == ["view 4: p-4", "unroute p-1"]


def test_the_last_old_prefill_stays_until_a_new_decode_replica_serves() -> None:
    p, d = pool("p", 1, role=Role.PREFILL, model=2), pool("d", 1, role=Role.DECODE, model=2)
    old_p, old_d = replica("p", 1, "a/0", role=Role.PREFILL), replica("d", 2, "a/1", role=Role.DECODE)
    new_p = replica("p", 3, "a/2", role=Role.PREFILL, model=2)
    new_d = replica("d", 4, "a/3", role=Role.DECODE, model=2)
    there, story, last = nodes("a:4"), Story(), view(1, [p, d], old_p, old_d, new_p)
    assert said(story.round(wanted(p, d), observed(there, old_p, old_d, new_p, new_d.loading, last=last)).actions) == []
    decision = story.round(wanted(p, d), observed(there, old_p, old_d, new_p, new_d, last=last))
    assert said(decision.actions) == ["view 2: p-3 d-4", "unroute p-1", "unroute d-2"]


def test_room_is_made_only_if_the_new_one_then_fits() -> None:
    p, story = pool("p", 1, tp=4, model=2), Story()
    old = replica("p", 1, "a/0")
    decision = story.round(wanted(p), observed(nodes("a:2"), old, last=view(1, [p], old)))
    assert said(decision.actions) == []
    assert [shortage.needed for shortage in decision.shortages] == [4]
