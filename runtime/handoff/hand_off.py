"""What goes with a prompt's KV to the replica that goes on: the token that was drawn after it, with its scores.

Everything else that the receiver needs, prompt, parameters and what was generated before, its gateway has told it. What
comes in is believed only as far as it was checked.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgpack
import numpy as np

from ..messages import TokenLogprobs

_MAX_SCORES = 1 << 16
_MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class HandOff:
    """The token after the prompt, and its log-probabilities where they were asked for."""

    token_id: int
    logprobs: TokenLogprobs | None = None


def encode_hand_off(hand_off: HandOff) -> bytes:
    """Return a hand-off as bytes."""
    scores = hand_off.logprobs
    fields: list[object] = [hand_off.token_id]
    if scores is not None:
        fields += [scores.token_ids.astype("<i4").tobytes(), scores.logprobs.astype("<f4").tobytes(), scores.rank]
    packed: bytes = msgpack.packb(fields)
    return packed


def decode_hand_off(data: bytes, *, vocab_size: int) -> HandOff | None:
    """Return what ``encode_hand_off`` was given; None for what is none, or names tokens that there are not."""
    if len(data) > _MAX_BYTES:
        return None
    try:
        fields = msgpack.unpackb(data, max_bin_len=_MAX_BYTES, max_array_len=4)
    except ValueError:
        # msgpack's own errors are ValueErrors, those of text that is none too.
        return None
    if not isinstance(fields, list) or len(fields) not in (1, 4) or not _is_count(fields[0], vocab_size):
        return None
    if len(fields) == 1:
        return HandOff(token_id=fields[0])
    scores = _scores(*fields[1:], vocab_size=vocab_size)
    return None if scores is None else HandOff(token_id=fields[0], logprobs=scores)


def _scores(token_ids: object, logprobs: object, rank: object, *, vocab_size: int) -> TokenLogprobs | None:
    if not isinstance(token_ids, bytes) or not isinstance(logprobs, bytes) or not _is_count(rank, vocab_size + 1):
        return None
    if len(token_ids) != len(logprobs) or len(token_ids) % 4 or not 4 <= len(token_ids) <= 4 * _MAX_SCORES:
        return None
    ids = np.frombuffer(token_ids, dtype="<i4").astype(np.int32)
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        return None
    values = np.frombuffer(logprobs, dtype="<f4").astype(np.float32)
    assert isinstance(rank, int)
    return TokenLogprobs(token_ids=ids, logprobs=values, rank=rank)


def _is_count(value: object, limit: int) -> bool:
    return type(value) is int and 0 <= value < limit
