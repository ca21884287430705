"""What one rank sends: from "this layer is computed up to here" and a grant to frames. Pure: events in, posts out.

Owns, for each transfer, how far each layer is computed, what of that was posted, and what the transport still reads. A
layer is posted as soon as it is computed and granted, whichever comes later; so the wire works while the next layer
computes, and a grant that comes late finds everything ready. Knows no sockets and no bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from ...placement.kv_routes import KvLayout, KvRoute, kv_routes
from .frame import KvFrame, token_runs
from .transfer import Drained, Ending, OpenSending, PeerRank, RankBroken, RankDone, Report, TransferId

DEFAULT_FRAME_BYTES = 8 << 20
"""What a frame holds at most: enough that what a frame costs besides its bytes is small, and it still fits caches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Post:
    """A frame to send: to whom, and where its tokens are.

    ``blocks``: this rank's blocks of the prompt, from its first token; ``block_sizes``: this side's and the target's
    """

    frame: KvFrame
    to: PeerRank
    blocks: Sequence[int]
    block_sizes: tuple[int, int]


@dataclass(slots=True)
class _Open:
    """A generation that was granted."""

    grant: OpenSending
    target: KvLayout
    routes: tuple[KvRoute, ...]
    posted: dict[tuple[int, int], int]
    """Up to where it was posted, by route and layer."""
    outstanding: int = 0
    pending: int = 0
    closing: bool = False
    said: bool = False


@dataclass(slots=True)
class _Tracked:
    blocks: list[int] = field(default_factory=list)
    computed: dict[int, int] = field(default_factory=dict)
    open: _Open | None = None
    forgotten: bool = False


class Outgoing:
    """The transfers from one rank. For one thread at a time: whoever shares it holds a lock.

    Units: entry_bytes, of one head of one token, all parts; max_frame_bytes, of a frame unless one token has more
    """

    def __init__(
        self, *, rank: int, layout: KvLayout, entry_bytes: int, max_frame_bytes: int = DEFAULT_FRAME_BYTES
    ) -> None:
        self._rank = rank
        self._layout = layout
        self._entry_bytes = entry_bytes
        self._max_frame_bytes = max_frame_bytes
        self._tracked: dict[TransferId, _Tracked] = {}
        self._pending: deque[Post] = deque()
        self._reports: list[Report] = []

    def take_reports(self) -> list[Report]:
        """Return what the driver has to know, each once."""
        reports, self._reports = self._reports, []
        return reports

    # -------------------------------------------------------------- what the engine says

    def track(self, transfer: TransferId) -> None:
        """Begin to note what is computed for a transfer, granted or not."""
        self._tracked.setdefault(transfer, _Tracked())

    def add_blocks(self, transfer: TransferId, blocks: Sequence[int]) -> None:
        """Note the prompt's next blocks at this rank."""
        one = self._tracked.get(transfer)
        if one is not None:
            one.blocks.extend(blocks)

    def computed(self, transfer: TransferId, layer: int, stop: int) -> None:
        """Note that a layer's KV is in its blocks for all positions before ``stop``; one that is over is ignored."""
        one = self._tracked.get(transfer)
        if one is not None and stop > one.computed.get(layer, 0):
            one.computed[layer] = stop
            self._post_layer(one, layer)

    def forget(self, transfer: TransferId) -> None:
        """Note that the transfer is over for good; what is read of it is still waited for."""
        one = self._tracked.get(transfer)
        if one is not None:
            one.forgotten = True
            if one.open is None:
                del self._tracked[transfer]

    # -------------------------------------------------------------- what the driver says

    def open(self, grant: OpenSending, target: KvLayout) -> None:
        """Let a transfer be sent to a replica of this layout; what is computed already is posted."""
        one = self._tracked.setdefault(grant.transfer, _Tracked())
        assert one.open is None, f"{grant.transfer} is open already"
        routes = tuple(route for route in kv_routes(self._layout, target) if route.source == self._rank)
        one.open = _Open(grant, target, routes, {})
        for layer in sorted(one.computed):
            self._post_layer(one, layer)
        self._maybe_done(one)

    def close(self, transfer: TransferId, generation: int) -> None:
        """Post no more of a generation, and report when the transport reads none of it."""
        one = self._tracked.get(transfer)
        if one is None or one.open is None or one.open.grant.generation != generation:
            self._reports.append(Drained(transfer=transfer, generation=generation, rank=self._rank))
            return
        one.open.closing = True
        one.open.pending = 0
        self._pending = deque(post for post in self._pending if post.frame.transfer != transfer)
        self._maybe_drained(transfer, one)

    # -------------------------------------------------------------- what the transport says

    def next_post(self) -> Post | None:
        """Return what to post next, without taking it; None when there is nothing."""
        return self._pending[0] if self._pending else None

    def posted(self) -> None:
        """Note that the transport took the next post, and reads its blocks until it says otherwise."""
        opened = self._opened(self._pending.popleft().frame)
        assert opened is not None, "what is closed is pending no longer"
        opened.pending -= 1
        opened.outstanding += 1

    def released(self, frame: KvFrame, *, sent: bool) -> None:
        """Note that the transport no longer reads a frame, which went out or never will."""
        one, opened = self._tracked[frame.transfer], self._opened(frame)
        assert opened is not None, "a generation stays open until the transport has let go of it"
        opened.outstanding -= 1
        if opened.closing:
            self._maybe_drained(frame.transfer, one)
        elif sent:
            self._maybe_done(one)
        elif not opened.said:
            opened.said = True
            self._reports.append(
                RankBroken(
                    transfer=frame.transfer, generation=frame.generation, rank=self._rank, ending=Ending.PEER_LOST
                )
            )

    # -------------------------------------------------------------- inside

    def _opened(self, frame: KvFrame) -> _Open | None:
        one = self._tracked.get(frame.transfer)
        if one is None or one.open is None or one.open.grant.generation != frame.generation:
            return None
        return one.open

    def _post_layer(self, one: _Tracked, layer: int) -> None:
        opened = one.open
        if opened is None or opened.closing:
            return
        grant = opened.grant
        block_sizes = (self._layout.block_size, opened.target.block_size)
        for index, route in enumerate(opened.routes):
            if layer not in route.layers:
                continue
            first = opened.posted.get((index, layer), grant.tokens.start)
            stop = min(one.computed[layer], grant.tokens.stop)
            if stop <= first:
                continue
            opened.posted[index, layer] = stop
            to = PeerRank(grant.to, route.target)
            for tokens in token_runs(
                range(first, stop),
                token_bytes=len(route.heads) * self._entry_bytes,
                block_size=opened.target.block_size,
                max_bytes=self._max_frame_bytes,
            ):
                frame = KvFrame(
                    transfer=grant.transfer,
                    generation=grant.generation,
                    receiver=grant.to.incarnation,
                    layer=layer,
                    first_head=route.heads.start,
                    num_heads=len(route.heads),
                    first_token=tokens.start,
                    num_tokens=len(tokens),
                )
                self._pending.append(Post(frame=frame, to=to, blocks=one.blocks, block_sizes=block_sizes))
                opened.pending += 1

    def _maybe_done(self, one: _Tracked) -> None:
        opened = one.open
        if opened is None or opened.closing or opened.said or opened.pending or opened.outstanding:
            return
        tokens = opened.grant.tokens
        if tokens and any(
            opened.posted.get((index, layer), tokens.start) < tokens.stop
            for index, route in enumerate(opened.routes)
            for layer in route.layers
        ):
            return
        opened.said = True
        grant = opened.grant
        self._reports.append(RankDone(transfer=grant.transfer, generation=grant.generation, rank=self._rank))

    def _maybe_drained(self, transfer: TransferId, one: _Tracked) -> None:
        opened = one.open
        assert opened is not None
        if opened.outstanding:
            return
        one.open = None
        self._reports.append(
            Drained(transfer=transfer, generation=opened.grant.generation, rank=self._rank),
        )
        if one.forgotten:
            del self._tracked[transfer]
