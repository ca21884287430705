"""Plans and results as bytes: what goes in comes out, small while rows go on, and nothing else is believed."""

from __future__ import annotations

import tracemalloc
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from slipstream.runtime.config import SchedulerConfig
from slipstream.runtime.engine.engine import Engine
from slipstream.runtime.engine.scheduler import Scheduler
from slipstream.runtime.messages import AdmittedSequence, SequenceId, StageTime, StepPlan, StepResult, TokenLogprobs
from slipstream.runtime.worker import step_codec
from slipstream.runtime.worker.null_executor import NullExecutor
from slipstream.runtime.worker.step_codec import (
    MAX_ADMITTED,
    PlanDecoder,
    PlanEncoder,
    decode_plan,
    decode_result,
    encode_plan,
    encode_result,
)
from slipstream.runtime.worker.step_fields import StepCodecError
from slipstream.sdk.params import SamplingParams
from slipstream.sdk.structured import StructuredOutputsParams
from slipstream.tests.engine.builders import request

MAX_SLOTS = 16
INT32_MAX = 2**31 - 1


def same(a: Any, b: Any) -> bool:
    """Whether two messages are equal: type, dtype, shape and value, all the way down."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    if is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


few = st.integers(0, 6)


def int32s(length: int | st.SearchStrategy[int] = few, low: int = 0) -> st.SearchStrategy[Any]:
    return hnp.arrays(np.int32, length, elements=st.integers(low, INT32_MAX))


texts = st.text(min_size=1, max_size=8, alphabet=st.characters())  # lone surrogates too
constraints = st.one_of(
    st.builds(StructuredOutputsParams, regex=st.sampled_from(["a+", "é"]), disable_any_whitespace=st.booleans()),
    st.builds(StructuredOutputsParams, choice=st.lists(st.sampled_from(["x", "yes", "ü"]), min_size=1, max_size=3)),
    st.just(StructuredOutputsParams(json={"type": "object"})),
    st.just(StructuredOutputsParams(json_object=True)),
)
params = st.builds(
    SamplingParams,
    n=st.integers(1, 128),
    presence_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(0.01, 100),
    temperature=st.floats(0, 100) | st.integers(0, 2),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(-1, INT32_MAX),
    min_p=st.floats(0, 1),
    seed=st.none() | st.integers(-(2**63), 2**64 - 1),
    stop=st.lists(texts, max_size=3),
    stop_token_ids=st.lists(st.integers(0, INT32_MAX), max_size=3),
    max_tokens=st.none() | st.integers(1, INT32_MAX),
    logprobs=st.none() | st.integers(0, 64),
    skip_special_tokens=st.booleans(),
    logit_bias=st.dictionaries(st.integers(0, INT32_MAX), st.floats(-100, 100), max_size=3),
    structured_outputs=st.none() | constraints,
)


@st.composite
def admissions(draw: st.DrawFn) -> AdmittedSequence:
    token_ids = draw(int32s())
    return AdmittedSequence(
        slot=draw(st.integers(0, INT32_MAX)),
        sequence_id=SequenceId(draw(st.integers(0, 2**63 - 1))),
        token_ids=token_ids,
        prompt_length=draw(st.integers(0, len(token_ids))),
        block_ids=draw(int32s()),
        params=draw(params),
        seed=draw(st.integers(-(2**63), 2**64 - 1)),
        stop_ids=tuple(draw(st.lists(st.integers(0, INT32_MAX), max_size=3))),
        wants_prompt_logprobs=draw(st.booleans()),
    )


@st.composite
def plans(draw: st.DrawFn, max_slot: int = INT32_MAX, max_admitted: int = 2) -> StepPlan:
    rows, blocks, copies = (draw(st.integers(0, 6)) for _ in range(3))
    sent = draw(st.lists(st.integers(0, rows - 1), unique=True)) if rows else []
    return StepPlan(
        step=draw(st.integers(0, 2**63 - 1)),
        admitted=tuple(draw(st.lists(admissions(), max_size=max_admitted))),
        slots=draw(hnp.arrays(np.int32, rows, elements=st.integers(0, max_slot))),
        sequence_ids=draw(hnp.arrays(np.int64, rows)),
        starts=draw(int32s(rows)),
        counts=draw(int32s(rows, low=1)),
        samples=draw(hnp.arrays(np.bool_, rows)),
        block_slots=draw(int32s(blocks)),
        block_indices=draw(int32s(blocks)),
        block_ids=draw(int32s(blocks)),
        copy_sources=draw(int32s(copies)),
        copy_targets=draw(int32s(copies)),
        sending_rows=np.array(sent, dtype=np.int32),
        sending_transfers=draw(hnp.arrays(np.int64, len(sent), elements=st.integers(0, 2**63 - 1))),
    )


@st.composite
def token_logprobs(draw: st.DrawFn) -> TokenLogprobs:
    length = draw(st.integers(1, 4))
    return TokenLogprobs(
        token_ids=draw(int32s(length)),
        logprobs=draw(hnp.arrays(np.float32, length)),
        rank=draw(st.integers(1, INT32_MAX)),
    )


seconds = st.floats(allow_nan=False, allow_infinity=False)
stage_times = st.builds(
    StageTime,
    stage=st.integers(0, 1023),
    busy_s=seconds,
    waiting_s=seconds,
    wire_s=seconds,
    wire_hidden_s=seconds,
)


@st.composite
def results(draw: st.DrawFn) -> StepResult:
    rows = draw(st.integers(0, 6))
    some = st.lists(st.integers(0, rows - 1), unique=True).map(tuple) if rows else st.just(())
    return StepResult(
        step=draw(st.integers(0, 2**63 - 1)),
        token_ids=draw(int32s(rows, low=-1)),
        execute_s=draw(st.floats(allow_nan=False)),
        logprobs={row: draw(token_logprobs()) for row in draw(some)},
        prompt_logprobs={row: tuple(draw(st.lists(token_logprobs(), max_size=3))) for row in draw(some)},
        invalid_rows=draw(some),
        grammar_rows=draw(some),
        stages=tuple(draw(st.lists(stage_times, max_size=3))),
    )


@settings(max_examples=60)
@given(plans())
def test_any_plan_comes_out_as_it_went_in(plan: StepPlan) -> None:
    assert same(decode_plan(encode_plan(plan)), plan)


@given(results())
def test_any_result_comes_out_as_it_went_in(result: StepResult) -> None:
    assert same(decode_result(encode_result(result)), result)


@st.composite
def continued(draw: st.DrawFn) -> list[StepPlan]:
    """Plans that follow each other as a scheduler's do, and now and then not at all."""
    series: list[StepPlan] = []
    for follows in draw(st.lists(st.integers(0, 3).map(bool), min_size=1, max_size=5)):
        plan = draw(plans(max_slot=MAX_SLOTS - 1, max_admitted=0))
        if series and follows:
            last = series[-1]
            kept = draw(hnp.arrays(np.bool_, len(last.slots), elements=st.integers(0, 4).map(bool)))
            joined = draw(st.integers(0, len(plan.slots)))
            plan = replace(
                plan,
                slots=np.concatenate([last.slots[kept], plan.slots[:joined]]),
                sequence_ids=np.concatenate([last.sequence_ids[kept], plan.sequence_ids[:joined]]),
                # Where a row continues past the largest int32 it cannot, and starts anew.
                starts=np.concatenate([np.maximum((last.starts + last.counts)[kept], 0), plan.starts[:joined]]),
                counts=np.concatenate([np.ones(int(kept.sum()), np.int32), plan.counts[:joined]]),
                samples=np.concatenate([np.ones(int(kept.sum()), np.bool_), plan.samples[:joined]]),
                sending_rows=plan.sending_rows[:0],
                sending_transfers=plan.sending_transfers[:0],
            )
        series.append(plan)
    return series


@settings(max_examples=60)
@given(continued(), st.data())
def test_a_link_carries_any_plans_in_a_row(series: list[StepPlan], data: st.DataObject) -> None:
    encoder, decoder = PlanEncoder(max_slots=MAX_SLOTS), PlanDecoder(max_slots=MAX_SLOTS)
    for plan in series:
        if not data.draw(st.integers(0, 4)):
            encoder.resync()
        assert same(decoder.decode(encoder.encode(plan)), plan)


def decode_step(step: int, rows: int, *, start: int = 100) -> StepPlan:
    empty = np.empty(0, dtype=np.int32)
    return StepPlan(
        step=step,
        admitted=(),
        slots=np.arange(rows, dtype=np.int32),
        sequence_ids=np.arange(1000, 1000 + rows, dtype=np.int64),
        starts=np.full(rows, start + step, dtype=np.int32),
        counts=np.ones(rows, dtype=np.int32),
        samples=np.ones(rows, dtype=np.bool_),
        block_slots=empty,
        block_indices=empty,
        block_ids=empty,
        copy_sources=empty,
        copy_targets=empty,
    )


def without(plan: StepPlan, row: int) -> StepPlan:
    columns: dict[str, Any] = {
        name: np.delete(getattr(plan, name), row) for name in ("slots", "sequence_ids", "starts", "counts", "samples")
    }
    return replace(plan, **columns)


def test_a_step_that_only_goes_on_is_a_few_bytes() -> None:
    encoder, decoder = PlanEncoder(max_slots=256), PlanDecoder(max_slots=256)
    assert len(encoder.encode(decode_step(0, 256))) > 4000, "the first stands for itself"
    encoder.resync()
    decoder.decode(encoder.encode(decode_step(0, 256)))
    for step in range(1, 5):
        plan = decode_step(step, 256)
        data = encoder.encode(plan)
        assert len(data) < 64
        assert same(decoder.decode(data), plan)


def test_a_row_that_ends_or_was_left_out_costs_a_few_bytes() -> None:
    encoder, decoder = PlanEncoder(max_slots=256), PlanDecoder(max_slots=256)
    series = [
        decode_step(0, 256),
        without(decode_step(1, 256), 17),
        # The row that was left out comes back at the end, where it stopped.
        replace(
            decode_step(2, 256),
            slots=np.append(np.delete(np.arange(256, dtype=np.int32), 17), np.int32(17)),
            sequence_ids=np.append(np.delete(np.arange(1000, 1256), 17), 1017),
            starts=np.append(np.full(255, 102, dtype=np.int32), np.int32(101)),
        ),
    ]
    sizes = []
    for plan in series:
        data = encoder.encode(plan)
        assert same(decoder.decode(data), plan)
        sizes.append(len(data))
    assert max(sizes[1:]) < 128, sizes


def test_a_scheduler_s_own_plans_stay_small() -> None:
    """Requests that come and go, prompts in chunks, blocks: all through one link, most of it far below a kilobyte."""
    rows, length = 64, 160
    config = SchedulerConfig(
        max_model_len=length, num_blocks=rows * 8, block_size=16, max_num_seqs=rows, max_num_batched_tokens=256
    )
    encoder, decoder = PlanEncoder(max_slots=rows), PlanDecoder(max_slots=rows)
    sizes: list[int] = []

    class Recorder(NullExecutor):
        def submit(self, plan: StepPlan) -> Any:
            data = encoder.encode(plan)
            assert same(decoder.decode(data), plan)
            if not plan.admitted:
                sizes.append(len(data))
            return super().submit(plan)

    engine = Engine(
        Scheduler(config),
        Recorder(max_slots=rows, vocab_size=1000),
        clock=lambda: 0.0,
        ahead=False,
        step_timeout_s=10.0,
    )
    for index in range(3 * rows):
        engine.submit(request(str(index), prompt=list(range(1, 20 + index % 40)), max_tokens=20 + index % 50))
    while engine.scheduler.load.waiting or engine.scheduler.load.running:
        engine.step()
    engine.close()
    assert len(sizes) > 50
    assert np.median(sizes) < 256, f"median {np.median(sizes)}, most {max(sizes)}"


def test_a_plan_that_was_lost_is_found_out_and_a_full_one_mends_it() -> None:
    encoder, decoder = PlanEncoder(max_slots=8), PlanDecoder(max_slots=8)
    decoder.decode(encoder.encode(decode_step(0, 8)))
    encoder.encode(decode_step(1, 8))
    late = encoder.encode(decode_step(2, 8))
    with pytest.raises(StepCodecError, match="plan 3 changes the one before it, but known is 1"):
        decoder.decode(late)
    with pytest.raises(StepCodecError, match="but none is known"):
        decoder.decode(encoder.encode(decode_step(3, 8)))
    encoder.resync()
    for step in (4, 5):
        plan = decode_step(step, 8)
        assert same(decoder.decode(encoder.encode(plan)), plan)


def test_a_plan_that_cannot_be_encoded_is_as_if_it_had_never_been() -> None:
    encoder, decoder = PlanEncoder(max_slots=8), PlanDecoder(max_slots=8)
    decoder.decode(encoder.encode(decode_step(0, 8)))
    with pytest.raises(StepCodecError, match="slots: must be from 0 to 7, got 0, 8"):
        encoder.encode(decode_step(1, 9))
    wide = replace(decode_step(1, 8), block_slots=np.zeros(1, dtype=np.int64))
    with pytest.raises(StepCodecError, match="block_slots: must be flat int32, got int64"):
        encoder.encode(wide)
    assert same(decoder.decode(encoder.encode(decode_step(1, 8))), decode_step(1, 8))


@pytest.mark.parametrize("decode", [decode_plan, decode_result, lambda data: PlanDecoder(max_slots=8).decode(data)])
@given(data=st.binary(max_size=200))
@example(data=b"\xdd\xff\xff\xff\xff")
@example(data=b"\x81\xc0\x01")
@example(data=b"\x81\x90\x01")
@example(data=b"\xd4\xff\x00")
@example(data=b"\x91" * 2000)
def test_arbitrary_bytes_are_refused_by_name(decode: Any, data: bytes) -> None:
    with pytest.raises(StepCodecError):
        decode(data)


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary(max_size=12) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def paths(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested maps and lists."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(path for key, each in inside for path in paths(each, (*here, key)))]


def damage(message: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    at = message
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return message


full_plan = plans(max_slot=MAX_SLOTS - 1, max_admitted=1).filter(lambda plan: len(plan.slots) > 1)


@settings(max_examples=50)
@given(full_plan, results(), st.data())
def test_damaged_messages_are_refused_by_name_or_mean_something_else(
    plan: StepPlan, result: StepResult, data: st.DataObject
) -> None:
    """A field with any other value is a valid message or the named error; nothing else can happen."""
    encoder = PlanEncoder(max_slots=MAX_SLOTS)
    first = encoder.encode(plan)
    changed = encoder.encode(replace(plan, starts=np.zeros_like(plan.starts), counts=plan.counts[::-1].copy()))
    for kind, encoded in (("plan", first), ("link", changed), ("result", encode_result(result))):
        message = msgpack.unpackb(encoded, unicode_errors="surrogatepass")
        message = damage(message, data.draw(st.sampled_from(paths(message))), data.draw(plain))
        try:
            bad = msgpack.packb(message, unicode_errors="surrogatepass")
        except OverflowError:
            continue
        link = PlanDecoder(max_slots=MAX_SLOTS)
        link.decode(first)
        decode: Any = {"plan": decode_plan, "link": link.decode, "result": decode_result}[kind]
        try:
            decoded = decode(bad)
        except StepCodecError:
            continue
        encode: Any = encode_result if kind == "result" else encode_plan
        decode = decode_result if kind == "result" else decode_plan
        assert same(decode(encode(decoded)), decoded), "what is believed is a message like any other"


def test_messages_with_any_bytes_flipped_are_refused_by_name_or_mean_something_else(seed: int) -> None:
    draw = np.random.default_rng(seed)
    encoder = PlanEncoder(max_slots=8)
    first, changed = encoder.encode(admitting()), encoder.encode(replace(admitting(), samples=np.array([True, False])))
    for _ in range(1000):
        for kind, data in (("plan", first), ("link", changed), ("result", encode_result(result_of(2)))):
            broken = np.frombuffer(data, dtype=np.uint8).copy()
            at = draw.integers(len(broken), size=draw.integers(1, 4))
            broken[at] = draw.integers(256, size=len(at), dtype=np.uint8)
            link = PlanDecoder(max_slots=8)
            link.decode(first)
            decode: Any = {"plan": decode_plan, "link": link.decode, "result": decode_result}[kind]
            with suppress(StepCodecError):
                decode(broken.tobytes())


def with_field(data: bytes, *path: Any, value: Any) -> bytes:
    packed: bytes = msgpack.packb(damage(msgpack.unpackb(data), path, value))
    return packed


def admitting() -> StepPlan:
    tokens = np.arange(3, dtype=np.int32)
    sequence = AdmittedSequence(
        slot=0,
        sequence_id=SequenceId(7),
        token_ids=tokens,
        prompt_length=3,
        block_ids=tokens,
        params=SamplingParams(temperature=0.5),
        seed=1,
        stop_ids=(2,),
    )
    return replace(decode_step(0, 2), admitted=(sequence,))


@pytest.mark.parametrize(
    ("path", "value", "error"),
    [
        (("extra",), 1, "plan: unknown field 'extra'"),
        (("step",), "1", "plan.step: must be an integer from 0 to"),
        (("step",), -1, "plan.step: must be an integer from 0 to"),
        (("rows", "slots"), b"123", "rows.slots: 3 bytes are no whole number of 4"),
        (("rows", "slots"), [1], "rows.slots: must be bytes, got tuple"),
        (("rows", "slots"), np.array([-1, 0], "<i4").tobytes(), "rows.slots: must be at least 0, got -1"),
        (("rows", "starts"), bytes(4), "rows.starts: has 1 entries, due are 2"),
        (("rows", "counts"), bytes(8), "rows.counts: must be at least 1, got 0"),
        (("rows", "samples"), b"", "rows.samples: has 0 entries, due are 1"),
        (("rows",), [], "rows: must be a map with names as keys"),
        (("block_ids",), bytes(4), "plan.block_slots: must be as long as block_indices and block_ids"),
        (("copy_targets",), bytes(4), "plan.copy_sources: must be as long as copy_targets"),
        (("sending_rows",), np.array([2], "<i4").tobytes(), "plan.sending_rows: must name each of 2 rows at most once"),
        (("sending_rows",), bytes(8), "plan.sending_rows: must name each of 2 rows at most once"),
        (("sending_rows",), bytes(4), "plan.sending_transfers: has 0 entries, due are 1"),
        (("sending_transfers",), bytes(8), "plan.sending_transfers: has 1 entries, due are 0"),
        (("admitted", 0, "prompt_length"), 4, r"admitted\[0\].prompt_length: must be an integer from 0 to 3, got 4"),
        (("admitted", 0, "seed"), True, r"admitted\[0\].seed: must be an integer"),
        (("admitted", 0, "wants_prompt_logprobs"), 1, r"wants_prompt_logprobs: must be true or false, got 1"),
        (("admitted", 0, "params", "heat"), 1, r"admitted\[0\].params: unknown field 'heat'"),
        (("admitted", 0, "params", "temperature"), -1.0, r"params.temperature: must be a number of at least 0"),
        (("admitted", 0, "params", "structured_outputs"), {"regexp": "a"}, "structured_outputs: unknown field"),
        (("admitted",), {}, "plan.admitted: must be a list of at most"),
    ],
)
def test_what_is_wrong_with_a_plan_is_named(path: tuple[Any, ...], value: Any, error: str) -> None:
    with pytest.raises(StepCodecError, match=error):
        decode_plan(with_field(encode_plan(admitting()), *path, value=value))


def result_of(rows: int) -> StepResult:
    entry = TokenLogprobs(token_ids=np.arange(2, dtype=np.int32), logprobs=np.zeros(2, np.float32), rank=1)
    return StepResult(
        step=1,
        token_ids=np.zeros(rows, dtype=np.int32),
        execute_s=0.5,
        logprobs={0: entry},
        prompt_logprobs={1: (entry, entry)},
        invalid_rows=(1,),
    )


@pytest.mark.parametrize(
    ("path", "value", "error"),
    [
        (("execute_s",), 1, "result.execute_s: must be a number, got 1"),
        (("token_ids",), np.array([-2, 0], "<i4").tobytes(), "result.token_ids: must be at least -1, got -2"),
        (("invalid_rows",), np.array([1, 1], "<i4").tobytes(), "result.invalid_rows: must name each of 2 rows"),
        (("invalid_rows",), np.array([2], "<i4").tobytes(), "result.invalid_rows: must name each of 2 rows"),
        (
            ("stages",),
            ((0, 0.5, 0.5, 0.5, float("nan")),),
            "result.stages: must be a stage and four numbers of seconds",
        ),
        (("stages",), ((-1, 0.5, 0.5, 0.5, 0.5),), "result.stages: must be a stage and four numbers of seconds"),
        (("stages",), ((0, 0.5, 0.5),), "result.stages: must be a stage and four numbers of seconds"),
        (("logprobs", "rows"), b"", "result.logprobs.lengths: has 1 entries, due are 0"),
        (
            ("logprobs", "lengths"),
            np.array([INT32_MAX], "<i4").tobytes(),
            "token_ids: has 2 entries, due are 2147483647",
        ),
        (("prompt_logprobs", "counts"), bytes(4), "prompt_logprobs.lengths: has 2 entries, due are 0"),
    ],
)
def test_what_is_wrong_with_a_result_is_named(path: tuple[Any, ...], value: Any, error: str) -> None:
    with pytest.raises(StepCodecError, match=error):
        decode_result(with_field(encode_result(result_of(2)), *path, value=value))


def test_announced_sizes_allocate_nothing() -> None:
    """Lists in lists, each announcing the most there may be: refused within the memory that one bound gives."""
    deep = (b"\xdd" + MAX_ADMITTED.to_bytes(4, "big")) * 400
    tracemalloc.start()
    try:
        for data in (
            deep,
            b"\xdd\x7f\xff\xff\xff",
            b"\xdf\x7f\xff\xff\xff",
            b"\xc6\x7f\xff\xff\xff",
            b"\xc9\x7f\xff\xff\xff",
        ):
            with pytest.raises(StepCodecError):
                decode_plan(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 400 * MAX_ADMITTED * 8 + (4 << 20)


def test_messages_over_the_limit_are_refused_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_plan(decode_step(0, 256))
    monkeypatch.setattr(step_codec, "MAX_MESSAGE_BYTES", len(data) - 1)
    with pytest.raises(StepCodecError, match=f"is {len(data)} bytes long"):
        encode_plan(decode_step(0, 256))
    with pytest.raises(StepCodecError, match=f"is {len(data)} bytes long"):
        decode_plan(data)


def test_rows_that_are_sent_travel_and_nothing_does_where_there_are_none() -> None:
    plan = replace(
        decode_step(0, 3),
        sending_rows=np.array([2, 0], dtype=np.int32),
        sending_transfers=np.array([2**40, 7], dtype=np.int64),
    )
    assert same(decode_plan(encode_plan(plan)), plan)
    assert not any("sending" in name for name in msgpack.unpackb(encode_plan(decode_step(0, 3))))
    bad = replace(plan, sending_transfers=np.array([-1, 7], dtype=np.int64))
    with pytest.raises(StepCodecError, match=r"plan\.sending_transfers: must be at least 0, got -1"):
        decode_plan(encode_plan(bad))


def test_defaults_do_not_travel() -> None:
    plain_params = replace(admitting().admitted[0], params=SamplingParams())
    wire = msgpack.unpackb(encode_plan(replace(decode_step(0, 1), admitted=(plain_params,))))
    assert wire["admitted"][0]["params"] == {}
