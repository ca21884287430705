"""The controller's port for views: on its own thread, the same after a restart, fed by what is published."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import aclosing, contextmanager

import pytest

from slipstream.placement.topology import Link, Topology
from slipstream.runtime.clock import monotonic_clock
from slipstream.runtime.controller.cluster import StaleController
from slipstream.runtime.controller.view_port import ViewPort, WatchedCluster
from slipstream.runtime.reconcile.actions import StartGang, StopRank, Unroute
from slipstream.runtime.reconcile.observed import Observed
from slipstream.runtime.reconcile.views import View
from slipstream.runtime.rpc.backoff import no_jitter
from slipstream.runtime.rpc.view_watch import ViewWatch
from slipstream.sdk.errors import ConfigError
from slipstream.tests.fakes.views import view

PATIENCE_S = 20.0
SECRET = b"one secret of sixteen bytes"


@contextmanager
def port_at(address: str = "127.0.0.1:0", *, secret: bytes | None = None) -> Iterator[ViewPort]:
    port = ViewPort(address, secret=secret)
    try:
        yield port
    finally:
        port.close()


def watched(address: str, above: int, *, secret: bytes | None = None) -> View:
    """Watch until a view above an epoch comes."""

    async def watch() -> View:
        source = ViewWatch([address], clock=monotonic_clock, jitter=no_jitter, secret=secret, first_pause_s=0.01)
        async with asyncio.timeout(PATIENCE_S), aclosing(source.views()) as views:
            async for each in views:
                if each.epoch > above:
                    return each
        raise AssertionError("views never end")

    return asyncio.run(watch())


class Published:
    """A cluster that keeps views; ``others`` is what another controller has published."""

    def __init__(self) -> None:
        self.last = View()
        self.calls: list[object] = []

    def observe(self) -> Observed:
        link = Link(bytes_per_s=1e9, latency_s=1e-4)
        topology = Topology(nodes=(), device_types={}, network=link)
        return Observed(topology=topology, ranks=(), drivers=(), view=self.last, incarnation=0)

    def start(self, gang: StartGang) -> None:
        self.calls.append(gang)

    def stop(self, stop: StopRank) -> None:
        self.calls.append(stop)

    def unroute(self, unroute: Unroute) -> None:
        self.calls.append(unroute)

    def publish(self, view: View) -> None:
        if view.epoch <= self.last.epoch:
            raise StaleController("published before")
        self.last = view


def test_what_is_published_is_watched() -> None:
    with port_at(secret=SECRET) as port:
        address = port.address(timeout_s=PATIENCE_S)
        for epoch in (1, 2):
            port.publish(view(epoch, {"p-1": "host:1"}))
            assert watched(address, epoch - 1, secret=SECRET) == view(epoch, {"p-1": "host:1"})
        port.publish(view(1))
        assert watched(address, 0, secret=SECRET).epoch == 2
        assert port.problem == ""


def test_the_same_port_is_had_right_after_a_restart() -> None:
    with port_at() as first:
        address = first.address(timeout_s=PATIENCE_S)
        first.publish(view(1))
        watched(address, 0)
    with port_at(address) as second:
        assert second.address(timeout_s=PATIENCE_S) == address
        second.publish(view(2))
        assert watched(address, 0).epoch == 2


def test_a_port_that_is_still_held_is_waited_for() -> None:
    with port_at() as first:
        address = first.address(timeout_s=PATIENCE_S)
        with port_at(address) as second:
            with pytest.raises(TimeoutError, match=f"{address} could not be had within 0.1 s: address: cannot listen"):
                second.address(timeout_s=0.1)
            second.publish(view(3))
            first.close()
            assert second.address(timeout_s=PATIENCE_S) == address
            assert watched(address, 0).epoch == 3 and second.problem == ""


def test_a_port_that_is_never_had_is_closed_all_the_same() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with port_at(address) as port:
            port.publish(view(1))
            with pytest.raises(TimeoutError):
                port.address(timeout_s=0.05)
        assert not any(thread.name == "slipstream-views" for thread in threading.enumerate())
        port.publish(view(2))


@pytest.mark.parametrize("address", ["", ":7000", "host", "host:port"])
def test_an_address_that_is_none_is_refused_at_once(address: str) -> None:
    with pytest.raises(ConfigError, match="address"):
        ViewPort(address)


def test_a_watched_cluster_shows_what_was_published_and_what_others_published() -> None:
    with port_at() as port:
        address = port.address(timeout_s=PATIENCE_S)
        cluster = Published()
        both = WatchedCluster(cluster, port)
        both.publish(view(1))
        assert watched(address, 0).epoch == 1
        # Another controller was quicker: what it published is seen, and what is refused here is never shown.
        cluster.last = view(5, {"p-9": "host:9"})
        with pytest.raises(StaleController):
            both.publish(view(2))
        assert both.observe().view.epoch == 5
        assert watched(address, 1) == view(5, {"p-9": "host:9"})
