"""The pipe to a rank's keeper: its first line, and its end."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from slipstream.comm.errors import CommTimeout
from slipstream.runtime.worker.keeper_pipe import MAX_LINE_BYTES, KeeperPipe

PATIENCE_S = 20.0


class Pipe:
    """A keeper's end of a pipe."""

    def __init__(self) -> None:
        self.read_end, self._write_end = os.pipe()
        self.ended = threading.Event()
        self.pipe = KeeperPipe(self.read_end, self.ended.set)

    def write(self, text: bytes) -> None:
        os.write(self._write_end, text)

    def end(self) -> None:
        if self._write_end >= 0:
            os.close(self._write_end)
            self._write_end = -1


@pytest.fixture
def keeper() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.end()
    assert made.ended.wait(PATIENCE_S)
    os.close(made.read_end)


def test_a_line_comes_in_pieces_and_only_the_first_one_counts(keeper: Pipe) -> None:
    keeper.write(b"where ")
    keeper.write(b"to meet\nand mo")
    assert keeper.pipe.line(PATIENCE_S) == "where to meet"
    keeper.write(b"re\nthan that\n")
    assert keeper.pipe.line(PATIENCE_S) == "where to meet"
    assert not keeper.ended.is_set()


def test_a_line_that_does_not_come_is_missed_at_the_deadline(keeper: Pipe) -> None:
    keeper.write(b"half of it")
    with pytest.raises(CommTimeout, match=r"within 0\.05 s where the replica meets"):
        keeper.pipe.line(0.05)


def test_the_end_is_noticed_without_a_line_and_after_one() -> None:
    for text in (b"", b"half", b"line\n"):
        keeper = Pipe()
        keeper.write(text)
        assert not keeper.ended.is_set()
        keeper.end()
        assert keeper.ended.wait(PATIENCE_S)
        os.close(keeper.read_end)


def test_a_line_without_an_end_is_cut(keeper: Pipe) -> None:
    # More than a pipe holds: it is read although nobody has asked for it.
    for _ in range(4):
        keeper.write(b"x" * MAX_LINE_BYTES)
    assert keeper.pipe.line(PATIENCE_S) == "x" * MAX_LINE_BYTES
