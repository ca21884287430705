"""Between the public service's messages and values. Pure, like ``codec``.

Only shapes are checked here: what a field may be is the gateway's to say, as it does over HTTP, by the same names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from struct import Struct
from typing import Any

from google.protobuf.message import DecodeError

from ...sdk.errors import InvalidRequest
from ...sdk.params import MAX_LOGIT_BIAS, MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS
from .codec import MAX_MESSAGE_BYTES, MAX_TIMEOUT_S
from .generated import inference_pb2 as pb
from .inference import AnswerNews, Ask, InferenceRefused, ModelFacts, Scored
from .submit_rules import MAX_PROMPT_TOKENS

MAX_IDEMPOTENCY_KEY_CHARS = 256
MAX_CHOICES = 4096
_LENGTH = Struct("!I")

_GIVEN = (
    "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "seed", "max_tokens", "min_tokens", "ignore_eos", "skip_special_tokens", "include_stop_str_in_output",
    "add_special_tokens", "logprobs",
)  # fmt: skip
_CODES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    409: "ABORTED",
    413: "INVALID_ARGUMENT",
    422: "FAILED_PRECONDITION",
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


def code_of(error: InferenceRefused) -> str:
    """Return the name of the gRPC status that says what an HTTP status says."""
    return _CODES.get(error.status, "INTERNAL")


# ------------------------------------------------------------------ requests


def decode_generate(data: bytes) -> Ask:
    """Return the request that these bytes are. Raises: InvalidRequest naming the field"""
    return _ask(_parse(pb.GenerateRequest(), data))


def decode_session_command(data: bytes) -> tuple[int, Ask | None, float | None]:
    """Return a session's command: a key, and a request with its time-out, or None to end the one of that key.

    Raises: BadAsk when it is known which request is meant; InvalidRequest
    """
    message = _parse(pb.SessionCommand(), data)
    match message.WhichOneof("command"):
        case "ask":
            key = _key(message.ask.key)
            try:
                return key, _ask(message.ask.request), _timeout(message.ask.timeout_s)
            except InvalidRequest as error:
                raise BadAsk(key, error) from error
        case "cancel":
            return _key(message.cancel.key), None, None
        case _:
            raise InvalidRequest("message", "holds no command that this gateway knows")


class BadAsk(InvalidRequest):
    """A request that cannot be read, while it is known which it was: that one alone is refused."""

    def __init__(self, key: int, cause: InvalidRequest) -> None:
        super().__init__(cause.field, cause.problem)
        self.key = key


def _parse(message: Any, data: bytes) -> Any:
    if len(data) > MAX_MESSAGE_BYTES:
        raise InvalidRequest("message", f"is {len(data)} bytes long, more than {MAX_MESSAGE_BYTES}")
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise InvalidRequest("message", f"is not a {message.DESCRIPTOR.name}") from error
    return message


def _key(key: int) -> int:
    if not key:
        raise InvalidRequest("key", "must be at least 1")
    return key


def _timeout(timeout_s: float) -> float | None:
    if not math.isfinite(timeout_s) or not 0 <= timeout_s <= MAX_TIMEOUT_S:
        raise InvalidRequest("timeout_s", f"must be from 0 to {MAX_TIMEOUT_S:g}, got {timeout_s}")
    return timeout_s or None


def _ask(message: pb.GenerateRequest) -> Ask:
    if len(message.idempotency_key) > MAX_IDEMPOTENCY_KEY_CHARS:
        raise InvalidRequest("idempotency_key", f"must have at most {MAX_IDEMPOTENCY_KEY_CHARS} characters")
    body: dict[str, Any] = {"prompt": _prompt(message), **_params(message.params)}
    if message.model:
        body["model"] = message.model
    if message.priority:
        body["priority"] = message.priority
    if message.HasField("cache_salt"):
        body["cache_salt"] = message.cache_salt
    if message.return_token_ids:
        body["return_token_ids"] = True
    return Ask(body=body, request_id=message.request_id, idempotency_key=message.idempotency_key)


def _prompt(message: pb.GenerateRequest) -> str | list[int]:
    match message.WhichOneof("prompt"):
        case "text":
            return message.text
        case "token_ids":
            _check_at_most("prompt", len(message.token_ids.ids), MAX_PROMPT_TOKENS)
            return list(message.token_ids.ids)
        case _:
            raise InvalidRequest("prompt", "is missing: give text or token_ids")


def _params(message: pb.GenerateParams) -> dict[str, Any]:
    _check_at_most("stop", len(message.stop), MAX_STOP_STRINGS)
    _check_at_most("stop_token_ids", len(message.stop_token_ids), MAX_STOP_TOKEN_IDS)
    _check_at_most("logit_bias", len(message.logit_bias), MAX_LOGIT_BIAS)
    given: dict[str, Any] = {name: getattr(message, name) for name in _GIVEN if message.HasField(name)}
    if message.stop:
        given["stop"] = list(message.stop)
    if message.stop_token_ids:
        given["stop_token_ids"] = list(message.stop_token_ids)
    if message.logit_bias:
        given["logit_bias"] = {str(token_id): amount for token_id, amount in message.logit_bias.items()}
    if message.HasField("structured_outputs"):
        given["structured_outputs"] = _constraint(message.structured_outputs)
    return given


def _constraint(message: pb.AnswerFormat) -> dict[str, Any]:
    kind = message.WhichOneof("constraint")
    if kind is None:
        raise InvalidRequest("structured_outputs", "holds no constraint that this gateway knows")
    value: Any = getattr(message, kind)
    if kind == "choice":
        _check_at_most("structured_outputs.choice", len(message.choice.texts), MAX_CHOICES)
        value = list(message.choice.texts)
    given = {kind: value}
    return given | {"disable_any_whitespace": True} if message.disable_any_whitespace else given


def _check_at_most(field: str, count: int, limit: int) -> None:
    if count > limit:
        raise InvalidRequest(field, f"at most {limit} entries, got {count}")


# ------------------------------------------------------------------ answers


def reply_of(news: AnswerNews) -> pb.GenerateReply:
    """Return news as a reply."""
    piece = pb.AnswerPiece(
        sample=news.sample,
        text=news.text,
        token_ids=news.token_ids,
        finish_reason=news.finish_reason,
        logprobs=[pb.TokenScores(tokens=[_scored(token) for token in position]) for position in news.logprobs],
    )
    if isinstance(news.stop_reason, int):
        piece.stop_token_id = news.stop_reason
    elif news.stop_reason is not None:
        piece.stop_string = news.stop_reason
    reply = pb.GenerateReply(answer_id=news.answer_id, pieces=[piece])
    if news.usage is not None:
        prompt, cached, output = news.usage
        reply.usage.CopyFrom(pb.Usage(prompt_tokens=prompt, cached_tokens=cached, output_tokens=output))
    return reply


def news_of(reply: pb.GenerateReply) -> AnswerNews:
    """Return the news that a reply is, one that ``reply_of`` made."""
    (piece,) = reply.pieces
    stop: int | str | None = None
    if (kind := piece.WhichOneof("stop_reason")) is not None:
        stop = getattr(piece, kind)
    usage = reply.usage
    return AnswerNews(
        sample=piece.sample,
        text=piece.text,
        token_ids=tuple(piece.token_ids),
        logprobs=tuple(
            tuple(Scored(token.token_id, token.logprob, token.rank, token.text) for token in position.tokens)
            for position in piece.logprobs
        ),
        finish_reason=piece.finish_reason,
        stop_reason=stop,
        answer_id=reply.answer_id,
        usage=(usage.prompt_tokens, usage.cached_tokens, usage.output_tokens) if reply.HasField("usage") else None,
    )


def write_kept(news: AnswerNews) -> bytes:
    """Return news as bytes that are kept, one behind the other."""
    data = reply_of(news).SerializeToString()
    return _LENGTH.pack(len(data)) + data


def read_kept(data: bytes) -> Iterator[AnswerNews]:
    """Yield the news that were kept."""
    place = 0
    while place < len(data):
        (length,) = _LENGTH.unpack_from(data, place)
        place += _LENGTH.size
        yield news_of(pb.GenerateReply.FromString(data[place : place + length]))
        place += length


def encode_models(models: tuple[ModelFacts, ...]) -> bytes:
    """Return what is served, as bytes."""
    cards = [pb.ModelCard(name=each.name, max_model_len=each.max_model_len, created=each.created_s) for each in models]
    return pb.ListModelsReply(models=cards).SerializeToString()


def failure_of(key: int, error: InferenceRefused) -> pb.SessionFailure:
    """Return how a request of a session ended."""
    return pb.SessionFailure(
        key=key, code=code_of(error), message=str(error), field=error.param, retry_after_s=error.retry_after_s
    )


def _scored(token: Scored) -> pb.ScoredToken:
    return pb.ScoredToken(token_id=token.token_id, logprob=token.logprob, rank=token.rank, text=token.text)
