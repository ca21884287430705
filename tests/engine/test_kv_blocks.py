"""The block pool: owner sets, prefix cache, eviction order; examples and a random walk against a plain model."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from slipstream.runtime.engine.kv_blocks import PREFIX_CACHE, KvBlockPool, Owner, chain_digest, root_digest

ONE, TWO = Owner(1), Owner(2)


def test_allocates_all_or_nothing() -> None:
    pool = KvBlockPool(3)
    assert pool.allocate(4, ONE) is None
    assert pool.available == 3
    blocks = pool.allocate(3, ONE)
    assert blocks is not None and sorted(blocks) == [0, 1, 2]
    assert pool.allocate(1, TWO) is None


def test_a_shared_block_is_free_when_its_last_owner_leaves() -> None:
    pool = KvBlockPool(2)
    blocks = pool.allocate(1, ONE)
    assert blocks is not None
    pool.share(blocks, TWO)
    pool.release(blocks, ONE)
    assert pool.available == 1
    pool.release(blocks, TWO)
    assert pool.available == 2


def test_releasing_twice_is_a_bug_that_is_noticed() -> None:
    pool = KvBlockPool(1)
    blocks = pool.allocate(1, ONE)
    assert blocks is not None
    pool.release(blocks, ONE)
    with pytest.raises(AssertionError, match="does not hold block"):
        pool.release(blocks, ONE)


def test_cached_blocks_are_found_until_they_are_needed() -> None:
    pool = KvBlockPool(2)
    blocks = pool.allocate(2, ONE)
    assert blocks is not None
    first = chain_digest(root_digest(None), b"a")
    second = chain_digest(first, b"b")
    pool.publish(blocks[0], first)
    pool.publish(blocks[1], second)
    pool.release(blocks, ONE)
    assert pool.available == 2 and pool.owners(blocks[0]) == {PREFIX_CACHE}
    # The tail goes before the head.
    assert pool.allocate(1, TWO) == [blocks[1]]
    assert pool.lookup(second) is None and pool.lookup(first) == blocks[0]
    assert pool.stats.evictions == 1


def test_a_hit_makes_a_block_recently_used() -> None:
    pool = KvBlockPool(2)
    digests = [chain_digest(root_digest(None), name) for name in (b"a", b"b")]
    blocks = []
    for digest in digests:
        got = pool.allocate(1, ONE)
        assert got is not None
        pool.publish(got[0], digest)
        pool.release(got, ONE)
        blocks += got
    pool.share([blocks[0]], TWO)
    pool.release([blocks[0]], TWO)
    assert pool.allocate(1, ONE) == [blocks[1]]


def test_the_first_block_with_a_content_stays_the_cached_one() -> None:
    pool = KvBlockPool(2)
    blocks = pool.allocate(2, ONE)
    assert blocks is not None
    digest = chain_digest(root_digest(None), b"a")
    pool.publish(blocks[0], digest)
    pool.publish(blocks[1], digest)
    assert pool.lookup(digest) == blocks[0] and pool.cached == 1


def test_roots_differ_by_every_extra_key() -> None:
    roots = {root_digest(*keys) for keys in [(), (None,), ("",), ("a",), ("a", None), ("a", ""), ("ab",), ("a", "b")]}
    assert len(roots) == 8


def test_changes_of_the_cache_are_told_once_and_first_all_of_it() -> None:
    pool = KvBlockPool(3)
    digests = [chain_digest(root_digest(None), name) for name in (b"a", b"b", b"c")]
    blocks = pool.allocate(3, ONE)
    assert blocks is not None
    pool.publish(blocks[0], digests[0])
    assert pool.take_changes() == ([digests[0]], [], True)
    assert pool.take_changes() == ([], [], False)
    pool.publish(blocks[1], digests[1])
    pool.publish(blocks[2], digests[2])
    pool.release(blocks, ONE)
    # The last of the prefix goes first; it was stored and given up since the last time.
    assert pool.allocate(1, TWO) == [blocks[2]]
    assert pool.take_changes() == ([digests[1]], [digests[2]], False)
    pool.publish(blocks[2], digests[2])
    pool.reset_prefix_cache()
    changes = pool.take_changes()
    assert changes.stored == [digests[2]] and set(changes.removed) == set(digests[:2]) and not changes.reset
    assert pool.cached_digests() == [digests[2]]


def test_more_changes_than_blocks_are_told_as_all_that_is_there() -> None:
    pool = KvBlockPool(2)
    pool.take_changes()
    for number in range(5):
        blocks = pool.allocate(1, ONE)
        assert blocks is not None
        pool.publish(blocks[0], str(number).encode())
        pool.release(blocks, ONE)
    changes = pool.take_changes()
    assert changes.reset and set(changes.stored) == {b"3", b"4"} and not changes.removed
    assert not pool.take_changes().reset


def test_settled_blocks_are_those_that_no_step_on_its_way_was_given() -> None:
    pool = KvBlockPool(4)
    pool.step = 3
    first, second = pool.allocate(1, ONE), pool.allocate(2, TWO)
    assert first is not None and second is not None
    pool.release(first, ONE)
    pool.publish(second[0], b"cached")
    pool.step = 5
    pool.release(second, TWO)
    # One was never used, one is of step 3; one more is free and one cached, both of step 5.
    assert pool.allocate_settled(3, ONE, settled_step=4) is None
    blocks = pool.allocate_settled(2, ONE, settled_step=4)
    assert blocks is not None and set(blocks) == {3, *first}
    assert pool.allocate_settled(2, TWO, settled_step=5) is not None and pool.cached == 0
    pool.check_integrity()


def test_settled_cached_blocks_are_taken_when_free_ones_are_not_settled() -> None:
    pool = KvBlockPool(2)
    blocks = pool.allocate(2, ONE)
    assert blocks is not None
    pool.publish(blocks[0], b"cached")
    pool.release(blocks[:1], ONE)
    pool.step = 1
    pool.release(blocks[1:], ONE)
    assert pool.allocate_settled(1, TWO, settled_step=0) == [blocks[0]]


class PoolWalk(RuleBasedStateMachine):
    """Random calls against a model that is a plain list of who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = KvBlockPool(7)
        self.held: dict[int, list[int]] = {}
        self.next_owner = 1
        self.published = 0

    @rule(count=st.integers(0, 8))
    def allocate(self, count: int) -> None:
        room = self.pool.available
        blocks = self.pool.allocate(count, Owner(self.next_owner))
        assert (blocks is None) == (count > room)
        if blocks:
            assert len(set(blocks)) == count
            in_use = {block for held in self.held.values() for block in held}
            assert not in_use & set(blocks), "a block that is in use was handed out"
            self.held[self.next_owner] = blocks
        self.next_owner += 1

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        blocks = self.held[data.draw(st.sampled_from(sorted(self.held)))]
        self.pool.share(blocks, Owner(self.next_owner))
        self.held[self.next_owner] = list(blocks)
        self.next_owner += 1

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.held)))
        self.pool.release(self.held.pop(owner), Owner(owner))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        blocks = self.held[data.draw(st.sampled_from(sorted(self.held)))]
        self.published += 1
        self.pool.publish(blocks[0], str(self.published).encode())

    @rule()
    def reset(self) -> None:
        self.pool.reset_prefix_cache()

    @invariant()
    def books_are_intact(self) -> None:
        self.pool.check_integrity()
        in_use = {block for held in self.held.values() for block in held}
        assert self.pool.available == self.pool.num_blocks - len(in_use)
        for owner, blocks in self.held.items():
            assert all(Owner(owner) in self.pool.owners(block) for block in blocks)


PoolWalk.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
test_random_walk = PoolWalk.TestCase
