"""What two ranks tell each other when they meet, and whether their KV fits together. Pure.

Degrees and block sizes may differ, that is what routes are for. All else has to be the same; what is not is refused
here, by name, before any request depends on it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from ...placement.kv_routes import KvLayout
from ..errors import BadFrame, KvMismatch

KV_PROTOCOL = 2
MAX_OFFER_BYTES = 4096
_MAX_NUMBER = 1 << 63


@dataclass(frozen=True, slots=True, kw_only=True)
class KvOffer:
    """One rank's side.

    ``model``: a fingerprint of weights and configuration; ``dtype``: on the wire, as torch names it; ``parts``: 2 for
    keys and values, 1 for latents; ``checksum``: "xxh3" or "none".
    """

    replica: str
    incarnation: int
    rank: int
    layout: KvLayout
    model: str
    dtype: str
    head_dim: int
    parts: int = 2
    checksum: str = "xxh3"
    protocol: int = KV_PROTOCOL

    def encode(self) -> bytes:
        """Return the offer as bytes."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, data: bytes) -> KvOffer:
        """Read an offer; nothing in it is believed before it was checked.

        Raises: BadFrame naming the field
        """
        if len(data) > MAX_OFFER_BYTES:
            raise BadFrame(f"a KV offer of {len(data)} bytes, more than the limit of {MAX_OFFER_BYTES}")
        try:
            values = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise BadFrame("a KV offer that is no JSON") from error
        checked = _checked("offer", values, cls)
        layout = _checked("layout", checked.pop("layout"), KvLayout)
        try:
            return cls(layout=KvLayout(**layout), **checked)
        except ValueError as error:
            raise BadFrame(f"a KV offer with a layout that cannot be: {error}") from error


def check_fit(ours: KvOffer, theirs: KvOffer) -> None:
    """Make sure that KV of one is KV of the other.

    Raises: KvMismatch naming all that differs
    """
    facts = [
        (name, getattr(ours, name), getattr(theirs, name))
        for name in ("protocol", "model", "dtype", "head_dim", "parts", "checksum")
    ]
    facts += [(name, getattr(ours.layout, name), getattr(theirs.layout, name)) for name in ("layers", "kv_heads")]
    wrong = [f"{name} is {own!r} here and {other!r} there" for name, own, other in facts if own != other]
    if not 0 <= theirs.rank < theirs.layout.ranks:
        wrong.append(f"rank {theirs.rank} is none of the {theirs.layout.ranks} ranks there")
    if wrong:
        raise KvMismatch(f"the KV of {ours.replica!r} and {theirs.replica!r} does not fit: {'; '.join(wrong)}")


_TYPES: dict[str, type] = {"str": str, "int": int, "KvLayout": dict}


def _checked(what: str, values: object, cls: type[KvOffer] | type[KvLayout]) -> dict[str, Any]:
    """Return a record's values if they are exactly its fields, each of its type."""
    if not isinstance(values, dict):
        raise BadFrame(f"a KV {what} that is no record")
    wanted = {field.name: _TYPES[str(field.type)] for field in fields(cls)}
    if values.keys() != wanted.keys():
        odd = ", ".join(sorted(str(name) for name in values.keys() ^ wanted.keys()))
        raise BadFrame(f"a KV {what} with fields too many or too few: {odd[:200]}")
    for name, kind in wanted.items():
        value = values[name]
        if type(value) is not kind or (isinstance(value, int) and not 0 <= value < _MAX_NUMBER):
            raise BadFrame(f"a KV {what} whose {name} is no {kind.__name__} that can be")
    return values
