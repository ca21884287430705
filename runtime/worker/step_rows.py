"""The rows of a plan on the step bus: all of them, or only what is not as expected.

From one step to the next most rows go on where they were. Both ends of a link therefore remember the same: which slots
the last plan had, in which order, and for each slot which sequence it holds and where that goes on. A plan is then what
differs from "the same slots, each with the next token, and a token drawn for each". Rows that end and begin, prefill
chunks and interrupted sequences are exceptions, by row. Pure arithmetic on both sides; knows nothing of bytes beyond
``step_fields``.

    kept      of the last plan's rows, those that are in this one, in the same order; left out: all
    joined    slots that follow them
    slots     the slots instead of both, where the order is another
    moved     rows whose sequence or start is not the expected one, with ``moved_ids`` and ``moved_starts``
    long      rows of more than one token, with ``long_counts``
    samples   which rows draw a token; left out: all
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..messages import BoolArray, Int32Array
from .step_fields import Fields, StepCodecError, pack_array, pack_bits, unpack_bits

MAX_ROWS = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The columns of a plan that have an entry for each row; see ``StepPlan``."""

    slots: Int32Array
    sequence_ids: NDArray[np.int64]
    starts: Int32Array
    counts: Int32Array
    samples: BoolArray


class RowTable:
    """What both ends of a link know after a plan.

    Shapes: slots [rows of the last plan] int32; sequence_ids [max_slots] int64, next_starts [max_slots] int32
    """

    def __init__(self, max_slots: int) -> None:
        self.max_slots = max_slots
        self.slots = np.empty(0, dtype=np.int32)
        self.sequence_ids = np.full(max_slots, -1, dtype=np.int64)
        self.next_starts = np.zeros(max_slots, dtype=np.int32)

    def check(self, slots: Int32Array) -> None:
        """Make sure that slots are in the table.

        Raises: StepCodecError
        """
        if len(slots) and not 0 <= int(slots.min()) <= int(slots.max()) < self.max_slots:
            raise StepCodecError("slots", f"must be from 0 to {self.max_slots - 1}, got {slots.min()}, {slots.max()}")

    def remember(self, rows: Rows) -> None:
        """Take a plan's rows as the last."""
        self.slots = rows.slots
        self.sequence_ids[rows.slots] = rows.sequence_ids
        # A sum over the edge of int32 wraps at both ends alike, and no row that is valid continues there.
        self.next_starts[rows.slots] = rows.starts + rows.counts


def rows_to_wire(rows: Rows) -> dict[str, Any]:
    """Return all rows."""
    return {
        "slots": pack_array("slots", rows.slots, np.int32),
        "sequence_ids": pack_array("sequence_ids", rows.sequence_ids, np.int64),
        "starts": pack_array("starts", rows.starts, np.int32),
        "counts": pack_array("counts", rows.counts, np.int32),
        "samples": pack_bits(rows.samples),
    }


def rows_from_wire(wire: object) -> Rows:
    """Return the rows of a message that has all of them.

    Raises: StepCodecError
    """
    fields = Fields("rows", wire)
    slots = fields.array("slots", np.int32, minimum=0)
    length = _bounded(len(slots))
    rows = Rows(
        slots=slots,
        sequence_ids=fields.array("sequence_ids", np.int64, length=length),
        starts=fields.array("starts", np.int32, minimum=0, length=length),
        counts=fields.array("counts", np.int32, minimum=1, length=length),
        samples=unpack_bits("rows.samples", fields.take("samples"), length=length),
    )
    fields.end()
    return rows


def changes_to_wire(rows: Rows, table: RowTable) -> dict[str, Any] | None:
    """Return what is not as the table expects; None when that is most of it."""
    moved = (rows.sequence_ids != table.sequence_ids[rows.slots]) | (rows.starts != table.next_starts[rows.slots])
    moved_rows = np.flatnonzero(moved).astype(np.int32)
    if 2 * len(moved_rows) > len(moved):
        return None
    wire = _slots_to_wire(rows.slots, table)
    if len(moved_rows):
        wire["moved"] = pack_array("moved", moved_rows, np.int32)
        wire["moved_ids"] = pack_array("sequence_ids", rows.sequence_ids[moved_rows], np.int64)
        wire["moved_starts"] = pack_array("starts", rows.starts[moved_rows], np.int32)
    long = np.flatnonzero(rows.counts != 1).astype(np.int32)
    if len(long):
        wire["long"] = pack_array("long", long, np.int32)
        wire["long_counts"] = pack_array("counts", rows.counts[long], np.int32)
    if not rows.samples.all():
        wire["samples"] = pack_bits(rows.samples)
    return wire


def rows_from_changes(wire: object, table: RowTable) -> Rows:
    """Return the rows that differ from what the table expects in this way.

    Raises: StepCodecError
    """
    fields = Fields("changes", wire)
    slots = _slots_from_wire(fields, table)
    length = _bounded(len(slots))
    sequence_ids, starts = table.sequence_ids[slots], table.next_starts[slots]
    moved = _row_numbers(fields, "moved", length)
    sequence_ids[moved] = fields.array("moved_ids", np.int64, length=len(moved))
    starts[moved] = fields.array("moved_starts", np.int32, length=len(moved))
    if length and int(starts.min()) < 0:
        raise StepCodecError("changes.moved_starts", f"a row would start at {starts.min()}")
    counts = np.ones(length, dtype=np.int32)
    long = _row_numbers(fields, "long", length)
    counts[long] = fields.array("long_counts", np.int32, minimum=1, length=len(long))
    packed = fields.take_or("samples", None)
    samples = (
        np.ones(length, dtype=np.bool_) if packed is None else unpack_bits("changes.samples", packed, length=length)
    )
    fields.end()
    return Rows(slots=slots, sequence_ids=sequence_ids, starts=starts, counts=counts, samples=samples)


def _slots_to_wire(slots: Int32Array, table: RowTable) -> dict[str, Any]:
    if np.array_equal(slots, table.slots):
        return {}
    here = np.zeros(table.max_slots, dtype=np.bool_)
    here[slots] = True
    kept = here[table.slots]
    first = table.slots[kept]
    if not np.array_equal(slots[: len(first)], first):
        return {"slots": pack_array("slots", slots, np.int32)}
    wire: dict[str, Any] = {}
    if not kept.all():
        wire["kept"] = pack_bits(kept)
    if len(slots) > len(first):
        wire["joined"] = pack_array("joined", slots[len(first) :], np.int32)
    return wire


def _slots_from_wire(fields: Fields, table: RowTable) -> Int32Array:
    if "slots" in fields:
        slots = fields.array("slots", np.int32)
    else:
        slots = table.slots
        packed = fields.take_or("kept", None)
        if packed is not None:
            slots = slots[unpack_bits("changes.kept", packed, length=len(slots))]
        slots = np.concatenate([slots, fields.array("joined", np.int32)])
    table.check(slots)
    return slots


def _row_numbers(fields: Fields, name: str, length: int) -> Int32Array:
    numbers = fields.array(name, np.int32, minimum=0)
    if len(numbers) > length or (len(numbers) and int(numbers.max()) >= length):
        raise StepCodecError(fields.path(name), f"names a row beyond the {length} that there are")
    return numbers


def _bounded(length: int) -> int:
    if length > MAX_ROWS:
        raise StepCodecError("slots", f"{length} rows are more than {MAX_ROWS}")
    return length
