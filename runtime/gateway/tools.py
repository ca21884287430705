"""Tool calls: from what a model writes to calls that a client understands.

Owns one parser a family of chat templates, behind ``ToolParser``. A parser reads an answer's text in pieces and returns
what may be shown and which calls are complete; what looks like a call and is none is shown as text, so that nothing is
lost. It must not know requests or streams.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from ..text.tokenizer import Tokenizer
from .tool_grammar import CallFormat

_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedCall:
    """One call; ``arguments`` is JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """What a piece of text gave: text to show, then calls that are now complete."""

    content: str = ""
    calls: tuple[ParsedCall, ...] = ()


class ToolParser(Protocol):
    """Reads one sample's answer.

    ``needs_special_tokens``: its marks are special tokens, which must not be left out of the text.
    ``call_format``: what a model has to write for this parser to find calls.
    """

    needs_special_tokens: bool
    call_format: CallFormat

    def feed(self, text: str) -> Parsed:
        """Take the next piece."""
        ...

    def finish(self) -> Parsed:
        """Return what is left when no more text comes."""
        ...


class HermesParser:
    """Hermes and Qwen: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, any number, between text."""

    needs_special_tokens = False
    _BEGIN = "<tool_call>"
    _END = "</tool_call>"
    call_format = CallFormat(
        before=f"{_BEGIN}\n", between=f"\n{_END}\n{_BEGIN}\n", after=f"\n{_END}", marks=(_BEGIN, _END)
    )

    def __init__(self) -> None:
        self._held = ""
        self._after_call = False

    def feed(self, text: str) -> Parsed:
        self._held += text
        content = ""
        calls: list[ParsedCall] = []
        while (start := self._held.find(self._BEGIN)) >= 0:
            # Line ends around calls are the template's, not the answer's.
            before = self._unspaced(self._held[:start])
            shown = before.rstrip()
            end = self._held.find(self._END, start)
            if end < 0:
                content += shown
                self._held = before[len(shown) :] + self._held[start:]
                return Parsed(content=content, calls=tuple(calls))
            block = self._held[start : end + len(self._END)]
            self._held = self._held[end + len(self._END) :]
            call = _call(_loads(block[len(self._BEGIN) : -len(self._END)]))
            self._after_call = call is not None
            content += shown if call is not None else before + block
            calls += [] if call is None else [call]
        open_text = self._unspaced(self._held)
        shown = open_text[: len(open_text) - _overlap(open_text, self._BEGIN)].rstrip()
        self._held = open_text[len(shown) :]
        self._after_call = self._after_call and not shown
        return Parsed(content=content + shown, calls=tuple(calls))

    def finish(self) -> Parsed:
        held, self._held = self._held, ""
        body = held.lstrip()
        if body.startswith(self._BEGIN) and (call := _call(_loads(body[len(self._BEGIN) :]))) is not None:
            # Some models end the answer where they should have closed the mark.
            return Parsed(calls=(call,))
        return Parsed(content=held)

    def _unspaced(self, text: str) -> str:
        return text.lstrip() if self._after_call else text


class LlamaJsonParser:
    """Llama 3: the whole answer is ``{"name": ..., "parameters": {...}}``, or several with ``;`` between them."""

    needs_special_tokens = True
    _MARK = "<|python_tag|>"
    _ENDS = ("<|eot_id|>", "<|eom_id|>")
    call_format = CallFormat(between="; ", arguments_key="parameters", text=r"/[^{\s](.|\n)*/")

    def __init__(self) -> None:
        self._held = ""
        self._is_text = False

    def feed(self, text: str) -> Parsed:
        if self._is_text:
            return Parsed(content=text)
        self._held += text
        begun = self._held.lstrip()
        if not begun or begun.startswith("{") or begun.startswith(self._MARK[: len(begun)]):
            return Parsed()
        self._is_text = True
        held, self._held = self._held, ""
        return Parsed(content=held)

    def finish(self) -> Parsed:
        held, self._held = self._held, ""
        body = held.strip().removeprefix(self._MARK)
        for end in self._ENDS:
            body = body.removesuffix(end)
        values = list(_several(body, separators=";"))
        calls = [call for value in values if (call := _call(value)) is not None]
        if not calls or len(calls) < len(values):
            return Parsed(content=held)
        return Parsed(calls=tuple(calls))


class MistralParser:
    """Mistral: ``[TOOL_CALLS]`` and a list of calls, or in newer models ``[TOOL_CALLS]name[ARGS]{...}``."""

    needs_special_tokens = True
    _MARK = "[TOOL_CALLS]"
    _ARGUMENTS = "[ARGS]"
    call_format = CallFormat(before=f"{_MARK}[", between=", ", after="]", marks=(_MARK,))

    def __init__(self) -> None:
        self._held = ""
        self._calling = False

    def feed(self, text: str) -> Parsed:
        self._held += text
        if self._calling:
            return Parsed()
        start = self._held.find(self._MARK)
        self._calling = start >= 0
        shown = start if self._calling else len(self._held) - _overlap(self._held, self._MARK)
        content, self._held = self._held[:shown], self._held[shown:]
        return Parsed(content=content)

    def finish(self) -> Parsed:
        held, self._held = self._held, ""
        if not self._calling:
            return Parsed(content=held)
        calls: list[ParsedCall] = []
        for part in held.split(self._MARK)[1:]:
            values = list(self._calls_in(part.strip().removesuffix("</s>")))
            found = [call for value in values if (call := _call(value)) is not None]
            if not found or len(found) < len(values):
                return Parsed(content=held)
            calls += found
        return Parsed(calls=tuple(calls))

    def _calls_in(self, part: str) -> Iterator[Any]:
        name, mark, arguments = part.partition(self._ARGUMENTS)
        if mark:
            yield {"name": name.strip(), "arguments": _loads(arguments)}
            return
        value = _loads(part)
        yield from value if isinstance(value, list) else [value]


_PARSERS: dict[str, Callable[[], ToolParser]] = {
    "hermes": HermesParser,
    "llama3_json": LlamaJsonParser,
    "mistral": MistralParser,
}

# A family is known by the mark that its vocabulary has a token for.
_MARKS = (("[TOOL_CALLS]", "mistral"), ("<|python_tag|>", "llama3_json"), ("<tool_call>", "hermes"))


def parser_for(setting: str, tokenizer: Tokenizer) -> Callable[[], ToolParser] | None:
    """Return what makes a parser for a model, None when its calls are not to be parsed.

    ``auto``: the family whose mark is in the vocabulary, and Hermes' form, which most templates use, without one.
    """
    if setting == "none":
        return None
    if setting == "auto":
        setting = next((name for mark, name in _MARKS if tokenizer.token_to_id(mark) is not None), "hermes")
    return _PARSERS[setting]


def _overlap(text: str, mark: str) -> int:
    """Return how many characters at the end of a text are the beginning of a mark."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:size])), 0)


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _several(text: str, *, separators: str) -> Iterator[Any]:
    """Yield JSON values that stand one after the other; None for what is no JSON, and then no more."""
    place = 0
    while place < len(text):
        if text[place].isspace() or text[place] in separators:
            place += 1
            continue
        try:
            value, place = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError):
            yield None
            return
        yield value


def _call(value: Any) -> ParsedCall | None:
    match value:
        case {"name": str(name), "arguments": arguments} | {"name": str(name), "parameters": arguments} if name:
            if isinstance(arguments, dict):
                return ParsedCall(name=name, arguments=json.dumps(arguments, ensure_ascii=False))
    return None
