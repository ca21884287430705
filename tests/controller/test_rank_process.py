"""A rank's process: what it says, how it ends, and that it does not outlive whoever keeps it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from slipstream.runtime.controller.rank_process import RankProcess

PROGRAM = "slipstream.tests.fakes.rank_program"
PATIENCE_S = 60.0
_PAUSE_S = 0.02


def wait(check: Callable[[], object]) -> None:
    never = threading.Event()
    for _ in range(int(PATIENCE_S / _PAUSE_S)):
        if check():
            return
        never.wait(_PAUSE_S)
    raise AssertionError("it does not become so")


@pytest.fixture
def started() -> Iterator[Callable[..., RankProcess]]:
    processes: list[RankProcess] = []

    def start(*arguments: str) -> RankProcess:
        processes.append(RankProcess(PROGRAM, arguments, {"SLIPSTREAM_TEST": "1"}))
        return processes[-1]

    yield start
    for process in processes:
        process.end()


def test_a_driver_says_where_it_is_and_a_rank_is_told(started: Callable[..., RankProcess]) -> None:
    driver, rank = started("127.0.0.1", "0"), started("127.0.0.1", "1")
    wait(lambda: driver.ready)
    assert driver.meeting == "at 127.0.0.1" and driver.address.startswith("127.0.0.1:")
    assert (rank.ready, rank.told) == (False, False)
    rank.tell(driver.meeting)
    rank.tell("only the first counts")
    wait(lambda: rank.ready)
    assert (rank.told, rank.address, rank.ended()) == (True, "", None)
    for process in (driver, rank):
        process.end()
        assert process.ended() == f"its process ended with status {-signal.SIGKILL}"
        process.end()


def test_what_a_process_said_last_is_why_it_ended(started: Callable[..., RankProcess]) -> None:
    process = started("127.0.0.1", "0", "fail")
    wait(process.ended)
    wait(lambda: "the checkpoint is cut short" in (process.ended() or ""))
    assert (process.ended() or "").startswith("its process ended with status 2")
    process.tell("nobody hears it")


def test_a_rank_says_how_much_it_has_loaded_and_what_it_prints_is_kept() -> None:
    arguments = ["--replica", "p-1", "--rank", "1", "--address", "127.0.0.1", "--listen", "x:0"]
    arguments += ["--ranks-on-host", "1", "--ranks-per-host", "1"]
    process = RankProcess("slipstream.tests.fakes.placed_rank", arguments, {"SLIPSTREAM_SECRET": "s"})
    try:
        wait(lambda: process.loaded == 1.0)
        assert not process.ready
        process.tell("at 127.0.0.1")
        wait(lambda: process.ready)
        assert process.log.page(0).lines == ("p-1 rank 1 stands in for slipstream.runtime.worker.main, with a secret",)
    finally:
        process.end()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_ends_when_whoever_keeps_it_is_killed(rank: str) -> None:
    keeper = f"""
import sys, threading
from slipstream.runtime.controller.rank_process import RankProcess
process = RankProcess({PROGRAM!r}, ["127.0.0.1", {rank!r}], {{}})
process.tell("at 127.0.0.1")
while not process.ready:
    threading.Event().wait({_PAUSE_S})
print(process.pid, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-P", "-c", keeper], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as running:
        assert running.stdout is not None
        child = os.pidfd_open(int(running.stdout.readline()))
        try:
            running.kill()
            ended, _, _ = select.select([child], [], [], PATIENCE_S)
            assert ended, "the rank lives on"
        finally:
            os.close(child)
