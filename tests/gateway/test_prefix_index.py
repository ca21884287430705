"""Prefix index, digests and the learned lines: against what they stand for, over random stories."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import numpy as np
import pytest

from slipstream.runtime.config import prefix_cache_key
from slipstream.runtime.engine.kv_blocks import chain_digest, root_digest
from slipstream.runtime.gateway.breaker import Breaker, BreakerSettings
from slipstream.runtime.gateway.decode_pace import DecodePace
from slipstream.runtime.gateway.link_speeds import LinkSpeeds
from slipstream.runtime.gateway.prefix_index import PrefixIndex
from slipstream.runtime.gateway.prompt_digests import STRIDE_BLOCKS, PromptDigests
from slipstream.runtime.rpc.engine_client import BlockChanges, HandOffReport


def plain(prompt: np.ndarray, size: int, salt: str | None = None, threshold: int | None = None) -> list[bytes]:
    parent, found = root_digest(salt, prefix_cache_key(len(prompt), threshold)), []
    for first in range(0, len(prompt) // size * size, size):
        parent = chain_digest(parent, prompt[first : first + size].tobytes())
        found.append(parent[:16])
    return found


def test_digests_are_the_engines_whatever_is_kept(seed: int) -> None:
    draw = random.Random(seed)
    digests = PromptDigests(block_size=4, rope_threshold=200, max_strides=6)
    base = np.array([draw.randrange(50) for _ in range(600)], dtype=np.int32)
    for _ in range(200):
        prompt = base[: draw.randrange(1, 600)].copy()
        if draw.random() < 0.5:
            prompt[draw.randrange(len(prompt))] += 1
        salt = draw.choice([None, "a"])
        wanted = plain(prompt, 4, salt, 200)
        asked_for = draw.randrange(len(wanted) + 1)
        got: list[bytes] = []
        for stride in digests.strides(prompt, generated=0, cache_salt=salt):
            got += stride
            if len(got) >= asked_for and draw.random() < 0.3:
                break
        assert got == wanted[: len(got)] and len(got) >= min(asked_for, len(wanted))


def test_an_index_finds_what_each_replica_has(seed: int) -> None:
    """Of caches that give tails up before heads, as ours do."""
    draw = random.Random(seed)
    index, names = PrefixIndex(), [f"r{place}" for place in range(6)]
    size = STRIDE_BLOCKS * 3
    chains = [[bytes([chain, place]) for place in range(size)] for chain in range(4)]
    have = {name: [0] * 4 for name in names}
    joined: set[str] = set()
    for _ in range(400):
        name, chain = draw.choice(names), draw.randrange(4)
        before, now = have[name][chain], draw.choice([0, draw.randrange(size + 1), size])
        match draw.choice(["change", "change", "change", "join", "leave", "reset"]):
            case "join":
                index.join(name)
                joined.add(name)
                have[name] = [0] * 4
            case "leave":
                index.leave(name)
                joined.discard(name)
            case "reset" if name in joined:
                have[name] = [now if each == chain else 0 for each in range(4)]
                index.note(name, BlockChanges(stored=tuple(chains[chain][:now]), reset=True))
            case "change":
                stored, removed = chains[chain][min(before, now) : now], chains[chain][now:before]
                index.note(name, BlockChanges(stored=tuple(stored), removed=tuple(removed)))
                if name in joined:
                    have[name][chain] = now
        index.check_integrity()
        length = draw.choice([1, STRIDE_BLOCKS, size])
        cuts = sorted({0, length, *(draw.randrange(length + 1) for _ in range(draw.randrange(4)))})
        pieces = [tuple(chains[chain][first:stop]) for first, stop in itertools.pairwise(cuts)]
        wanted = {each: min(have[each][chain], length) for each in joined if have[each][chain]}
        assert index.hits(pieces) == wanted


def test_an_index_is_bounded_and_says_what_it_left_out() -> None:
    index = PrefixIndex(max_blocks=10)
    index.join("a")
    index.note("a", BlockChanges(stored=tuple(bytes([place]) for place in range(15))))
    assert (len(index), index.dropped, index.blocks_of("a")) == (10, 5, 10)
    index.note("a", BlockChanges(removed=(bytes([0]), bytes([14]))))
    assert len(index) == 9
    index.leave("a")
    assert len(index) == 0 and index.hits([(bytes([1]),)]) == {}
    index.check_integrity()


def test_a_look_up_asks_for_no_more_than_is_of_use() -> None:
    index = PrefixIndex()
    index.join("a")
    index.note("a", BlockChanges(stored=(b"0", b"1")))
    asked = []

    def blocks() -> Iterator[tuple[bytes, ...]]:
        for place in range(100):
            asked.append(place)
            yield (str(place).encode(),)

    assert index.hits(blocks()) == {"a": 2} and asked == [0, 1, 2]


def test_a_breaker_opens_waits_longer_and_closes() -> None:
    breaker = Breaker(BreakerSettings(failures=2, first_pause_s=1.0, longest_pause_s=4.0))
    breaker.failed(0.0)
    breaker.succeeded()
    breaker.failed(0.0)
    assert breaker.lets(0.0), "two failures in a row open it"
    now_s, pauses = 0.0, []
    for _ in range(4):
        breaker.failed(now_s)
        began_s = now_s
        while not breaker.lets(now_s):
            now_s += 0.25
        pauses.append(now_s - began_s)
        breaker.went(now_s)
        assert not breaker.lets(now_s), "one try in each pause"
    assert pauses == [1.0, 2.0, 4.0, 4.0]
    breaker.succeeded()
    assert breaker.lets(now_s) and not breaker.open


def test_links_are_learned_from_what_went_over_them() -> None:
    links = LinkSpeeds(first_bytes_per_s=1e9, first_kv_bytes=1000.0)
    assert links.extra_s("p", "d", tokens=10_000, hidden_behind_s=0.0) == pytest.approx(0.01)
    for _ in range(60):
        # 2,000 bytes a token at 1 MB/s: 2 s on the wire, 0.5 s of it behind prefill, and 0.1 s for the rest.
        report = HandOffReport(ending="committed", bytes_moved=2_000_000, prefill_s=0.5, wire_s=2.0, wait_s=1.6)
        links.note("p", "d", report, tokens=1000)
    assert links.kv_bytes == pytest.approx(2000.0) and links.bytes_per_s("p", "d") == pytest.approx(1e6)
    assert links.extra_s("p", "d", tokens=1000, hidden_behind_s=0.5) == pytest.approx(1.6)
    assert links.extra_s("p", "d", tokens=100, hidden_behind_s=0.5) == pytest.approx(0.1)
    # One that nothing is known of is thought to be like those that are known.
    assert links.bytes_per_s("p", "e") == pytest.approx(1e6, rel=0.01)
    links.note("p", "d", HandOffReport(ending="committed", bytes_moved=16, wire_s=1e-9), tokens=1)
    assert links.bytes_per_s("p", "d") == pytest.approx(1e6)
    links.forget("d")
    assert links.bytes_per_s("p", "d") == links.bytes_per_s("x", "y")


def test_the_pace_of_decoding_is_a_line_over_sequences(seed: int) -> None:
    draw = random.Random(seed)
    pace = DecodePace()
    pace.note(0, 0.5)
    assert not pace.measured, "nobody decoded"
    pace.note(10, 0.020)
    assert pace.token_s(20) == pytest.approx(0.030) and pace.token_s(10) == pytest.approx(0.020)
    for _ in range(300):
        sequences = draw.randint(1, 64)
        pace.note(sequences, (0.010 + 0.0005 * sequences) * draw.uniform(0.95, 1.05))
    for sequences in (1, 20, 64):
        assert pace.token_s(sequences) == pytest.approx(0.010 + 0.0005 * sequences, rel=0.2)
    assert pace.token_s(5) <= pace.token_s(6), "never falling"
