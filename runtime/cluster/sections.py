"""What all sections of a file that a person writes have in common, and how its errors read.

Owns the refusal of unknown keys and the wording: the file, the path of the field, what is wrong.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from ...sdk.errors import ConfigError

MAX_FILE_BYTES = 8 << 20

_S = TypeVar("_S", bound="Section")


class Section(BaseModel):
    """A part of a file; keys that it does not have are refused, and numbers are not made of strings."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML takes the last, and aliases, which can grow without bound."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            peek: Any = self.peek_event
            event = peek()
            raise yaml.constructor.ConstructorError(None, None, "aliases are not supported", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is there twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 takes 3e9 for text, and so would refuse a number that JSON and people write.
_UniqueKeys.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_section(path: Path, kind: type[_S]) -> _S:
    """Read a YAML or JSON file as a section.

    Raises: ConfigError naming the file, the field and what is wrong with it
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(str(path), f"is larger than {MAX_FILE_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), f"is not UTF-8: {error}") from error
    return parse_section(text, kind, file=str(path))


def parse_section(text: str, kind: type[_S], *, file: str) -> _S:
    """Return the section that a text in YAML, and so in JSON, describes. Raises: ConfigError as ``read_section``"""
    try:
        value = yaml.load(text, Loader=_UniqueKeys)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(file, f"is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise ConfigError(file, f"must hold keys and values, holds {type(value).__name__}")
    try:
        return kind.model_validate(_with_tuples(value))
    except ValidationError as error:
        raise _in_our_words(error, file, value) from error


def _with_tuples(value: Any) -> Any:
    """Return a value with its lists as tuples, which frozen sections have; nothing else is converted for them."""
    if isinstance(value, dict):
        return {key: _with_tuples(each) for key, each in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _in_our_words(error: ValidationError, file: str, value: object) -> ConfigError:
    """Return the first problem, with the path of the field as one would write it."""
    problems = error.errors(include_url=False)
    first = problems[0]
    path = _path(first["loc"], value)
    message = {"extra_forbidden": "is not a known key", "missing": "is missing"}.get(
        first["type"], first["msg"].removeprefix("Value error, ")
    )
    if first["type"] not in ("extra_forbidden", "missing", "value_error"):
        message += f", got {json.dumps(first['input'], default=str)[:80]}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return ConfigError(f"{file}: {path}" if path else file, message + more)


def _path(places: tuple[int | str, ...], value: object) -> str:
    """Return the path of a field in the file, without the names of alternatives that pydantic puts between."""
    path = ""
    for depth, place in enumerate(places):
        if isinstance(value, list) and isinstance(place, int):
            path, value = f"{path}[{place}]", value[place] if place < len(value) else None
        elif isinstance(value, dict) and (place in value or depth == len(places) - 1):
            path, value = f"{path}.{place}", value.get(place)
    return path.removeprefix(".")
