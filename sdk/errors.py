"""The errors that a caller of Slipstream may see.

    SlipstreamError
    ├── InvalidRequest     bad parameter or prompt; names the field           blame: caller
    ├── ConfigError        bad constructor or command-line option             blame: caller
    ├── CheckpointError    unusable model directory; names file and tensor    blame: caller
    ├── Overloaded         a bounded queue is full                            blame: us, retryable
    ├── DeadlineExceeded   the request's time is over                         blame: us, retryable
    ├── EngineUnavailable  a replica cannot be reached, or was lost           blame: peer, retryable
    └── EngineError        a step failed or took too long                     blame: us, retryable

Each class says whether the same call may succeed later (``retryable``) and who has to act (``blame``). Mapping to
HTTP and gRPC status codes is the business of the servers, not of these classes.
"""

from __future__ import annotations

from enum import Enum
from typing import ClassVar


class Blame(Enum):
    """Who has to act for the error to go away."""

    CALLER = "caller"
    PEER = "peer"
    US = "us"


class SlipstreamError(Exception):
    """The root of every error that Slipstream raises on purpose."""

    retryable: ClassVar[bool] = False
    blame: ClassVar[Blame] = Blame.US


class InvalidRequest(SlipstreamError, ValueError):
    """A prompt or a parameter cannot be served; ``field`` names it."""

    blame = Blame.CALLER

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class ConfigError(SlipstreamError, ValueError):
    """An option of the engine is wrong or does not go with another; ``field`` names it."""

    blame = Blame.CALLER

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class CheckpointError(SlipstreamError):
    """A model directory cannot be used; the message names the file, and the tensor where there is one."""

    blame = Blame.CALLER

    def __init__(self, file: str, problem: str, *, tensor: str | None = None) -> None:
        where = file if tensor is None else f"{file}: tensor {tensor!r}"
        super().__init__(f"{where}: {problem}")
        self.file = file
        self.tensor = tensor
        self.problem = problem


class Overloaded(SlipstreamError):
    """A bounded queue is full; the same request may be accepted later."""

    retryable = True


class DeadlineExceeded(SlipstreamError):
    """A request did not end within its time and was aborted."""

    retryable = True


class EngineUnavailable(SlipstreamError):
    """A replica did not answer, or its connection was lost while requests were on their way."""

    retryable = True
    blame = Blame.PEER


class EngineError(SlipstreamError):
    """A step of the engine failed or outran its deadline; every request it held has ended with this error."""

    retryable = True
