"""How a replica moves KV: what its driver is given, and what of that all of its ranks have to know."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...comm.kv.channel import StreamLimits
from ...comm.kv.outgoing import DEFAULT_FRAME_BYTES

KINDS = ("shm", "tcp")
"""Kinds of transports, the one that is preferred first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLimits:
    """Bounds of a rank's end.

    ``checksums``: whether frames are checked where they arrive; both ends have to have the same.
    Units: serial_below_tokens, prompts shorter than this are posted when a step ends and not layer by layer;
    connect_timeout_s, until a rank of another replica is met; max_connecting, ranks being met at once; max_frame_bytes,
    of a frame that is sent; the others as ``StreamLimits`` has them
    """

    # Measured with the demo model over shared memory, on two cores: from 128 tokens on a prompt's KV is there a sixth
    # sooner when it is posted layer by layer; below, that costs the step about as much as it saves.
    serial_below_tokens: int = 128
    connect_timeout_s: float = 5.0
    max_connecting: int = 64
    streams: int = 2
    max_frame_bytes: int = DEFAULT_FRAME_BYTES
    max_queued_bytes: int = 1 << 30
    frame_timeout_s: float = 10.0
    checksums: bool = True

    def streams_of(self) -> StreamLimits:
        """Return the limits of transports made of connections."""
        return StreamLimits(
            streams=self.streams,
            max_frame_bytes=max(StreamLimits().max_frame_bytes, 2 * self.max_frame_bytes),
            max_queued_bytes=self.max_queued_bytes,
            frame_timeout_s=self.frame_timeout_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class KvSettings:
    """What a driver is given.

    ``incarnation``: larger than that of any earlier life of the replica. ``secret``: of the cluster. ``address``: a
    host, where the ranks on the driver's host are reached by other replicas. ``kinds``: of transports, the one that is
    preferred first. ``across_hosts``: whether other replicas may be on other hosts. ``wire_dtype``: of numbers on their
    way, "auto" as in the cache, or "fp8".
    """

    replica: str
    incarnation: int
    secret: bytes = field(repr=False)
    address: str = "127.0.0.1"
    kinds: tuple[str, ...] = KINDS
    across_hosts: bool = False
    wire_dtype: str = "auto"
    limits: KvLimits = KvLimits()


@dataclass(frozen=True, slots=True, kw_only=True)
class KvShare:
    """What all ranks of a replica know of it: part of their setup, and no secret. ``model``: its fingerprint."""

    replica: str
    incarnation: int
    model: str
    kinds: tuple[str, ...]
    across_hosts: bool
    wire_dtype: str
    limits: KvLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class KvSeat:
    """One rank's own part. ``address``: the host at which other replicas reach it."""

    address: str
    secret: bytes = field(repr=False)
