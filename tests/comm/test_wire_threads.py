"""Threads that are started meanwhile give way; those that ran before do not change."""

from __future__ import annotations

import os
import threading

import pytest

from slipstream.comm.wire_threads import started_threads_yield

PATIENCE_S = 20.0


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="this system has no batch threads")
def test_only_threads_started_meanwhile_give_way() -> None:
    hold = threading.Event()
    before, meanwhile = (threading.Thread(target=hold.wait, args=(PATIENCE_S,)) for _ in range(2))
    before.start()
    with started_threads_yield():
        meanwhile.start()
    assert meanwhile.native_id is not None and before.native_id is not None
    policies = [os.sched_getscheduler(thread) for thread in (meanwhile.native_id, before.native_id, 0)]
    hold.set()
    assert policies[0] == os.SCHED_BATCH
    assert os.SCHED_BATCH not in policies[1:]
    before.join(PATIENCE_S)
    meanwhile.join(PATIENCE_S)
