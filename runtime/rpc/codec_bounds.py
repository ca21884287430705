"""Bounds of what drivers say to one another: each refuses by an InvalidRequest that names the field."""

from __future__ import annotations

from ...sdk.errors import InvalidRequest
from .submit_rules import MAX_REPLICA_CHARS

MAX_NUMBER = 2**63 - 1
INT32_MAX = 2**31 - 1


def check_replica(replica: str) -> None:
    """Make sure of a replica's name."""
    if not 1 <= len(replica) <= MAX_REPLICA_CHARS:
        raise InvalidRequest("replica", f"must have 1 to {MAX_REPLICA_CHARS} characters, got {len(replica)}")


def check_number(field: str, number: int, least: int, most: int) -> None:
    """Make sure that a number is within bounds."""
    if not least <= number <= most:
        raise InvalidRequest(field, f"must be from {least} to {most}, got {number}")


def check_count(field: str, count: int, limit: int) -> None:
    """Make sure that there are not too many of something."""
    if count > limit:
        raise InvalidRequest(field, f"{count} are more than {limit}")


def check_size(field: str, data: bytes, limit: int) -> None:
    """Make sure that bytes are not too many."""
    if len(data) > limit:
        raise InvalidRequest(field, f"is {len(data)} bytes long, more than {limit}")
