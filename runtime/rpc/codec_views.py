"""Between views and bytes, both ways.

Pure, like ``codec``: bounded before anything is made of it, and what cannot be a view is an InvalidRequest that names
the field.
"""

from __future__ import annotations

from google.protobuf.message import DecodeError

from ...placement.plan import Degrees, Role
from ...sdk.errors import InvalidRequest
from ..reconcile.desired import Generation
from ..reconcile.views import PoolView, ReplicaView, View
from .generated import cluster_pb2 as pb

MAX_VIEW_BYTES = 4 << 20
MAX_POOLS = 256
MAX_REPLICAS = 8192
MAX_NAME_CHARS = 256
MAX_DEGREE = 1 << 16
_MAX_EPOCH = 2**63 - 1
_MAX_NUMBER = 2**31 - 1

_ROLES = {Role.PREFILL: pb.ROLE_PREFILL, Role.DECODE: pb.ROLE_DECODE, Role.MIXED: pb.ROLE_MIXED}
_ROLES_BACK = {wire: role for role, wire in _ROLES.items()}


def encode_watch(after_epoch: int) -> bytes:
    """Return the request for views above an epoch, as bytes."""
    return pb.WatchRequest(after_epoch=after_epoch).SerializeToString()


def decode_watch(data: bytes) -> int:
    """Return the epoch above which views are asked for; raise InvalidRequest for anything else."""
    try:
        return pb.WatchRequest.FromString(data).after_epoch
    except DecodeError as error:
        raise InvalidRequest("message", "is not a WatchRequest") from error


def encode_view(view: View) -> bytes:
    """Return a view as bytes; raise InvalidRequest when it is larger than a watcher would take."""
    message = pb.View(
        epoch=view.epoch,
        begun=view.begun,
        pools=[pb.PoolView(name=pool.name, role=_ROLES[pool.role], wanted=pool.wanted) for pool in view.pools],
        replicas=[_replica_to_wire(replica) for replica in view.replicas],
    )
    data = message.SerializeToString()
    _check_view(message, len(data))
    return data


def decode_view(data: bytes) -> View:
    """Return the view that these bytes are; raise InvalidRequest for anything else."""
    # Before it is read: what a peer sends may be of any size.
    _check_at_most("view", len(data), MAX_VIEW_BYTES, "bytes")
    try:
        message = pb.View.FromString(data)
    except DecodeError as error:
        raise InvalidRequest("view", "is not a View") from error
    _check_view(message, len(data))
    return View(
        epoch=message.epoch,
        begun=message.begun,
        pools=tuple(
            PoolView(name=_name("pools.name", pool.name), role=_role(pool.role), wanted=_number("wanted", pool.wanted))
            for pool in message.pools
        ),
        replicas=tuple(_replica_from_wire(replica) for replica in message.replicas),
    )


def _check_view(message: pb.View, length: int) -> None:
    _check_at_most("view", length, MAX_VIEW_BYTES, "bytes")
    _check_at_most("epoch", message.epoch, _MAX_EPOCH, "")
    _check_at_most("pools", len(message.pools), MAX_POOLS, "pools")
    _check_at_most("replicas", len(message.replicas), MAX_REPLICAS, "replicas")
    names = {replica.replica for replica in message.replicas}
    if len(names) < len(message.replicas):
        raise InvalidRequest("replicas", "two have the same name")


def _check_at_most(field: str, count: int, limit: int, unit: str) -> None:
    if count > limit:
        raise InvalidRequest(field, f"{count} {unit} are more than {limit}".replace("  ", " "))


def _replica_to_wire(replica: ReplicaView) -> pb.ReplicaView:
    degrees = replica.degrees
    return pb.ReplicaView(
        replica=replica.replica,
        pool=replica.pool,
        role=_ROLES[replica.role],
        generation=pb.Generation(model=replica.generation.model, cut=replica.generation.cut),
        degrees=pb.Degrees(pp=degrees.pp, ep=degrees.ep, tp=degrees.tp, experts_over_tp=degrees.experts_over_tp),
        address=replica.address,
    )


def _replica_from_wire(message: pb.ReplicaView) -> ReplicaView:
    degrees = message.degrees
    for axis in ("pp", "ep", "tp"):
        degree: int = getattr(degrees, axis)
        if not 1 <= degree <= MAX_DEGREE:
            raise InvalidRequest(f"degrees.{axis}", f"must be from 1 to {MAX_DEGREE}, got {degree}")
    generation = message.generation
    return ReplicaView(
        replica=_name("replica", message.replica),
        pool=_name("pool", message.pool),
        role=_role(message.role),
        generation=Generation(
            model=_number("generation.model", generation.model), cut=_number("generation.cut", generation.cut)
        ),
        degrees=Degrees(pp=degrees.pp, ep=degrees.ep, tp=degrees.tp, experts_over_tp=degrees.experts_over_tp),
        address=_name("address", message.address),
    )


def _name(field: str, text: str) -> str:
    if not 1 <= len(text) <= MAX_NAME_CHARS:
        raise InvalidRequest(field, f"must have 1 to {MAX_NAME_CHARS} characters, got {len(text)}")
    return text


def _number(field: str, number: int) -> int:
    _check_at_most(field, number, _MAX_NUMBER, "")
    return number


def _role(role: pb.Role) -> Role:
    if role not in _ROLES_BACK:
        raise InvalidRequest("role", f"{role} is not a role")
    return _ROLES_BACK[role]
