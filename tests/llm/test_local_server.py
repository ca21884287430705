"""A server of one's own comes up, answers, and never stays behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from slipstream.runtime.local_server import ServerFailed, running_server
from slipstream.sdk.errors import SlipstreamError
from slipstream.tests.gateway.server_process import PATIENCE_S, eventually

DEMO_MODEL = str(Path(__file__).resolve().parents[2] / "examples" / "demo_model")


@pytest.fixture(autouse=True)
def nothing_stays_behind() -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))
    yield
    assert set(psutil.Process().children(recursive=True)) <= before


def family() -> list[psutil.Process]:
    """The servers that this process has started, with their drivers; other tests may have left a process to fork."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if any("slipstream.runtime" in word for word in child.cmdline())]


def test_it_serves_and_is_gone_afterwards() -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with running_server(DEMO_MODEL, "--served-model-name", "mine", start_timeout_s=PATIENCE_S) as url:
        started = family()
        assert len(started) == 2
        body = {"model": "mine", "prompt": "import", "max_tokens": 3}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S)
        assert answer.json()["usage"]["completion_tokens"] == 3
    assert not any(process.is_running() for process in started)
    assert signal.getsignal(signal.SIGTERM) is handler


def test_what_it_said_is_in_the_error_when_it_does_not_come_up(tmp_path: Path) -> None:
    for file in Path(DEMO_MODEL).iterdir():
        (tmp_path / file.name).write_bytes(b"{}" if file.name == "config.json" else file.read_bytes())
    with (
        pytest.raises(ServerFailed, match=r"config\.json: architectures"),
        running_server(str(tmp_path), start_timeout_s=PATIENCE_S),
    ):
        pytest.fail("it came up")


def test_a_server_that_is_late_is_ended() -> None:
    with (
        pytest.raises(ServerFailed, match=r"not ready within 0\.05 s"),
        running_server(DEMO_MODEL, start_timeout_s=0.05),
    ):
        pytest.fail("it came up")


def test_an_error_in_the_block_ends_it_too() -> None:
    with pytest.raises(ZeroDivisionError), running_server(DEMO_MODEL, start_timeout_s=PATIENCE_S):
        raise ZeroDivisionError


@pytest.mark.parametrize("fails", [True, False])
def test_a_server_that_ends_by_itself_is_named(fails: bool) -> None:
    with (
        pytest.raises(ServerFailed, match="ended by itself with status -9"),
        running_server(DEMO_MODEL, start_timeout_s=PATIENCE_S),
    ):
        server, driver = sorted(family(), key=lambda process: len(process.children()), reverse=True)
        server.kill()
        # The driver sees that its gateway is gone.
        eventually(lambda: not driver.is_running() or driver.status() == psutil.STATUS_ZOMBIE, what="driver gone")
        if fails:
            raise SlipstreamError("connection lost")


@pytest.mark.parametrize(("number", "statuses"), [(signal.SIGINT, {0, 1, 130}), (signal.SIGTERM, {143})])
def test_a_chat_that_is_stopped_leaves_no_server(number: int, statuses: set[int]) -> None:
    # A run in the background may ignore Ctrl-C, and its children with it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    command = [sys.executable, "-P", "-m", "slipstream.runtime.cli", "chat", DEMO_MODEL]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        try:
            assert any("stops an answer" in line for line in process.stdout)
            started = psutil.Process(process.pid).children(recursive=True)
            assert len(started) == 2
            process.send_signal(number)
            _, said = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
            signal.signal(signal.SIGINT, before)
    assert process.returncode in statuses, said
    assert "Traceback" not in said
    assert not any(each.is_running() for each in started)
