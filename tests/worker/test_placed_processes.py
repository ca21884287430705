"""Ranks that are started one by one, each at an address of its own: the same tokens, and every way to end."""

from __future__ import annotations

import asyncio
import signal
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from slipstream.runtime.rpc.client import GrpcEngineClient
from slipstream.runtime.worker.exit_status import EXIT_DRAINED, EXIT_ENGINE_FAILED, EXIT_REFUSED, EXIT_STOPPED
from slipstream.sdk.errors import EngineUnavailable
from slipstream.tests.contracts.engine_client import finish
from slipstream.tests.engine.builders import request
from slipstream.tests.models.checkpoints import make_checkpoint
from slipstream.tests.worker.engine_calls import PATIENCE_S, Tokens, ask, ask_in_process
from slipstream.tests.worker.placed_ranks import Keeper, Rank, command, introduce, keepers

ONE, OTHER = Rank("127.0.0.2"), Rank("127.0.0.3")
TWO = ("--tensor-parallel-size=2",)
STAGES = ("--pipeline-parallel-size=2",)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("parallel_dense", tmp_path_factory.mktemp("model") / "dense")


@pytest.fixture(scope="module")
def expected(model: Path) -> Tokens:
    return ask_in_process(model, dtype="float32", max_model_len=512, num_threads=1, max_num_seqs=8)


@pytest.fixture
def socket() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="slip") as folder:
        yield str(Path(folder) / "engine.sock")


def test_tensor_parallel_ranks_at_two_addresses_give_the_same_and_drain(
    model: Path, expected: Tokens, socket: str
) -> None:
    with keepers(model, [ONE, OTHER], *TWO, "--socket", socket) as ranks:
        order = introduce(ranks)
        assert order["bus"].startswith(f"{ONE.address}:")
        assert order["rendezvous_host"] == ONE.address
        assert ranks[0].hear("ready")["address"] == socket
        assert ask(socket) == expected
        for rank in ranks:
            shares = [line for line in rank.lines if line.startswith('{"loaded"')]
            assert 1 <= len(shares) <= 20 and shares[-1] == '{"loaded": 1.0}'
        # A node that is taken down signals all its processes: the driver drains, and needs the other rank for that.
        ranks[1].signal(signal.SIGTERM)
        assert ask(socket) == expected
        ranks[0].signal(signal.SIGTERM)
        assert [rank.exit_status() for rank in ranks] == [EXIT_DRAINED, EXIT_DRAINED]


def test_stages_at_two_addresses_give_the_same_and_end_with_a_killed_driver(
    model: Path, expected: Tokens, socket: str
) -> None:
    with keepers(model, [ONE, OTHER], *STAGES, "--socket", socket) as ranks:
        introduce(ranks)
        ranks[0].hear("ready")
        assert ask(socket) == expected
        ranks[0].signal(signal.SIGKILL)
        assert ranks[1].exit_status() == EXIT_ENGINE_FAILED
        assert "rank 1: " in ranks[1].output and "Traceback" not in ranks[1].output


def test_a_rank_that_nobody_keeps_ends_and_takes_a_driver_with_it_that_is_idle(model: Path) -> None:
    with keepers(model, [ONE, OTHER], *TWO, "--listen", f"{ONE.address}:0") as ranks:
        introduce(ranks)
        assert ranks[0].hear("ready")["address"].startswith(f"{ONE.address}:")
        ranks[1].let_go()
        assert ranks[1].exit_status() == EXIT_STOPPED
        assert ranks[0].exit_status() == EXIT_ENGINE_FAILED
        assert "rank 1 is gone" in ranks[0].output


def test_a_rank_that_is_killed_ends_what_runs_and_the_driver(model: Path, socket: str) -> None:
    async def run(rank: Keeper) -> None:
        client = GrpcEngineClient(socket)
        await client.connect(timeout_s=PATIENCE_S)
        stream = client.generate(request("long", [1, 2, 3], max_tokens=400), timeout_s=PATIENCE_S)
        first = await anext(stream)
        rank.signal(signal.SIGKILL)
        with pytest.raises(EngineUnavailable, match="rank 1"):
            await finish(stream, first)
        await client.close()

    with keepers(model, [ONE, OTHER], *TWO, "--socket", socket) as ranks:
        introduce(ranks)
        ranks[0].hear("ready")
        asyncio.run(asyncio.wait_for(run(ranks[1]), PATIENCE_S))
        assert ranks[0].exit_status() == EXIT_ENGINE_FAILED


def test_a_driver_without_its_keeper_ends_at_once_and_one_of_a_single_rank_needs_no_secret(
    model: Path, socket: str
) -> None:
    alone = Rank(ONE.address, secret=None)
    with keepers(model, [alone], "--socket", socket) as (driver,):
        driver.hear("ready")
        assert not any(line.startswith('{"meeting"') for line in driver.lines)
        driver.let_go()
        assert driver.exit_status() == EXIT_STOPPED


def test_ranks_with_another_secret_and_ranks_that_never_come_are_named_at_the_deadline(model: Path) -> None:
    ranks = [ONE, Rank(OTHER.address, secret="a secret of another cluster")]
    four = (*TWO, *STAGES, "--listen", f"{ONE.address}:0", "--start-timeout=8")
    with keepers(model, ranks, *four) as (driver, stranger):
        stranger.tell(driver.hear("meeting")["meeting"])
        assert stranger.exit_status() == EXIT_REFUSED
        assert "rank 1: error: " in stranger.output and "secret is not the driver's" in stranger.output
        assert driver.exit_status() == EXIT_ENGINE_FAILED
        assert "rank 1, 2, 3 did not connect within 8 s; refused: the secret is not" in driver.output
        assert "Traceback" not in stranger.output + driver.output


def test_what_cannot_work_is_refused_before_anybody_is_waited_for(model: Path) -> None:
    secretless, listen = Rank(ONE.address, secret=None), ("--listen", f"{ONE.address}:0")
    cases = [
        (secretless, command(model, 0, secretless, *TWO, *listen), "SLIPSTREAM_SECRET: SLIPSTREAM_SECRET is not set"),
        (secretless, command(model, 1, secretless, *TWO), "SLIPSTREAM_SECRET: SLIPSTREAM_SECRET is not set"),
        (OTHER, command(model, 1, OTHER, *TWO), "meeting: is no JSON, but 'at 10.0.0.1'"),
    ]
    with ExitStack() as started:
        ranks = [Keeper(line, secret=rank.secret) for rank, line, _ in cases]
        for rank in ranks:
            started.callback(rank.close)
        ranks[2].tell("at 10.0.0.1")
        for rank, (_, _, said) in zip(ranks, cases, strict=True):
            assert rank.exit_status() == EXIT_REFUSED, rank.output
            assert said in rank.output and "Traceback" not in rank.output
