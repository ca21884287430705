"""Between what a replica says of itself beside a step's news and messages: load, hand-offs, changes of its cache.

Pure, like ``codec``. Numbers that a router goes by must be numbers: what is not finite, or below 0, is an
InvalidRequest that names the field.
"""

from __future__ import annotations

import math

from ...comm.kv.transfer import Ending
from ...sdk.errors import InvalidRequest
from ..messages import StageTime
from .engine_client import BlockChanges, EngineLoadReport, HandOffReport
from .generated import engine_pb2 as pb

DIGEST_BYTES = 16
MAX_BLOCKS_CHANGED = 1 << 18
"""Digests of one ``BlockChanges``, stored and removed together: well below what a message may hold."""

_ENDINGS = frozenset(ending.value for ending in Ending)


def load_to_wire(load: EngineLoadReport) -> pb.Load:
    """Return a load report as a message."""
    return pb.Load(
        running=load.running,
        waiting=load.waiting,
        queue_room=load.queue_room,
        blocks_total=load.blocks_total,
        blocks_available=load.blocks_available,
        preemptions=load.preemptions,
        prefix_hits=load.prefix_hits,
        prefix_misses=load.prefix_misses,
        draining=load.draining,
        stages=[_stage_time_to_wire(time) for time in load.stages],
        queued_tokens=load.queued_tokens,
        prefill_tokens_per_s=load.prefill_tokens_per_s,
        token_s=load.token_s,
        awaiting=load.awaiting,
        sending=load.sending,
        receiving=load.receiving,
        kv_bytes_out=load.kv_bytes_out,
        kv_bytes_in=load.kv_bytes_in,
    )


def load_from_wire(message: pb.Load) -> EngineLoadReport:
    """Return the load report that a message is. Raises: InvalidRequest"""
    return EngineLoadReport(
        running=message.running,
        waiting=message.waiting,
        queue_room=message.queue_room,
        blocks_total=message.blocks_total,
        blocks_available=message.blocks_available,
        preemptions=message.preemptions,
        prefix_hits=message.prefix_hits,
        prefix_misses=message.prefix_misses,
        draining=message.draining,
        stages=tuple(_stage_time_from_wire(time) for time in message.stages),
        queued_tokens=message.queued_tokens,
        prefill_tokens_per_s=_amount("prefill_tokens_per_s", message.prefill_tokens_per_s),
        token_s=_amount("token_s", message.token_s),
        awaiting=message.awaiting,
        sending=message.sending,
        receiving=message.receiving,
        kv_bytes_out=message.kv_bytes_out,
        kv_bytes_in=message.kv_bytes_in,
    )


def hand_off_to_wire(report: HandOffReport) -> pb.HandOffReport:
    """Return how a hand-off ended, as a message."""
    return pb.HandOffReport(
        ending=report.ending,
        bytes_moved=report.bytes_moved,
        prefill_s=report.prefill_s,
        wire_s=report.wire_s,
        hidden_s=report.hidden_s,
        wait_s=report.wait_s,
    )


def hand_off_from_wire(message: pb.HandOffReport) -> HandOffReport:
    """Return what a message says of a hand-off. Raises: InvalidRequest"""
    if message.ending not in _ENDINGS:
        raise InvalidRequest("ending", f"{message.ending[:64]!r} is not how a transfer can end")
    return HandOffReport(
        ending=message.ending,
        bytes_moved=message.bytes_moved,
        prefill_s=_amount("prefill_s", message.prefill_s),
        wire_s=_amount("wire_s", message.wire_s),
        hidden_s=_amount("hidden_s", message.hidden_s),
        wait_s=_amount("wait_s", message.wait_s),
    )


def changes_to_wire(changes: BlockChanges) -> pb.BlocksChanged:
    """Return changes of a prefix cache as a message. Raises: InvalidRequest when they are too many for one"""
    for field, digests in (("stored", changes.stored), ("removed", changes.removed)):
        if any(len(digest) != DIGEST_BYTES for digest in digests):
            raise InvalidRequest(field, f"holds a digest that has not {DIGEST_BYTES} bytes")
    _check_count(len(changes.stored) + len(changes.removed))
    return pb.BlocksChanged(stored=b"".join(changes.stored), removed=b"".join(changes.removed), reset=changes.reset)


def changes_from_wire(message: pb.BlocksChanged) -> BlockChanges:
    """Return the changes of a prefix cache that a message is. Raises: InvalidRequest"""
    for field, column in (("stored", message.stored), ("removed", message.removed)):
        if len(column) % DIGEST_BYTES:
            raise InvalidRequest(field, f"is {len(column)} bytes long, not a multiple of {DIGEST_BYTES}")
    _check_count((len(message.stored) + len(message.removed)) // DIGEST_BYTES)
    return BlockChanges(stored=_digests(message.stored), removed=_digests(message.removed), reset=message.reset)


def _digests(column: bytes) -> tuple[bytes, ...]:
    return tuple(column[start : start + DIGEST_BYTES] for start in range(0, len(column), DIGEST_BYTES))


def _check_count(count: int) -> None:
    if count > MAX_BLOCKS_CHANGED:
        raise InvalidRequest("blocks_changed", f"holds {count} digests, more than {MAX_BLOCKS_CHANGED}")


def _amount(field: str, amount: float) -> float:
    if not math.isfinite(amount) or amount < 0:
        raise InvalidRequest(field, f"must be 0 or more, got {amount}")
    return amount


def _stage_time_to_wire(time: StageTime) -> pb.StageTime:
    return pb.StageTime(
        stage=time.stage,
        busy_s=time.busy_s,
        waiting_s=time.waiting_s,
        wire_s=time.wire_s,
        wire_hidden_s=time.wire_hidden_s,
    )


def _stage_time_from_wire(message: pb.StageTime) -> StageTime:
    return StageTime(
        stage=message.stage,
        busy_s=message.busy_s,
        waiting_s=message.waiting_s,
        wire_s=message.wire_s,
        wire_hidden_s=message.wire_hidden_s,
    )
