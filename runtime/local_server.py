"""A server of one's own: ``slipstream serve`` in processes beside this one, for as long as it is needed.

Owns its command line, the wait until it is ready, and its end. What it is asked is its callers' business: they get an
address and speak HTTP to it, as anybody does.

    SlipstreamError
    └── ServerFailed    it did not come up, or ended unasked; the message has its last lines    blame: us
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from ..sdk.errors import SlipstreamError
from .clock import monotonic_clock
from .ending import ending_on_signals

_READY = re.compile(rb" at (http://127\.0\.0\.1:\d+)/v1 ")
_DRAIN_TIMEOUT_S = 5.0
_STOP_TIMEOUT_S = 10.0
_SHOWN_BYTES = 4096
_READ_BYTES = 4096


class ServerFailed(SlipstreamError):
    """A server that was started here did not become ready, or ended before it was told to."""


@contextlib.contextmanager
def running_server(model: str, *options: str, start_timeout_s: float) -> Iterator[str]:
    """Serve a model on a free loopback port, yield the address, and stop the server whatever happens.

    It is told to finish what runs and ended when it does not; so it is when this process gets SIGTERM or SIGHUP, or a
    person presses Ctrl-C.
    ``options`` are those of ``slipstream serve``.
    Raises: ServerFailed; when the block fails because the server has ended, this comes in place of that error
    """
    with tempfile.TemporaryFile() as log, ending_on_signals(), _started(model, options, log) as process:
        try:
            yield _wait_until_ready(process, log, start_timeout_s)
        except SlipstreamError as error:
            if isinstance(error, ServerFailed) or process.poll() is None:
                raise
            raise _ended(process, log) from error
        if process.poll() is not None:
            raise _ended(process, log)


@contextlib.contextmanager
def _started(model: str, options: Sequence[str], log: BinaryIO) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-P", "-m", "slipstream.runtime.cli", "serve", "--host", "127.0.0.1", "--port", "0"]
    command += ["--drain-timeout-s", str(_DRAIN_TIMEOUT_S), "--log-level", "warning", *options, "--", model]
    # A session of its own: Ctrl-C in a terminal is for this process, which then tells the server.
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            _stop(process)


def _wait_until_ready(process: subprocess.Popen[bytes], log: BinaryIO, timeout_s: float) -> str:
    """Return the address that the server names when it has generated a first token."""
    assert process.stdout is not None
    deadline_s, printed = monotonic_clock() + timeout_s, b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left_s := deadline_s - monotonic_clock()) > 0:
            if not selector.select(left_s):
                continue
            chunk = os.read(process.stdout.fileno(), _READ_BYTES)
            if not chunk:
                raise _ended(process, log)
            printed += chunk
            if found := _READY.search(printed):
                return found[1].decode()
    raise ServerFailed(f"the server was not ready within {timeout_s:g} s{_last_lines(log)}")


def _ended(process: subprocess.Popen[bytes], log: BinaryIO) -> ServerFailed:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_TIMEOUT_S)
    return ServerFailed(f"the server ended by itself with status {process.returncode}{_last_lines(log)}")


def _last_lines(log: BinaryIO) -> str:
    # Read in place: the server writes at the position that it shares with this file.
    size = os.fstat(log.fileno()).st_size
    text = os.pread(log.fileno(), _SHOWN_BYTES, max(0, size - _SHOWN_BYTES)).decode(errors="replace").strip()
    return f"; its last lines:\n{text}" if text else " and said nothing"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Let the server finish what runs, then stop it at once, then kill it; its engine ends with it."""
    try:
        for timeout_s in (_DRAIN_TIMEOUT_S + _STOP_TIMEOUT_S, _STOP_TIMEOUT_S):
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout_s)
                return
    finally:
        process.kill()
