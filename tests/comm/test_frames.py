"""Frames come out as they went in, wherever the stream is cut, and nothing is allocated for one that is too long."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.comm.errors import BadFrame
from slipstream.comm.frames import HEADER, MAX_TEXT_BYTES, Frame, FrameKind, FrameReader, text_payload

CHUNK = 1 << 16
sizes = st.integers(0, 40) | st.integers(CHUNK - 30, CHUNK + 30) | st.integers(0, 3 * CHUNK)
frames = st.builds(
    lambda kind, seq, size: Frame(kind, seq, bytes(i % 251 for i in range(size))),
    st.sampled_from(FrameKind),
    st.integers(0, 2**64 - 1),
    sizes,
)


def encoded(frame: Frame) -> bytes:
    return HEADER.pack(len(frame.payload), frame.kind, frame.seq) + frame.payload


def read(reader: FrameReader, data: bytes, cuts: list[int]) -> list[Frame]:
    """Hand data over in pieces as a socket would, never more than there is space for."""
    found: list[Frame] = []
    turn = 0
    while data:
        space = reader.space()
        assert len(space), "a reader that returned no frame has room for more"
        count = min(len(space), len(data), cuts[turn % len(cuts)])
        space[:count] = data[:count]
        reader.advance(count)
        data = data[count:]
        turn += 1
        while (frame := reader.take()) is not None:
            found.append(frame)
    return found


@given(st.lists(frames, max_size=5), st.lists(st.integers(1, 2 * CHUNK), min_size=1, max_size=5))
def test_any_stream_however_it_is_cut(series: list[Frame], cuts: list[int]) -> None:
    reader = FrameReader(max_payload_bytes=4 * CHUNK)
    # No more than a few hundred turns, however small the pieces.
    data = b"".join(map(encoded, series))
    cuts = [max(cut, len(data) // 200) for cut in cuts]
    assert read(reader, data, cuts) == series


def test_a_frame_over_the_limit_is_refused_by_its_header_alone() -> None:
    reader = FrameReader(max_payload_bytes=1 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(BadFrame, match="announces 1048577 bytes, more than the limit of 1048576"):
            read(reader, HEADER.pack((1 << 20) + 1, FrameKind.STEP, 1), [64])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 18


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(BadFrame, match="unknown kind 9"):
        read(FrameReader(max_payload_bytes=10), HEADER.pack(0, 9, 1), [64])


def test_texts_are_bounded_and_safe_to_show() -> None:
    payload = text_payload("é" * MAX_TEXT_BYTES + "\ud800")
    assert len(payload) == MAX_TEXT_BYTES
    assert Frame(FrameKind.CLOSE, 0, payload).text == "é" * (MAX_TEXT_BYTES // 2)
    assert Frame(FrameKind.CLOSE, 0, b"\xff broken").text == "\ufffd broken"
