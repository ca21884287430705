"""What a chat may call: ``tools`` and ``tool_choice``, checked and settled.

Owns the meaning of the four choices. ``none``: the model does not see the tools. ``auto``: it may call, and calls to
``strict`` functions keep to their schemas. ``required`` and a named function: it can write nothing but calls; an answer
that was cut short still gives text and no call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...sdk.errors import InvalidRequest
from ...sdk.structured import StructuredOutputsParams
from ..text.tokenizer import Tokenizer
from .requests import ChatBody
from .response_format import AnswerFormat
from .settings import GatewaySettings
from .tool_grammar import Function, calls_only, calls_or
from .tools import ToolParser, parser_for

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """``shown``: what the template gets. ``make_parser`` None: the answer is text and nothing else.

    ``grammar``: what the answer is held to, None when the model writes as it likes, or as the body's format says.
    """

    shown: list[dict[str, Any]] | None = None
    make_parser: Callable[[], ToolParser] | None = None
    grammar: AnswerFormat | None = None
    needs_special_tokens: bool = False
    at_most_one: bool = False


def settle_tools(
    body: ChatBody, settings: GatewaySettings, tokenizer: Tokenizer, wanted: AnswerFormat | None
) -> ToolUse:
    """Settle what one chat may call; ``wanted``: the format that it asks of an answer.

    Raises: InvalidRequest naming ``tools`` or ``tool_choice``
    """
    functions = _functions(body.tools or [], settings)
    choice = ("auto" if functions else "none") if body.tool_choice is None else body.tool_choice
    if isinstance(choice, dict):
        functions = [_named_function(choice, functions)]
    if choice != "none" and not functions:
        raise InvalidRequest("tool_choice", "needs tools to choose from")
    if choice == "none":
        return ToolUse()
    make_parser = parser_for(settings.tool_call_parser, tokenizer)
    if make_parser is None:
        if choice != "auto":
            raise InvalidRequest("tool_choice", "only 'none' and 'auto': this server does not read calls")
        return ToolUse(shown=body.tools)
    parser = make_parser()
    at_most_one = body.parallel_tool_calls is False or isinstance(choice, dict)
    form, token_of = parser.call_format, tokenizer.token_to_id
    grammar = None
    if choice != "auto":
        grammar = calls_only(form, functions, token_of, many=not at_most_one)
    elif wanted is not None or any(function.strict for function in functions):
        grammar = calls_or(form, functions, token_of, many=not at_most_one, answer=_schema_of(wanted))
    return ToolUse(
        shown=body.tools,
        make_parser=make_parser,
        grammar=None if grammar is None else _as_format(grammar),
        needs_special_tokens=parser.needs_special_tokens,
        at_most_one=at_most_one,
    )


def _as_format(grammar: str) -> AnswerFormat:
    try:
        return AnswerFormat(constraint=StructuredOutputsParams(grammar=grammar), field="tools")
    except InvalidRequest as error:
        raise InvalidRequest("tools", f"their schemas are too large together: {error.problem}") from None


def _schema_of(wanted: AnswerFormat | None) -> str | None:
    if wanted is None:
        return None
    constraint = wanted.constraint
    if constraint.json_object:
        return '{"type":"object"}'
    if not isinstance(constraint.json, str):
        raise InvalidRequest(wanted.field, "a format that is not JSON goes with tool_choice 'none' only")
    # One line: the grammar's rules end with theirs.
    return json.dumps(json.loads(constraint.json))


def _functions(tools: list[dict[str, Any]], settings: GatewaySettings) -> list[Function]:
    if len(tools) > settings.limits.max_tools:
        raise InvalidRequest("tools", f"at most {settings.limits.max_tools}, got {len(tools)}")
    functions = []
    for place, tool in enumerate(tools):
        match tool:
            case {"type": "function", "function": {"name": str(name)} as function} if _NAME.fullmatch(name):
                field = f"tools.{place}.function"
                parameters, strict = function.get("parameters"), function.get("strict")
                if parameters is not None and not isinstance(parameters, dict):
                    raise InvalidRequest(f"{field}.parameters", "must be a JSON schema")
                if strict is not None and not isinstance(strict, bool):
                    raise InvalidRequest(f"{field}.strict", "must be true or false")
                functions.append(
                    Function(name=name, parameters=parameters, strict=strict is True, field=f"{field}.parameters")
                )
            case _:
                problem = "must be {type: 'function', function: {name, ...}}, the name of letters, digits, _, . and -"
                raise InvalidRequest(f"tools.{place}", problem)
    return functions


def _named_function(choice: dict[str, Any], functions: list[Function]) -> Function:
    match choice:
        case {"type": "function", "function": {"name": str(name)}}:
            found = next((function for function in functions if function.name == name), None)
            if found is None:
                raise InvalidRequest("tool_choice", f"the function {name[:64]!r} is not among tools")
            return found
    raise InvalidRequest("tool_choice", "must be 'none', 'auto', 'required' or {type: 'function', function: {name}}")
