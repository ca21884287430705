"""From a body's prompt or messages to prompts that the engine takes.

Owns when tokenizing leaves the event loop, and the checks on how many prompts there are. Templates and tokenizers
themselves are in ``runtime/text``.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from ...sdk.errors import InvalidRequest
from ..prompts import PreparedPrompt, is_token_list
from ..text.tokenizer import Tokenizer
from .errors import HttpRefusal
from .replica import ServedModel
from .settings import GatewaySettings

T = TypeVar("T")

_INLINE_CHARS = 2_000
"""Text up to this long is tokenized at once; a thread costs more. Longer text must not hold up other requests."""


def check_model(name: str | None, settings: GatewaySettings) -> None:
    """Check that a body asks for the model that is served; raise HttpRefusal (404) otherwise."""
    if name is not None and name not in settings.served_model_names:
        served = ", ".join(settings.served_model_names)
        message = f"the model {name[:200]!r} is not served here; served is: {served}"
        raise HttpRefusal(404, message, param="model", code="model_not_found")


def split_prompts(prompt: object, settings: GatewaySettings) -> list[str | list[int]]:
    """Return a completion's prompts: text or token ids, one or many.

    Raises: InvalidRequest naming ``prompt``
    """
    if isinstance(prompt, str) or is_token_list(prompt):
        return [prompt]  # type: ignore[list-item]  # is_token_list does not narrow
    if not isinstance(prompt, list) or not prompt:
        raise InvalidRequest("prompt", "must be text, token ids, or a list of either that is not empty")
    limit = settings.limits.max_prompts
    if len(prompt) > limit:
        raise InvalidRequest("prompt", f"at most {limit} prompts in one request, got {len(prompt)}")
    for place, each in enumerate(prompt):
        if not isinstance(each, str) and not is_token_list(each):
            raise InvalidRequest("prompt", f"entry {place} must be text or a list of token ids that is not empty")
    return prompt


def check_sequences(prompts: int, n: int, settings: GatewaySettings) -> None:
    """Check how many samples a request makes altogether."""
    limit = settings.limits.max_sequences
    if prompts * n > limit:
        raise InvalidRequest("n", f"{prompts} prompts of {n} samples each are more than {limit} in one request")


async def prepare(
    model: ServedModel, prompt: str | list[int], *, add_special_tokens: bool = True, cache_salt: str | None = None
) -> PreparedPrompt:
    """Make one prompt ready; ``cache_salt`` keeps its cached prefix apart from others'.

    Raises: InvalidRequest naming ``prompt``
    """

    if isinstance(prompt, str):
        _check_length(model, "prompt", len(prompt))

    def make() -> PreparedPrompt:
        if isinstance(prompt, str) and not add_special_tokens:
            prepared = _without_special_tokens(model, prompt)
        else:
            prepared = model.factory.prepare(prompt)
        return replace(prepared, cache_salt=cache_salt)

    return await _beside(len(prompt), make)


async def tokenize_text(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    """Return the tokens of a text, however many they are."""
    return await _beside(len(text), lambda: tokenizer.encode(text, add_special_tokens=add_special_tokens))


async def prepare_chat(
    model: ServedModel,
    messages: object,
    *,
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
    template_variables: Mapping[str, Any],
    cache_salt: str | None = None,
) -> PreparedPrompt:
    """Render a chat and make it ready.

    Raises: InvalidRequest naming ``messages``, ``tools`` or ``chat_template_kwargs``
    """

    def render() -> PreparedPrompt:
        try:
            text = render_chat(
                model.tokenizer, messages, tools=tools, add_generation_prompt=add_generation_prompt,
                template_variables=template_variables,
            )  # fmt: skip
        except RecursionError as error:
            raise InvalidRequest("messages", "are nested too deeply") from error
        _check_length(model, "messages", len(text))
        prepared = _without_special_tokens(model, text, field="messages")
        return replace(prepared, cache_salt=cache_salt)

    return await _beside(_size_of(messages), render)


def render_chat(
    tokenizer: Tokenizer,
    messages: object,
    *,
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
    template_variables: Mapping[str, Any],
) -> str:
    """Return a chat as text, through the model's template."""
    reserved = {"messages", "tools", "add_generation_prompt", "self"} & template_variables.keys()
    if reserved:
        raise InvalidRequest("chat_template_kwargs", f"{sorted(reserved)[0]!r} cannot be set this way")
    return tokenizer.apply_chat_template(
        _for_template(messages),  # type: ignore[arg-type]  # the template checks what it is given
        add_generation_prompt=add_generation_prompt,
        tools=tools,
        **template_variables,
    )


def _for_template(messages: object) -> object:
    """Write messages as templates know them: arguments of calls as objects, ``developer`` as ``system``."""
    if not isinstance(messages, list):
        return messages
    return [_message_for_template(message) if isinstance(message, dict) else message for message in messages]


def _message_for_template(message: dict[str, Any]) -> dict[str, Any]:
    changed = dict(message)
    if changed.get("role") == "developer":
        changed["role"] = "system"
    calls = changed.get("tool_calls")
    if isinstance(calls, list):
        changed["tool_calls"] = [_call_for_template(call) for call in calls]
    elif calls is None:
        changed.pop("tool_calls", None)
    return changed


def _call_for_template(call: object) -> object:
    match call:
        case {"function": {"arguments": str(text), **function}, **rest}:
            try:
                arguments = json.loads(text)
            except (ValueError, RecursionError):
                return call
            return {**rest, "function": {**function, "arguments": arguments}}
    return call


def _without_special_tokens(model: ServedModel, text: str, *, field: str = "prompt") -> PreparedPrompt:
    try:
        token_ids = model.tokenizer.encode(text, add_special_tokens=False)
        return model.factory.prepare({"prompt": text, "prompt_token_ids": token_ids})
    except InvalidRequest as error:
        raise InvalidRequest(field, error.problem) from error


def _check_length(model: ServedModel, field: str, chars: int) -> None:
    if chars > model.max_prompt_chars:
        limit = model.facts.max_model_len
        raise InvalidRequest(field, f"{chars} characters are more than max_model_len={limit} tokens can hold")


async def _beside(size: int, make: Callable[[], T]) -> T:
    """Make something of text, in a thread when the text is large."""
    return make() if size <= _INLINE_CHARS else await asyncio.to_thread(make)


def _size_of(messages: object) -> int:
    """Return about how much text there is: only ever too much where there are parts."""
    if not isinstance(messages, list):
        return 0
    size = 0
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        size += len(content) if isinstance(content, str) else _INLINE_CHARS
        if size > _INLINE_CHARS:
            break
    return size
