"""The bodies that clients send: every field that is known, and what is done with it.

Owns names and types. Ranges are checked where their meaning is: in ``SamplingParams``, in the tokenizer, in the
handlers. A field that is not here is refused. ``null`` means the same as leaving a field out.

Three kinds of fields:
- those that act, under OpenAI's names, or vLLM's where OpenAI has none;
- ``_IGNORED``: they say something about the caller and cannot change an answer, so they are accepted;
- ``_REFUSED``: known elsewhere and not here; refused by name unless their value asks for nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from ...sdk.errors import InvalidRequest
from ...sdk.params import (
    LOGIT_BIAS_LIMIT,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_REPETITION_PENALTY,
    MAX_STOP_STRING_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MIN_REPETITION_PENALTY,
)

_IGNORED = frozenset(
    {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    }
)  # fmt: skip

_REFUSED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "truncate_prompt_tokens": (),
    "continue_final_message": (False,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}
"""Field → the values that ask for nothing, besides null."""

MAX_TOP_LOGPROBS = 20
_LARGEST_INT = 2**31 - 1
_TOKEN_ID = {"type": "integer", "minimum": 0, "maximum": _LARGEST_INT}
_TOKEN_IDS = {"type": "array", "items": _TOKEN_ID, "minItems": 1}

_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        _TOKEN_IDS,
        {"type": "array", "items": {"anyOf": [{"type": "string"}, _TOKEN_IDS]}, "minItems": 1},
    ],
    "description": "text, token ids, or a list of either",
    "examples": ["def add(a, b):", [5, 6, 7], ["def add(a, b):", "import"], [[5, 6, 7], [8]]],
}

_TEXT_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}

_MESSAGES_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role"],
        "properties": {
            "role": {"type": "string"},
            "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART}, {"type": "null"}]},
            "tool_calls": {"description": "calls that an assistant has made; the template gets them as they are"},
        },
        "anyOf": [{"required": ["content"]}, {"required": ["tool_calls"]}],
    },
    "examples": [[{"role": "user", "content": "Hello"}]],
}

_STOP_STRING = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_STRING_CHARS}

_STOP_SCHEMA = {"anyOf": [_STOP_STRING, {"type": "array", "items": _STOP_STRING, "maxItems": MAX_STOP_STRINGS}]}

_LOGIT_BIAS_SCHEMA = {
    "type": "object",
    "propertyNames": {"pattern": "^[0-9]{1,10}$"},
    "additionalProperties": {"type": "number", "minimum": -LOGIT_BIAS_LIMIT, "maximum": LOGIT_BIAS_LIMIT},
    "maxProperties": MAX_LOGIT_BIAS,
    "description": "token id → what is added to its logit",
}

_TOOLS_SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["type", "function"],
        "properties": {
            "type": {"const": "function"},
            "function": {
                "type": "object",
                "required": ["name"],
                "properties": {
                    "name": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"},
                    "description": {"description": "what the function does; the template gets it as it is"},
                    "parameters": {"type": ["object", "null"]},
                },
            },
        },
    },
}


def _numbers(low: float, high: float, *, above: bool = False) -> WithJsonSchema:
    return WithJsonSchema({"type": "number", "exclusiveMinimum" if above else "minimum": low, "maximum": high})


def _integers(low: int, high: int) -> WithJsonSchema:
    return WithJsonSchema({"type": "integer", "minimum": low, "maximum": high})


# Checked by hand: a schema's complaint about a million tokens, one by one, would cost more than the request.
Prompt = Annotated[Any, WithJsonSchema(_PROMPT_SCHEMA)]
Messages = Annotated[Any, WithJsonSchema(_MESSAGES_SCHEMA)]
TokenIds = Annotated[Any, WithJsonSchema({"type": "array", "items": _TOKEN_ID, "examples": [[5, 6, 7]]})]
Tools = Annotated[list[dict[str, Any]], WithJsonSchema(_TOOLS_SCHEMA)]

# What these annotations add is for /openapi.json; the checks are in SamplingParams, for every way in.
Share = Annotated[float, _numbers(0, 1)]
ShareAboveZero = Annotated[float, _numbers(0, 1, above=True)]
Penalty = Annotated[float, _numbers(-2, 2)]
Count = Annotated[int, _integers(0, _LARGEST_INT)]
Logprobs = Annotated[int, _integers(0, MAX_LOGPROBS)]


def _describe_ignored(schema: dict[str, Any]) -> None:
    schema["properties"] |= {name: {"description": "accepted; has no effect"} for name in sorted(_IGNORED)}


def _describe_either(schema: dict[str, Any]) -> None:
    _describe_ignored(schema)
    schema["oneOf"] = [
        {"required": [given], "properties": {given: {"not": {"type": "null"}}, other: {"type": "null"}}}
        for given, other in (("prompt", "messages"), ("messages", "prompt"))
    ]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_describe_ignored)

    @classmethod
    def parse(cls, value: dict[str, Any]) -> Self:
        """Check a body; drop what is ignored.

        Raises: InvalidRequest, naming the first field that is wrong
        """
        for name, neutral in _REFUSED.items():
            if name in cls.model_fields or (given := value.get(name)) is None:
                continue
            # 1 == True in Python, and not in JSON.
            if not any(given == each and type(given) is type(each) for each in neutral):
                instead = "; use structured_outputs instead" if name.startswith("guided_") else ""
                raise InvalidRequest(name, f"is not supported by this server{instead}")
        dropped = _IGNORED | (_REFUSED.keys() - cls.model_fields.keys())
        try:
            return cls.model_validate({name: item for name, item in value.items() if name not in dropped})
        except ValidationError as error:
            raise _complaint(error) from None


def _complaint(error: ValidationError) -> InvalidRequest:
    # Without the input: it may be megabytes, and the client has it.
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    name = ".".join(str(part) for part in first["loc"]) or "body"
    if first["type"] == "extra_forbidden":
        return InvalidRequest(name, "is not a field that this endpoint knows")
    if first["type"] == "missing":
        return InvalidRequest(name, "is missing")
    return InvalidRequest(name, first["msg"])


class StreamOptions(BaseModel):
    """What a stream carries besides text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(
        default=None, description="with include_usage: every event, not only the last, has the usage so far"
    )
    include_obfuscation: bool | None = Field(default=None, description="accepted; nothing is added to streams")


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    properties = {**required, **(optional or {})}
    return {"type": "object", "properties": properties, "required": [*required], "additionalProperties": False}


_RESPONSE_FORMAT_SCHEMA = {
    "anyOf": [
        _object({"type": {"const": "text"}}),
        _object({"type": {"const": "json_object"}}),
        _object(
            {
                "type": {"const": "json_schema"},
                "json_schema": _object(
                    {"schema": {"type": "object", "description": "a JSON schema"}},
                    {"name": {}, "description": {}, "strict": {}},
                ),
            }
        ),
    ]
}


class StructuredOutputsBody(BaseModel):
    """vLLM's spelling of what an answer must look like: one of the first five."""

    model_config = ConfigDict(extra="forbid", strict=True)

    json_schema: str | dict[str, Any] | None = Field(default=None, alias="json", description="a JSON schema")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = Field(default=None, description="Lark's notation")
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None


class GenerationBody(_Body):
    """What completions and chats have in common."""

    model: str | None = Field(default=None, description="a served name; the served model when left out")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, _integers(1, MAX_N)] | None = None
    temperature: Annotated[float, _numbers(0, 100)] | None = None
    top_p: ShareAboveZero | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int, _integers(-(2**63), 2**64 - 1)] | None = None
    stop: Annotated[str | list[str], WithJsonSchema(_STOP_SCHEMA)] | None = None
    max_tokens: Count | None = None
    logit_bias: Annotated[dict[str, float], WithJsonSchema(_LOGIT_BIAS_SCHEMA)] | None = None
    response_format: Annotated[dict[str, Any], WithJsonSchema(_RESPONSE_FORMAT_SCHEMA)] | None = None
    structured_outputs: StructuredOutputsBody | None = None

    top_k: Annotated[int, _integers(-1, _LARGEST_INT)] | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, _numbers(MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY)] | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    stop_token_ids: (
        Annotated[list[int], WithJsonSchema({"type": "array", "items": _TOKEN_ID, "maxItems": MAX_STOP_TOKEN_IDS})]
        | None
    ) = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = Field(default=None, description="accepted; has no effect")
    include_stop_str_in_output: bool | None = None
    priority: int | None = Field(default=None, ge=-(2**31), le=2**31 - 1)
    cache_salt: str | None = Field(default=None, min_length=1, max_length=256)
    return_token_ids: bool | None = None


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    add_special_tokens: bool | None = None


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, _integers(0, MAX_TOP_LOGPROBS)] | None = None
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeBody(_Body):
    """POST /tokenize: a prompt or a chat."""

    model_config = ConfigDict(json_schema_extra=_describe_either)

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(_Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: TokenIds
    skip_special_tokens: bool | None = None
