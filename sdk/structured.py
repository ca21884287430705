"""What an answer must look like: structured outputs.

Owns the kinds of constraint, their names and the limits of their size. Whether a schema or a grammar can be compiled is
known where the model's vocabulary is: at the engine, which says so before any work is done.
"""

from __future__ import annotations

import json as json_text
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import InvalidRequest

MAX_CONSTRAINT_CHARS = 1 << 16
MAX_CHOICES = 1024

_KINDS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """A constraint on the whole text of an answer; exactly one of the five, with vLLM's names.

    - ``json``: a JSON schema, as a dictionary or as text. Keywords that cannot be enforced are refused.
    - ``regex``: a regular expression that matches the whole text; no look-around, no back references.
    - ``choice``: one of these strings.
    - ``grammar``: a context-free grammar in Lark's notation, beginning at ``start``.
    - ``json_object``: any JSON object.
    - ``disable_any_whitespace``: JSON without the white space that is otherwise allowed between its tokens.

    After checking ``json`` is text and ``choice`` a tuple, so that equal constraints compare equal.
    Raises: InvalidRequest, naming the field
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: tuple[str, ...] | list[str] | None = None
    grammar: str | None = None
    json_object: bool = False
    disable_any_whitespace: bool = False

    def __post_init__(self) -> None:
        for name in ("json_object", "disable_any_whitespace"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequest(f"structured_outputs.{name}", "must be true or false")
        given = [name for name in _KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            shown = ", ".join(given) or "none"
            raise InvalidRequest("structured_outputs", f"needs exactly one of {', '.join(_KINDS)}, got {shown}")
        if self.json is not None:
            object.__setattr__(self, "json", _schema(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        for name in ("regex", "grammar"):
            if getattr(self, name) is not None:
                _text(f"structured_outputs.{name}", getattr(self, name))

    @property
    def kind(self) -> str:
        """Which of the five it is."""
        return next(name for name in _KINDS if getattr(self, name) not in (None, False))


def _schema(value: object) -> str:
    field = "structured_outputs.json"
    if isinstance(value, Mapping):
        try:
            value = json_text.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequest(field, f"is not JSON: {error}") from None
        return _text(field, value)
    text = _text(field, value)
    try:
        parsed = json_text.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(field, f"is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise InvalidRequest(field, f"must be a JSON schema, an object, got {type(parsed).__name__}")
    return text


def _choices(value: object) -> tuple[str, ...]:
    field = "structured_outputs.choice"
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(each, str) for each in value):
        raise InvalidRequest(field, "must be a list of strings")
    if not 1 <= len(value) <= MAX_CHOICES:
        raise InvalidRequest(field, f"needs 1 to {MAX_CHOICES} strings, got {len(value)}")
    if sum(map(len, value)) > MAX_CONSTRAINT_CHARS:
        raise InvalidRequest(field, f"at most {MAX_CONSTRAINT_CHARS} characters in all, got {sum(map(len, value))}")
    if not all(value):
        raise InvalidRequest(field, "a string is empty")
    for each in value:
        _unicode(field, each)
    return tuple(value)


def _text(field: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(field, f"must be text, got {type(value).__name__}")
    if not 1 <= len(value) <= MAX_CONSTRAINT_CHARS:
        raise InvalidRequest(field, f"needs 1 to {MAX_CONSTRAINT_CHARS} characters, got {len(value)}")
    return _unicode(field, value)


def _unicode(field: str, text: str) -> str:
    # A lone surrogate is a str that no encoder, and no tokenizer, takes.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InvalidRequest(field, "holds a lone surrogate, which is not Unicode text")
    return text
