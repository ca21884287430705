"""Random lives of requests over two engines: right tokens, each ended once, no block lost on either side.

Both engines draw their own limits and block size; steps are on their way when blocks change hands, transfers are
refused, wait, break and are aborted, and what broke goes on with the tokens that were drawn.
"""

from __future__ import annotations

import random

import pytest

from slipstream.runtime.messages import EngineRequest
from slipstream.tests.engine.builders import Bench, bench, config, request
from slipstream.tests.engine.split_world import SendingOracle, SplitWorld
from slipstream.tests.fakes.oracle_executor import VOCABULARY, expected_tokens

RUNS_PER_TEST = 12
TICKS_WITH_ARRIVALS = 150


def draw_bench(draw: random.Random, length: int) -> Bench:
    block_size = draw.choice([1, 2, 4, 8])
    num_blocks = -(-length // block_size) + draw.randint(0, draw.choice([1, 80 // block_size]))
    settings = config(
        block_size=block_size,
        num_blocks=num_blocks,
        max_model_len=length,
        max_num_seqs=draw.randint(1, 6),
        max_num_batched_tokens=draw.randint(6, 40),
        enable_prefix_caching=draw.random() < 0.7,
        scheduling_policy=draw.choice(["fcfs", "priority"]),
        micro_batches=draw.choice([1, 1, 2, 3]),
    )
    return bench(settings, ahead=draw.random() < 0.7, executor=SendingOracle)


def draw_request(draw: random.Random, name: str, length: int, prefixes: list[list[int]]) -> EngineRequest:
    own = [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 4))]
    prompt = (draw.choice(prefixes)[: draw.randint(0, 24)] + own)[: length - 2]
    seed, max_tokens = draw.randrange(2**64), draw.randint(1, length - len(prompt))
    # Some come with tokens that another replica drew before.
    generated: tuple[list[int], ...] = ()
    if max_tokens > 1 and draw.random() < 0.3:
        generated = (expected_tokens(prompt, seed, draw.randint(1, max_tokens - 1)),)
    return request(
        name,
        prompt,
        max_tokens=max_tokens,
        seed=seed,
        stop_ids=() if generated else tuple(draw.randrange(VOCABULARY) for _ in range(draw.choice([0, 0, 3]))),
        priority=draw.randrange(3),
        generated=generated,
    )


def live(seed: int) -> SplitWorld:
    draw = random.Random(seed)
    length = draw.choice([16, 40])
    world = SplitWorld(draw, draw_bench(draw, length), draw_bench(draw, length))
    prefixes = [[draw.randrange(VOCABULARY) for _ in range(24)] for _ in range(3)]
    for _ in range(TICKS_WITH_ARRIVALS):
        if draw.random() < 0.2:
            asked = draw_request(draw, str(len(world.requests)), length, prefixes)
            if draw.random() < 0.3:
                # The decode engine has work of its own.
                world.requests[asked.request_id] = asked
                world.decode.engine.submit(asked)
            else:
                world.submit(asked)
        if draw.random() < 0.02 and world.requests:
            world.abort(draw.choice(sorted(world.requests)))
        world.tick()
    world.run()
    check_outcome(world)
    return world


def check_outcome(world: SplitWorld) -> None:
    for name, asked in world.requests.items():
        story = [*world.prefill.scheduler.story(name), "and then", *world.decode.scheduler.story(name)]
        want = expected_tokens(asked.prompt_token_ids.tolist(), asked.seed, asked.max_tokens, asked.stop_ids)
        if asked.generated and asked.generated[0] is not None:
            want = want[len(asked.generated[0]) :]
        got = world.tokens[name]
        if name in world.aborted:
            assert got == want[: len(got)], story
        else:
            assert got == want, story
            assert world.endings[name] == 1, story
    for at in (world.prefill, world.decode):
        assert not at.scheduler.loans
        assert at.scheduler.pool.available == at.scheduler.pool.num_blocks, "blocks are held though nothing lives"
        assert at.scheduler.table.free_slots == at.scheduler.config.max_num_seqs
        assert at.scheduler.load.queued_tokens == 0


@pytest.mark.parametrize("part", range(2))
def test_random_lives_over_two_engines(part: int, seed: int) -> None:
    committed = preemptions = 0
    for run in range(RUNS_PER_TEST):
        run_seed = seed + part * 1_000_003 + run
        try:
            world = live(run_seed)
        except AssertionError as error:
            raise AssertionError(f"traffic seed {run_seed}: {error}") from error
        committed += world.committed
        preemptions += world.decode.scheduler.load.preemptions + world.prefill.scheduler.load.preemptions
    # The lives must have had what they are for.
    assert committed > 30 and preemptions > 5
