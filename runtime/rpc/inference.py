"""What a public inference service asks of the gateway behind it: values, and the contract. Knows no gRPC.

A request's body has the names and meanings of ``POST /v1/completions``: the gateway reads both with the same eyes.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Protocol

from ...sdk.errors import SlipstreamError


class InferenceRefused(SlipstreamError):
    """A request that is refused, or ended by an error. ``status``: what HTTP says of it; ``param`` names a field."""

    def __init__(self, status: int, message: str, *, param: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks, as the call's metadata say. ``timeout_s``: None leaves the gateway's own limit."""

    authorization: bytes | None = field(default=None, repr=False)
    traceparent: bytes | None = None
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request. ``body``: what was given, by the names of ``POST /v1/completions``."""

    body: dict[str, Any]
    request_id: str = ""
    idempotency_key: str = ""


@dataclass(frozen=True, slots=True)
class Scored:
    """One token with its log-probability."""

    token_id: int
    logprob: float
    rank: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerNews:
    """What is new of one sample. ``answer_id`` comes once, with the first; ``usage`` once, with the last.

    ``usage``: tokens of the prompt, those of them that were cached, tokens of the answer
    """

    sample: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[tuple[Scored, ...], ...] = ()
    finish_reason: str = ""
    stop_reason: int | str | None = None
    answer_id: str = ""
    usage: tuple[int, int, int] | None = None

    @property
    def is_text_alone(self) -> bool:
        """Whether there is nothing but text, in which case it needs no reply of its own."""
        return not (self.token_ids or self.logprobs or self.finish_reason or self.answer_id or self.usage)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """One served name. Units: created_s, since 1970"""

    name: str
    max_model_len: int
    created_s: int


class TextLine(Protocol):
    """Where a sample's text may be written without waking whoever carries its request."""

    @property
    def keeps_up(self) -> bool:
        """Whether there is room for more."""
        ...

    def write(self, sample: int, text: str) -> None:
        """Write a sample's next text."""
        ...


class InferenceHost(Protocol):
    """A gateway, as the service sees it."""

    def check(self, caller: Caller) -> None:
        """Raise InferenceRefused for one who may not ask anything."""
        ...

    def models(self) -> tuple[ModelFacts, ...]:
        """Return what is served."""
        ...

    def generate(self, ask: Ask, caller: Caller, line: TextLine | None) -> AsyncGenerator[AnswerNews]:
        """Run a request and yield its news until all samples have ended; closing it early ends the request.

        Text that is written to ``line`` is in no news. Raises: InferenceRefused
        """
        ...
