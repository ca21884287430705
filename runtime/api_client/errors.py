"""What can go wrong with a request to an API.

    SlipstreamError
    └── ApiError    the server did not answer as it should; ``kind`` says in which way    blame: peer

A deadline is the caller's: it is not seen here.
"""

from __future__ import annotations

from ...sdk.errors import Blame, SlipstreamError


class ApiError(SlipstreamError):
    """A request failed. ``kind`` is one of few short names, to count by: ``no connection``, ``http 429``, ..."""

    blame = Blame.PEER

    def __init__(self, kind: str, problem: str) -> None:
        super().__init__(f"{kind}: {problem}")
        self.kind = kind
        self.problem = problem
