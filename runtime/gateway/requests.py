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

_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ],
    "description": "text, token ids, or a list of either",
}

_MESSAGES_SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["role"],
        "properties": {
            "role": {"type": "string"},
            "content": {
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "items": {"type": "object"}},
                    {"type": "null"},
                ]
            },
        },
    },
}

# Checked by hand: a schema's complaint about a million tokens, one by one, would cost more than the request.
Prompt = Annotated[Any, WithJsonSchema(_PROMPT_SCHEMA)]
Messages = Annotated[Any, WithJsonSchema(_MESSAGES_SCHEMA)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

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
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: StructuredOutputsBody | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
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
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    add_special_tokens: bool | None = None


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeBody(_Body):
    """POST /tokenize: a prompt or a chat."""

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
    tokens: Annotated[Any, WithJsonSchema({"type": "array", "items": {"type": "integer"}})]
    skip_special_tokens: bool | None = None
