"""Between what drivers say about KV and bytes, both ways.

Pure, like ``codec``: bounded before anything is made of it, and what cannot be said is an InvalidRequest that names the
field. What a message means, and whether it may be said now, is for the machines of ``comm/kv`` to judge.
"""

from __future__ import annotations

import math
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from ...comm.kv.transfer import (
    Acknowledged,
    Deferred,
    End,
    Ending,
    Finish,
    FromReceiver,
    FromSender,
    Granted,
    Heartbeat,
    Reserve,
    TransferId,
    TransferLimits,
)
from ...sdk.errors import InvalidRequest
from .codec import MAX_MESSAGE_BYTES, MAX_TIMEOUT_S
from .codec_bounds import INT32_MAX, MAX_NUMBER, check_count, check_number, check_replica, check_size
from .codec_kv_facts import facts_from_wire, facts_to_wire
from .generated import kv_pb2 as pb
from .kv_talk import KvFacts

MAX_HINT_BYTES = TransferLimits().max_hint_bytes
MAX_HAND_OFF_BYTES = TransferLimits().max_hand_off_bytes
MAX_BLOCKS = 1 << 20
MAX_ALIVE = 1 << 14

_AnyMessage = TypeVar("_AnyMessage", bound=Message)


def encode_from_sender(message: FromSender | KvFacts) -> bytes:
    """Return what a sending driver says, as bytes; raise InvalidRequest when the other side would not take it."""
    match message:
        case KvFacts():
            wire = pb.KvFromSender(facts=facts_to_wire(message))
        case Reserve():
            wire = pb.KvFromSender(reserve=_reserve_to_wire(message))
        case Finish(transfer=transfer, generation=generation, hand_off=hand_off):
            check_size("hand_off", hand_off, MAX_HAND_OFF_BYTES)
            finish = pb.KvFinish(transfer=_transfer_to_wire(transfer, generation), hand_off=hand_off)
            wire = pb.KvFromSender(finish=finish)
        case End():
            wire = pb.KvFromSender(end=_end_to_wire(message))
        case Heartbeat():
            wire = pb.KvFromSender(heartbeat=_heartbeat_to_wire(message))
    return wire.SerializeToString()


def decode_from_sender(data: bytes) -> FromSender | KvFacts:
    """Return what a sending driver says; raise InvalidRequest for what cannot be."""
    wire = _parse(pb.KvFromSender, data)
    match wire.WhichOneof("message"):
        case "facts":
            return facts_from_wire(wire.facts)
        case "reserve":
            return _reserve_from_wire(wire.reserve)
        case "finish":
            transfer, generation = _transfer_from_wire(wire.finish.transfer)
            check_size("hand_off", wire.finish.hand_off, MAX_HAND_OFF_BYTES)
            return Finish(transfer=transfer, generation=generation, hand_off=wire.finish.hand_off)
        case "end":
            return _end_from_wire(wire.end)
        case "heartbeat":
            return _heartbeat_from_wire(wire.heartbeat)
        case _:
            raise InvalidRequest("message", "holds nothing that a receiving driver knows")


def encode_from_receiver(message: FromReceiver | KvFacts) -> bytes:
    """Return what a receiving driver says, as bytes; raise InvalidRequest when the other side would not take it."""
    match message:
        case KvFacts():
            wire = pb.KvFromReceiver(facts=facts_to_wire(message))
        case Granted():
            wire = pb.KvFromReceiver(granted=_granted_to_wire(message))
        case Deferred(transfer=transfer, generation=generation):
            wire = pb.KvFromReceiver(deferred=pb.KvDeferred(transfer=_transfer_to_wire(transfer, generation)))
        case Acknowledged(transfer=transfer, generation=generation):
            acknowledged = pb.KvAcknowledged(transfer=_transfer_to_wire(transfer, generation))
            wire = pb.KvFromReceiver(acknowledged=acknowledged)
        case End():
            wire = pb.KvFromReceiver(end=_end_to_wire(message))
        case Heartbeat():
            wire = pb.KvFromReceiver(heartbeat=_heartbeat_to_wire(message))
    return wire.SerializeToString()


def decode_from_receiver(data: bytes) -> FromReceiver | KvFacts:
    """Return what a receiving driver says; raise InvalidRequest for what cannot be."""
    wire = _parse(pb.KvFromReceiver, data)
    match wire.WhichOneof("message"):
        case "facts":
            return facts_from_wire(wire.facts)
        case "granted":
            return _granted_from_wire(wire.granted)
        case "deferred":
            transfer, generation = _transfer_from_wire(wire.deferred.transfer)
            return Deferred(transfer=transfer, generation=generation)
        case "acknowledged":
            transfer, generation = _transfer_from_wire(wire.acknowledged.transfer)
            return Acknowledged(transfer=transfer, generation=generation)
        case "end":
            return _end_from_wire(wire.end)
        case "heartbeat":
            return _heartbeat_from_wire(wire.heartbeat)
        case _:
            raise InvalidRequest("message", "holds nothing that a sending driver knows")


def _parse(kind: type[_AnyMessage], data: bytes) -> _AnyMessage:
    if len(data) > MAX_MESSAGE_BYTES:
        raise InvalidRequest("message", f"is {len(data)} bytes long, more than {MAX_MESSAGE_BYTES}")
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise InvalidRequest("message", f"is not a {kind.DESCRIPTOR.name}") from error


# ------------------------------------------------------------------ transfers


def _transfer_to_wire(transfer: TransferId, generation: int) -> pb.KvTransfer:
    _check_transfer(transfer, generation)
    return pb.KvTransfer(
        replica=transfer.replica,
        incarnation=transfer.incarnation,
        number=transfer.number,
        generation=generation,
    )


def _transfer_from_wire(message: pb.KvTransfer) -> tuple[TransferId, int]:
    transfer = TransferId(message.replica, message.incarnation, message.number)
    _check_transfer(transfer, message.generation)
    return transfer, message.generation


def _check_transfer(transfer: TransferId, generation: int) -> None:
    check_replica(transfer.replica)
    check_number("incarnation", transfer.incarnation, 0, MAX_NUMBER)
    check_number("number", transfer.number, 0, MAX_NUMBER)
    check_number("generation", generation, 1, INT32_MAX)


def _reserve_to_wire(reserve: Reserve) -> pb.KvReserve:
    check_number("tokens", reserve.tokens, 1, INT32_MAX)
    check_size("hint", reserve.hint, MAX_HINT_BYTES)
    return pb.KvReserve(
        transfer=_transfer_to_wire(reserve.transfer, reserve.generation),
        tokens=reserve.tokens,
        # One that has just passed is 0, and no longer one than any may be.
        timeout_s=min(max(reserve.timeout_s, 0.0), MAX_TIMEOUT_S),
        hint=reserve.hint,
    )


def _reserve_from_wire(message: pb.KvReserve) -> Reserve:
    transfer, generation = _transfer_from_wire(message.transfer)
    check_number("tokens", message.tokens, 1, INT32_MAX)
    check_size("hint", message.hint, MAX_HINT_BYTES)
    if not math.isfinite(message.timeout_s) or not 0 <= message.timeout_s <= MAX_TIMEOUT_S:
        raise InvalidRequest("timeout_s", f"must be from 0 to {MAX_TIMEOUT_S:g}, got {message.timeout_s}")
    return Reserve(
        transfer=transfer,
        generation=generation,
        tokens=message.tokens,
        timeout_s=message.timeout_s,
        hint=message.hint,
    )


def _granted_to_wire(granted: Granted) -> pb.KvGranted:
    _check_blocks(len(granted.blocks), min(granted.blocks, default=0), max(granted.blocks, default=0))
    check_number("first_token", granted.first_token, 0, INT32_MAX)
    return pb.KvGranted(
        transfer=_transfer_to_wire(granted.transfer, granted.generation),
        blocks=granted.blocks,
        first_token=granted.first_token,
    )


def _granted_from_wire(message: pb.KvGranted) -> Granted:
    transfer, generation = _transfer_from_wire(message.transfer)
    _check_blocks(len(message.blocks), 0, max(message.blocks, default=0))
    check_number("first_token", message.first_token, 0, INT32_MAX)
    return Granted(
        transfer=transfer,
        generation=generation,
        blocks=tuple(message.blocks),
        first_token=message.first_token,
    )


def _end_to_wire(end: End) -> pb.KvEnd:
    return pb.KvEnd(transfer=_transfer_to_wire(end.transfer, end.generation), ending=end.ending.value)


def _end_from_wire(message: pb.KvEnd) -> End:
    transfer, generation = _transfer_from_wire(message.transfer)
    try:
        ending = Ending(message.ending)
    except ValueError as error:
        raise InvalidRequest("ending", f"{message.ending[:64]!r} is not how a transfer can end") from error
    return End(transfer=transfer, generation=generation, ending=ending)


def _heartbeat_to_wire(heartbeat: Heartbeat) -> pb.KvHeartbeat:
    check_count("alive", len(heartbeat.alive), MAX_ALIVE)
    return pb.KvHeartbeat(alive=[_transfer_to_wire(transfer, generation) for transfer, generation in heartbeat.alive])


def _heartbeat_from_wire(message: pb.KvHeartbeat) -> Heartbeat:
    check_count("alive", len(message.alive), MAX_ALIVE)
    return Heartbeat(alive=tuple(_transfer_from_wire(transfer) for transfer in message.alive))


def _check_blocks(count: int, least: int, most: int) -> None:
    check_count("blocks", count, MAX_BLOCKS)
    if least < 0 or most > INT32_MAX:
        raise InvalidRequest("blocks", f"must be from 0 to {INT32_MAX}, got {least if least < 0 else most}")
