"""Threads that wait: none stands behind another, each is used again, and the end waits for nobody."""

from __future__ import annotations

import subprocess
import sys
import threading

from slipstream.comm.waiters import Waiters

PATIENCE_S = 20.0


def test_a_wait_never_stands_behind_another() -> None:
    waiters = Waiters("test")
    hang, through = threading.Event(), threading.Barrier(4)

    def meet_and_hang() -> None:
        through.wait(PATIENCE_S)
        hang.wait(PATIENCE_S)

    for _ in range(3):
        waiters.start(meet_and_hang)
    through.wait(PATIENCE_S)  # all three run at once
    passed = threading.Event()
    waiters.start(passed.set)
    assert passed.wait(PATIENCE_S)
    hang.set()
    waiters.end()


def test_a_thread_is_used_again() -> None:
    waiters = Waiters("test")
    seen: list[int] = []
    for _ in range(50):
        ran = threading.Event()

        def call(ran: threading.Event = ran) -> None:
            seen.append(threading.get_ident())
            ran.set()

        waiters.start(call)
        assert ran.wait(PATIENCE_S)
    # Between the end of a call and the thread's being free another may have been needed, now and then.
    assert len(set(seen)) < 10
    waiters.end()


def test_the_end_waits_for_nobody_and_takes_nothing_more() -> None:
    waiters = Waiters("test")
    began, hang, ended = threading.Event(), threading.Event(), threading.Event()

    def call() -> None:
        began.set()
        hang.wait(PATIENCE_S)
        ended.set()

    waiters.start(call)
    assert began.wait(PATIENCE_S)
    waiters.end()
    waiters.end()
    refused = threading.Event()
    waiters.start(refused.set)
    assert not ended.is_set()
    hang.set()
    assert ended.wait(PATIENCE_S) and not refused.is_set()


def test_threads_can_be_waited_for() -> None:
    waiters = Waiters("test")
    hang, runs = threading.Event(), threading.Event()

    def call() -> None:
        runs.set()
        hang.wait(PATIENCE_S)

    waiters.start(call)
    assert runs.wait(PATIENCE_S)
    waiters.end()
    assert not waiters.join(0.01), "a thread that hangs has not ended"
    hang.set()
    assert waiters.join(PATIENCE_S)


def test_a_process_ends_its_waiting_threads_before_the_interpreter() -> None:
    program = """
import atexit, sys, threading
ended = threading.Event()
# Registered first, so run last: the threads have to be gone by then.
atexit.register(lambda: print("ended" if ended.is_set() else "still there"))
from slipstream.comm.waiters import Waiters
waiters, runs = Waiters("test"), threading.Event()
closed = threading.Event()
def call():
    runs.set()
    closed.wait(20)
    ended.set()
waiters.start(call)
runs.wait(20)
atexit.register(closed.set)
"""
    ended = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "ended\n", "")
