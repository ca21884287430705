"""Parsers of tool calls: what they find does not depend on the pieces in which the text comes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.runtime.gateway.tools import HermesParser, LlamaJsonParser, MistralParser, ToolParser

PARSERS: dict[str, type[ToolParser]] = {"hermes": HermesParser, "llama": LlamaJsonParser, "mistral": MistralParser}

# parser, text, what is shown, calls
FOUND: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    ("hermes", "hello", "hello", []),
    ("hermes", " a < b <tool \n", " a < b <tool \n", []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}}</tool_call>', "", [("f", "{}")]),
    ("hermes", 'x\n\n<tool_call>{"name": "f", "arguments": {"a": [1]}}</tool_call>\n', "x", [("f", '{"a": [1]}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}}', "", [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "argu', '<tool_call>{"name": "f", "argu', []),
    ("hermes", "a <tool_call>no</tool_call> b", "a <tool_call>no</tool_call> b", []),
    ("llama", "hello", "hello", []),
    ("llama", ' {"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    ("llama", '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}', "",
     [("f", "{}"), ("g", "{}")]),
    ("llama", '{"answer": 42}', '{"answer": 42}', []),
    ("llama", "{oh", "{oh", []),
    ("mistral", "hello [TOOL", "hello [TOOL", []),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"b": 2}}]', "",
     [("f", "{}"), ("g", '{"b": 2}')]),
    ("mistral", 'so: [TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}', "so: ", [("f", '{"a": 1}'), ("g", "{}")]),
    ("mistral", "[TOOL_CALLS]oops", "[TOOL_CALLS]oops", []),
]  # fmt: skip


def read(name: str, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    parser = PARSERS[name]()
    parsed = [*(parser.feed(piece) for piece in pieces), parser.finish()]
    return (
        "".join(each.content for each in parsed),
        [(call.name, call.arguments) for each in parsed for call in each.calls],
    )


@pytest.mark.parametrize(("name", "text", "content", "calls"), FOUND)
def test_found(name: str, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert read(name, [text]) == (content, calls)
    assert read(name, list(text)) == (content, calls)


@given(
    name=st.sampled_from(sorted(PARSERS)),
    parts=st.lists(
        st.sampled_from(
            ["<tool_call>", "</tool_call>", '{"name": "f", "arguments": {}}', "[TOOL_CALLS]", "[ARGS]", "{", "}", "[",
             "]", "\n", " ", "x", "<", "<|python_tag|>", ";", "f", '{"name": "f", "parameters": {}}']
        ),
        max_size=8,
    ),
    cuts=st.lists(st.integers(0, 200), max_size=8),
)  # fmt: skip
def test_pieces_make_no_difference(name: str, parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [text[start:end] for start, end in itertools.pairwise(places)]
    assert read(name, pieces) == read(name, [text])
