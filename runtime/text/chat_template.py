"""Turn a chat into the text that the model was trained on.

Owns the checkpoint's chat templates. They are programs that came with the weights: they run in Jinja's sandbox and see
plain data only. It must not know tokens: it stands before the tokenizer.

The environment is that of ``transformers`` (``chat_template_utils``), so the same template gives the same text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ...sdk.errors import CheckpointError, InvalidRequest
from .json_file import read_json_object

DEFAULT_TEMPLATE = "default"
TOOL_TEMPLATE = "tool_use"

_TEMPLATE_FILE = "chat_template.jinja"
_TEMPLATE_JSON = "chat_template.json"
_CONFIG_FILE = "tokenizer_config.json"
_RESERVED_VARIABLES = frozenset({"messages", "chat_template"})

StrftimeNow = Callable[[str], str]
"""Formats the present moment; some templates write the date."""


class ChatTemplate:
    """The chat templates of one checkpoint, compiled.

    ``variables`` are what every rendering sees besides the chat: the texts of the special tokens.
    Raises: CheckpointError naming ``file``, when a template has no sense as Jinja.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        *,
        file: str,
        variables: Mapping[str, str],
        strftime_now: StrftimeNow | None = None,
    ) -> None:
        environment = _environment(strftime_now)
        self._variables = dict(variables)
        self._templates: dict[str, Template] = {}
        for name, source in sources.items():
            try:
                self._templates[name] = environment.from_string(source)
            except TemplateSyntaxError as error:
                problem = f"chat template {name!r}, line {error.lineno}: {error.message}"
                raise CheckpointError(file, problem) from error

    @classmethod
    def from_directory(
        cls, directory: Path, *, variables: Mapping[str, str], strftime_now: StrftimeNow | None = None
    ) -> ChatTemplate | None:
        """Return the checkpoint's templates, None when it has none.

        ``chat_template.jinja`` goes before ``tokenizer_config.json`` and ``chat_template.json``.

        Raises: CheckpointError naming the file.
        """
        file = directory / _TEMPLATE_FILE
        if file.is_file():
            try:
                sources = {DEFAULT_TEMPLATE: file.read_text(encoding="utf-8")}
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(str(file), f"cannot be read as text: {error}") from error
            return cls(sources, file=str(file), variables=variables, strftime_now=strftime_now)
        for name in (_CONFIG_FILE, _TEMPLATE_JSON):
            file = directory / name
            value = read_json_object(file).get("chat_template")
            if value is not None:
                sources = _named_templates(value, str(file))
                return cls(sources, file=str(file), variables=variables, strftime_now=strftime_now)
        return None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        extra_variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Render a chat to text; the template puts the special tokens in itself.

        Content given as parts of type text is joined by line ends.

        Raises: InvalidRequest naming ``messages``, ``tools`` or ``chat_template_kwargs``.
        """
        plain_messages = _checked_messages(messages)
        plain_tools = _checked_tools(tools)
        extra = _checked_variables(extra_variables or {})
        template = self._template_for(plain_tools is not None)
        variables: dict[str, Any] = {"documents": None, **self._variables, **extra}
        variables |= {
            "messages": plain_messages,
            "tools": plain_tools,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return template.render(variables)
        except TemplateError as error:
            raise InvalidRequest("messages", f"the model's chat template refuses them: {error}") from error
        except Exception as error:
            # A template is a foreign program, and what it stumbles over is nearly always what it was given.
            problem = f"the model's chat template failed on them: {type(error).__name__}: {error}"
            raise InvalidRequest("messages", problem) from error

    def _template_for(self, with_tools: bool) -> Template:
        if with_tools and TOOL_TEMPLATE in self._templates:
            return self._templates[TOOL_TEMPLATE]
        if DEFAULT_TEMPLATE in self._templates:
            return self._templates[DEFAULT_TEMPLATE]
        names = ", ".join(sorted(self._templates))
        raise InvalidRequest("messages", f"the model has no chat template named {DEFAULT_TEMPLATE!r}, only: {names}")


class _GenerationBlocks(Extension):
    """Renders ``{% generation %}`` blocks, which mark the assistant's words for training, as what is in them."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment(strftime_now: StrftimeNow | None) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    if strftime_now is not None:
        environment.globals["strftime_now"] = strftime_now
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _named_templates(value: object, file: str) -> dict[str, str]:
    if isinstance(value, str):
        return {DEFAULT_TEMPLATE: value}
    named: dict[str, str] = {}
    for entry in value if isinstance(value, list) else [None]:
        match entry:
            case {"name": str(name), "template": str(template)}:
                named[name] = template
            case _:
                problem = "chat_template must be a string or a list of {name, template}"
                raise CheckpointError(file, problem)
    if not named:
        raise CheckpointError(file, "chat_template is an empty list")
    return named


def _checked_messages(messages: object) -> list[dict[str, Any]]:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise InvalidRequest("messages", "must be a list of {role, content}")
    if not messages:
        raise InvalidRequest("messages", "must hold at least one message")
    return [_checked_message(message, f"message {index}") for index, message in enumerate(messages)]


def _checked_message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequest("messages", f"{where} must be {{role, content}} with a role that is a string")
    if "content" not in message and not message.get("tool_calls"):
        raise InvalidRequest("messages", f"{where} has no content")
    plain = {str(key): _plain(value, "messages", where) for key, value in message.items()}
    content = plain.get("content")
    if isinstance(content, list):
        plain["content"] = "\n".join(_part_text(part, where) for part in content)
    elif content is not None and not isinstance(content, str):
        raise InvalidRequest("messages", f"{where}: content must be a string or a list of {{type, text}} parts")
    return plain


def _part_text(part: object, where: str) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": str(kind)} if kind != "text":
            raise InvalidRequest("messages", f"{where}: parts of type {kind!r} are not supported, only text")
        case _:
            raise InvalidRequest("messages", f"{where}: each part must be {{type: 'text', text: ...}}")


def _checked_tools(tools: object) -> list[dict[str, Any]] | None:
    if tools is None:
        return None
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise InvalidRequest("tools", "must be a list of JSON schemas")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise InvalidRequest("tools", f"tool {index} must be a JSON schema, got {type(tool).__name__}")
    return [_plain(tool, "tools", f"tool {index}") for index, tool in enumerate(tools)]


def _checked_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    for name in variables:
        if name in _RESERVED_VARIABLES:
            raise InvalidRequest("chat_template_kwargs", f"{name!r} cannot be set this way")
    return {name: _plain(value, "chat_template_kwargs", name) for name, value in variables.items()}


def _plain(value: object, field: str, where: str) -> Any:
    """Copy JSON-like data, and refuse all else: a template must not get hold of objects with methods."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, field, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, field, where) for item in value]
    raise InvalidRequest(field, f"{where}: {type(value).__name__} is not JSON data")
