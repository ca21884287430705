"""From a body to SamplingParams: what the client said, over what the model's makers suggest, over our defaults.

Owns the order of these three, and the checks that need more than one field.
"""

from __future__ import annotations

from typing import Any

from ...sdk.errors import InvalidRequest
from ...sdk.params import SamplingParams
from ..models.generation_defaults import GenerationDefaults
from .requests import MAX_TOP_LOGPROBS, ChatBody, CompletionBody, GenerationBody

_SAME_NAME = (
    "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "seed", "stop", "stop_token_ids", "min_tokens", "ignore_eos", "skip_special_tokens", "include_stop_str_in_output",
    "logit_bias",
)  # fmt: skip

_COMPLETION_MAX_TOKENS = 16


def completion_params(body: CompletionBody, defaults: GenerationDefaults) -> SamplingParams:
    """Return the parameters of a completion.

    Echoed log-probabilities are the prompt's. ``max_tokens`` 0 only makes sense with ``echo``: one token is drawn then,
    because there is no step without one, and the caller leaves it out of its answer.
    Raises: InvalidRequest, naming the field
    """
    max_tokens = _COMPLETION_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise InvalidRequest("max_tokens", "0 is only allowed with echo")
    prompt_logprobs = body.prompt_logprobs
    if body.echo and body.logprobs is not None:
        prompt_logprobs = max(body.logprobs, prompt_logprobs or 0)
    return _params(
        body,
        defaults,
        max_tokens=1 if max_tokens == 0 else max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def chat_params(body: ChatBody, defaults: GenerationDefaults) -> SamplingParams:
    """Return the parameters of a chat; its answer may be as long as the model allows unless it says otherwise.

    Raises: InvalidRequest, naming the field
    """
    if body.top_logprobs is not None:
        if not body.logprobs:
            raise InvalidRequest("top_logprobs", "needs logprobs to be true")
        if not 0 <= body.top_logprobs <= MAX_TOP_LOGPROBS:
            raise InvalidRequest("top_logprobs", f"must be from 0 to {MAX_TOP_LOGPROBS}, got {body.top_logprobs}")
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise InvalidRequest("max_tokens", "says another number than max_completion_tokens: give one of them")
    given = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return _params(
        body,
        defaults,
        max_tokens=defaults.max_new_tokens if given is None else given,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=None,
    )


def _params(body: GenerationBody, defaults: GenerationDefaults, **resolved: int | None) -> SamplingParams:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options", "needs stream to be true")
    values: dict[str, Any] = {
        "temperature": 0.0 if defaults.do_sample is False else defaults.temperature,
        "top_p": defaults.top_p,
        "top_k": defaults.top_k,
        "min_p": defaults.min_p,
        "repetition_penalty": defaults.repetition_penalty,
    }
    for name in _SAME_NAME:
        if (given := getattr(body, name)) is not None:
            values[name] = given
    # Those that were resolved keep their None: for max_tokens it means as many as the model allows.
    return SamplingParams(**({name: value for name, value in values.items() if value is not None} | resolved))
