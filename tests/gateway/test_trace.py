"""Trace contexts: what a caller's header says goes on, and what says nothing begins a new trace."""

from __future__ import annotations

import pytest

from slipstream.runtime.gateway.trace import trace_of

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(
    ("header", "flags"),
    [
        (f"00-{TRACE}-{SPAN}-01", "01"),
        (f" 00-{TRACE}-{SPAN}-00 ", "00"),
        # A later version, which may have more to say.
        (f"01-{TRACE}-{SPAN}-03", "03"),
        (f"01-{TRACE}-{SPAN}-01-more", "01"),
    ],
)
def test_a_trace_goes_on(header: str, flags: str) -> None:
    trace = trace_of(header.encode())
    assert trace.trace_id == TRACE and trace.span_id != SPAN and trace.flags == flags
    assert trace.traceparent == f"00-{TRACE}-{trace.span_id}-{flags}"


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "00",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-01-more",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE[1:]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01\nx",
    ],
)
def test_what_is_no_trace_begins_one(header: str | None) -> None:
    one, other = (trace_of(None if header is None else header.encode()) for _ in range(2))
    assert len({one.trace_id, other.trace_id, TRACE}) == 3 and one.flags == "00"
    assert len(one.trace_id) == 32 and len(one.span_id) == 16
