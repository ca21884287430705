"""Ray keeps the contract of a ``Cluster``: three raylets on this machine, ranks as processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from slipstream.tests.contracts.cluster import Bed, ClusterContract
from slipstream.tests.controller.ray_bed import RayBed, RayNodes


class TestRayCluster(ClusterContract):
    @pytest.fixture
    def bed(self, nodes: RayNodes) -> Iterator[Bed]:
        bed = RayBed(nodes)
        yield bed
        bed.close()
