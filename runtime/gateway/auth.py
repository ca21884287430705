"""API keys: who may call.

Owns the file of keys and how a key is compared. It must not know routes.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from ...sdk.errors import ConfigError
from .errors import HttpRefusal

_MIN_KEY_CHARS = 8


def read_api_keys(file: Path) -> tuple[str, ...]:
    """Read keys from a file, one a line; empty lines and lines that start with # are skipped.

    Raises: ConfigError, when the file cannot be read, holds no key, or one that is too short to be a secret.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("api_key_file", f"{file} cannot be read: {error}") from error
    keys = []
    for number, line in enumerate(lines, start=1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if len(key) < _MIN_KEY_CHARS or any(character.isspace() for character in key):
            problem = f"a key has at least {_MIN_KEY_CHARS} characters and no spaces"
            raise ConfigError("api_key_file", f"{file}, line {number}: {problem}")
        keys.append(key)
    if not keys:
        raise ConfigError("api_key_file", f"{file} holds no keys: put one on each line")
    return tuple(dict.fromkeys(keys))


class ApiKeys:
    """The keys that are let in; all are when there are none.

    Keys are compared as digests of equal length, every one of them each time: how long a refusal takes says nothing
    about how near a guess was.
    """

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def check(self, authorization: bytes | None) -> str:
        """Check the value of an ``authorization`` header, and return what stands for its key: "" where none is needed.

        Raises: HttpRefusal (401) when it does not let in
        """
        if not self._digests:
            return ""
        scheme, _, key = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer" or not key.strip():
            raise HttpRefusal(
                401, "an API key is needed: send the header 'authorization: Bearer KEY'", code="no_api_key"
            )
        given = _digest(key.strip())
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if not any(matches):
            raise HttpRefusal(401, "the API key is not valid", code="invalid_api_key")
        return given.hex()[:16]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
