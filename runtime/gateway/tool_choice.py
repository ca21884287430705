"""What a chat may call: ``tools`` and ``tool_choice``, checked and settled.

Owns the meaning of the four choices. ``none``: the model does not see the tools. ``auto``: it may call. ``required``
and a named function: its answer is made to begin with a call; the rest is its own, so an answer that was cut short, or
a model that cannot write calls, still gives text and no call.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...sdk.errors import InvalidRequest
from ..text.tokenizer import Tokenizer
from .requests import ChatBody
from .settings import GatewaySettings
from .tools import ToolParser, parser_for

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """``shown``: what the template gets. ``make_parser`` None: the answer is text and nothing else."""

    shown: list[dict[str, Any]] | None = None
    make_parser: Callable[[], ToolParser] | None = None
    answer_prefix: str = ""
    needs_special_tokens: bool = False
    at_most_one: bool = False


def settle_tools(body: ChatBody, settings: GatewaySettings, tokenizer: Tokenizer) -> ToolUse:
    """Settle what one chat may call.

    Raises: InvalidRequest naming ``tools`` or ``tool_choice``
    """
    names = _tool_names(body.tools or [], settings)
    choice = ("auto" if names else "none") if body.tool_choice is None else body.tool_choice
    named = _named_function(choice, names) if isinstance(choice, dict) else None
    if choice != "none" and not names:
        raise InvalidRequest("tool_choice", "needs tools to choose from")
    if choice == "none":
        return ToolUse()
    make_parser = parser_for(settings.tool_call_parser, tokenizer)
    if make_parser is None:
        if choice != "auto":
            raise InvalidRequest("tool_choice", "only 'none' and 'auto': this server does not read calls")
        return ToolUse(shown=body.tools)
    parser = make_parser()
    return ToolUse(
        shown=body.tools,
        make_parser=make_parser,
        answer_prefix="" if choice == "auto" else parser.forced_beginning(named),
        needs_special_tokens=parser.needs_special_tokens,
        at_most_one=body.parallel_tool_calls is False,
    )


def _tool_names(tools: list[dict[str, Any]], settings: GatewaySettings) -> list[str]:
    if len(tools) > settings.limits.max_tools:
        raise InvalidRequest("tools", f"at most {settings.limits.max_tools}, got {len(tools)}")
    names = []
    for place, tool in enumerate(tools):
        match tool:
            case {"type": "function", "function": {"name": str(name)} as function} if _NAME.fullmatch(name):
                parameters = function.get("parameters")
                if parameters is not None and not isinstance(parameters, dict):
                    raise InvalidRequest(f"tools.{place}.function.parameters", "must be a JSON schema")
                names.append(name)
            case _:
                problem = "must be {type: 'function', function: {name, ...}}, the name of letters, digits, _, . and -"
                raise InvalidRequest(f"tools.{place}", problem)
    return names


def _named_function(choice: dict[str, Any], names: list[str]) -> str:
    match choice:
        case {"type": "function", "function": {"name": str(name)}}:
            if name not in names:
                raise InvalidRequest("tool_choice", f"the function {name[:64]!r} is not among tools")
            return name
    raise InvalidRequest("tool_choice", "must be 'none', 'auto', 'required' or {type: 'function', function: {name}}")
