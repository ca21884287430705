"""From addresses to sockets: ``unix:/path`` on one host, ``host:port`` (``[::1]:port``) between hosts.

Owns the options that a link of small messages wants. Knows nothing of what is sent.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress

from .errors import CommMisuse, CommTimeout, PeerLost

_UNIX = "unix:"
_BACKLOG = 128

# Enough for several steps, so that a step is one write for the driver even while a rank still computes the last. Of
# unix sockets alone: those of TCP grow by themselves, unless somebody sets them.
_UNIX_BUFFER_BYTES = 1 << 20

# A host that is gone says nothing. The kernel asks after 5 s of silence, then every 2 s, and gives up when nothing was
# answered, or none of our bytes taken, for 30 s (without that option, after three questions). That needs no thread and
# no message of ours.
_KEEPALIVE = (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 30_000))


def listen(address: str) -> tuple[socket.socket, str]:
    """Return a listening socket and its full address, with the port that port 0 became.

    Raises: CommMisuse when nobody can listen there
    """
    family, where = _parse(address)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        if isinstance(where, str):
            os.chmod(where, 0o600)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise CommMisuse(f"cannot listen at {address}: {error}") from error
    return sock, address if isinstance(where, str) else _name(sock.getsockname()[:2])


def connect(address: str, *, timeout_s: float) -> socket.socket:
    """Return a connected socket; ``prepare`` comes next.

    Raises: PeerLost when nobody listens there, CommTimeout
    """
    family, where = _parse(address)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        # A time-out of 0 would mean not to wait for the connection, and to say so with an error of another kind.
        sock.settimeout(max(timeout_s, 0.001))
        sock.connect(where)
    except TimeoutError as error:
        sock.close()
        raise CommTimeout(f"{address} does not answer") from error
    except OSError as error:
        sock.close()
        raise PeerLost(f"cannot connect to {address}: {error}") from error
    return sock


def prepare(sock: socket.socket) -> None:
    """Set a connected socket up for small messages: sent at once, never blocking."""
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            # A kernel may allow less; that costs speed, nothing else.
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, option, _UNIX_BUFFER_BYTES)
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        # Not every system has all of them.
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def remove(address: str) -> None:
    """Remove what listening at an address left behind."""
    if address.startswith(_UNIX):
        with suppress(FileNotFoundError):
            os.unlink(address.removeprefix(_UNIX))


def _parse(address: str) -> tuple[socket.AddressFamily, str | tuple[str, int]]:
    if address.startswith(_UNIX):
        return socket.AF_UNIX, address.removeprefix(_UNIX)
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise CommMisuse(f"{address!r} is no address: give unix:/path, host:port or [ipv6]:port")
    return (socket.AF_INET6 if ":" in host else socket.AF_INET), (host, int(port))


def _name(where: tuple[str, int]) -> str:
    host, port = where
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
