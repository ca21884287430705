"""One frame: some tokens of some heads of one layer, and the header that names them. Pure: values to bytes and back.

Bytes after the header come in one order that both ends know without asking: keys, then values, or latents alone; of
each the pieces that ``token_cuts`` makes of the tokens, in order; of a piece, head by head, its tokens. So each end
finds them in its own blocks, whatever the sizes of blocks are there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct

from ..errors import BadFrame
from .transfer import TransferId

_NAMES = Struct("!4sQQIQIIIQI")
_TAIL = Struct("!IQ")
_MAGIC = b"KVf1"
HEADER_BYTES = _NAMES.size + _TAIL.size


@dataclass(frozen=True, slots=True, kw_only=True)
class KvFrame:
    """What a frame holds. Layer and heads are the model's; ``receiver``: the incarnation that granted the blocks."""

    transfer: TransferId
    generation: int
    receiver: int
    layer: int
    first_head: int
    num_heads: int
    first_token: int
    num_tokens: int

    @property
    def heads(self) -> range:
        """The heads."""
        return range(self.first_head, self.first_head + self.num_heads)

    @property
    def tokens(self) -> range:
        """The token positions."""
        return range(self.first_token, self.first_token + self.num_tokens)

    def payload_bytes(self, entry_bytes: int) -> int:
        """Return the bytes after the header, with so many for one head of one token, all parts."""
        return self.num_heads * self.num_tokens * entry_bytes

    def names(self) -> bytes:
        """Return the part of the header that says what this is; a checksum begins with it."""
        return _NAMES.pack(
            _MAGIC,
            self.transfer.incarnation,
            self.transfer.number,
            self.generation,
            self.receiver,
            self.layer,
            self.first_head,
            self.num_heads,
            self.first_token,
            self.num_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class KvHeader:
    """A frame's header as it was read."""

    frame: KvFrame
    payload_bytes: int
    checksum: int


def pack_header(frame: KvFrame, payload_bytes: int, checksum: int) -> bytes:
    """Return a header's bytes."""
    return frame.names() + _TAIL.pack(payload_bytes, checksum)


def unpack_header(data: bytes | bytearray | memoryview, replica: str, *, max_payload_bytes: int) -> KvHeader:
    """Read a header that came over a connection with ``replica``.

    Raises: BadFrame
    """
    magic, incarnation, number, generation, receiver, layer, first_head, num_heads, first_token, num_tokens = (
        _NAMES.unpack_from(data)
    )
    payload_bytes, checksum = _TAIL.unpack_from(data, _NAMES.size)
    if magic != _MAGIC:
        raise BadFrame(f"{replica} sent what is no KV frame")
    if payload_bytes > max_payload_bytes:
        raise BadFrame(
            f"{replica} announces a KV frame of {payload_bytes} bytes, more than the limit of {max_payload_bytes}"
        )
    frame = KvFrame(
        transfer=TransferId(replica, incarnation, number),
        generation=generation,
        receiver=receiver,
        layer=layer,
        first_head=first_head,
        num_heads=num_heads,
        first_token=first_token,
        num_tokens=num_tokens,
    )
    return KvHeader(frame=frame, payload_bytes=payload_bytes, checksum=checksum)


def token_runs(tokens: range, *, token_bytes: int, block_size: int, max_bytes: int) -> Iterator[range]:
    """Cut tokens into runs of at most ``max_bytes``, at the target's blocks where a block fits.

    Units: token_bytes, of all heads of one token, all parts
    """
    most = max(max_bytes // token_bytes, 1)
    if most >= block_size:
        most -= most % block_size
    first = tokens.start
    while first < tokens.stop:
        stop = min(first + most, tokens.stop)
        if stop < tokens.stop and most >= block_size:
            stop -= stop % block_size
        yield range(first, stop)
        first = stop
