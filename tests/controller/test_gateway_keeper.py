"""Whoever keeps a gateway: its process, its keys, and that it is started again."""

from __future__ import annotations

import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slipstream.runtime.clock import monotonic_clock
from slipstream.runtime.controller.gateway_keeper import (
    GatewayKeeper,
    GatewayOrder,
    GatewayReport,
    GatewayState,
)
from slipstream.runtime.controller.private_file import write_private

PROGRAM = "slipstream.tests.fakes.gateway_program"
PATIENCE_S = 60.0
_PAUSE_S = 0.02


def order(**changes: object) -> GatewayOrder:
    given: dict[str, object] = {
        "name": "0", "node": "a", "host": "", "port": 0, "watch": ("10.0.0.1:7",), "module": PROGRAM,
        "environment": {"SLIPSTREAM_TEST": "1"},
    }  # fmt: skip
    return GatewayOrder(**{**given, **changes})  # type: ignore[arg-type]


@pytest.fixture
def kept() -> Iterator[Callable[..., GatewayKeeper]]:
    keepers: list[GatewayKeeper] = []

    def keep(**changes: object) -> GatewayKeeper:
        keepers.append(GatewayKeeper(order(**changes), node="a", own_address="127.0.0.1", clock=monotonic_clock))
        return keepers[-1]

    yield keep
    for keeper in keepers:
        keeper.end(drain_s=0.0)


def until(keeper: GatewayKeeper, check: Callable[[GatewayReport], bool]) -> GatewayReport:
    never = threading.Event()
    for _ in range(int(PATIENCE_S / _PAUSE_S)):
        if check(report := keeper.report()):
            return report
        never.wait(_PAUSE_S)
    raise AssertionError(f"it does not become so: {keeper.report()}")


def ready(report: GatewayReport) -> bool:
    return report.state is GatewayState.READY


def test_a_gateway_is_kept_and_started_again(kept: Callable[..., GatewayKeeper]) -> None:
    keeper = kept(host="0.0.0.0", api_keys=("first-key", "second-key"), arguments=("--served-model-name", "x"))
    first = until(keeper, ready)
    # What listens everywhere is shown where it can be reached.
    assert first.address.startswith("127.0.0.1:") and (first.node, first.starts) == ("a", 1)
    assert keeper.log(-10).lines == ("watches 10.0.0.1:7 with 2 keys, 2 other arguments",)
    os.kill(first.pid, signal.SIGKILL)
    second = until(keeper, lambda report: ready(report) and report.starts == 2)
    assert second.pid != first.pid and second.detail == f"its process ended with status {-signal.SIGKILL}" + (
        ": watches 10.0.0.1:7 with 2 keys, 2 other arguments"
    )


def test_one_that_is_told_to_end_finishes_what_runs(kept: Callable[..., GatewayKeeper]) -> None:
    keeper = kept()
    report = until(keeper, ready)
    keeper.end(drain_s=PATIENCE_S)
    assert keeper.log(-1).lines == ("drained",)
    assert keeper.report().state is GatewayState.PAUSED and not Path(f"/proc/{report.pid}").exists()
    keeper.end(drain_s=PATIENCE_S)


def test_one_that_cannot_start_says_why(kept: Callable[..., GatewayKeeper]) -> None:
    keeper = kept(arguments=("--fail",))
    report = until(keeper, lambda report: report.starts >= 2 and bool(report.detail))
    assert "ended with status 3" in report.detail and "the port is taken" in report.detail


def test_keys_are_for_this_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    for keys in ("a" * 8, "b" * 8):
        write_private(path, keys)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.read_text(encoding="utf-8") == keys
    assert "bbbb" not in repr(order(api_keys=("b" * 8,)))
