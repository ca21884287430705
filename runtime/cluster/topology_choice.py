"""Which topology a cluster file is planned on: a file's, or that of a cluster that runs.

In this order: ``--topology FILE``; ``--address`` of a running Ray; the topology file beside the cluster file; the Ray
that this machine knows. Owns that order and what is said of it; a running cluster is read by who is handed in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ...placement.topology import DeviceType, Topology
from ...sdk.errors import ConfigError, SlipstreamError
from .cluster_file import ClusterFile
from .topology_sections import device_types, read_topology


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenTopology:
    """A topology, and sentences on where it comes from."""

    topology: Topology
    said: tuple[str, ...]


class ReadRunning(Protocol):
    """Reads the topology of a cluster that runs at an address, or that this machine knows.

    Raises: SlipstreamError when there is none, ImportError when what it takes is not installed
    """

    def __call__(self, address: str | None, types: Mapping[str, DeviceType]) -> ChosenTopology: ...


def choose_topology(
    file: Path, cluster: ClusterFile, *, topology: Path | None, address: str | None, running: ReadRunning | None
) -> ChosenTopology:
    """Return the topology for a cluster file. Raises: ConfigError; with an address, what ``running`` raises"""
    if topology is not None and address is not None:
        raise ConfigError("address", "goes without --topology: plans are for one or for the other")
    beside = file.with_name(f"{file.stem}.topology{file.suffix}")
    if topology is not None:
        return _of_file(topology, cluster, f"topology: {topology}")
    if address is None and beside.is_file():
        more = "" if running is None else "; --address auto plans on the Ray that runs instead"
        return _of_file(beside, cluster, f"topology: {beside}, beside the cluster file{more}")
    way_out = f"give --topology FILE, or put {beside.name} beside {file}"
    if running is None:
        raise ConfigError("topology", way_out)
    try:
        return running(address, device_types(cluster.device_types))
    except (SlipstreamError, ImportError) as error:
        if address is not None:
            raise
        raise ConfigError("topology", f"{way_out}, or start Ray: {error}") from error


def _of_file(path: Path, cluster: ClusterFile, said: str) -> ChosenTopology:
    return ChosenTopology(topology=read_topology(path, cluster.device_types), said=(said,))
