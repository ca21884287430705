"""Random traffic against the oracle executor: right tokens, intact books, nothing left behind.

Every run draws a configuration (block size, cache size, batch limits, policy, prefix cache, steps on their way, even
chunks) and traffic (shared prefixes, several samples, stop ids, priorities, aborts). The oracle's tokens depend on what
each position's KV really was, so a wrong block, copy, prefix or order of steps shows up as a wrong token.
"""

from __future__ import annotations

import random

import pytest

from slipstream.runtime.engine.sequence import sample_seed
from slipstream.runtime.messages import EngineRequest
from slipstream.tests.engine.builders import Bench, bench, config, request
from slipstream.tests.fakes.oracle_executor import VOCABULARY, expected_tokens

RUNS_PER_TEST = 60
STEPS_WITH_ARRIVALS = 120


def draw_bench(draw: random.Random) -> Bench:
    block_size = draw.choice([1, 2, 4, 8])
    num_blocks = draw.randint(max(4, 40 // block_size), 120 // block_size + 4)
    settings = config(
        block_size=block_size,
        num_blocks=num_blocks,
        max_model_len=min(num_blocks * block_size, 40),
        max_num_seqs=draw.randint(1, 8),
        max_num_batched_tokens=draw.randint(8, 64),
        long_prefill_token_threshold=draw.choice([0, 1, 3, 7]),
        enable_prefix_caching=draw.random() < 0.7,
        scheduling_policy=draw.choice(["fcfs", "priority"]),
        micro_batches=draw.choice([1, 1, 2, 4]),
        even_chunks=draw.random() < 0.5,
        attention_ratio=draw.choice([0.0, 0.01, 1.0]),
    )
    return bench(settings, ahead=draw.random() < 0.5)


def draw_request(draw: random.Random, name: str, at: Bench, prefixes: list[list[int]]) -> EngineRequest:
    limit = at.scheduler.config.max_model_len
    own = [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 4))]
    prompt = (draw.choice(prefixes)[: draw.randint(0, 30)] + own)[: limit - 2]
    return request(
        name,
        prompt,
        n=draw.randint(1, min(3, at.scheduler.config.max_num_seqs)),
        max_tokens=draw.randint(1, limit - len(prompt)),
        stop_ids=tuple(draw.randrange(VOCABULARY) for _ in range(draw.choice([0, 0, 1, 4]))),
        seed=draw.randrange(2**64),
        priority=draw.randrange(3),
        cache_salt=draw.choice([None, None, "tenant"]),
    )


def run_traffic(seed: int) -> Bench:
    draw = random.Random(seed)
    at = draw_bench(draw)
    prefixes = [[draw.randrange(VOCABULARY) for _ in range(30)] for _ in range(3)]
    requests: dict[str, EngineRequest] = {}
    aborted: set[str] = set()
    for _ in range(STEPS_WITH_ARRIVALS):
        if draw.random() < 0.4:
            arrival = draw_request(draw, str(len(requests)), at, prefixes)
            requests[arrival.request_id] = arrival
            at.engine.submit(arrival)
        if draw.random() < 0.05 and at.scheduler.live_request_ids:
            victim = draw.choice(at.scheduler.live_request_ids)
            aborted.add(victim)
            assert at.engine.abort(victim)
        if at.engine.has_work:
            at.step()
    at.run()
    check_outcome(at, requests, aborted)
    return at


def check_outcome(at: Bench, requests: dict[str, EngineRequest], aborted: set[str]) -> None:
    for name, asked in requests.items():
        for index in range(asked.params.n):
            want = expected_tokens(
                asked.prompt_token_ids.tolist(), sample_seed(asked.seed, index), asked.max_tokens, asked.stop_ids
            )
            got = at.tokens[name, index]
            if name in aborted:
                assert got == want[: len(got)], at.scheduler.story(name)
            else:
                assert got == want, at.scheduler.story(name)
                assert at.finished.count(f"{name}/{index}") == 1, at.scheduler.story(name)
    assert at.scheduler.pool.available == at.scheduler.pool.num_blocks, "blocks are held though nothing lives"
    assert at.scheduler.table.free_slots == at.scheduler.config.max_num_seqs
    at.scheduler.pool.reset_prefix_cache()
    assert all(not at.scheduler.pool.owners(block) for block in range(at.scheduler.pool.num_blocks))


@pytest.mark.parametrize("part", range(4))
def test_random_traffic_gives_the_right_tokens_and_frees_everything(part: int, seed: int) -> None:
    preemptions = hits = 0
    for run in range(RUNS_PER_TEST):
        run_seed = seed + part * 1_000_003 + run
        try:
            at = run_traffic(run_seed)
        except AssertionError as error:
            raise AssertionError(f"traffic seed {run_seed}: {error}") from error
        preemptions += at.scheduler.load.preemptions
        hits += at.scheduler.pool.stats.hits
    # The traffic must have exercised what it is for.
    assert preemptions > 100 and hits > 100


def test_the_oracle_notices_a_corrupted_block(seed: int) -> None:
    """The property above means nothing if the oracle cannot fail."""
    at = bench(config())
    prompt = [1, 2, 3, 4, 5, 6]
    at.engine.submit(request("a", prompt, max_tokens=8, seed=seed % 2**64))
    at.step()
    at.oracle.kv += 1
    at.run()
    assert at.tokens["a", 0] != expected_tokens(prompt, seed % 2**64, 8)
