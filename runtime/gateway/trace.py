"""Trace contexts as W3C has them: one id for a request in all processes that it passes.

Owns the header's form: ``00-TRACE_ID-SPAN_ID-FLAGS``, in hex. What a caller sent wrongly is as if it had sent nothing.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_NO_TRACE = b"0" * 32
_NO_SPAN = b"0" * 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceContext:
    """A request's place in its trace: the whole's id, our own part's, and what the caller said of sampling."""

    trace_id: str
    span_id: str
    flags: str

    @property
    def traceparent(self) -> str:
        """What is sent on, and back to the caller."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"


def trace_of(traceparent: bytes | None) -> TraceContext:
    """Return our part of the trace that a ``traceparent`` names, of a new one without it."""
    trace_id, flags = secrets.token_hex(16), "00"
    if traceparent is not None and (found := _TRACEPARENT.fullmatch(traceparent.strip())) is not None:
        version, trace, span, given, more = found.groups()
        known = version != b"ff" and trace != _NO_TRACE and span != _NO_SPAN
        # Later versions may say more at the end; ours says no more.
        if known and (more is None or version != b"00"):
            trace_id, flags = trace.decode(), given.decode()
    return TraceContext(trace_id=trace_id, span_id=secrets.token_hex(8), flags=flags)
