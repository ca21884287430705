"""Where a driver's requests wait while their constraint is compiled: beside the step loop, never in it.

Bounded in number by the queue here, in time by the compiler's own limits and by each request's deadline.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from ...sdk.errors import InvalidRequest, Overloaded, SlipstreamError
from ...sdk.structured import StructuredOutputsParams

logger = logging.getLogger(__name__)

_THREADS = 2
_MAX_WAITING = 256


class ConstraintCompiler(Protocol):
    """Compiles constraints and keeps them; ``GrammarCompiler`` is one. Called from several threads."""

    def has(self, constraint: StructuredOutputsParams) -> bool:
        """Return whether a constraint is compiled already."""
        ...

    def compile(self, constraint: StructuredOutputsParams) -> None:
        """Compile a constraint; raise InvalidRequest when that cannot be done."""
        ...


class GrammarGate:
    """Lets requests through when their constraint is compiled. ``compiler`` None: this engine has no vocabulary."""

    def __init__(self, compiler: ConstraintCompiler | None) -> None:
        self._compiler = compiler
        self._pool = ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="slipstream-compile")
        self._waiting: set[Future[None]] = set()

    def begin(self, constraint: StructuredOutputsParams, done: Callable[[SlipstreamError | None], None]) -> bool:
        """Start compiling and return True: ``done`` is called from another thread. False when it is compiled already.

        Raises: InvalidRequest; Overloaded when too many wait
        """
        if self._compiler is None:
            raise InvalidRequest("structured_outputs", "this replica has no tokenizer, and cannot serve them")
        if self._compiler.has(constraint):
            return False
        # A copy, because compiling threads take themselves out meanwhile.
        if len(self._waiting.copy()) >= _MAX_WAITING:
            raise Overloaded(f"{_MAX_WAITING} requests wait for their structured_outputs to be compiled already")
        future = self._pool.submit(self._compiler.compile, constraint)
        self._waiting.add(future)
        future.add_done_callback(lambda ended: self._end(ended, done))
        return True

    def _end(self, future: Future[None], done: Callable[[SlipstreamError | None], None]) -> None:
        self._waiting.discard(future)
        if future.cancelled():
            return
        error = future.exception()
        if error is not None and not isinstance(error, SlipstreamError):
            logger.error("a constraint could not be compiled: %r", error)
            error = InvalidRequest("structured_outputs", "cannot be compiled")
        done(error)

    def close(self) -> None:
        """Let go of what waits. Idempotent."""
        self._pool.shutdown(wait=False, cancel_futures=True)
