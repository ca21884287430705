"""What a model must write when it calls: the grammar of calls to given functions, in a template family's form.

Owns how a call is spelled. A call that the model was made to write, or whose function is ``strict``, is then valid by
construction: its name is one of those given, its arguments keep to the function's schema. Pure.

Source: Lark's notation as llguidance reads it (github.com/guidance-ai/llguidance, docs/syntax.md)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...sdk.errors import InvalidRequest

_ANY_TEXT = r"/(.|\n)*/"
_COPIED = frozenset({"const", "enum", "default", "examples"})
"""Keywords whose values are data, not schemas."""
_HOISTED = ("$defs", "definitions")


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFormat:
    """How a family writes calls: ``before``, a call, (``between``, a call)..., ``after``.

    A call is a JSON object with ``name`` and ``arguments_key``. ``marks``: the parts of these texts for which the
    vocabulary may have tokens of their own. ``text``: what an answer looks like that calls nothing, as a Lark terminal.
    """

    before: str = ""
    between: str
    after: str = ""
    arguments_key: str = "arguments"
    marks: tuple[str, ...] = ()
    text: str = _ANY_TEXT


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """A function that may be called; ``strict``: its schema is to be kept to also when nobody made the model call."""

    name: str
    parameters: dict[str, Any] | None
    strict: bool
    field: str

    def call_schema(self, arguments_key: str) -> str:
        """Return the schema of a call, a document of its own: references are led to where their targets now stand.

        Raises: InvalidRequest, naming the field, for parameters that describe no object
        """
        parameters = {"type": "object"} if not self.parameters else {"type": "object", **self.parameters}
        if parameters["type"] != "object":
            raise InvalidRequest(self.field, "must describe an object: its type must be 'object'")
        hoisted = {key: parameters.pop(key) for key in _HOISTED if key in parameters}
        place = f"#/properties/{arguments_key}"
        try:
            schema = {
                "type": "object",
                "properties": {"name": {"const": self.name}, arguments_key: _rebased(parameters, place)},
                "required": ["name", arguments_key],
                "additionalProperties": False,
                **{key: _rebased(value, place) for key, value in hoisted.items()},
                # A schema that is not strict is a hint: what of it cannot be kept to is left out.
                "x-guidance": {"lenient": not self.strict, "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,20}"},
            }
            return json.dumps(schema)
        except RecursionError:
            raise InvalidRequest(self.field, "is nested too deeply") from None


def calls_only(
    form: CallFormat, functions: list[Function], token_of: Callable[[str], int | None], *, many: bool
) -> str:
    """Return the grammar of an answer that is one call, or ``many``: at least one.

    ``token_of``: the id of a mark in the vocabulary, None when it has none
    """
    return _document(["start: calls", *_call_rules(form, functions, token_of, many=many)])


def calls_or(
    form: CallFormat,
    functions: list[Function],
    token_of: Callable[[str], int | None],
    *,
    many: bool,
    answer: str | None,
) -> str:
    """Return the grammar of an answer that is text, or that calls after some text; with ``answer``, a JSON schema, an
    answer that is either JSON of that schema or calls.
    """
    rules = _call_rules(form, functions, token_of, many=many)
    if answer is not None:
        return _document(["start: calls | answer", f"answer: %json {answer}", *rules])
    mark = form.marks[0] if form.marks and form.before.startswith(form.marks[0]) else None
    if mark is None or token_of(mark) is not None:
        # The mark is a token that no text holds, or the first character tells.
        lead = "" if mark is None else "TEXT? "
        return _document([f"start: TEXT | {lead}calls", f"TEXT: {form.text}", *rules])
    # The mark is text like any other: the shortest text that ends with it begins a call.
    pieces = _pieces(form.before.removeprefix(mark), form.marks, token_of)
    more = f" ({_pieces(form.between, form.marks, token_of)} call)*" if many else ""
    tail = _pieces(form.after, form.marks, token_of)
    return _document(
        [
            f"start: TEXT | lead {pieces} call{more} {tail}",
            f"TEXT: {form.text} & ~/(.|\\n)*{_regex(mark)}(.|\\n)*/",
            f"lead[lazy]: /(.|\\n)*{_regex(mark)}/",
            *[rule for rule in rules if not rule.startswith("calls:")],
        ]
    )


def _call_rules(
    form: CallFormat, functions: list[Function], token_of: Callable[[str], int | None], *, many: bool
) -> list[str]:
    before, after = (_pieces(text, form.marks, token_of) for text in (form.before, form.after))
    more = f" ({_pieces(form.between, form.marks, token_of)} call)*" if many else ""
    schemas = [each.call_schema(form.arguments_key) for each in functions]
    return [
        f"calls: {before} call{more} {after}",
        f"call: {' | '.join(f'call_{place}' for place in range(len(schemas)))}",
        *(f"call_{place}: %json {schema}" for place, schema in enumerate(schemas)),
    ]


def _document(rules: list[str]) -> str:
    return "\n".join(rules) + "\n"


def _pieces(text: str, marks: tuple[str, ...], token_of: Callable[[str], int | None]) -> str:
    """Spell a text out for a rule, its marks by token where the vocabulary has them."""
    if not marks:
        return json.dumps(text) if text else ""
    parts = re.split(f"({'|'.join(map(re.escape, marks))})", text)
    spelled = []
    for part in filter(None, parts):
        token_id = token_of(part) if part in marks else None
        spelled.append(json.dumps(part) if token_id is None else f"<[{token_id}]>")
    return " ".join(spelled)


def _regex(text: str) -> str:
    return re.escape(text).replace("/", r"\/")


def _rebased(value: Any, base: str) -> Any:
    """Return a schema that now stands at ``base``: its references to its own root follow it; hoisted ones stay."""
    if isinstance(value, list):
        return [_rebased(each, base) for each in value]
    if not isinstance(value, dict):
        return value
    rebased = {}
    for key, item in value.items():
        if key == "$ref" and isinstance(item, str) and item.startswith("#"):
            stays = item.startswith(tuple(f"#/{hoisted}/" for hoisted in _HOISTED))
            rebased[key] = item if stays else base + item[1:]
        else:
            rebased[key] = item if key in _COPIED else _rebased(item, base)
    return rebased
