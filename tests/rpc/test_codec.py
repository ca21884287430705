"""The codec, both ways: what goes round comes back the same, and hostile bytes are refused by name."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from slipstream.comm.kv import transfer
from slipstream.runtime.messages import EngineRequest, FinishReason, StageTime, TokenLogprobs
from slipstream.runtime.rpc import codec, codec_events
from slipstream.runtime.rpc.codec_load import MAX_BLOCKS_CHANGED
from slipstream.runtime.rpc.engine_client import (
    BlockChanges,
    EngineFacts,
    EngineLoadReport,
    HandOffReport,
    PromptScores,
    SendTo,
)
from slipstream.runtime.rpc.generated import engine_pb2 as pb
from slipstream.runtime.rpc.session import (
    PROTOCOL_VERSION,
    Abort,
    AbortSample,
    BlocksChanged,
    Closed,
    Drain,
    Drained,
    Ending,
    GoOn,
    HandOffEnded,
    Load,
    Opened,
    Rejected,
    StepNews,
    Submit,
)
from slipstream.runtime.rpc.submit_rules import MAX_PROMPT_TOKENS
from slipstream.sdk.errors import (
    DeadlineExceeded,
    EngineError,
    EngineUnavailable,
    InvalidRequest,
    Overloaded,
    SlipstreamError,
)
from slipstream.sdk.params import SamplingParams
from slipstream.sdk.structured import StructuredOutputsParams
from slipstream.tests.rpc import proto_codegen

INT32 = 2**31 - 1
tokens = st.integers(0, INT32)
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
keys = st.integers(1, 2**64 - 1)


def same(one: Any, other: Any) -> bool:
    """Compare values that hold arrays."""
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    if isinstance(one, SlipstreamError):
        return type(one) is type(other) and str(one) == str(other)
    if hasattr(one, "__dataclass_fields__"):
        return type(one) is type(other) and all(
            same(getattr(one, field.name), getattr(other, field.name)) for field in fields(one)
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


# ------------------------------------------------------------------ commands


constraints = st.builds(
    lambda fields, packed: StructuredOutputsParams(**fields, disable_any_whitespace=packed),
    st.fixed_dictionaries({"json": st.dictionaries(texts, texts, max_size=2)})
    | st.fixed_dictionaries({"choice": st.lists(texts, min_size=1, max_size=3)})
    | st.fixed_dictionaries({"regex": texts})
    | st.fixed_dictionaries({"grammar": texts})
    | st.just({"json_object": True}),
    st.booleans(),
)


@st.composite
def params(draw: st.DrawFn) -> SamplingParams:
    max_tokens = draw(st.none() | st.integers(1, INT32))
    number = st.floats
    constraint = draw(st.none() | constraints)
    return SamplingParams(
        n=draw(st.integers(1, 128)),
        presence_penalty=draw(number(-2, 2)),
        frequency_penalty=draw(number(-2, 2)),
        repetition_penalty=draw(number(0.01, 100)),
        temperature=draw(number(0, 100)),
        top_p=draw(number(0, 1, exclude_min=True)),
        top_k=draw(tokens),
        min_p=draw(number(0, 1)),
        stop=tuple(draw(st.lists(texts, max_size=3))),
        stop_token_ids=tuple(draw(st.lists(tokens, max_size=3))),
        ignore_eos=constraint is None and draw(st.booleans()),
        structured_outputs=constraint,
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens or INT32)),
        logprobs=draw(st.none() | st.integers(0, 64)),
        prompt_logprobs=draw(st.none() | st.integers(0, 64)),
        skip_special_tokens=draw(st.booleans()),
        include_stop_str_in_output=draw(st.booleans()),
        logit_bias=draw(st.dictionaries(tokens, number(-100, 100), max_size=4)),
    )


tickets = st.text("0123456789abcdefXYZ_-", min_size=1, max_size=64)


@st.composite
def generated(draw: st.DrawFn, n: int) -> tuple[Any, ...]:
    sample = st.none() | st.lists(tokens, max_size=5).map(lambda ids: np.array(ids, dtype=np.int32))
    samples = draw(st.lists(sample, min_size=n, max_size=n))
    return () if all(each is None for each in samples) else tuple(samples)


@st.composite
def submits(draw: st.DrawFn) -> Submit:
    given_params = draw(params())
    request = EngineRequest(
        request_id=draw(texts),
        prompt_token_ids=np.array(draw(st.lists(tokens, max_size=40)), dtype=np.int32),
        params=given_params,
        seed=draw(st.integers(0, 2**64 - 1)),
        stop_ids=tuple(draw(st.lists(tokens, max_size=5))),
        max_tokens=draw(st.integers(6, INT32)),
        arrival_time_s=0.0,
        priority=draw(st.integers(-(2**31), INT32)),
        cache_salt=draw(st.none() | texts),
        generated=draw(st.just(()) | generated(given_params.n)),
    )
    splits: Any = st.just({})
    if given_params.n == 1:
        send_to = st.builds(SendTo, replica=texts, address=texts, ticket=tickets)
        splits |= st.fixed_dictionaries({"send_to": send_to}) | st.fixed_dictionaries({"ticket": tickets})
    return Submit(
        key=draw(keys),
        request=request,
        timeout_s=draw(st.floats(0, codec.MAX_TIMEOUT_S, exclude_min=True)),
        trace_id=draw(st.just("") | st.text("0123456789abcdef", min_size=32, max_size=32)),
        **draw(splits),
    )


commands = (
    submits()
    | st.builds(Abort, key=keys)
    | st.builds(AbortSample, key=keys, index=st.integers(0, 127))
    | st.builds(GoOn, key=keys)
    | st.just(Drain())
)


@given(commands)
def test_commands_come_back_the_same(command: Any) -> None:
    assert same(codec.decode_command(codec.encode_command(command)), command)


def test_a_seed_travels_resolved_and_the_gateways_clock_does_not() -> None:
    request = replace(plain(), params=SamplingParams(seed=-3), seed=2**64 - 3, arrival_time_s=17.0)
    back = codec.decode_command(codec.encode_command(Submit(key=1, request=request, timeout_s=1.0)))
    assert isinstance(back, Submit)
    assert (back.request.seed, back.request.params.seed, back.request.arrival_time_s) == (2**64 - 3, None, 0.0)


def plain() -> EngineRequest:
    return EngineRequest(
        request_id="r",
        prompt_token_ids=np.array([1, 2], dtype=np.int32),
        params=SamplingParams(),
        seed=1,
        stop_ids=(2,),
        max_tokens=16,
        arrival_time_s=0.0,
    )


def wire_submit() -> pb.ClientMessage:
    return pb.ClientMessage.FromString(codec.encode_command(Submit(key=5, request=plain(), timeout_s=1.0)))


def sent(**changes: str) -> pb.SendTo:
    return pb.SendTo(**{"replica": "d-1", "address": "host:1", "ticket": "t", **changes})


def wide() -> pb.SamplingParams:
    request = replace(plain(), params=SamplingParams(n=2))
    message = pb.ClientMessage.FromString(codec.encode_command(Submit(key=5, request=request, timeout_s=1.0)))
    return message.submit.params


WRONG_SUBMITS: dict[str, list[dict[str, Any]]] = {
    "request_id": [{"request_id": ""}, {"request_id": 257 * "x"}],
    "prompt_token_ids": [{"prompt_token_ids": [-1]}, {"prompt_token_ids": [1, -(2**31)]}],
    "prompt": [{"prompt_token_ids": (MAX_PROMPT_TOKENS + 1) * [0]}],
    "stop_ids": [{"stop_ids": [-1]}, {"stop_ids": 257 * [1]}],
    "max_tokens": [{"max_tokens": 0}, {"max_tokens": 2**32 - 1}],
    "cache_salt": [{"cache_salt": 4097 * "x"}],
    "generated": [
        {"generated": 2 * [pb.Generated()]},
        {"generated": 129 * [pb.Generated()]},
        {"generated": [pb.Generated(over=True)]},
        {"generated": [pb.Generated(over=True, token_ids=[1])]},
        {"generated": [pb.Generated(token_ids=[1, -1])]},
        {"generated": [pb.Generated(token_ids=16 * [1])]},
        {"generated": [pb.Generated(token_ids=(MAX_PROMPT_TOKENS + 1) * [1])], "max_tokens": INT32},
    ],
    "send_to.replica": [{"send_to": sent(replica="")}, {"send_to": sent(replica=257 * "x")}],
    "send_to.address": [{"send_to": sent(address="")}, {"send_to": sent(address=257 * "x")}],
    "send_to.ticket": [{"send_to": sent(ticket=text)} for text in ("", "a b", "é", 65 * "x", "x\n")],
    "ticket": [{"ticket": text} for text in ("a b", "é", 65 * "x", "x\n")] + [{"ticket": "x", "send_to": sent()}],
    "n": [{"ticket": "x", "params": wide()}, {"send_to": sent(), "params": wide()}],
    "trace_id": [{"trace_id": text} for text in ("0", 31 * "0", 33 * "0", 32 * "F", 32 * "g", 31 * "0" + "\n")],
    "timeout_s": [{"timeout_s": value} for value in (0.0, -1.0, math.nan, math.inf, 1e300)],
}
WRONG_PARAMS: dict[str, list[dict[str, Any]]] = {
    "n": [{"n": 0}, {"n": 129}, {"n": 2**32 - 1}],
    "temperature": [{"temperature": value} for value in (-1.0, math.nan, math.inf)],
    "top_p": [{"top_p": 0.0}],
    "top_k": [{"top_k": 2**32 - 1}],
    "repetition_penalty": [{"repetition_penalty": 0.0}],
    "logprobs": [{"logprobs": 65}],
    "stop": [{"stop": 65 * ["x"]}, {"stop": [""]}, {"stop": [2000 * "x"]}],
    "stop_token_ids": [{"stop_token_ids": 129 * [1]}, {"stop_token_ids": [-1]}],
    "logit_bias": [
        {"bias_token_ids": [1]},
        {"bias_token_ids": [1], "bias_amounts": [math.nan]},
        {"bias_token_ids": [-1], "bias_amounts": [1.0]},
        {"bias_token_ids": 1025 * [1], "bias_amounts": 1025 * [1.0]},
    ],
}


def wrong(table: dict[str, list[dict[str, Any]]]) -> list[Any]:
    return [
        pytest.param(field, changes, id=f"{field}-{number}")
        for field, each in table.items()
        for number, changes in enumerate(each)
    ]


def change(message: Any, changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        if isinstance(value, list):
            del getattr(message, name)[:]
            getattr(message, name).extend(value)
        elif isinstance(value, Message):
            getattr(message, name).CopyFrom(value)
        else:
            setattr(message, name, value)


@pytest.mark.parametrize(("field", "changes"), wrong(WRONG_SUBMITS))
def test_a_wrong_submit_names_field_and_request(field: str, changes: dict[str, Any]) -> None:
    message = wire_submit()
    change(message.submit, changes)
    with pytest.raises(codec.BadSubmit) as caught:
        codec.decode_command(message.SerializeToString())
    assert (caught.value.field, caught.value.key) == (field, 5)


@pytest.mark.parametrize(("field", "changes"), wrong(WRONG_PARAMS))
def test_wrong_parameters_name_the_field(field: str, changes: dict[str, Any]) -> None:
    message = wire_submit()
    change(message.submit.params, changes)
    with pytest.raises(codec.BadSubmit) as caught:
        codec.decode_command(message.SerializeToString())
    assert (caught.value.field, caught.value.key) == (field, 5)


@pytest.mark.parametrize(
    ("field", "constraint"),
    [
        ("", pb.StructuredOutputs()),
        ("", pb.StructuredOutputs(json_object=False)),
        (".json", pb.StructuredOutputs(json="{")),
        (".choice", pb.StructuredOutputs(choice=pb.Choices())),
        (".choice", pb.StructuredOutputs(choice=pb.Choices(texts=2000 * ["a"]))),
        (".regex", pb.StructuredOutputs(regex=100_000 * "a")),
    ],
)
def test_wrong_constraints_name_the_field(field: str, constraint: pb.StructuredOutputs) -> None:
    message = wire_submit()
    message.submit.params.structured_outputs.CopyFrom(constraint)
    with pytest.raises(codec.BadSubmit) as caught:
        codec.decode_command(message.SerializeToString())
    assert caught.value.field == f"structured_outputs{field}"


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("message", pb.ClientMessage()),
        ("key", pb.ClientMessage(submit=pb.Submit())),
        ("key", pb.ClientMessage(abort=pb.Abort())),
        ("key", pb.ClientMessage(go_on=pb.GoOn())),
        ("index", pb.ClientMessage(abort_sample=pb.AbortSample(key=1, index=2**32 - 1))),
    ],
)
def test_a_wrong_command_is_refused(field: str, message: pb.ClientMessage) -> None:
    with pytest.raises(InvalidRequest) as caught:
        codec.decode_command(message.SerializeToString())
    assert caught.value.field == field and not isinstance(caught.value, codec.BadSubmit)


@pytest.mark.parametrize("decode", [codec.decode_command, codec_events.decode_event, codec_events.decode_facts])
def test_a_message_too_large_is_not_even_read(decode: Any) -> None:
    with pytest.raises(InvalidRequest, match="bytes long"):
        decode(bytes(codec.MAX_MESSAGE_BYTES + 1))


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("priority", replace(plain(), priority=2**31)),
        ("request_id", replace(plain(), request_id="")),
        ("request", replace(plain(), request_id="\ud800")),
        ("stop_ids", replace(plain(), stop_ids=tuple(range(300)))),
        ("generated", replace(plain(), generated=(None,))),
    ],
)
def test_what_cannot_travel_is_refused_before_it_is_sent(field: str, request_: EngineRequest) -> None:
    with pytest.raises(InvalidRequest) as caught:
        codec.encode_command(Submit(key=1, request=request_, timeout_s=1.0))
    assert caught.value.field == field


# ------------------------------------------------------------------ events

counts = st.integers(0, 2**32 - 1)
seconds = st.floats(0, 1e9)
stage_times = st.builds(
    StageTime, stage=counts, busy_s=seconds, waiting_s=seconds, wire_s=seconds, wire_hidden_s=seconds
)
loads = st.builds(
    EngineLoadReport,
    **dict.fromkeys(("running", "waiting", "queue_room", "blocks_total", "blocks_available"), counts),
    **dict.fromkeys(("preemptions", "prefix_hits", "prefix_misses"), st.integers(0, 2**64 - 1)),
    stages=st.lists(stage_times, max_size=3).map(tuple),
    **dict.fromkeys(("awaiting", "sending", "receiving"), counts),
    **dict.fromkeys(("queued_tokens", "kv_bytes_out", "kv_bytes_in"), st.integers(0, 2**64 - 1)),
    **dict.fromkeys(("prefill_tokens_per_s", "token_s"), seconds),
    draining=st.booleans(),
)
errors = st.builds(InvalidRequest, texts, texts) | st.one_of(
    *(st.builds(kind, texts) for kind in (Overloaded, DeadlineExceeded, EngineUnavailable, EngineError))
)
endings = st.builds(
    Ending,
    key=keys,
    index=st.integers(0, 127),
    reason=st.sampled_from(FinishReason),
    stop_token_id=st.none() | tokens,
    cached_tokens=counts,
    preemptions=counts,
    queue_s=st.none() | st.floats(0, 1e9),
)


@st.composite
def entries(draw: st.DrawFn) -> TokenLogprobs:
    ids = draw(st.lists(tokens, min_size=1, max_size=5))
    values = st.floats(max_value=0, width=32, allow_nan=False)
    return TokenLogprobs(
        token_ids=np.array(ids, dtype=np.int32),
        logprobs=np.array([draw(values) for _ in ids], dtype=np.float32),
        rank=draw(counts),
    )


@st.composite
def news(draw: st.DrawFn) -> StepNews:
    size = draw(st.integers(0, 6))
    asking = draw(st.sets(st.sampled_from(range(size)))) if size else set()
    scores = st.builds(PromptScores, position=counts, entries=st.lists(entries(), max_size=4).map(tuple))
    return StepNews(
        keys=[draw(keys) for _ in range(size)],
        indices=[draw(st.integers(0, 127)) for _ in range(size)],
        token_ids=[draw(tokens) for _ in range(size)],
        logprobs={place: draw(entries()) for place in sorted(asking)},
        prompt_scores=draw(st.lists(st.tuples(keys, scores), max_size=2)),
        endings=draw(st.lists(endings, max_size=3)),
        load=draw(loads),
    )


hand_offs = st.builds(
    HandOffReport,
    ending=st.sampled_from([ending.value for ending in transfer.Ending]),
    bytes_moved=st.integers(0, 2**64 - 1),
    **dict.fromkeys(("prefill_s", "wire_s", "hidden_s", "wait_s"), seconds),
)
digests = st.lists(st.binary(min_size=16, max_size=16), max_size=4).map(tuple)
changes_of_blocks = st.builds(BlockChanges, stored=digests, removed=digests, reset=st.booleans())

events = (
    news()
    | st.builds(Opened, epoch=texts, load=loads)
    | st.builds(Rejected, key=keys, error=errors)
    | st.builds(Load, load=loads)
    | st.builds(HandOffEnded, key=keys, report=hand_offs)
    | st.builds(BlocksChanged, changes=changes_of_blocks)
    | st.just(Drained())
    | st.builds(Closed, error=errors)
)


@given(events)
def test_events_come_back_the_same(event: Any) -> None:
    assert same(codec_events.decode_event(codec_events.encode_event(event)), event)


facts = st.builds(
    EngineFacts,
    **dict.fromkeys(("epoch", "model", "dtype", "device", "replica"), texts),
    **dict.fromkeys(("vocab_size", "max_model_len", "max_num_seqs"), counts),
    eos_token_ids=st.lists(tokens, max_size=4).map(tuple),
    role=st.sampled_from(["prefill", "decode", "mixed"]),
    block_size=st.integers(0, codec_events.MAX_BLOCK_SIZE),
    rope_threshold=st.none() | counts,
    **dict.fromkeys(("sends_kv", "receives_kv"), st.booleans()),
)


@given(facts)
def test_facts_come_back_the_same(given_facts: EngineFacts) -> None:
    assert codec_events.decode_facts(codec_events.encode_facts(given_facts)) == given_facts


def test_another_version_of_the_protocol_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="protocol_version"):
        codec_events.decode_facts(pb.FactsReply(protocol_version=99).SerializeToString())


@pytest.mark.parametrize(
    ("field", "wrong_facts"),
    [("role", {"role": ""}), ("role", {"role": "both"}), ("block_size", {"block_size": 2**31})],
)
def test_wrong_facts_name_the_field(field: str, wrong_facts: dict[str, Any]) -> None:
    reply = pb.FactsReply(**{"protocol_version": PROTOCOL_VERSION, "role": "mixed", **wrong_facts})
    with pytest.raises(InvalidRequest) as caught:
        codec_events.decode_facts(reply.SerializeToString())
    assert caught.value.field == field


def load_with(field: str, amount: float) -> pb.ServerMessage:
    load = pb.Load()
    setattr(load, field, amount)
    return pb.ServerMessage(load=load)


def hand_off_with(field: str, amount: float) -> pb.ServerMessage:
    report = pb.HandOffReport(ending="committed")
    setattr(report, field, amount)
    return pb.ServerMessage(hand_off_ended=pb.HandOffEnded(key=1, report=report))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        *((field, load_with(field, amount))
          for field in ("prefill_tokens_per_s", "token_s") for amount in (-1.0, math.nan, math.inf)),
        ("ending", pb.ServerMessage(hand_off_ended=pb.HandOffEnded(key=1))),
        ("ending", pb.ServerMessage(hand_off_ended=pb.HandOffEnded(report=pb.HandOffReport(ending="well")))),
        *((field, hand_off_with(field, -1.0)) for field in ("prefill_s", "wire_s", "hidden_s", "wait_s")),
        ("stored", pb.ServerMessage(blocks_changed=pb.BlocksChanged(stored=bytes(17)))),
        ("removed", pb.ServerMessage(blocks_changed=pb.BlocksChanged(removed=bytes(1)))),
        ("blocks_changed", pb.ServerMessage(blocks_changed=pb.BlocksChanged(
            stored=bytes(16 * MAX_BLOCKS_CHANGED), removed=bytes(16)))),
    ],
)  # fmt: skip
def test_what_no_replica_can_say_of_itself_names_the_field(field: str, message: pb.ServerMessage) -> None:
    with pytest.raises(InvalidRequest) as caught:
        codec_events.decode_event(message.SerializeToString())
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("stored", BlockChanges(stored=(bytes(15),))),
        ("removed", BlockChanges(removed=(bytes(16), bytes(32)))),
        ("blocks_changed", BlockChanges(stored=MAX_BLOCKS_CHANGED * (bytes(16),), removed=(bytes(16),))),
    ],
)
def test_changes_that_cannot_travel_are_refused_before_they_are_sent(field: str, changes: BlockChanges) -> None:
    with pytest.raises(InvalidRequest) as caught:
        codec_events.encode_event(BlocksChanged(changes=changes))
    assert caught.value.field == field


def columns(**changes: Any) -> pb.LogprobColumns:
    return pb.LogprobColumns(**{"counts": [1], "token_ids": [1], "logprobs": [0.0], "ranks": [1], **changes})


@pytest.mark.parametrize(
    ("field", "step"),
    [
        ("sample_indices", {"keys": [1]}),
        ("token_ids", {"keys": [1], "sample_indices": [0]}),
        ("sample_indices", {"keys": [1], "sample_indices": [2**32 - 1], "token_ids": [1]}),
        ("logprobs", {"logprobs": columns()}),
        ("logprobs", {"logprobs": columns(ranks=[])}),
        ("logprobs", {"logprobs": columns(counts=[2**32 - 1])}),
        ("logprobs", {"logprobs": columns(counts=[2])}),
        ("logprobs", {"logprobs": columns(logprobs=[])}),
        ("prompt_scores", {"prompt_scores": [pb.PromptScores(key=1, scores=pb.LogprobColumns(counts=[0], ranks=[0]))]}),
        ("reason", {"endings": [pb.Ending(key=1)]}),
        ("reason", {"endings": [pb.Ending(key=1, reason=77)]}),  # type: ignore[arg-type]
    ],
)
def test_wrong_news_name_the_column(field: str, step: dict[str, Any]) -> None:
    message = pb.ServerMessage(step=pb.StepNews(**step))
    with pytest.raises(InvalidRequest) as caught:
        codec_events.decode_event(message.SerializeToString())
    assert caught.value.field == field


def test_an_unknown_kind_of_error_is_the_engines() -> None:
    error = pb.Error(kind=77, problem="odd")  # type: ignore[arg-type]
    message = pb.ServerMessage(rejected=pb.Rejected(key=1, error=error))
    event = codec_events.decode_event(message.SerializeToString())
    assert isinstance(event, Rejected) and type(event.error) is EngineError


def test_an_error_that_quotes_half_a_character_travels() -> None:
    event = Rejected(key=1, error=InvalidRequest("stop", f"{9999 * 'x'}\ud800"))
    assert isinstance(codec_events.decode_event(codec_events.encode_event(event)), Rejected)
    short = Rejected(key=1, error=InvalidRequest("stop", "\ud800"))
    back = codec_events.decode_event(codec_events.encode_event(short))
    assert isinstance(back, Rejected) and "ud800" in str(back.error)


# ------------------------------------------------------------------ any bytes


@given(st.binary(max_size=200))
def test_any_bytes_are_a_command_or_refused(data: bytes) -> None:
    try:
        codec.decode_command(data)
    except InvalidRequest as error:
        assert error.field


@given(commands, st.data())
def test_damaged_commands_are_commands_or_refused(command: Any, data: st.DataObject) -> None:
    raw = bytearray(codec.encode_command(command))
    for _ in range(data.draw(st.integers(1, 4))):
        if raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        codec.decode_command(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
    except InvalidRequest as error:
        assert error.field


@given(events, st.data())
def test_damaged_events_are_events_or_refused(event: Any, data: st.DataObject) -> None:
    raw = bytearray(codec_events.encode_event(event))
    for _ in range(data.draw(st.integers(1, 4))):
        if raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        codec_events.decode_event(bytes(raw))
    except InvalidRequest as error:
        assert error.field


def test_generated_code_is_current() -> None:
    folder = proto_codegen.RPC / "generated"
    checked_in = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*_pb2.py*")}
    assert checked_in == proto_codegen.generate(), "run `make proto`"
