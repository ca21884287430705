"""The topology file: nodes, devices and links, written down for planning without the cluster.

Owns names, units and the short ways of writing (``count``, ``groups``); turns into a ``Topology``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from ...placement.device_table import DEVICE_TABLE
from ...placement.topology import DeviceType, Link, Node, Topology
from ...sdk.errors import ConfigError
from .sections import Section, read_section

MAX_NODES = 4096

Positive = Annotated[float, Field(gt=0)]


class LinkSection(Section):
    """What one direction of a link carries. Units: gbytes_per_s, 10^9 bytes; latency_us, of the smallest message"""

    gbytes_per_s: Positive
    latency_us: Annotated[float, Field(ge=0)] = 10.0

    @property
    def value(self) -> Link:
        """The link as placement has it."""
        return Link(bytes_per_s=self.gbytes_per_s * 1e9, latency_s=self.latency_us * 1e-6)


class DeviceTypeSection(Section):
    """A row for the device table. ``tflops``: dense, by type of number (bfloat16, float16, float32, int8, float8).

    Units: memory_gib, 2^30 bytes; memory_gbytes_per_s, 10^9 bytes; price_per_hour in any one currency
    """

    memory_gib: Positive
    tflops: Annotated[dict[str, Positive], Field(min_length=1)]
    memory_gbytes_per_s: Positive
    power_w: Annotated[float, Field(ge=0)] = 0.0
    price_per_hour: Annotated[float, Field(ge=0)] = 0.0
    link: LinkSection = LinkSection(gbytes_per_s=32)

    def named(self, name: str) -> DeviceType:
        """Return the row as placement has it."""
        return DeviceType(
            name=name,
            memory_bytes=int(self.memory_gib * (1 << 30)),
            flops={dtype: value * 1e12 for dtype, value in self.tflops.items()},
            memory_bytes_per_s=self.memory_gbytes_per_s * 1e9,
            power_w=self.power_w,
            price_per_hour=self.price_per_hour,
            link=self.link.value,
        )


class NodeSection(Section):
    """One node, or ``count`` alike, whose names get a number: ``h100-0``, ``h100-1``.

    - ``device_link``: between two of its devices; left out, the device table's.
    - ``groups``: label → how many successive nodes have the same value of it: ``rack: 4`` puts four in each rack.
    - ``taken``: indices of devices that are in use.
    """

    name: Annotated[str, Field(min_length=1, max_length=200)]
    count: Annotated[int, Field(ge=1, le=MAX_NODES)] | None = None
    address: str = ""
    device_type: str
    devices: Annotated[int, Field(ge=1, le=1024)]
    device_link: LinkSection | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    groups: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    taken: tuple[Annotated[int, Field(ge=0)], ...] = ()

    @model_validator(mode="after")
    def _one_or_many(self) -> Self:
        if self.count is None and self.groups:
            raise ValueError("groups is for nodes with a count; say labels")
        if set(self.groups) & set(self.labels):
            raise ValueError("a label is in groups or in labels, not in both")
        return self

    def nodes(self, types: Mapping[str, DeviceType]) -> list[Node]:
        """Return the nodes; the type of their devices is known."""
        link = types[self.device_type].link if self.device_link is None else self.device_link.value
        made = []
        for index in range(self.count or 1):
            name = self.name if self.count is None else f"{self.name}-{index}"
            made.append(
                Node(
                    name=name,
                    address=self.address or name,
                    device_type=self.device_type,
                    devices=self.devices,
                    device_link=link,
                    labels={
                        **self.labels,
                        **{label: f"{self.name}-{label}-{index // size}" for label, size in self.groups.items()},
                    },
                    taken=frozenset(self.taken),
                )
            )
        return made


class PairSection(Section):
    """A link between two nodes that differs from what holds otherwise."""

    between: Annotated[tuple[str, ...], Field(min_length=2, max_length=2)]
    link: LinkSection


class TopologyFile(Section):
    """A cluster as it is or might be.

    - ``network``: between any two nodes. ``within``: label → between nodes for which it has the same value.
      ``links``: between two nodes by name.
    - ``device_types``: as in the cluster file.
    """

    nodes: Annotated[tuple[NodeSection, ...], Field(min_length=1)]
    network: LinkSection
    within: dict[str, LinkSection] = Field(default_factory=dict)
    links: tuple[PairSection, ...] = ()
    device_types: dict[str, DeviceTypeSection] = Field(default_factory=dict)

    def topology(self, more_types: Mapping[str, DeviceTypeSection] | None = None) -> Topology:
        """Return the topology; ``more_types`` are the cluster file's rows and count more than this file's.

        Raises: ConfigError naming what does not go together
        """
        types = device_types(self.device_types, more_types or {})
        nodes: list[Node] = []
        for section in self.nodes:
            if section.device_type not in types:
                raise ConfigError(
                    "nodes", f"{section.name}: type {section.device_type!r} is unknown; known are {', '.join(types)}"
                )
            nodes += section.nodes(types)
            if len(nodes) > MAX_NODES:
                raise ConfigError("nodes", f"are more than {MAX_NODES}")
        known = {node.name for node in nodes}
        for pair in self.links:
            for name in pair.between:
                if name not in known:
                    raise ConfigError("links", f"name a node {name!r} that is not there")
        links = {(min(pair.between), max(pair.between)): pair.link.value for pair in self.links}
        within = {label: link.value for label, link in self.within.items()}
        try:
            return Topology(
                nodes=tuple(nodes), device_types=types, network=self.network.value, links=links, within=within
            )
        except ValueError as error:
            raise ConfigError("nodes", str(error)) from error


def device_types(*more: Mapping[str, DeviceTypeSection]) -> dict[str, DeviceType]:
    """Return the device table with rows of files over it, the last ones counting most."""
    table = dict(DEVICE_TABLE)
    for rows in more:
        table.update({name: row.named(name) for name, row in rows.items()})
    return table


def read_topology(path: str | Path, more_types: Mapping[str, DeviceTypeSection] | None = None) -> Topology:
    """Read a topology file. Raises: ConfigError naming the file and the path of the field"""
    file = Path(path)
    try:
        return read_section(file, TopologyFile).topology(more_types)
    except ConfigError as error:
        where = str(file)
        raise (
            error if error.field.startswith(where) else ConfigError(f"{where}: {error.field}", error.problem)
        ) from error
