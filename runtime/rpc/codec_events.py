"""Between what passes within a session and bytes, both ways: the events of a replica, and what it is.

Pure, like ``codec``. Columns are measured against one another before anything is made of them; what cannot be an event
is an InvalidRequest that names the column.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message

from ...sdk.errors import InvalidRequest
from ...sdk.params import MAX_LOGPROBS, MAX_N
from ..messages import FinishReason, TokenLogprobs
from .codec import MAX_MESSAGE_BYTES
from .codec_load import (
    changes_from_wire,
    changes_to_wire,
    hand_off_from_wire,
    hand_off_to_wire,
    load_from_wire,
    load_to_wire,
)
from .engine_client import EngineFacts, PromptScores
from .errors import error_from_wire, error_to_wire
from .generated import engine_pb2 as pb
from .session import (
    PROTOCOL_VERSION,
    BlocksChanged,
    Closed,
    Drained,
    Ending,
    Event,
    HandOffEnded,
    Load,
    Opened,
    Rejected,
    StepNews,
)

_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
    FinishReason.GRAMMAR: pb.FINISH_REASON_GRAMMAR,
}
_REASONS_BACK = {wire: reason for reason, wire in _REASONS.items()}

MAX_BLOCK_SIZE = 1 << 16
_ROLES = ("prefill", "decode", "mixed")

AnyMessage = TypeVar("AnyMessage", bound=Message)


def encode_event(event: Event) -> bytes:
    """Return an event as bytes."""
    match event:
        case StepNews():
            message = pb.ServerMessage(step=_news_to_wire(event))
        case Opened(epoch=epoch, load=load):
            message = pb.ServerMessage(opened=pb.Opened(epoch=epoch, load=load_to_wire(load)))
        case Rejected(key=key, error=error):
            message = pb.ServerMessage(rejected=pb.Rejected(key=key, error=error_to_wire(error)))
        case Load(load=load):
            message = pb.ServerMessage(load=load_to_wire(load))
        case HandOffEnded(key=key, report=report):
            message = pb.ServerMessage(hand_off_ended=pb.HandOffEnded(key=key, report=hand_off_to_wire(report)))
        case BlocksChanged(changes=changes):
            message = pb.ServerMessage(blocks_changed=changes_to_wire(changes))
        case Drained():
            message = pb.ServerMessage(drained=pb.Drained())
        case Closed(error=error):
            message = pb.ServerMessage(closed=pb.Closed(error=error_to_wire(error)))
    return message.SerializeToString()


def decode_event(data: bytes) -> Event:
    """Return the event that these bytes are; raise InvalidRequest for anything else."""
    message = _parse(pb.ServerMessage, data)
    match message.WhichOneof("event"):
        case "step":
            return _news_from_wire(message.step)
        case "opened":
            return Opened(epoch=message.opened.epoch, load=load_from_wire(message.opened.load))
        case "rejected":
            return Rejected(key=message.rejected.key, error=error_from_wire(message.rejected.error))
        case "load":
            return Load(load=load_from_wire(message.load))
        case "hand_off_ended":
            ended = message.hand_off_ended
            return HandOffEnded(key=ended.key, report=hand_off_from_wire(ended.report))
        case "blocks_changed":
            return BlocksChanged(changes=changes_from_wire(message.blocks_changed))
        case "drained":
            return Drained()
        case "closed":
            return Closed(error=error_from_wire(message.closed.error))
        case _:
            raise InvalidRequest("message", "holds no event that this gateway knows")


def encode_facts(facts: EngineFacts) -> bytes:
    """Return what a replica is, as bytes."""
    return pb.FactsReply(
        protocol_version=PROTOCOL_VERSION,
        epoch=facts.epoch,
        model=facts.model,
        vocab_size=facts.vocab_size,
        max_model_len=facts.max_model_len,
        max_num_seqs=facts.max_num_seqs,
        eos_token_ids=facts.eos_token_ids,
        dtype=facts.dtype,
        device=facts.device,
        replica=facts.replica,
        role=facts.role,
        block_size=facts.block_size,
        rope_threshold=facts.rope_threshold,
        sends_kv=facts.sends_kv,
        receives_kv=facts.receives_kv,
    ).SerializeToString()


def decode_facts(data: bytes) -> EngineFacts:
    """Return what a replica says it is; raise InvalidRequest when it speaks another protocol."""
    message = _parse(pb.FactsReply, data)
    if message.protocol_version != PROTOCOL_VERSION:
        problem = f"the replica speaks version {message.protocol_version}, this gateway {PROTOCOL_VERSION}"
        raise InvalidRequest("protocol_version", problem)
    if message.role not in _ROLES:
        raise InvalidRequest("role", f"must be one of {', '.join(_ROLES)}, got {message.role[:64]!r}")
    if message.block_size > MAX_BLOCK_SIZE:
        raise InvalidRequest("block_size", f"must be at most {MAX_BLOCK_SIZE}, got {message.block_size}")
    return EngineFacts(
        epoch=message.epoch,
        model=message.model,
        vocab_size=message.vocab_size,
        max_model_len=message.max_model_len,
        max_num_seqs=message.max_num_seqs,
        eos_token_ids=tuple(message.eos_token_ids),
        dtype=message.dtype,
        device=message.device,
        replica=message.replica,
        role=message.role,
        block_size=message.block_size,
        rope_threshold=message.rope_threshold if message.HasField("rope_threshold") else None,
        sends_kv=message.sends_kv,
        receives_kv=message.receives_kv,
    )


def _parse(kind: type[AnyMessage], data: bytes) -> AnyMessage:
    if len(data) > MAX_MESSAGE_BYTES:
        raise InvalidRequest("message", f"is {len(data)} bytes long, more than {MAX_MESSAGE_BYTES}")
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise InvalidRequest("message", f"is not a {kind.DESCRIPTOR.name}") from error


# ------------------------------------------------------------------ a step's news


def _news_to_wire(news: StepNews) -> pb.StepNews:
    message = pb.StepNews(
        keys=news.keys,
        sample_indices=news.indices,
        token_ids=news.token_ids,
        endings=[_ending_to_wire(ending) for ending in news.endings],
        load=load_to_wire(news.load),
    )
    if news.logprobs:
        message.logprobs.CopyFrom(_columns([news.logprobs.get(place) for place in range(len(news.keys))]))
    for key, scores in news.prompt_scores:
        message.prompt_scores.add(key=key, position=scores.position, scores=_columns(list(scores.entries)))
    return message


def _news_from_wire(message: pb.StepNews) -> StepNews:
    length = len(message.keys)
    for field, column in (("sample_indices", message.sample_indices), ("token_ids", message.token_ids)):
        if len(column) != length:
            raise InvalidRequest(field, f"has {len(column)} entries for {length} keys")
    entries = _entries("logprobs", message.logprobs)
    if entries and len(entries) != length:
        raise InvalidRequest("logprobs", f"has {len(entries)} entries for {length} keys")
    indices = list(message.sample_indices)
    if indices and max(indices) >= MAX_N:
        raise InvalidRequest("sample_indices", f"must be less than {MAX_N}, got {max(indices)}")
    return StepNews(
        keys=list(message.keys),
        indices=indices,
        token_ids=list(message.token_ids),
        logprobs={place: entry for place, entry in enumerate(entries) if entry is not None},
        prompt_scores=[(part.key, _scores_from_wire(part)) for part in message.prompt_scores],
        endings=[_ending_from_wire(ending) for ending in message.endings],
        load=load_from_wire(message.load),
    )


def _columns(entries: list[TokenLogprobs | None]) -> pb.LogprobColumns:
    there = [entry for entry in entries if entry is not None]
    return pb.LogprobColumns(
        counts=[0 if entry is None else len(entry.token_ids) for entry in entries],
        token_ids=np.concatenate([entry.token_ids for entry in there]).tolist() if there else [],
        logprobs=np.concatenate([entry.logprobs for entry in there]).tolist() if there else [],
        ranks=[0 if entry is None else entry.rank for entry in entries],
    )


def _entries(field: str, columns: pb.LogprobColumns) -> list[TokenLogprobs | None]:
    counts = list(columns.counts)
    if len(columns.ranks) != len(counts):
        raise InvalidRequest(field, f"has {len(columns.ranks)} ranks for {len(counts)} counts")
    if counts and max(counts) > MAX_LOGPROBS + 1:
        raise InvalidRequest(field, f"has {max(counts)} tokens at one position, more than {MAX_LOGPROBS + 1}")
    total = sum(counts)
    if len(columns.token_ids) != total or len(columns.logprobs) != total:
        lengths = f"{len(columns.token_ids)} tokens and {len(columns.logprobs)} numbers"
        raise InvalidRequest(field, f"has {lengths} where its counts add up to {total}")
    token_ids = np.array(columns.token_ids, dtype=np.int32)
    logprobs = np.array(columns.logprobs, dtype=np.float32)
    bounds = np.cumsum([0, *counts]).tolist()
    return [
        TokenLogprobs(token_ids=token_ids[start:end], logprobs=logprobs[start:end], rank=rank) if end > start else None
        for (start, end), rank in zip(pairwise(bounds), columns.ranks, strict=True)
    ]


def _scores_from_wire(message: pb.PromptScores) -> PromptScores:
    entries = _entries("prompt_scores", message.scores)
    there = tuple(entry for entry in entries if entry is not None)
    if len(there) != len(entries):
        raise InvalidRequest("prompt_scores", "has a position without a token")
    return PromptScores(position=message.position, entries=there)


def _ending_to_wire(ending: Ending) -> pb.Ending:
    return pb.Ending(
        key=ending.key,
        sample_index=ending.index,
        reason=_REASONS[ending.reason],
        stop_token_id=ending.stop_token_id,
        cached_tokens=ending.cached_tokens,
        preemptions=ending.preemptions,
        queue_s=ending.queue_s,
    )


def _ending_from_wire(message: pb.Ending) -> Ending:
    if message.reason not in _REASONS_BACK:
        raise InvalidRequest("reason", f"{message.reason} is not a reason to finish")
    return Ending(
        key=message.key,
        index=message.sample_index,
        reason=_REASONS_BACK[message.reason],
        stop_token_id=message.stop_token_id if message.HasField("stop_token_id") else None,
        cached_tokens=message.cached_tokens,
        preemptions=message.preemptions,
        queue_s=message.queue_s if message.HasField("queue_s") else None,
    )
