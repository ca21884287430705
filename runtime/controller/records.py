"""Values as JSON and back: what the platform keeps for the controller, and what its actors are told.

Reads by type: what does not fit the type is an error that says where, and nothing in the text chooses a type. Knows
dataclasses, tuples, frozen sets, mappings with strings as keys, enumerations and plain values.
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")


class BadRecord(ValueError):
    """A record is not what it should be; the message says where."""


def to_json(value: object) -> str:
    """Return a value as one line."""
    return json.dumps(_plain(value), separators=(",", ":"), sort_keys=True)


def from_json(kind: type[T], text: str | bytes) -> T:
    """Return the value of a type. Raises: BadRecord"""
    try:
        plain = json.loads(text)
    except ValueError as error:
        raise BadRecord(f"{kind.__name__}: no JSON: {error}") from error
    return cast("T", _read(kind, plain, kind.__name__))


def _plain(value: object) -> object:
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, frozenset):
        return sorted(cast("Any", _plain(each)) for each in value)
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"{type(value).__name__} has no place in a record")


def _read(kind: Any, plain: Any, where: str) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if plain is None and type(None) in inner:
            return None
        (kind,) = (each for each in inner if each is not type(None))
        return _read(kind, plain, where)
    if origin in (tuple, frozenset):
        return origin(
            _read(inner[0], each, f"{where}[{index}]") for index, each in enumerate(_check(plain, list, where))
        )
    if origin is not None:
        return {key: _read(inner[1], each, f"{where}.{key}") for key, each in _check(plain, dict, where).items()}
    if is_dataclass(kind):
        hints = _hints(cast("type", kind))
        values = _check(plain, dict, where)
        if unknown := sorted(set(values) - set(hints)):
            raise BadRecord(f"{where}: there is no {', '.join(unknown)}")
        read = {name: _read(hints[name], each, f"{where}.{name}") for name, each in values.items()}
        try:
            return cast("Any", kind)(**read)
        except (TypeError, ValueError) as error:
            raise BadRecord(f"{where}: {error}") from error
    if issubclass(kind, Enum):
        try:
            return kind(plain)
        except ValueError as error:
            raise BadRecord(f"{where}: {error}") from error
    if kind is float:
        return float(_check(plain, (int, float), where))
    return _check(plain, kind, where)


def _check(plain: Any, kind: Any, where: str) -> Any:
    if not isinstance(plain, kind):
        raise BadRecord(f"{where}: {plain!r} is not what belongs there")
    return plain


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
