"""How a gRPC server comes to listen: on a socket's path that only this user may use, or on one host and port."""

from __future__ import annotations

import os

import grpc

from ...sdk.errors import ConfigError
from .tls import Tls
from .wire import is_socket


async def listen(server: grpc.aio.Server, target: str, *, tls: Tls | None = None) -> str:
    """Bind and start a server; return the address to connect to. Over TCP with certificates, where there are some.

    Raises: ConfigError naming ``address`` when it cannot be had
    """
    on_socket = is_socket(target)
    credentials = None if tls is None or on_socket else tls.server_credentials()
    # A socket is as open as its file: nobody but this user gets in, from the first moment on.
    old_mask = os.umask(0o177) if on_socket else None
    try:
        port = server.add_insecure_port(target) if credentials is None else server.add_secure_port(target, credentials)
    except RuntimeError as error:
        raise ConfigError("address", f"cannot listen on {target}: {error}") from error
    finally:
        if old_mask is not None:
            os.umask(old_mask)
    await server.start()
    return target.removeprefix("unix:") if on_socket else f"{target.rpartition(':')[0]}:{port}"
