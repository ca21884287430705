"""What a driver orders its ranks to do about KV, what they say to it, and both as bytes. Values; pure.

Orders are carried out one after the other, and a rank's words come in the order in which it said them. Bytes come from
processes of one replica that have proved themselves, and are believed no further than they were checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from ...comm.errors import BadFrame
from ...comm.kv.transfer import (
    Drained,
    Ending,
    OpenReceiving,
    OpenSending,
    Peer,
    PeerRank,
    RankBroken,
    RankDone,
    RankOpened,
    Report,
    TransferId,
)
from ...comm.kv.transport import PeerDown
from ...placement.kv_routes import KvLayout

MAX_ORDER_BYTES = 64 << 20
MAX_RANKS = 4096
MAX_KINDS = 8
_MAX_TEXT_BYTES = 4096
_MAX_NUMBER = (1 << 63) - 1


# ------------------------------------------------------------------ orders


@dataclass(frozen=True, slots=True, order=True)
class RankEnd:
    """Where a rank takes KV in: a kind of transport, and its address."""

    kind: str
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KvTarget:
    """The replica that KV goes to. ``ends``: of each of its ranks, those that this replica may use, best first."""

    layout: KvLayout
    ends: tuple[tuple[RankEnd, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSend:
    """Connect to the target and post, now and as more is computed."""

    grant: OpenSending
    target: KvTarget


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenReceive:
    """Let frames of a transfer in. ``source``: the layout of the replica that sends them."""

    grant: OpenReceiving
    source: KvLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseTransfer:
    """Stop with a generation of a transfer, in either direction, and report ``Drained``."""

    transfer: TransferId
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetTransfer:
    """A transfer from here is over for good; steps that still name it are of no effect."""

    transfer: TransferId


KvOrder = OpenSend | OpenReceive | CloseTransfer | ForgetTransfer


# ------------------------------------------------------------------ what ranks say


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMoved:
    """What a rank has moved of a generation of a transfer; said once for each, before it is done or drained.

    Units: wire_s, in which some frame was on its way; hidden_s, the part of it before the prompt was computed here
    """

    transfer: TransferId
    generation: int
    rank: int
    bytes_out: int = 0
    bytes_in: int = 0
    wire_s: float = 0.0
    hidden_s: float = 0.0


RankWord = Report | PeerDown | RankMoved


# ------------------------------------------------------------------ bytes


def encode_ends(ends: tuple[RankEnd, ...]) -> bytes:
    """Return the ends of one rank as bytes."""
    return _pack([[end.kind, end.address] for end in ends])


def decode_ends(data: bytes) -> tuple[RankEnd, ...]:
    """Return what ``encode_ends`` was given. Raises: BadFrame"""
    return _ends(_unpack(data))


def encode_order(order: KvOrder) -> bytes:
    """Return an order as bytes."""
    match order:
        case OpenSend(grant=grant, target=target):
            ends = [[[end.kind, end.address] for end in each] for each in target.ends]
            peer = [grant.to.replica, grant.to.incarnation]
            return _pack(["send", *_grant(grant), peer, _layout_of(target.layout), ends])
        case OpenReceive(grant=grant, source=source):
            return _pack(["receive", *_grant(grant), _layout_of(source)])
        case CloseTransfer(transfer=transfer, generation=generation):
            return _pack(["close", *_name(transfer), generation])
        case ForgetTransfer(transfer=transfer):
            return _pack(["forget", *_name(transfer)])


def decode_order(data: bytes) -> KvOrder:
    """Return what ``encode_order`` was given. Raises: BadFrame"""
    items = _Items(_unpack(data), "order")
    kind = items.text()
    transfer = items.transfer()
    order: KvOrder
    match kind:
        case "send":
            generation, tokens, blocks = items.number(), items.tokens(), items.blocks()
            to = _Items(items.next(), "peer")
            peer = Peer(to.text(), to.number())
            to.end()
            layout = _layout(items.next())
            ends = tuple(_ends(each) for each in _rows(items.next(), at_most=MAX_RANKS))
            if len(ends) != layout.ranks:
                raise BadFrame(f"a KV order with the ends of {len(ends)} ranks, the target has {layout.ranks}")
            sending = OpenSending(transfer=transfer, generation=generation, to=peer, tokens=tokens, blocks=blocks)
            order = OpenSend(grant=sending, target=KvTarget(layout=layout, ends=ends))
        case "receive":
            generation, tokens, blocks = items.number(), items.tokens(), items.blocks()
            receiving = OpenReceiving(transfer=transfer, generation=generation, tokens=tokens, blocks=blocks)
            order = OpenReceive(grant=receiving, source=_layout(items.next()))
        case "close":
            order = CloseTransfer(transfer=transfer, generation=items.number())
        case "forget":
            order = ForgetTransfer(transfer=transfer)
        case _:
            raise BadFrame("a KV order of an unknown kind: start all ranks from one release")
    items.end()
    return order


def encode_word(word: RankWord) -> bytes:
    """Return what a rank says as bytes."""
    match word:
        case PeerDown(peer=peer, why=why):
            return _pack(["down", peer.peer.replica, peer.peer.incarnation, peer.rank, why[: _MAX_TEXT_BYTES // 4]])
        case RankMoved(bytes_out=out, bytes_in=come, wire_s=wire_s, hidden_s=hidden_s):
            return _pack(["moved", *_name(word.transfer), word.generation, out, come, wire_s, hidden_s])
        case RankBroken(ending=ending):
            return _pack(["broken", *_name(word.transfer), word.generation, ending.value])
        case RankOpened() | RankDone() | Drained():
            return _pack([_NAMES[type(word)], *_name(word.transfer), word.generation])


def decode_word(data: bytes, *, rank: int) -> RankWord:
    """Return what a rank said; which rank it is, its connection knows. Raises: BadFrame"""
    items = _Items(_unpack(data), "word")
    kind = items.text()
    word: RankWord
    if kind == "down":
        peer = PeerRank(Peer(items.text(), items.number()), items.number())
        word = PeerDown(peer, items.text())
    else:
        transfer, generation = items.transfer(), items.number()
        if kind == "moved":
            word = RankMoved(
                transfer=transfer,
                generation=generation,
                rank=rank,
                bytes_out=items.number(),
                bytes_in=items.number(),
                wire_s=items.seconds(),
                hidden_s=items.seconds(),
            )
        elif kind == "broken":
            word = RankBroken(transfer=transfer, generation=generation, rank=rank, ending=items.ending())
        elif kind in _REPORTS:
            word = _REPORTS[kind](transfer=transfer, generation=generation, rank=rank)
        else:
            raise BadFrame("a rank says something of an unknown kind: start all ranks from one release")
    items.end()
    return word


_REPORTS: dict[str, Callable[..., RankOpened | RankDone | Drained]] = {
    "opened": RankOpened,
    "done": RankDone,
    "drained": Drained,
}
_NAMES: dict[type, str] = {RankOpened: "opened", RankDone: "done", Drained: "drained"}


def _pack(values: list[Any]) -> bytes:
    # A name that is no text is nobody's that the driver knows.
    packed: bytes = msgpack.packb(values, unicode_errors="replace")
    return packed


def _unpack(data: bytes) -> object:
    if len(data) > MAX_ORDER_BYTES:
        raise BadFrame(f"a message about KV of {len(data)} bytes, more than the limit of {MAX_ORDER_BYTES}")
    try:
        return msgpack.unpackb(
            data,
            use_list=False,
            max_str_len=_MAX_TEXT_BYTES,
            max_array_len=MAX_RANKS,
            max_map_len=0,
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException) as error:
        raise BadFrame("a message about KV that is none") from error


def _name(transfer: TransferId) -> list[Any]:
    return [transfer.replica, transfer.incarnation, transfer.number]


def _grant(grant: OpenSending | OpenReceiving) -> list[Any]:
    blocks = np.asarray(grant.blocks, dtype="<i8").tobytes()
    return [*_name(grant.transfer), grant.generation, grant.tokens.start, grant.tokens.stop, blocks]


def _layout_of(layout: KvLayout) -> list[int]:
    return [layout.layers, layout.kv_heads, layout.block_size, layout.tp, layout.pp, layout.copies]


def _layout(value: object) -> KvLayout:
    items = _Items(value, "layout")
    layers, kv_heads, block_size, tp, pp, copies = (items.number() for _ in range(6))
    items.end()
    try:
        return KvLayout(layers=layers, kv_heads=kv_heads, block_size=block_size, tp=tp, pp=pp, copies=copies)
    except ValueError as error:
        raise BadFrame(f"a KV order with a layout that cannot be: {error}") from error


def _ends(value: object) -> tuple[RankEnd, ...]:
    found: list[RankEnd] = []
    for each in _rows(value, at_most=MAX_KINDS):
        items = _Items(each, "end")
        found.append(RankEnd(items.text(), items.text()))
        items.end()
    return tuple(found)


def _rows(value: object, *, at_most: int) -> tuple[Any, ...]:
    if not isinstance(value, tuple) or len(value) > at_most:
        raise BadFrame("a message about KV with a list that is none, or too long")
    return value


class _Items:
    """The values of a list, taken one by one, each of its type."""

    def __init__(self, value: object, what: str) -> None:
        self._values = _rows(value, at_most=MAX_RANKS)
        self._what = what
        self._at = 0

    def next(self) -> Any:
        if self._at == len(self._values):
            raise BadFrame(f"a KV {self._what} that is cut short: start all ranks from one release")
        self._at += 1
        return self._values[self._at - 1]

    def end(self) -> None:
        if self._at < len(self._values):
            raise BadFrame(f"a KV {self._what} that is too long: start all ranks from one release")

    def text(self) -> str:
        value = self.next()
        if not isinstance(value, str):
            raise self._wrong("a text")
        return value

    def number(self) -> int:
        value = self.next()
        if type(value) is not int or not 0 <= value <= _MAX_NUMBER:
            raise self._wrong("a number")
        return value

    def seconds(self) -> float:
        value = self.next()
        if type(value) is not float or not math.isfinite(value) or value < 0:
            raise self._wrong("a time")
        return value

    def tokens(self) -> range:
        first, stop = self.number(), self.number()
        if first > stop:
            raise self._wrong("a run of tokens")
        return range(first, stop)

    def blocks(self) -> tuple[int, ...]:
        value = self.next()
        if not isinstance(value, bytes) or len(value) % 8:
            raise self._wrong("a list of blocks")
        blocks = np.frombuffer(value, dtype="<i8")
        if len(blocks) and int(blocks.min()) < 0:
            raise self._wrong("a list of blocks")
        return tuple(blocks.tolist())

    def transfer(self) -> TransferId:
        return TransferId(self.text(), self.number(), self.number())

    def ending(self) -> Ending:
        try:
            return Ending(self.text())
        except ValueError as error:
            raise self._wrong("an ending") from error

    def _wrong(self, wanted: str) -> BadFrame:
        return BadFrame(f"a KV {self._what} whose value {self._at} is not {wanted} that can be")
