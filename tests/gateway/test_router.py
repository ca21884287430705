"""Which replicas a request goes to: facts and loads in, routes out."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from slipstream.comm.kv.transfer import Ending
from slipstream.runtime.engine.kv_blocks import chain_digest, root_digest
from slipstream.runtime.gateway.breaker import BreakerSettings
from slipstream.runtime.gateway.router import Router
from slipstream.runtime.gateway.routes import Ask, ReplicaFacts, Route, RouterSettings, Split, Whole
from slipstream.runtime.rpc.engine_client import BlockChanges, EngineLoadReport, HandOffReport

PREFILL = ReplicaFacts(role="prefill", block_size=16, sends_kv=True)
DECODE = ReplicaFacts(role="decode", block_size=16, receives_kv=True)
MIXED = ReplicaFacts(role="mixed", block_size=16)
IDLE = EngineLoadReport(
    running=0, waiting=0, queue_room=100, blocks_total=10_000, blocks_available=10_000, preemptions=0, prefix_hits=0,
    prefix_misses=0, draining=False, prefill_tokens_per_s=1000.0, token_s=0.02,
)  # fmt: skip


def router_of(**replicas: ReplicaFacts) -> Router:
    return joined(None, **replicas)


def joined(settings: RouterSettings | None, /, **replicas: ReplicaFacts) -> Router:
    router = Router(settings, breakers=BreakerSettings(failures=2, first_pause_s=1.0, longest_pause_s=4.0))
    for name, facts in replicas.items():
        router.join(name, facts)
        router.note_load(name, IDLE, 0.0)
    return router


def ask(tokens: int = 1000, first: int = 0, **more: Any) -> Ask:
    values: dict[str, Any] = {"prompt": np.arange(first, first + tokens, dtype=np.int32), "max_tokens": 100, **more}
    return Ask(**values)


def digests(prompt: np.ndarray, blocks: int) -> tuple[bytes, ...]:
    """What an engine names a prompt's blocks."""
    parent, named = root_digest(None, None), []
    for place in range(blocks):
        parent = chain_digest(parent, prompt[16 * place : 16 * (place + 1)].tobytes())
        named.append(parent[:16])
    return tuple(named)


def route_of(router: Router, asked: Ask, now_s: float = 1.0) -> Route:
    found = router.route(asked, now_s)
    assert found is not None
    return found


def pair(router: Router, asked: Ask, now_s: float = 1.0) -> tuple[str, str]:
    route = route_of(router, asked, now_s)
    router.ended(route)
    assert isinstance(route, Split), route
    return route.prefill, route.decode


def alone(router: Router, asked: Ask, now_s: float = 1.0) -> str:
    route = route_of(router, asked, now_s)
    router.ended(route)
    assert isinstance(route, Whole), route
    return route.replica


def test_nobody_serves() -> None:
    assert Router().route(ask(), 0.0) is None
    assert router_of(p=PREFILL).route(ask(), 0.0) is None


def test_a_long_prompt_is_split_and_a_short_one_is_not() -> None:
    router = router_of(p=PREFILL, d=DECODE)
    assert pair(router, ask(1000)) == ("p", "d")
    assert alone(router, ask(100)) == "d"


def test_a_prompt_that_is_mostly_cached_where_it_is_decoded_stays_there() -> None:
    router = router_of(p=PREFILL, d=DECODE)
    asked = ask(1000)
    router.note_blocks("d", BlockChanges(stored=digests(asked.prompt, 60)))
    route = route_of(router, asked)
    assert isinstance(route, Whole)
    assert (route.cost.cached_tokens, route.cost.computed_tokens, route.cost.sent_tokens) == (960, 40, 0)


@pytest.mark.parametrize("why", [{"may_split": False}, {"max_tokens": 1}])
def test_what_one_replica_has_to_do_alone_is_not_split(why: dict[str, Any]) -> None:
    assert alone(router_of(p=PREFILL, d=DECODE), ask(**why)) == "d"


def test_mixed_replicas_compete_with_pairs() -> None:
    router = router_of(p=PREFILL, d=DECODE, m=MIXED)
    router.note_load("p", replace(IDLE, queued_tokens=50_000), 1.0)
    assert alone(router, ask()) == "m"
    router.note_load("p", IDLE, 1.0)
    router.note_load("m", replace(IDLE, queued_tokens=50_000), 1.0)
    assert pair(router, ask()) == ("p", "d")


def test_the_cost_says_what_was_thought() -> None:
    router = joined(RouterSettings(first_link_bytes_per_s=1e6, first_kv_bytes=4000.0), p=PREFILL, d=DECODE)
    router.note_load("p", replace(IDLE, queued_tokens=3000), 1.0)
    cost = route_of(router, ask(1000)).cost
    assert cost.queue_s == pytest.approx(3.0) and cost.compute_s == pytest.approx(1.0)
    assert cost.transfer_s == pytest.approx(4.0 - 1.0), "what the prompt's second does not hide"
    assert cost.sent_tokens == 1000 and cost.total_s > cost.queue_s + cost.compute_s + cost.transfer_s


def test_cached_prefixes_draw_until_the_queue_outweighs_them() -> None:
    router = router_of(p1=PREFILL, p2=PREFILL, d=DECODE)
    asked = ask(1600)
    router.note_blocks("p1", BlockChanges(stored=digests(asked.prompt, 100)))
    for turn in range(4):
        assert pair(router, asked, 100.0 * turn) == ("p1", "d")
    router.note_load("p1", replace(IDLE, queued_tokens=30_000), 400.0)
    assert pair(router, asked, 400.0) == ("p2", "d")


def test_a_hot_prefix_spreads_when_all_ask_at_once() -> None:
    router = router_of(**{f"p{place}": PREFILL for place in range(4)}, d=DECODE)
    asked = ask(1600)
    router.note_blocks("p0", BlockChanges(stored=digests(asked.prompt, 90)))
    went = [route_of(router, asked) for _ in range(60)]
    counts = {name: sum(isinstance(each, Split) and each.prefill == name for each in went) for name in ("p0", "p1")}
    assert counts["p0"] > counts["p1"] > 0, counts


def test_requests_that_are_equal_go_by_turns() -> None:
    router = router_of(p1=PREFILL, p2=PREFILL, d1=DECODE, d2=DECODE)
    pairs = [pair(router, ask(1000, first=10_000 * turn), 1000.0 * turn) for turn in range(4)]
    assert {name for name, _ in pairs[:2]} == {"p1", "p2"} and {name for _, name in pairs[:2]} == {"d1", "d2"}
    assert pairs[:2] == pairs[2:]


def test_load_between_paced_requests_is_not_zero() -> None:
    """KV_FAILURES 14: each request is over before the next comes, and every report says that nothing is there."""
    router = router_of(p1=PREFILL, p2=PREFILL, d=DECODE)
    asked = ask(1024)
    router.note_blocks("p1", BlockChanges(stored=digests(asked.prompt, 1)))
    got = {"p1": 0, "p2": 0}
    for turn in range(60):
        name, _ = pair(router, asked, turn * 1.1)
        got[name] += 1
        for each in got:
            router.note_load(each, IDLE, turn * 1.1 + 1.05)
    # A block of 64 is worth less than what one of two has done lately.
    assert min(got.values()) > 15, got


def test_what_was_sent_counts_until_a_report_can_know_of_it() -> None:
    router = router_of(p1=PREFILL, p2=PREFILL, d=DECODE)
    first = route_of(router, ask(5000), 1.0)
    assert isinstance(first, Split)
    other = {"p1": "p2", "p2": "p1"}[first.prefill]
    # A report that was on its way when the request was sent does not take it away.
    router.note_load(first.prefill, IDLE, 1.01)
    assert [pair(router, ask(600, first=9000), 1.02)[0] for _ in range(3)] == [other] * 3
    router.note_load(first.prefill, replace(IDLE, queued_tokens=4900, waiting=1), 1.2)
    assert [pair(router, ask(600, first=9000), 1.2)[0] for _ in range(3)] == [other] * 3
    router.note_load(first.prefill, IDLE, 6.0)
    assert {pair(router, ask(600, first=9000), 30.0 * turn)[0] for turn in range(1, 5)} == {"p1", "p2"}


def test_a_report_counts_cached_tokens_of_those_that_wait_and_the_router_does_not() -> None:
    router = router_of(p=PREFILL, d=DECODE)
    asked = ask(1600)
    router.note_blocks("p", BlockChanges(stored=digests(asked.prompt, 90)))
    routes = [route_of(router, asked, 1.0) for _ in range(3)]
    router.note_load("p", replace(IDLE, queued_tokens=160 + 2 * 1600, running=1, waiting=2), 2.0)
    assert route_of(router, asked, 2.0).cost.queue_s == pytest.approx((160 + 2 * 160) / 1000)
    for route in routes:
        router.ended(route)


def test_ended_routes_weigh_nothing_and_may_end_twice() -> None:
    router = joined(RouterSettings(recent_weight=0.0), d1=DECODE, d2=DECODE)
    routes = [route_of(router, ask(100), 1.0) for _ in range(6)]
    assert sorted(route.replica for route in routes if isinstance(route, Whole)) == ["d1"] * 3 + ["d2"] * 3
    for route in routes * 2:
        router.ended(route)
    assert route_of(router, ask(100), 1.0).cost.queue_s == 0


@pytest.mark.parametrize(
    "load",
    [
        replace(IDLE, draining=True),
        replace(IDLE, queue_room=0),
        replace(IDLE, blocks_available=10),
        replace(IDLE, running=200, token_s=0.2),
        replace(IDLE, running=256, waiting=40, token_s=0.02),
    ],
    ids=["draining", "queue full", "no blocks", "slow", "no slot"],
)
def test_a_decode_replica_in_trouble_is_left_out(load: EngineLoadReport) -> None:
    router = router_of(p=PREFILL, d1=DECODE, d2=replace(DECODE, max_num_seqs=256))
    router.note_load("d2", load, 1.0)
    assert {pair(router, ask(1000), float(turn))[1] for turn in range(1, 5)} == {"d1"}


def test_what_never_fits_is_not_sent() -> None:
    router = router_of(p=PREFILL, d=DECODE)
    router.note_load("d", replace(IDLE, blocks_total=60, blocks_available=60), 1.0)
    assert router.route(ask(1000), 1.0) is None
    assert router_of(p=PREFILL, d=replace(DECODE, max_model_len=1050)).route(ask(1000), 1.0) is None
    # Where the prompt alone fits, the prefill replica may have it.
    assert pair(router_of(p=replace(PREFILL, max_model_len=1050), d=DECODE), ask(1000)) == ("p", "d")


def test_excluded_and_other_generations_are_left_out() -> None:
    router = router_of(p1=PREFILL, p2=PREFILL, d=DECODE, e=replace(DECODE, generation=2))
    for turn in range(4):
        asked = ask(exclude=frozenset({"p1"}), generation=0)
        assert pair(router, asked, float(turn)) == ("p2", "d")
    assert router.route(ask(generation=3), 1.0) is None
    assert router.route(ask(exclude=frozenset({"d", "e"})), 1.0) is None


def test_another_sender_for_a_request_that_waits() -> None:
    router = router_of(p1=PREFILL, p2=PREFILL, d1=DECODE, d2=DECODE)
    asked = ask(decode="d2", exclude=frozenset({"p1"}))
    assert pair(router, asked) == ("p2", "d2")
    # With nobody left to send, the one that waits computes it itself; draining it still does.
    router.note_load("d2", replace(IDLE, draining=True), 1.0)
    assert alone(router, replace(asked, exclude=frozenset({"p1", "p2"}))) == "d2"
    router.leave("d2")
    assert router.route(asked, 1.0) is None


COMMITTED = HandOffReport(ending=Ending.COMMITTED, bytes_moved=64_000_000, prefill_s=1.0, wire_s=1.0, hidden_s=0.9)


def test_a_broken_way_between_two_is_left_and_tried_again() -> None:
    router = router_of(p1=PREFILL, p2=PREFILL, d=DECODE)
    broken = Split(prefill="p1", decode="d")
    lost = HandOffReport(ending=Ending.PEER_LOST)
    router.note_hand_off(broken, lost, 2.0)
    assert router.open_breakers == []
    router.note_hand_off(broken, None, 2.0)
    assert router.open_breakers == [("p1", "d")]
    assert {pair(router, ask(), 2.0 + turn / 10)[0] for turn in range(6)} == {"p2"}
    # After the pause one request tries it; while nothing is heard of it, no other does.
    tried = [pair(router, ask(), 100.0)[0] for _ in range(6)]
    assert tried.count("p1") == 1
    router.note_hand_off(broken, COMMITTED, 100.1)
    assert router.open_breakers == [] and "p1" in {pair(router, ask(), 200.0)[0] for _ in range(3)}


@pytest.mark.parametrize("ending", [Ending.CANCELLED, Ending.DEADLINE, Ending.NO_ROOM, Ending.NEVER_FITS])
def test_what_says_nothing_of_the_way_opens_no_breaker(ending: Ending) -> None:
    router = router_of(p=PREFILL, d=DECODE)
    route = route_of(router, ask())
    assert isinstance(route, Split)
    for _ in range(5):
        router.note_hand_off(route, HandOffReport(ending=ending), 1.0)
    assert router.open_breakers == []


def test_when_all_ways_are_broken_one_replica_does_it() -> None:
    router = router_of(p=PREFILL, d=DECODE)
    route = route_of(router, ask())
    assert isinstance(route, Split)
    for _ in range(2):
        router.note_hand_off(route, None, 1.0)
    assert alone(router, ask(), 1.1) == "d"


def test_slow_links_are_learned_and_left() -> None:
    router = router_of(p=PREFILL, d1=DECODE, d2=DECODE)
    for name, wire_s in (("d1", 20.0), ("d2", 0.1)):
        route = next(each for each in (route_of(router, ask(), 1.0) for _ in range(50)) if _decode(each) == name)
        assert isinstance(route, Split)
        router.note_hand_off(route, replace(COMMITTED, wire_s=wire_s, wait_s=wire_s), 1.0)
    assert [pair(router, ask(), 500.0 * turn)[1] for turn in range(1, 6)] == ["d2"] * 5


def _decode(route: Route) -> str:
    return route.decode if isinstance(route, Split) else ""


def test_who_leaves_is_forgotten() -> None:
    router = router_of(p1=PREFILL, p2=PREFILL, d=DECODE)
    asked = ask(1600)
    router.note_blocks("p1", BlockChanges(stored=digests(asked.prompt, 100)))
    assert router.cached_tokens(asked) == {"p1": 1599}
    route = route_of(router, asked)
    router.leave("p1")
    router.leave("p1")
    router.note_load("p1", IDLE, 1.0)
    router.note_blocks("p1", BlockChanges(stored=digests(asked.prompt, 100)))
    assert isinstance(route, Split)
    router.note_hand_off(route, None, 1.0)
    router.ended(route)
    assert router.cached_tokens(asked) == {} and not router.has("p1") and pair(router, asked) == ("p2", "d")
    # A new life begins with nothing.
    router.join("p1", PREFILL)
    assert router.cached_tokens(asked) == {}


def test_prefixes_of_other_tenants_and_block_sizes_are_others() -> None:
    router = router_of(p1=PREFILL, p2=replace(PREFILL, block_size=32), d=DECODE)
    asked = ask(1600)
    for name in ("p1", "p2"):
        router.note_blocks(name, BlockChanges(stored=digests(asked.prompt, 100)))
    assert router.cached_tokens(asked) == {"p1": 1599}
    assert router.cached_tokens(replace(asked, cache_salt="another")) == {}


def test_long_prompts_of_dynamic_rope_share_only_with_their_length() -> None:
    router = router_of(p=replace(PREFILL, rope_threshold=500), d=DECODE)
    short, long = ask(500), ask(1000)
    router.note_blocks("p", BlockChanges(stored=digests(short.prompt, 31)))
    assert router.cached_tokens(short) == {"p": 496} and router.cached_tokens(long) == {}
    # What was generated does not make a prompt longer.
    going_on = replace(short, prompt=np.arange(600, dtype=np.int32), generated=100)
    assert router.cached_tokens(going_on) == {"p": 496}


def test_of_a_large_pool_the_cached_ones_are_among_those_looked_at(seed: int) -> None:
    draw = random.Random(seed)
    names = [f"p{place}" for place in range(40)]
    router = router_of(**dict.fromkeys(names, PREFILL), d=DECODE)
    asked = ask(1600)
    holder = draw.choice(names)
    router.note_blocks(holder, BlockChanges(stored=digests(asked.prompt, 100)))
    assert pair(router, asked) == (holder, "d")
    others = {pair(router, ask(1600, first=10_000 * turn), 100.0 * turn)[0] for turn in range(1, 200)}
    assert len(others) == 40, "all of them get something"


def test_the_same_story_gives_the_same_routes(seed: int) -> None:
    def story() -> list[object]:
        draw = random.Random(seed)
        router = router_of(**{f"p{place}": PREFILL for place in range(12)}, d1=DECODE, d2=DECODE, m=MIXED)
        went: list[object] = []
        for turn in range(60):
            asked = ask(draw.choice([100, 700, 3000]), first=draw.randrange(5) * 10_000)
            route = route_of(router, asked, turn * 0.1)
            went.append((route.prefill, route.decode) if isinstance(route, Split) else route.replica)
            if draw.random() < 0.7:
                router.ended(route)
        return went

    assert story() == story()
