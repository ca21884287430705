"""Being connected to a Ray, for as long as a block runs.

Owns where a connection begins and ends, what Ray finds in the environment meanwhile, and that nobody waits for minutes
where none answers.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray import _raylet
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray.exceptions import RayError

from .cluster import ClusterError

NAMESPACE = "slipstream"
_CONNECT_TIMEOUT_S = 5.0


@contextlib.contextmanager
def connected(address: str, *, environment: Mapping[str, str] | None = None) -> Iterator[None]:
    """Be connected to a running Ray: at ``host:port``, or ``auto`` for the one that this machine knows.

    ``environment``: what Ray is to find in it meanwhile.
    Raises: ClusterError when none answers
    """
    with _environment(environment or {}):
        # Ray puts the folder of who connects on the path of all that runs for them: not the root of a clone.
        with tempfile.TemporaryDirectory() as nowhere, contextlib.chdir(nowhere):
            try:
                found: str = canonicalize_bootstrap_address_or_die(address)
                host, _, port = found.rpartition(":")
                # Ray itself asks for minutes whether somebody has come.
                socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
                ray.init(address=found, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
            except (OSError, RuntimeError, ValueError, RayError) as error:
                why = str(error).splitlines()[0] if str(error) else type(error).__name__
                where = "on this machine" if address == "auto" else f"at {address}"
                raise ClusterError(f"no Ray can be reached {where}: {why}") from error
        try:
            yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for as long as the block runs."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    _read_environment()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _read_environment()


def _read_environment() -> None:
    """Let Ray read from the environment how it is to prove who it is: it did when it was loaded, and once only."""
    # Compiled, and so without types.
    compiled: Any = _raylet
    compiled.Config.initialize("")
    compiled.AuthenticationTokenLoader.instance().reset_cache()
