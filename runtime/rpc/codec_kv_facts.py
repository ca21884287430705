"""Between what a driver says of its replica's KV and messages, both ways. Pure, like ``codec_kv``."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ...comm.errors import BadFrame
from ...comm.kv.layout import MAX_OFFER_BYTES, KvOffer
from ...placement.kv_routes import KvLayout
from ...sdk.errors import InvalidRequest
from .codec_bounds import MAX_NUMBER, check_count, check_number, check_replica, check_size
from .generated import kv_pb2 as pb
from .kv_talk import KV_TALK_VERSION, KvFacts

MAX_RANKS = 4096
MAX_KINDS = 8
MAX_END_CHARS = 256
MAX_HOST_ID_CHARS = 128
_KIND = re.compile(r"[a-z][a-z0-9_]{0,15}")


def facts_to_wire(facts: KvFacts) -> pb.KvFacts:
    """Return what a driver says of its KV, as a message. Raises: InvalidRequest"""
    _check_facts(facts)
    layout = facts.layout
    return pb.KvFacts(
        protocol_version=KV_TALK_VERSION,
        replica=facts.replica,
        incarnation=facts.incarnation,
        layout=pb.KvLayout(
            layers=layout.layers,
            kv_heads=layout.kv_heads,
            block_size=layout.block_size,
            tp=layout.tp,
            pp=layout.pp,
            copies=layout.copies,
        ),
        ends=[pb.KvRankEnds(addresses=ends) for ends in facts.ends],
        host_id=facts.host_id,
        offer=b"" if facts.offer is None else facts.offer.encode(),
    )


def facts_from_wire(message: pb.KvFacts) -> KvFacts:
    """Return what a message says of a replica's KV. Raises: InvalidRequest"""
    if message.protocol_version != KV_TALK_VERSION:
        problem = f"the other driver speaks version {message.protocol_version}, this one {KV_TALK_VERSION}"
        raise InvalidRequest("protocol_version", problem)
    check_count("ends", len(message.ends), MAX_RANKS)
    layout = message.layout
    try:
        held = KvLayout(
            layers=layout.layers,
            kv_heads=layout.kv_heads,
            block_size=layout.block_size,
            tp=layout.tp,
            pp=layout.pp,
            copies=layout.copies,
        )
    except ValueError as error:
        raise InvalidRequest("layout", f"cannot be: {error}") from error
    facts = KvFacts(
        replica=message.replica,
        incarnation=message.incarnation,
        layout=held,
        ends=tuple(dict(ends.addresses) for ends in message.ends),
        host_id=message.host_id,
        offer=_offer(message.offer) if message.offer else None,
    )
    _check_facts(facts)
    return facts


def _offer(data: bytes) -> KvOffer:
    check_size("offer", data, MAX_OFFER_BYTES)
    try:
        return KvOffer.decode(data)
    except BadFrame as error:
        raise InvalidRequest("offer", str(error)) from error


def _check_facts(facts: KvFacts) -> None:
    """Make sure of all but the layout, which is checked where it is made."""
    check_replica(facts.replica)
    check_number("incarnation", facts.incarnation, 0, MAX_NUMBER)
    check_count("ends", len(facts.ends), MAX_RANKS)
    if len(facts.ends) != facts.layout.ranks:
        raise InvalidRequest("ends", f"has {len(facts.ends)} entries for {facts.layout.ranks} ranks")
    for ends in facts.ends:
        _check_ends(ends)
    if len(facts.host_id) > MAX_HOST_ID_CHARS:
        raise InvalidRequest("host_id", f"{len(facts.host_id)} characters are more than {MAX_HOST_ID_CHARS}")
    offer = facts.offer
    if offer is not None and (offer.replica, offer.incarnation, offer.layout) != (
        facts.replica,
        facts.incarnation,
        facts.layout,
    ):
        raise InvalidRequest("offer", "is of another replica, life or layout than the facts that it came with")


def _check_ends(ends: Mapping[str, str]) -> None:
    check_count("ends", len(ends), MAX_KINDS)
    for kind, address in ends.items():
        if not _KIND.fullmatch(kind):
            raise InvalidRequest("ends", f"{kind[:64]!r} is no kind of transport")
        if not 1 <= len(address) <= MAX_END_CHARS or not address.isprintable():
            raise InvalidRequest("ends", f"an address needs 1 to {MAX_END_CHARS} printable characters")
