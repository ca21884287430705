"""A thousand clients of a streaming server in one loop that does next to nothing: they share the machine with it.

Owns sockets, and when each token was read. Bytes are counted, not parsed: a client that did more would be what is
measured. Every token of the null gateway is a word that begins with ``~``, see ``null_gateway``.
"""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Callable
from typing import Any

from slipstream.benchmarks.null_gateway import MODEL_NAME

PROMPT_TOKENS = 16

_CHUNK_BYTES = 1 << 14
_TAIL_BYTES = 1000
_TIMEOUT_S = 120.0
# Waiting in the poll would have the server wake this process for nearly each token, at the server's cost. It counts as
# added latency, as all that happens here does.
_NAP_S = 0.0005
_TOKEN = b"~"
_EVENT = b"data: {"


class Stream:
    """One request on a connection of its own. ``arrivals_s``: when each token was read, monotonic seconds."""

    def __init__(self, port: int, index: int, tokens: int) -> None:
        self.index = index
        self.tokens = tokens
        self.arrivals_s: list[float] = []
        self._events = 0
        self._tail = b""
        self.connection = socket.create_connection(("127.0.0.1", port), timeout=_TIMEOUT_S)
        self.connection.setblocking(False)

    @property
    def text_events(self) -> int:
        """Events so far but the last one, which has the usage and no text."""
        return self._events - 1

    def ask(self) -> None:
        """Send the request."""
        prompt = [(self.index + place) % 1000 for place in range(PROMPT_TOKENS)]
        body: dict[str, Any] = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": self.tokens, "stream": True}
        content = json.dumps(body | {"temperature": 0, "stream_options": {"include_usage": True}}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n"
        self.connection.sendall(
            head.encode() + b"content-type: application/json\r\nconnection: close\r\n\r\n" + content
        )

    def read(self) -> bool:
        """Read what has come; return whether the stream is at its end, and raise when it ended too early."""
        chunk = self.connection.recv(_CHUNK_BYTES)
        now_s = time.monotonic()
        new = chunk.count(_TOKEN)
        if new == 1:
            self.arrivals_s.append(now_s)
        else:
            self.arrivals_s += [now_s] * new
        self._events += chunk.count(_EVENT)
        if len(self.arrivals_s) >= self.tokens or not chunk:
            self._tail = (self._tail + chunk)[-_TAIL_BYTES:]
        if not chunk:
            self._check()
        return not chunk

    def _check(self) -> None:
        self.connection.close()
        counted = f'"completion_tokens":{self.tokens},'.encode()
        whole = len(self.arrivals_s) == self.tokens and counted in self._tail and b"data: [DONE]" in self._tail
        if not whole:
            raise RuntimeError(f"stream {self.index}: {len(self.arrivals_s)} of {self.tokens} tokens: {self._tail!r}")


class Clients:
    """Streams that are read side by side. ``tokens_read``: of all of them so far."""

    def __init__(self, port: int) -> None:
        self.tokens_read = 0
        self._port = port
        self._poll = select.epoll()
        self._streams: dict[int, Stream] = {}
        self._made = 0

    def connect(self, tokens: int) -> Stream:
        """Open a connection for a stream of so many tokens."""
        stream = Stream(self._port, self._made, tokens)
        self._made += 1
        self._streams[stream.connection.fileno()] = stream
        self._poll.register(stream.connection, select.EPOLLIN)
        return stream

    def run(self, *, ended: Callable[[Stream], None], look: Callable[[], None], look_every_s: float) -> None:
        """Read until no stream is left. ``ended`` may start others; ``look`` is called now and then."""
        next_look_s = time.monotonic() + look_every_s
        overdue_s = time.monotonic() + _TIMEOUT_S
        while self._streams:
            ready = self._poll.poll(0)
            if ready:
                overdue_s = time.monotonic() + _TIMEOUT_S
            elif time.monotonic() > overdue_s:
                raise TimeoutError(f"nothing came for {_TIMEOUT_S:.0f} s")
            else:
                time.sleep(_NAP_S)
            for descriptor, _ in ready:
                stream = self._streams[descriptor]
                before = len(stream.arrivals_s)
                if stream.read():
                    # Closing a socket takes it out of the poll.
                    del self._streams[descriptor]
                    ended(stream)
                self.tokens_read += len(stream.arrivals_s) - before
            if time.monotonic() >= next_look_s:
                next_look_s = time.monotonic() + look_every_s
                look()
