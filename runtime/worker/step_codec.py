"""Step plans and results as bytes: what travels on the step bus between a replica's driver and its ranks.

Owns the messages' form: msgpack maps with the fields' names, arrays as raw bytes. Whatever bytes come in, out comes a
valid message or a StepCodecError that names the field; sizes are bounded before anything is allocated for them. Values
that only a model or a cache can judge (is there such a token, such a block?) are not looked at.

A link sends most plans as differences from the one before (``step_rows``): ``PlanEncoder`` and ``PlanDecoder`` count
plans, so that one which was lost between them is found out, and the first plan, or one after ``resync``, stands for
itself. ``encode_plan`` and ``decode_plan`` know no link. Nothing here knows how bytes travel.
"""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from typing import Any

import msgpack
import numpy as np

from ..messages import AdmittedSequence, SequenceId, StageTime, StepPlan, StepResult, TokenLogprobs
from .step_fields import Fields, StepCodecError, pack_array, shown
from .step_params import params_from_wire, params_to_wire
from .step_rows import MAX_ROWS, Rows, RowTable, changes_to_wire, rows_from_changes, rows_from_wire, rows_to_wire

MAX_MESSAGE_BYTES = 256 << 20
MAX_ADMITTED = 8192
"""Most sequences that one step may admit, which also is the longest list in a message.

A list's memory is allocated when its length is read, and lists may be nested: this bounds both together.
"""

_MAX_FIELDS = 64
_MAX_STAGES = 1024
_INT32_MAX = 2**31 - 1
_INT64_MAX = 2**63 - 1
_BLOCKS = ("block_slots", "block_indices", "block_ids")
_COPIES = ("copy_sources", "copy_targets")


class PlanEncoder:
    """The driver's end of a link. All ranks of a replica are sent the same, so one encoder serves them all."""

    def __init__(self, *, max_slots: int) -> None:
        self._max_slots = max_slots
        self._table: RowTable | None = None
        self._number = 0

    def encode(self, plan: StepPlan) -> bytes:
        """Return the next plan as bytes; ``resync`` when they are not sent after all.

        Raises: StepCodecError, the next plan is encoded as if this one had never been
        """
        rows, table = _rows_of(plan), self._table or RowTable(self._max_slots)
        table.check(rows.slots)
        changes = None if self._table is None else changes_to_wire(rows, table)
        if changes is None:
            # A full plan starts from a blank table, at both ends.
            table = RowTable(self._max_slots)
        data = _pack(_plan_to_wire(plan, rows, number=self._number + 1, changes=changes))
        table.remember(rows)
        self._table = table
        self._number += 1
        return data

    def resync(self) -> None:
        """Let the next plan stand for itself: after one that was not sent, or for ranks that have just joined."""
        self._table = None


class PlanDecoder:
    """A rank's end of a link."""

    def __init__(self, *, max_slots: int) -> None:
        self._max_slots = max_slots
        self._table: RowTable | None = None
        self._number = 0

    def decode(self, data: bytes) -> StepPlan:
        """Return the next plan.

        Raises: StepCodecError, also when a plan is missing before it; from then on only a full plan is taken
        """
        table, self._table = self._table, None
        fields = _unpack("plan", data)
        number = fields.integer("number", 0, _INT64_MAX)
        if "changes" in fields:
            if table is None or number != self._number + 1:
                known = "none is known" if table is None else f"known is {self._number}"
                raise StepCodecError("plan.number", f"plan {number} changes the one before it, but {known}")
            rows = rows_from_changes(fields.take("changes"), table)
        else:
            rows = rows_from_wire(fields.take("rows"))
            table = RowTable(self._max_slots)
            table.check(rows.slots)
        plan = _plan_from_wire(fields, rows)
        table.remember(rows)
        self._table = table
        self._number = number
        return plan


def encode_plan(plan: StepPlan) -> bytes:
    """Return a plan as bytes that stand for themselves.

    Raises: StepCodecError
    """
    return _pack(_plan_to_wire(plan, _rows_of(plan), number=0, changes=None))


def decode_plan(data: bytes) -> StepPlan:
    """Return the plan that bytes are which stand for themselves.

    Raises: StepCodecError
    """
    fields = _unpack("plan", data)
    fields.integer("number", 0, _INT64_MAX)
    return _plan_from_wire(fields, rows_from_wire(fields.take("rows")))


def encode_result(result: StepResult) -> bytes:
    """Return a result as bytes.

    Raises: StepCodecError
    """
    wire: dict[str, Any] = {
        "step": int(result.step),
        "token_ids": pack_array("token_ids", result.token_ids, np.int32),
        "execute_s": float(result.execute_s),
    }
    if result.logprobs:
        entries = list(result.logprobs.values())
        wire["logprobs"] = {"rows": _integers("rows", result.logprobs), **_logprobs_to_wire(entries)}
    if result.prompt_logprobs:
        entries = [entry for entries in result.prompt_logprobs.values() for entry in entries]
        counts = map(len, result.prompt_logprobs.values())
        wire["prompt_logprobs"] = {
            "rows": _integers("rows", result.prompt_logprobs),
            "counts": _integers("counts", counts),
            **_logprobs_to_wire(entries),
        }
    for name in ("invalid_rows", "grammar_rows"):
        if rows := getattr(result, name):
            wire[name] = _integers(name, rows)
    if result.stages:
        wire["stages"] = [_stage_time_to_wire(time) for time in result.stages]
    return _pack(wire)


def decode_result(data: bytes) -> StepResult:
    """Return the result that bytes are.

    Raises: StepCodecError
    """
    fields = _unpack("result", data)
    token_ids = fields.array("token_ids", np.int32, minimum=-1)
    if len(token_ids) > MAX_ROWS:
        raise StepCodecError("result.token_ids", f"{len(token_ids)} rows are more than {MAX_ROWS}")
    logprobs: dict[int, TokenLogprobs] = {}
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
    if "logprobs" in fields:
        columns = Fields("result.logprobs", fields.take("logprobs"))
        rows = _row_set(columns, "rows", len(token_ids))
        logprobs = dict(zip(rows, _logprobs_from_wire(columns, len(rows)), strict=True))
    if "prompt_logprobs" in fields:
        columns = Fields("result.prompt_logprobs", fields.take("prompt_logprobs"))
        rows = _row_set(columns, "rows", len(token_ids))
        counts = columns.array("counts", np.int32, minimum=0, length=len(rows))
        entries = _logprobs_from_wire(columns, int(counts.sum(dtype=np.int64)))
        ends = accumulate(counts.tolist(), initial=0)
        prompt_logprobs = {row: tuple(entries[a:b]) for row, (a, b) in zip(rows, pairwise(ends), strict=True)}
    result = StepResult(
        step=fields.integer("step", 0, _INT64_MAX),
        token_ids=token_ids,
        execute_s=fields.number("execute_s"),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        invalid_rows=_row_set(fields, "invalid_rows", len(token_ids)),
        grammar_rows=_row_set(fields, "grammar_rows", len(token_ids)),
        stages=tuple(_stage_time(item) for item in fields.items("stages", at_most=_MAX_STAGES)),
    )
    fields.end()
    return result


def _stage_time_to_wire(time: StageTime) -> list[int | float]:
    seconds = (time.busy_s, time.waiting_s, time.wire_s, time.wire_hidden_s)
    return [int(time.stage), *map(float, seconds)]


def _stage_time(item: object) -> StageTime:
    match item:
        case (int(stage), float(busy_s), float(waiting_s), float(wire_s), float(hidden_s)):
            finite = all(map(math.isfinite, (busy_s, waiting_s, wire_s, hidden_s)))
            if not isinstance(stage, bool) and 0 <= stage < _MAX_STAGES and finite:
                return StageTime(stage=stage, busy_s=busy_s, waiting_s=waiting_s, wire_s=wire_s, wire_hidden_s=hidden_s)
    raise StepCodecError("result.stages", f"must be a stage and four numbers of seconds, got {shown(item)}")


def _rows_of(plan: StepPlan) -> Rows:
    return Rows(
        slots=plan.slots,
        sequence_ids=plan.sequence_ids,
        starts=plan.starts,
        counts=plan.counts,
        samples=plan.samples,
    )


def _plan_to_wire(plan: StepPlan, rows: Rows, *, number: int, changes: dict[str, Any] | None) -> dict[str, Any]:
    wire: dict[str, Any] = {"step": int(plan.step), "number": number}
    if changes is None:
        wire["rows"] = rows_to_wire(rows)
    else:
        wire["changes"] = changes
    if len(plan.admitted) > MAX_ADMITTED or len(rows.slots) > MAX_ROWS:
        sizes = f"{len(plan.admitted)} admitted sequences and {len(rows.slots)} rows"
        raise StepCodecError("plan", f"{sizes} are more than {MAX_ADMITTED} and {MAX_ROWS}")
    if plan.admitted:
        wire["admitted"] = [_admitted_to_wire(admitted) for admitted in plan.admitted]
    for name in (*_BLOCKS, *_COPIES):
        array = getattr(plan, name)
        if len(array):
            wire[name] = pack_array(name, array, np.int32)
    if len(plan.sending_rows):
        wire["sending_rows"] = pack_array("sending_rows", plan.sending_rows, np.int32)
        wire["sending_transfers"] = pack_array("sending_transfers", plan.sending_transfers, np.int64)
    return wire


def _plan_from_wire(fields: Fields, rows: Rows) -> StepPlan:
    admitted = fields.items("admitted", at_most=MAX_ADMITTED)
    blocks = [fields.array(name, np.int32, minimum=0) for name in _BLOCKS]
    copies = [fields.array(name, np.int32, minimum=0) for name in _COPIES]
    for names, columns in ((_BLOCKS, blocks), (_COPIES, copies)):
        if len({len(column) for column in columns}) > 1:
            raise StepCodecError(f"plan.{names[0]}", f"must be as long as {' and '.join(names[1:])}")
    sending_rows = np.array(_row_set(fields, "sending_rows", len(rows.slots)), dtype=np.int32)
    sending_transfers = fields.array("sending_transfers", np.int64, minimum=0, length=len(sending_rows))
    plan = StepPlan(
        step=fields.integer("step", 0, _INT64_MAX),
        admitted=tuple(_admitted_from_wire(f"plan.admitted[{i}]", wire) for i, wire in enumerate(admitted)),
        slots=rows.slots,
        sequence_ids=rows.sequence_ids,
        starts=rows.starts,
        counts=rows.counts,
        samples=rows.samples,
        block_slots=blocks[0],
        block_indices=blocks[1],
        block_ids=blocks[2],
        copy_sources=copies[0],
        copy_targets=copies[1],
        sending_rows=sending_rows,
        sending_transfers=sending_transfers,
    )
    fields.end()
    return plan


def _admitted_to_wire(admitted: AdmittedSequence) -> dict[str, Any]:
    return {
        "slot": int(admitted.slot),
        "sequence_id": int(admitted.sequence_id),
        "token_ids": pack_array("token_ids", admitted.token_ids, np.int32),
        "prompt_length": int(admitted.prompt_length),
        "block_ids": pack_array("block_ids", admitted.block_ids, np.int32),
        "params": params_to_wire(admitted.params),
        "seed": int(admitted.seed),
        "stop_ids": _integers("stop_ids", admitted.stop_ids),
        "wants_prompt_logprobs": bool(admitted.wants_prompt_logprobs),
    }


def _admitted_from_wire(where: str, wire: object) -> AdmittedSequence:
    fields = Fields(where, wire)
    token_ids = fields.array("token_ids", np.int32, minimum=0)
    admitted = AdmittedSequence(
        slot=fields.integer("slot", 0, _INT32_MAX),
        sequence_id=SequenceId(fields.integer("sequence_id", -(2**63), _INT64_MAX)),
        token_ids=token_ids,
        prompt_length=fields.integer("prompt_length", 0, len(token_ids)),
        block_ids=fields.array("block_ids", np.int32, minimum=0),
        params=params_from_wire(fields.path("params"), fields.take("params")),
        seed=fields.integer("seed", -(2**63), 2**64 - 1),
        stop_ids=tuple(fields.array("stop_ids", np.int32, minimum=0).tolist()),
        wants_prompt_logprobs=fields.truth("wants_prompt_logprobs"),
    )
    fields.end()
    return admitted


def _logprobs_to_wire(entries: list[TokenLogprobs]) -> dict[str, Any]:
    """Return entries as columns: a step may have thousands, and each is a few numbers."""
    for entry in entries:
        if len(entry.token_ids) != len(entry.logprobs):
            raise StepCodecError("logprobs", f"{len(entry.logprobs)} are not one for each of {len(entry.token_ids)}")
    # The empty arrays are for steps whose rows have no entries.
    ids = np.concatenate([np.empty(0, np.int32), *(entry.token_ids for entry in entries)])
    values = np.concatenate([np.empty(0, np.float32), *(entry.logprobs for entry in entries)])
    return {
        "lengths": _integers("lengths", (len(entry.token_ids) for entry in entries)),
        "token_ids": pack_array("logprobs.token_ids", ids, np.int32),
        "logprobs": pack_array("logprobs.logprobs", values, np.float32),
        "ranks": _integers("ranks", (entry.rank for entry in entries)),
    }


def _logprobs_from_wire(columns: Fields, count: int) -> list[TokenLogprobs]:
    lengths = columns.array("lengths", np.int32, minimum=1, length=count)
    ranks = columns.array("ranks", np.int32, minimum=1, length=count)
    total = int(lengths.sum(dtype=np.int64))
    token_ids = columns.array("token_ids", np.int32, minimum=0, length=total)
    logprobs = columns.array("logprobs", np.float32, length=total)
    columns.end()
    spans = pairwise(accumulate(lengths.tolist(), initial=0))
    return [
        TokenLogprobs(token_ids=token_ids[a:b], logprobs=logprobs[a:b], rank=rank)
        for (a, b), rank in zip(spans, ranks.tolist(), strict=True)
    ]


def _integers(field: str, values: Any) -> bytes:
    try:
        return pack_array(field, np.fromiter(values, dtype=np.int32), np.int32)
    except (OverflowError, TypeError, ValueError) as error:
        raise StepCodecError(field, f"must be integers of 32 bits: {error}") from error


def _row_set(fields: Fields, name: str, rows: int) -> tuple[int, ...]:
    numbers = fields.array(name, np.int32, minimum=0).tolist()
    if len(set(numbers)) != len(numbers) or (numbers and max(numbers) >= rows):
        raise StepCodecError(fields.path(name), f"must name each of {rows} rows at most once")
    return tuple(numbers)


def _pack(wire: dict[str, Any]) -> bytes:
    try:
        # A stop string may hold a lone surrogate: nobody has to encode it but us.
        data: bytes = msgpack.packb(wire, unicode_errors="surrogatepass")
    except (OverflowError, TypeError, ValueError) as error:
        raise StepCodecError("message", f"cannot be encoded: {error}") from error
    if len(data) > MAX_MESSAGE_BYTES:
        raise StepCodecError("message", f"is {len(data)} bytes long, more than {MAX_MESSAGE_BYTES}")
    return data


def _unpack(where: str, data: bytes) -> Fields:
    if len(data) > MAX_MESSAGE_BYTES:
        raise StepCodecError(where, f"is {len(data)} bytes long, more than {MAX_MESSAGE_BYTES}")
    try:
        message = msgpack.unpackb(
            data,
            use_list=False,
            strict_map_key=True,
            unicode_errors="surrogatepass",
            max_array_len=MAX_ADMITTED,
            max_map_len=_MAX_FIELDS,
            max_ext_len=0,
        )
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise StepCodecError(where, f"is no message: {error}") from error
    return Fields(where, message)
