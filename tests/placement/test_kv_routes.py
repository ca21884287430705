"""Routes of KV: each destination's part comes from one sender, and those that could all send share the work."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.placement.kv_routes import KvLayout, KvRoute, kv_routes, token_cuts

DEGREES = (1, 2, 4, 8, 16)
HEADS = (1, 2, 4, 8)


def received(layout: KvLayout, routes: tuple[KvRoute, ...]) -> Counter[tuple[int, int, int]]:
    """Count how often each (rank, layer, head) is sent."""
    return Counter((route.target, layer, head) for route in routes for layer in route.layers for head in route.heads)


def check(source: KvLayout, target: KvLayout) -> tuple[KvRoute, ...]:
    routes = kv_routes(source, target)
    for route in routes:
        assert set(route.layers) <= set(source.layers_of(route.source)) & set(target.layers_of(route.target))
        assert set(route.heads) <= set(source.heads_of(route.source)) & set(target.heads_of(route.target))
    wanted = {
        (rank, layer, head)
        for rank in range(target.ranks)
        for layer in target.layers_of(rank)
        for head in target.heads_of(rank)
    }
    found = received(target, routes)
    assert found.keys() == wanted and set(found.values()) == {1}
    return routes


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("target", DEGREES)
@pytest.mark.parametrize("source", DEGREES)
def test_class_7_every_part_is_sent_once(source: int, target: int, heads: int) -> None:
    check(
        KvLayout(layers=16, kv_heads=heads, block_size=16, tp=source),
        KvLayout(layers=16, kv_heads=heads, block_size=16, tp=target),
    )


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("target", DEGREES)
@pytest.mark.parametrize("source", DEGREES)
def test_ranks_that_hold_the_same_send_as_much(source: int, target: int, heads: int) -> None:
    layers = 16
    routes = kv_routes(
        KvLayout(layers=layers, kv_heads=heads, block_size=16, tp=source),
        KvLayout(layers=layers, kv_heads=heads, block_size=16, tp=target),
    )
    sent = Counter[int]()
    for route in routes:
        sent[route.source] += len(route.layers) * len(route.heads)
    assert len(sent) == source and len(set(sent.values())) == 1


def test_stages_copies_and_degrees_that_do_not_divide() -> None:
    axes = itertools.product((1, 2, 3, 4), (1, 2, 3), (1, 2))
    layouts = [KvLayout(layers=7, kv_heads=6, block_size=4, tp=tp, pp=pp, copies=copies) for tp, pp, copies in axes]
    for source, target in itertools.product(layouts, layouts):
        check(source, target)


def test_uneven_shares_differ_by_little() -> None:
    """Two that hold all send to three that want all: no layer is sent more often by one than it must."""
    source = KvLayout(layers=10, kv_heads=1, block_size=16, tp=2)
    target = KvLayout(layers=10, kv_heads=1, block_size=16, tp=3)
    sent = Counter[int]()
    for route in kv_routes(source, target):
        sent[route.source] += len(route.layers)
    assert sent == {0: 15, 1: 15}


def test_what_is_of_two_models_has_no_routes() -> None:
    ours = KvLayout(layers=4, kv_heads=2, block_size=16)
    with pytest.raises(ValueError, match="the source has 4 layers, the target 5"):
        kv_routes(ours, KvLayout(layers=5, kv_heads=2, block_size=16))
    with pytest.raises(ValueError, match="the source has 2 kv_heads, the target 4"):
        kv_routes(ours, KvLayout(layers=4, kv_heads=4, block_size=16))
    with pytest.raises(ValueError, match="tp must be from 1 to 65536, got 0"):
        KvLayout(layers=4, kv_heads=4, block_size=16, tp=0)
    with pytest.raises(ValueError, match="pp 5 is more than the 4 layers"):
        KvLayout(layers=4, kv_heads=4, block_size=16, pp=5)


def test_layouts_are_those_of_the_models() -> None:
    """The runtime cuts models by rules of its own; KV is where they put it."""
    layout = KvLayout(layers=7, kv_heads=8, block_size=16, tp=4, pp=2, copies=2)
    assert [list(layout.layers_of(rank)) for rank in (0, 7, 8)] == [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6]]
    assert [layout.heads_of(rank) for rank in (0, 3, 5)] == [range(0, 2), range(6, 8), range(2, 4)]
    assert layout.holders(4, 2) == (9, 13)
    replicated = KvLayout(layers=1, kv_heads=2, block_size=16, tp=8)
    assert [replicated.heads_of(rank).start for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]


@given(st.integers(0, 100), st.integers(0, 100), st.integers(1, 20), st.integers(1, 20))
def test_no_piece_crosses_a_block_on_either_side(first: int, count: int, one: int, other: int) -> None:
    cuts = token_cuts(range(first, first + count), (one, other))
    assert (cuts[0], cuts[-1]) == (first, first + count) if count else cuts == []
    for start, stop in itertools.pairwise(cuts):
        assert start < stop
        assert start // one == (stop - 1) // one and start // other == (stop - 1) // other
