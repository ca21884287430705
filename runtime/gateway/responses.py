"""The bodies that clients get: OpenAI's shapes as typed dictionaries, written by orjson.

Typed dictionaries and not models: a stream writes one a token, and this is the fastest way to bytes.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any, Literal, NotRequired

import orjson
from typing_extensions import TypedDict

from ...sdk.results import RequestOutput
from .logprobs import ChatLogprobs, CompletionLogprobs


class PromptTokensDetails(TypedDict):
    """Of the prompt's tokens, those whose KV was in the prefix cache."""

    cached_tokens: int


class Usage(TypedDict):
    """What a request has cost in tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionChoice(TypedDict):
    """One sample of one prompt, or what a piece of a stream adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[list[dict[str, Any] | None]]


class Completion(TypedDict):
    """POST /v1/completions, whole or one piece of the stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class FunctionCall(TypedDict):
    """A function's name and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """One call that the model asks for; ``index`` only in streams."""

    id: str
    type: Literal["function"]
    function: FunctionCall
    index: NotRequired[int]


class ChatMessage(TypedDict):
    """The assistant's answer, or in a stream what is added to it."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str | None]
    refusal: NotRequired[None]
    tool_calls: NotRequired[list[ToolCall]]


class ChatChoice(TypedDict):
    """One answer, whole (``message``) or a piece of it (``delta``)."""

    index: int
    message: NotRequired[ChatMessage]
    delta: NotRequired[ChatMessage]
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: NotRequired[int | str | None]
    token_ids: NotRequired[list[int]]


class ChatCompletion(TypedDict):
    """POST /v1/chat/completions, whole or one piece of the stream."""

    id: str
    object: Literal["chat.completion", "chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: NotRequired[Usage | None]
    prompt_token_ids: NotRequired[list[int]]


class ModelCard(TypedDict):
    """One served name."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None


class ModelList(TypedDict):
    """GET /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokenized(TypedDict):
    """POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(TypedDict):
    """POST /detokenize."""

    prompt: str


class Health(TypedDict):
    """GET /health."""

    status: Literal["alive"]


class Ready(TypedDict):
    """GET /ready; ``problem`` says what stands in the way, ``degraded`` what fails though requests are answered."""

    status: Literal["ready", "not ready"]
    problem: NotRequired[str]
    degraded: NotRequired[str]


def usage_of(outputs: Sequence[RequestOutput], *, without_output: bool = False) -> Usage:
    """Add up what prompts have cost; a prompt counts once, however many samples it has."""
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    drawn = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
    completion_tokens = 0 if without_output else drawn
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in outputs)},
    }


def to_json(value: object) -> bytes:
    """Write a body."""
    return orjson.dumps(value)


def to_event(value: object) -> bytes:
    """Write one server-sent event."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


class EventTemplate:
    """Events that differ in one text alone: written once, and then only the text is.

    ``make`` returns the event with a text; the text must stand in it once.
    """

    __slots__ = ("_after", "_before")

    def __init__(self, make: Callable[[str], object]) -> None:
        mark = secrets.token_hex(16)
        self._before, self._after = to_event(make(mark)).split(orjson.dumps(mark))

    def write(self, text: str) -> bytes:
        """Write the event with this text."""
        return b"%b%b%b" % (self._before, orjson.dumps(text), self._after)


LAST_EVENT = b"data: [DONE]\n\n"
