"""Views as bytes: what goes round comes back the same, and hostile bytes are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.placement.plan import Degrees, Role
from slipstream.runtime.reconcile.desired import Generation
from slipstream.runtime.reconcile.views import PoolView, ReplicaView, View
from slipstream.runtime.rpc import codec_views as codec
from slipstream.runtime.rpc.generated import cluster_pb2 as pb
from slipstream.sdk.errors import InvalidRequest
from slipstream.tests.fakes.views import view

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
numbers = st.integers(0, 2**31 - 1)
roles = st.sampled_from(Role)
degree = st.integers(1, codec.MAX_DEGREE)


def built(kind: Any, **parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Build a value of all of its fields: one that is new has to travel too, or be argued away here."""
    assert set(parts) == {field.name for field in fields(kind)}, f"{kind.__name__} has other fields"
    return st.builds(kind, **parts)


replicas = built(
    ReplicaView,
    replica=names,
    pool=names,
    role=roles,
    generation=built(Generation, model=numbers, cut=numbers),
    degrees=built(Degrees, pp=degree, ep=degree, tp=degree, experts_over_tp=st.booleans()),
    address=names,
)
views = built(
    View,
    epoch=st.integers(0, 2**63 - 1),
    begun=st.booleans(),
    pools=st.lists(built(PoolView, name=names, role=roles, wanted=numbers), max_size=3).map(tuple),
    replicas=st.lists(replicas, max_size=4, unique_by=lambda replica: replica.replica).map(tuple),
)


@given(views)
def test_views_come_back_the_same(given_view: View) -> None:
    assert codec.decode_view(codec.encode_view(given_view)) == given_view


@given(st.integers(0, 2**63 - 1))
def test_epochs_come_back_the_same(epoch: int) -> None:
    assert codec.decode_watch(codec.encode_watch(epoch)) == epoch


def wire(**changes: Any) -> pb.ReplicaView:
    parts: dict[str, Any] = {
        "replica": "p-1", "pool": "p", "role": pb.ROLE_MIXED, "address": "host:1",
        "generation": pb.Generation(model=1, cut=1), "degrees": pb.Degrees(pp=1, ep=1, tp=1),
    }  # fmt: skip
    return pb.ReplicaView(**{**parts, **changes})


WRONG: list[tuple[str, Callable[[], pb.View]]] = [
    ("epoch", lambda: pb.View(epoch=2**64 - 1)),
    ("replica", lambda: pb.View(replicas=[wire(replica="")])),
    ("replica", lambda: pb.View(replicas=[wire(replica=257 * "x")])),
    ("pool", lambda: pb.View(replicas=[wire(pool="")])),
    ("address", lambda: pb.View(replicas=[wire(address="")])),
    ("address", lambda: pb.View(replicas=[wire(address=300 * "x")])),
    ("role", lambda: pb.View(replicas=[wire(role=0)])),
    ("role", lambda: pb.View(replicas=[wire(role=77)])),
    ("role", lambda: pb.View(pools=[pb.PoolView(name="p")])),
    ("pools.name", lambda: pb.View(pools=[pb.PoolView(role=pb.ROLE_MIXED)])),
    ("wanted", lambda: pb.View(pools=[pb.PoolView(name="p", role=pb.ROLE_MIXED, wanted=2**32 - 1)])),
    ("generation.model", lambda: pb.View(replicas=[wire(generation=pb.Generation(model=2**32 - 1))])),
    ("degrees.pp", lambda: pb.View(replicas=[wire(degrees=pb.Degrees())])),
    ("degrees.tp", lambda: pb.View(replicas=[wire(degrees=pb.Degrees(pp=1, ep=1, tp=2**32 - 1))])),
    ("replicas", lambda: pb.View(replicas=[wire(), wire(address="host:2")])),
    ("replicas", lambda: pb.View(replicas=[wire()] * (codec.MAX_REPLICAS + 1))),
    ("pools", lambda: pb.View(pools=[pb.PoolView()] * (codec.MAX_POOLS + 1))),
]


@pytest.mark.parametrize(("field", "make"), WRONG)
def test_a_wrong_view_names_the_field(field: str, make: Callable[[], pb.View]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        codec.decode_view(make().SerializeToString())
    assert caught.value.field == field


def test_a_view_too_large_is_not_even_read_and_not_sent() -> None:
    with pytest.raises(InvalidRequest, match="bytes are more"):
        codec.decode_view(bytes(codec.MAX_VIEW_BYTES + 1))
    with pytest.raises(InvalidRequest, match="replicas are more"):
        codec.encode_view(view(1, {f"p-{number}": "host:1" for number in range(codec.MAX_REPLICAS + 1)}))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_view_or_refused(data: bytes) -> None:
    for decode in (codec.decode_view, codec.decode_watch):
        try:
            decode(data)
        except InvalidRequest as error:
            assert error.field


@given(views, st.data())
def test_damaged_views_are_views_or_refused(given_view: View, data: st.DataObject) -> None:
    raw = bytearray(codec.encode_view(given_view))
    for _ in range(data.draw(st.integers(1, 4))):
        if raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        codec.decode_view(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
    except InvalidRequest as error:
        assert error.field
