"""Between what passes within a session and bytes, both ways: the commands of a gateway.

Pure. Everything is bounded before anything is made of it: a message is at most ``MAX_MESSAGE_BYTES`` long, and its
columns are measured before they become arrays. What a peer may not send is an InvalidRequest that names the field.
The events of a replica are in ``codec_events``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from ...sdk.errors import InvalidRequest
from ...sdk.params import MAX_LOGIT_BIAS, MAX_N, MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS, SamplingParams
from ...sdk.structured import StructuredOutputsParams
from ..messages import EngineRequest, Int32Array
from .engine_client import SendTo
from .generated import engine_pb2 as pb
from .session import Abort, AbortSample, Command, Drain, GoOn, Submit
from .submit_rules import MAX_PROMPT_TOKENS, check_submit

MAX_MESSAGE_BYTES = 16 << 20
MAX_STOP_IDS = 2 * MAX_STOP_TOKEN_IDS
MAX_REQUEST_ID_CHARS = 256
MAX_CACHE_SALT_CHARS = 4096
MAX_TIMEOUT_S = 30 * 86_400.0
_INT32_MAX = 2**31 - 1


def encode_command(command: Command) -> bytes:
    """Return a command as bytes; raise InvalidRequest when it is larger than the other side would take."""
    match command:
        case Submit():
            message = pb.ClientMessage(submit=_submit_to_wire(command))
        case Abort(key=key):
            message = pb.ClientMessage(abort=pb.Abort(key=key))
        case AbortSample(key=key, index=index):
            message = pb.ClientMessage(abort_sample=pb.AbortSample(key=key, index=index))
        case GoOn(key=key):
            message = pb.ClientMessage(go_on=pb.GoOn(key=key))
        case Drain():
            message = pb.ClientMessage(drain=pb.Drain())
    return message.SerializeToString()


def decode_command(data: bytes) -> Command:
    """Return the command that these bytes are.

    Raises: InvalidRequest for anything else; BadSubmit when it is known which request is meant
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise InvalidRequest("message", f"is {len(data)} bytes long, more than {MAX_MESSAGE_BYTES}")
    try:
        message = pb.ClientMessage.FromString(data)
    except DecodeError as error:
        raise InvalidRequest("message", "is not a ClientMessage") from error
    match message.WhichOneof("command"):
        case "submit":
            return _submit_from_wire(message.submit)
        case "abort":
            return Abort(key=_key(message.abort.key))
        case "abort_sample":
            index = message.abort_sample.index
            if index >= MAX_N:
                raise InvalidRequest("index", f"must be less than {MAX_N}, got {index}")
            return AbortSample(key=_key(message.abort_sample.key), index=index)
        case "go_on":
            return GoOn(key=_key(message.go_on.key))
        case "drain":
            return Drain()
        case _:
            raise InvalidRequest("message", "holds no command that this replica knows")


class BadSubmit(InvalidRequest):
    """A submit that cannot be taken, while it is known which request it was: that one alone is refused."""

    def __init__(self, key: int, cause: InvalidRequest) -> None:
        super().__init__(cause.field, cause.problem)
        self.key = key


def _key(key: int) -> int:
    if not key:
        raise InvalidRequest("key", "must be at least 1")
    return key


def _submit_to_wire(submit: Submit) -> pb.Submit:
    request = submit.request
    _check_lengths(len(request.prompt_token_ids), len(request.stop_ids), request.request_id, request.cache_salt)
    check_submit(submit)
    if not -(2**31) <= request.priority <= _INT32_MAX:
        raise InvalidRequest("priority", f"must be an integer of 32 bits, got {request.priority}")
    try:
        return pb.Submit(
            key=submit.key,
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids.tolist(),
            params=_params_to_wire(request.params),
            seed=request.seed,
            stop_ids=request.stop_ids,
            max_tokens=request.max_tokens,
            priority=request.priority,
            cache_salt=request.cache_salt,
            timeout_s=submit.timeout_s,
            generated=[_generated_to_wire(tokens) for tokens in request.generated],
            send_to=None if submit.send_to is None else _send_to_to_wire(submit.send_to),
            ticket=submit.ticket,
            trace_id=submit.trace_id,
        )
    except UnicodeEncodeError as error:
        raise InvalidRequest("request", f"holds text that is not Unicode: {error.reason}") from error


def _submit_from_wire(message: pb.Submit) -> Submit:
    key = _key(message.key)
    try:
        submit = Submit(
            key=key,
            request=_request_from_wire(message),
            timeout_s=_timeout(message.timeout_s),
            send_to=_send_to_from_wire(message.send_to) if message.HasField("send_to") else None,
            ticket=message.ticket,
            trace_id=message.trace_id,
        )
        check_submit(submit)
    except InvalidRequest as error:
        raise BadSubmit(key, error) from error
    return submit


def _request_from_wire(message: pb.Submit) -> EngineRequest:
    salt = message.cache_salt if message.HasField("cache_salt") else None
    _check_lengths(len(message.prompt_token_ids), len(message.stop_ids), message.request_id, salt)
    if not 1 <= message.max_tokens <= _INT32_MAX:
        raise InvalidRequest("max_tokens", f"must be an integer from 1 to {_INT32_MAX}, got {message.max_tokens}")
    stop_ids = tuple(message.stop_ids)
    if stop_ids and min(stop_ids) < 0:
        raise InvalidRequest("stop_ids", f"must not be negative, got {min(stop_ids)}")
    return EngineRequest(
        request_id=message.request_id,
        prompt_token_ids=_tokens("prompt_token_ids", message.prompt_token_ids),
        params=_params_from_wire(message.params),
        seed=message.seed,
        stop_ids=stop_ids,
        max_tokens=message.max_tokens,
        # The replica's own clock says when a request arrived; the gateway's means nothing here.
        arrival_time_s=0.0,
        priority=message.priority,
        cache_salt=salt,
        generated=_generated_from_wire(message),
    )


def _tokens(field: str, column: Sequence[int]) -> Int32Array:
    tokens = np.array(column, dtype=np.int32)
    if len(tokens) and int(tokens.min()) < 0:
        raise InvalidRequest(field, f"must not be negative, got {int(tokens.min())}")
    return tokens


def _check_lengths(prompt_tokens: int, stop_ids: int, request_id: str, salt: str | None) -> None:
    if prompt_tokens > MAX_PROMPT_TOKENS:
        raise InvalidRequest("prompt", f"{prompt_tokens} tokens are more than {MAX_PROMPT_TOKENS}")
    if stop_ids > MAX_STOP_IDS:
        raise InvalidRequest("stop_ids", f"{stop_ids} are more than {MAX_STOP_IDS}")
    if not 1 <= len(request_id) <= MAX_REQUEST_ID_CHARS:
        raise InvalidRequest("request_id", f"must have 1 to {MAX_REQUEST_ID_CHARS} characters, got {len(request_id)}")
    if salt is not None and len(salt) > MAX_CACHE_SALT_CHARS:
        raise InvalidRequest("cache_salt", f"{len(salt)} characters are more than {MAX_CACHE_SALT_CHARS}")


# ------------------------------------------------------------------ requests that go on elsewhere


def _generated_to_wire(tokens: Int32Array | None) -> pb.Generated:
    return pb.Generated(over=True) if tokens is None else pb.Generated(token_ids=tokens.tolist())


def _generated_from_wire(message: pb.Submit) -> tuple[Int32Array | None, ...]:
    # Before anything is made of them: there may be any number.
    if len(message.generated) > MAX_N:
        raise InvalidRequest("generated", f"{len(message.generated)} samples are more than {MAX_N}")
    if any(sample.over and sample.token_ids for sample in message.generated):
        raise InvalidRequest("generated", "has tokens of a sample that is over")
    if sum(len(sample.token_ids) for sample in message.generated) > MAX_PROMPT_TOKENS:
        raise InvalidRequest("generated", f"has more than {MAX_PROMPT_TOKENS} tokens")
    return tuple(None if sample.over else _tokens("generated", sample.token_ids) for sample in message.generated)


def _send_to_to_wire(send_to: SendTo) -> pb.SendTo:
    return pb.SendTo(replica=send_to.replica, address=send_to.address, ticket=send_to.ticket)


def _send_to_from_wire(message: pb.SendTo) -> SendTo:
    return SendTo(replica=message.replica, address=message.address, ticket=message.ticket)


# ------------------------------------------------------------------ parameters


def _timeout(timeout_s: float) -> float:
    if not math.isfinite(timeout_s) or not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise InvalidRequest("timeout_s", f"must be above 0 and at most {MAX_TIMEOUT_S:g}, got {timeout_s}")
    return timeout_s


def _params_to_wire(params: SamplingParams) -> pb.SamplingParams:
    return pb.SamplingParams(
        n=params.n,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        stop=params.stop_strings,
        stop_token_ids=params.stop_ids,
        ignore_eos=params.ignore_eos,
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
        detokenize=params.detokenize,
        skip_special_tokens=params.skip_special_tokens,
        include_stop_str_in_output=params.include_stop_str_in_output,
        bias_token_ids=list(params.logit_bias.keys()),
        bias_amounts=list(params.logit_bias.values()),
        structured_outputs=None
        if params.structured_outputs is None
        else _constraint_to_wire(params.structured_outputs),
    )


def _constraint_to_wire(constraint: StructuredOutputsParams) -> pb.StructuredOutputs:
    message = pb.StructuredOutputs(disable_any_whitespace=constraint.disable_any_whitespace)
    if constraint.kind == "choice":
        message.choice.texts.extend(constraint.choice or ())
    else:
        setattr(message, constraint.kind, getattr(constraint, constraint.kind))
    return message


def _constraint_from_wire(message: pb.StructuredOutputs) -> StructuredOutputsParams:
    kind = message.WhichOneof("constraint")
    if kind is None:
        raise InvalidRequest("structured_outputs", "holds no constraint that this replica knows")
    value: Any = tuple(message.choice.texts) if kind == "choice" else getattr(message, kind)
    return replace(StructuredOutputsParams(**{kind: value}), disable_any_whitespace=message.disable_any_whitespace)


def _params_from_wire(message: pb.SamplingParams) -> SamplingParams:
    """Return checked parameters; the ranges are ``SamplingParams``' own business. The seed has been resolved."""
    if len(message.bias_token_ids) != len(message.bias_amounts):
        lengths = f"{len(message.bias_token_ids)} tokens and {len(message.bias_amounts)} amounts"
        raise InvalidRequest("logit_bias", f"needs an amount for each token, got {lengths}")
    for field, length, limit in (
        ("logit_bias", len(message.bias_token_ids), MAX_LOGIT_BIAS),
        ("stop", len(message.stop), MAX_STOP_STRINGS),
        ("stop_token_ids", len(message.stop_token_ids), MAX_STOP_TOKEN_IDS),
    ):
        if length > limit:
            raise InvalidRequest(field, f"at most {limit} entries, got {length}")
    return SamplingParams(
        n=message.n,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty,
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
        min_tokens=message.min_tokens,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        detokenize=message.detokenize,
        skip_special_tokens=message.skip_special_tokens,
        include_stop_str_in_output=message.include_stop_str_in_output,
        logit_bias=dict(zip(message.bias_token_ids, message.bias_amounts, strict=True)),
        structured_outputs=(
            _constraint_from_wire(message.structured_outputs) if message.HasField("structured_outputs") else None
        ),
    )
