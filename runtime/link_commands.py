"""``slipstream measure-links``, and how ``slipstream plan`` reads a cluster that runs.

A way in like ``cli``, which registers what is here: loads Ray when a command needs it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..sdk.errors import ConfigError

if TYPE_CHECKING:
    from ..placement.topology import DeviceType
    from .cluster.topology_choice import ChosenTopology

AddressOption = Annotated[str | None, typer.Option(help="a running Ray: host:port, or auto for the one known here")]


def measure_links(
    address: AddressOption = None,
    seconds: Annotated[float, typer.Option(help="seconds that bytes flow, for each direction of each link")] = 1.0,
    streams: Annotated[int, typer.Option(help="TCP connections that bytes come over at once")] = 4,
    timeout_s: Annotated[float, typer.Option(help="seconds for all; links that are left then are not measured")] = 900,
    save: Annotated[
        Path | None, typer.Option(help="a topology file to write, for `slipstream plan --topology`", metavar="FILE")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Measure what the network between all pairs of nodes of a running Ray carries, and keep it for planning.

    TCP between the nodes' own addresses, both ways, no node in two measurements at once. It takes bandwidth from
    whatever serves meanwhile.
    """
    from ..placement.device_table import DEVICE_TABLE
    from .cluster.topology_text import topology_text, unknown_types
    from .controller.link_report import records_of, text_of
    from .controller.link_wire import ProbeLimits
    from .controller.running_topology import measure_running
    from .operations.reach import reached

    try:
        limits = ProbeLimits(seconds=seconds, streams=streams, timeout_s=4 * seconds + 10)
    except ValueError as error:
        raise ConfigError("measure-links", str(error)) from error
    with reached(address, start=False, announce=_tell):
        measured, topology = measure_running(limits, DEVICE_TABLE, timeout_s=timeout_s, tell=_tell)
    typer.echo(json.dumps(records_of(measured), indent=1) if as_json else text_of(measured))
    if save is not None:
        unknown = unknown_types(topology)
        notes = [f"measured by slipstream measure-links; {len(measured.links)} directions"]
        if unknown:
            notes.append(f"before planning, give {', '.join(unknown)} a row in device_types")
        save.write_text(topology_text(topology, notes), encoding="utf-8")
        typer.echo(f"wrote {save}" + "".join(f"; {note}" for note in notes[1:]), err=True)
    if measured.missing:
        raise typer.Exit(1)


def read_running(address: str | None, types: Mapping[str, DeviceType]) -> ChosenTopology:
    """Return the topology of a Ray that runs. Raises: ClusterError when there is none, ImportError without Ray"""
    from .controller.running_topology import running_topology
    from .operations.reach import reached

    with reached(address, start=False, announce=_tell):
        return running_topology(types)


def _tell(text: str) -> None:
    typer.echo(text, err=True)
