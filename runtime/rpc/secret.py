"""The cluster's secret, as the processes that speak gRPC get it: from the environment, or not at all."""

from __future__ import annotations

from collections.abc import Mapping

from ...comm.handshake import MIN_SECRET_BYTES, SECRET_VARIABLE
from ...sdk.errors import ConfigError


def secret_from(environment: Mapping[str, str]) -> bytes | None:
    """Return the secret that calls over TCP have to prove, None where none is set: then anybody may call.

    Raises: ConfigError when it is too short
    """
    return checked_secret(environment.get(SECRET_VARIABLE, ""))


def checked_secret(text: str) -> bytes | None:
    """Return a secret as bytes, None for "". Raises: ConfigError when it is too short"""
    secret = text.encode()
    if secret and len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(SECRET_VARIABLE, f"needs at least {MIN_SECRET_BYTES} bytes, got {len(secret)}")
    return secret or None
