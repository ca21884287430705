"""Typed reading of the JSON files of a checkpoint, with errors that name the file and the field.

Owns the difference between absent, null and wrong. Knows nothing of what the fields mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...sdk.errors import CheckpointError

MAX_JSON_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFields:
    """The fields of one JSON object; every reader raises CheckpointError naming ``file`` and the field."""

    file: str
    values: Mapping[str, object]
    prefix: str = ""

    def has(self, name: str) -> bool:
        """Say whether the field is there, null included."""
        return name in self.values

    def is_set(self, name: str) -> bool:
        """Say whether the field is there and not null."""
        return self.values.get(name) is not None

    def problem(self, name: str, problem: str) -> CheckpointError:
        """Return the error for a field, for the caller to raise."""
        return CheckpointError(self.file, f"{self.prefix}{name}: {problem}")

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1) -> int:
        """Return an integer of at least ``minimum``; absent or null gives ``default``."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            wanted = "a positive integer" if minimum == 1 else f"an integer of at least {minimum}"
            raise self.problem(name, f"must be {wanted}, got {value!r}")
        return value

    def number(self, name: str, default: float | None = None, *, minimum: float = 0.0) -> float:
        """Return a finite number above ``minimum``; absent or null gives ``default``."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.problem(name, f"must be a number, got {value!r}")
        if not math.isfinite(value) or value <= minimum:
            raise self.problem(name, f"must be a finite number above {minimum:g}, got {value!r}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """Return a boolean; absent or null gives ``default``."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.problem(name, f"must be true or false, got {value!r}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """Return a string; absent or null gives ``default``."""
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self.problem(name, f"must be a string, got {value!r}")
        return value

    def items(self, name: str) -> tuple[object, ...]:
        """Return a list's items; absent or null gives none."""
        value = self.values.get(name)
        if value is None:
            return ()
        if not isinstance(value, list):
            raise self.problem(name, f"must be a list, got {value!r}")
        return tuple(value)

    def table(self, name: str) -> ConfigFields:
        """Return a nested object's fields; absent or null gives no fields."""
        value = self.values.get(name)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.problem(name, f"must be an object, got {value!r}")
        return ConfigFields(file=self.file, values=value, prefix=f"{self.prefix}{name}.")

    def token_ids(self, name: str, default: int | None = None) -> tuple[int, ...]:
        """Return token ids written as one integer, a list of them, or null (none)."""
        value = self.values.get(name, default)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        for token_id in ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
                raise self.problem(name, f"must be a token id or a list of them, got {value!r}")
        return tuple(dict.fromkeys(ids))

    def _value(self, name: str, default: object) -> object:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is None:
            raise self.problem(name, "is missing")
        return default


def read_json(path: Path) -> ConfigFields:
    """Read one JSON object.

    Raises: CheckpointError when the file is missing, too large, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(
                str(path), f"is larger than {MAX_JSON_BYTES} bytes, which no JSON file here should be"
            )
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(str(path), "no such file") from None
    except OSError as error:
        raise CheckpointError(str(path), f"cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(str(path), f"is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(str(path), f"must hold a JSON object, got {type(values).__name__}")
    return ConfigFields(file=str(path), values=values)
