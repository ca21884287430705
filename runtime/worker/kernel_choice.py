"""The option ``kernels``: which backend carries out which operation, for all that a process computes from then on."""

from __future__ import annotations

from ...kernels import backends
from ...sdk.errors import ConfigError


def choose_kernels(text: str) -> None:
    """Make a choice, in place of the one before; before a model is loaded. Raises: ConfigError naming ``kernels``"""
    try:
        backends.use(text)
    except ValueError as error:
        raise ConfigError("kernels", str(error)) from error
