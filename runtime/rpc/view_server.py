"""Serves views over gRPC to whoever watches.

Owns the watchers' number and pace. Nothing is queued for them: each is sent the newest view when it can take one, so a
slow one costs no more than a fast one and misses what came between.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from ...sdk.errors import EngineUnavailable, Overloaded, SlipstreamError
from ..reconcile.views import View
from .codec_views import decode_watch, encode_view
from .door import Door
from .errors import status_of
from .listening import listen
from .tls import Tls
from .view_source import ViewBoard
from .wire import CLUSTER_SERVICE, SERVER_OPTIONS, WATCH, is_socket, one_host_of

# Calls that are not watching: challenges, and those that are about to be refused.
_OTHER_CALLS = 64
_LAST_BYTES_S = 0.5
_Context = grpc.aio.ServicerContext[bytes, bytes]


class ViewServer:
    """One gRPC server for one board, made on the event loop that it runs on.

    ``address``: ``host:port``, where port 0 takes any free one, or a socket's path. ``secret``: what callers over TCP
    have to know; ``tls``: certificates, for those.
    Units: heartbeat_s, how long a watcher hears nothing at most; write_timeout_s, how long it may leave one view unread
    before its watch ends
    Raises: ConfigError naming ``address``
    """

    def __init__(
        self,
        board: ViewBoard,
        address: str,
        *,
        secret: bytes | None = None,
        tls: Tls | None = None,
        max_watchers: int = 256,
        heartbeat_s: float = 5.0,
        write_timeout_s: float = 10.0,
    ) -> None:
        self._target = one_host_of(address)
        self._board = board
        self._tls = tls
        self._door = Door(None if is_socket(self._target) else secret)
        self._max_watchers = max_watchers
        self._heartbeat_s = heartbeat_s
        self._write_timeout_s = write_timeout_s
        self._watchers = 0
        self._stopping = asyncio.Event()
        self._encoded: tuple[View, bytes] | None = None
        self._server = grpc.aio.server(options=SERVER_OPTIONS, maximum_concurrent_rpcs=max_watchers + _OTHER_CALLS)
        handlers: Any = {WATCH: grpc.unary_stream_rpc_method_handler(self._watch)}
        methods = grpc.method_handlers_generic_handler(CLUSTER_SERVICE, handlers)
        self._server.add_generic_rpc_handlers((methods, *self._door.methods()))

    @property
    def watchers(self) -> int:
        """How many watch now."""
        return self._watchers

    async def start(self) -> str:
        """Listen, and return the address to connect to. Raises: ConfigError naming ``address``"""
        return await listen(self._server, self._target, tls=self._tls)

    async def stop(self, *, grace_s: float = _LAST_BYTES_S) -> None:
        """End all watches and listen no more; ``grace_s``: how long watchers may take to hear of it."""
        self._stopping.set()
        await self._server.stop(grace_s)

    async def _watch(self, request: bytes, context: _Context) -> None:
        """Send views to one watcher until it leaves."""
        await self._door.admit(context, WATCH)
        if self._watchers >= self._max_watchers:
            full = Overloaded(f"{self._watchers} watch already")
            await context.abort(status_of(full), str(full))
        self._watchers += 1
        try:
            await self._send_views(decode_watch(request), context)
            return
        except SlipstreamError as error:
            ended = error
        finally:
            self._watchers -= 1
        await context.abort(status_of(ended), str(ended))

    async def _send_views(self, epoch: int, context: _Context) -> None:
        """Raises: InvalidRequest when a view is too large to be sent; EngineUnavailable when one was left unread"""
        while await self._until_due(epoch):
            view = self._board.newest
            try:
                async with asyncio.timeout(self._write_timeout_s):
                    await context.write(self._bytes_of(view))
            except TimeoutError as error:
                raise EngineUnavailable(f"a view was left unread for {self._write_timeout_s:g} s") from error
            epoch = max(epoch, view.epoch)

    async def _until_due(self, epoch: int) -> bool:
        """Wait for a view above an epoch, or until it is time to be heard; return False at the server's end."""
        waits = [asyncio.ensure_future(self._board.newer(epoch)), asyncio.ensure_future(self._stopping.wait())]
        try:
            await asyncio.wait(waits, timeout=self._heartbeat_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return not self._stopping.is_set()

    def _bytes_of(self, view: View) -> bytes:
        """Return a view as bytes, made once for all watchers."""
        if self._encoded is None or self._encoded[0] is not view:
            self._encoded = (view, encode_view(view))
        return self._encoded[1]
