"""A thousand requests on one stream of the public gRPC service, read by one thread: see ``stream_clients``.

Owns when each token was read. Every token of the null gateway is a word that begins with ``~``, see ``null_gateway``.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from slipstream.benchmarks.null_gateway import MODEL_NAME
from slipstream.benchmarks.stream_clients import PROMPT_TOKENS
from slipstream.runtime.rpc.generated import inference_pb2 as pb

_TIMEOUT_S = 600.0
_MAX_MESSAGE_BYTES = 16 << 20
_TOKEN = "~"


class SessionStream:
    """One request. ``arrivals_s``: when each of its tokens was read, monotonic seconds."""

    def __init__(self, key: int, tokens: int, said: queue.SimpleQueue[bytes | None]) -> None:
        self.key = key
        self.tokens = tokens
        self.arrivals_s: list[float] = []
        self.text_events = 0
        self._said = said

    def ask(self) -> None:
        """Send the request."""
        prompt = pb.TokenIds(ids=[(self.key + place) % 1000 for place in range(PROMPT_TOKENS)])
        params = pb.GenerateParams(max_tokens=self.tokens, temperature=0.0)
        request = pb.GenerateRequest(model=MODEL_NAME, token_ids=prompt, params=params)
        command = pb.SessionCommand(ask=pb.SessionAsk(key=self.key, request=request))
        self._said.put(command.SerializeToString())

    def take(self, text: str, now_s: float) -> None:
        """Note a text."""
        new = text.count(_TOKEN)
        self.arrivals_s += [now_s] * new
        self.text_events += new > 0

    def check(self, usage: pb.Usage) -> None:
        """Make sure that the answer is whole."""
        if not len(self.arrivals_s) == usage.output_tokens == self.tokens:
            raise RuntimeError(f"request {self.key}: {len(self.arrivals_s)} of {self.tokens} tokens")


class SessionClients:
    """Requests side by side on one stream. ``tokens_read``: of all of them so far."""

    def __init__(self, port: int) -> None:
        self.tokens_read = 0
        self._channel = grpc.insecure_channel(
            f"127.0.0.1:{port}", options=(("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),)
        )
        self._said: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._streams: dict[int, SessionStream] = {}
        self._made = 0

    def connect(self, tokens: int) -> SessionStream:
        """Make a request of so many tokens."""
        self._made += 1
        stream = self._streams[self._made] = SessionStream(self._made, tokens, self._said)
        return stream

    def run(self, *, ended: Callable[[SessionStream], None], look: Callable[[], None], look_every_s: float) -> None:
        """Read until no request is left. ``ended`` may start others; ``look`` is called now and then."""
        next_look_s = time.monotonic() + look_every_s
        session: Any = self._channel.stream_stream("/slipstream.v1.Inference/Session")
        for data in session(self._commands(), timeout=_TIMEOUT_S):
            now_s = time.monotonic()
            news = pb.SessionNews.FromString(data)
            if news.failures:
                raise RuntimeError(f"a request failed: {news.failures[0]}")
            self._take(news, now_s, ended)
            if now_s >= next_look_s:
                next_look_s = now_s + look_every_s
                look()
            if not self._streams:
                self._said.put(None)
        self._channel.close()

    def _commands(self) -> Iterator[bytes]:
        while (data := self._said.get()) is not None:
            yield data

    def _take(self, news: pb.SessionNews, now_s: float, ended: Callable[[SessionStream], None]) -> None:
        streams = self._streams
        for key, text in zip(news.keys, news.texts, strict=True):
            streams[key].take(text, now_s)
        # Nearly all texts are a token's each.
        self.tokens_read += len(news.keys)
        for reply in news.replies:
            for piece in reply.reply.pieces:
                streams[reply.key].take(piece.text, now_s)
                self.tokens_read += piece.text.count(_TOKEN)
            if reply.reply.HasField("usage"):
                stream = streams.pop(reply.key)
                stream.check(reply.reply.usage)
                ended(stream)
