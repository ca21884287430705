"""What a driver tells the other ranks of its replica, the same to all, and which of them a process is.

An order travels as one line of JSON, by a pipe or through whoever keeps the ranks of a replica on several nodes. What
comes in need not be one: every field is held against its type, and what does not fit is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, TypeVar

from ...sdk.errors import ConfigError
from ..handoff.settings import KvLimits, KvShare
from .rank import RankSetup

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Which rank of its replica a process is, and where.

    ``address``: of the node, where the other ranks reach it. ``ranks_on_host``: of this replica, on the same host.
    ``kv_address``: where other replicas reach it, None at the same address.
    """

    rank: int
    address: str
    ranks_on_host: int
    kv_address: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOrder:
    """Where the ranks of a replica meet, and what each is a part of.

    ``bus``: the step bus's address. ``rendezvous_host``, ``rendezvous_port``: where the groups are opened. ``kv_bus``:
    where ranks hear about KV, if the replica moves any.
    Units: timeout_s, seconds until everybody has to be there; comm_timeout_s, of a single exchange
    """

    replica: str
    bus: str
    rendezvous_host: str
    rendezvous_port: int
    timeout_s: float
    comm_timeout_s: float
    setup: RankSetup
    kv_bus: str = ""

    def to_json(self) -> str:
        """Return the order as one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> RankOrder:
        """Return what ``to_json`` was called on. Raises: ConfigError naming ``meeting``, and the field"""
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError("meeting", f"is no JSON, but {line[:80]!r}: a driver's line is needed") from error
        order = _read(cls, values, "order")
        try:
            order.setup.mesh  # noqa: B018 (it checks the degrees)
        except ValueError as error:
            raise ConfigError("meeting", str(error)) from error
        return order


def _read(kind: type[_T], values: object, name: str) -> _T:
    """Make a dataclass of what JSON had of it, if it has every field and each is of its type."""
    if not isinstance(values, dict):
        raise ConfigError("meeting", f"{name} must be an object, got {_shown(values)}")
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]  # only called with dataclasses
    needed = [field.name for field in known.values() if field.default is MISSING]
    if wrong := sorted(set(values) - set(known)) or sorted(set(needed) - set(values)):
        raise ConfigError(
            "meeting",
            f"{name}: {wrong[0]} is {'unknown' if wrong[0] in values else 'missing'}: start all ranks from one release",
        )
    read: dict[str, Any] = {each: _value(str(known[each].type), values[each], each) for each in values}
    return kind(**read)


def _value(kind: str, value: object, name: str) -> object:
    if kind == "RankSetup":
        return _read(RankSetup, value, name)
    if kind == "KvShare | None":
        return None if value is None else _read(KvShare, value, name)
    if kind == "KvLimits":
        return _read(KvLimits, value, name)
    fits, make = _KINDS[kind]
    if not fits(value):
        raise ConfigError("meeting", f"{name} must be {kind}, got {_shown(value)}")
    return make(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_ints(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_int, value))


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _as_is(value: Any) -> Any:
    return value


_KINDS: dict[str, tuple[Callable[[object], bool], Callable[[Any], object]]] = {
    "str": (lambda value: isinstance(value, str), _as_is),
    "int": (_is_int, _as_is),
    "bool": (lambda value: isinstance(value, bool), _as_is),
    "float": (lambda value: _is_int(value) or isinstance(value, float), float),
    "int | None": (lambda value: value is None or _is_int(value), _as_is),
    "bool | None": (lambda value: value is None or isinstance(value, bool), _as_is),
    "tuple[int, ...]": (_is_ints, tuple),
    "tuple[str, ...]": (_is_texts, tuple),
}
"""A field's type → whether a value of JSON is one, and what is made of it."""


def _shown(value: object) -> str:
    return repr(value)[:80]
