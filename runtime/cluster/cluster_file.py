"""The cluster file: one deployment, as a person writes it.

Owns what sections there are and what must hold between them. Unknown keys are refused; every error names the file and
the path of the field.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import BeforeValidator, Field, model_validator

from ...placement.plan import Degrees, Role
from ...placement.workload import Workload, independent, of_trace
from ...sdk.errors import ConfigError
from .pool_sections import Auto, DevicesSection, EngineSection, ModelSection, Name, PoolSection, none_if_auto
from .sections import Section, read_section
from .service_sections import (
    Autoscaling,
    GatewaySection,
    KvTransportSection,
    LimitsSection,
    ObjectivesSection,
    StaticScaling,
    WorkloadSection,
)
from .topology_sections import DeviceTypeSection
from .trace_file import read_trace

Pools = Annotated[tuple[PoolSection, ...], Field(min_length=1, max_length=64)]
AutoPools = Annotated[Pools | None, BeforeValidator(none_if_auto, json_schema_input_type=Auto | Pools)]


class ClusterFile(Section):
    """One model served on one cluster.

    - ``pools`` ``auto``: the planner decides whether prefill and decode are split, on any of ``devices``.
    - ``place_what_fits``: where there are too few devices, place as many replicas as fit instead of none.
    - ``device_types``: rows for the device table, or other figures for those that are there.
    """

    name: Name = "slipstream"
    model: ModelSection
    pools: AutoPools = None
    devices: DevicesSection = DevicesSection()
    engine: EngineSection = EngineSection()
    workload: WorkloadSection
    objectives: ObjectivesSection = ObjectivesSection()
    kv_transport: KvTransportSection = KvTransportSection()
    limits: LimitsSection = LimitsSection()
    gateway: GatewaySection = GatewaySection()
    autoscaling: Autoscaling = StaticScaling()
    device_types: dict[str, DeviceTypeSection] = Field(default_factory=dict)
    place_what_fits: bool = False

    def engine_of(self, pool: PoolSection) -> EngineSection:
        """Return the options of a pool's engines: the file's, and over them the pool's own."""
        return self.engine.under(pool.engine)

    def read_workload(self, directory: Path) -> Workload:
        """Return the workload; a trace file is looked for from ``directory``, the cluster file's own.

        Raises: ConfigError naming the trace file and line
        """
        section = self.workload
        if section.trace is not None:
            requests, rate = read_trace(directory / section.trace)
            return of_trace(requests, requests_per_s=section.requests_per_s or rate, cached_share=section.cached_share)
        assert section.prompt_tokens is not None and section.output_tokens is not None, "checked with the section"
        return independent(
            section.prompt_tokens.lengths,
            section.output_tokens.lengths,
            requests_per_s=section.requests_per_s,
            cached_share=section.cached_share,
        )

    @model_validator(mode="after")
    def _pools_go_together(self) -> Self:
        pools = self.pools or ()
        names = [pool.name for pool in pools]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two pools are called {name!r}")
        roles = {pool.kind for pool in pools}
        for role, other in ((Role.PREFILL, Role.DECODE), (Role.DECODE, Role.PREFILL)):
            if role in roles and other not in roles:
                raise ValueError(f"pools of role {role} need one of role {other} beside them")
        if self.pools is not None and self.devices != DevicesSection():
            raise ValueError("devices is for pools: auto; say it in each of the pools instead")
        for pool in pools:
            try:
                self.engine_of(pool).options(self.model.path, pool.degrees.value if pool.degrees else Degrees())
            except ConfigError as error:
                # Whether experts are spread is not known before the degrees are.
                if pool.degrees is not None or error.field not in ("enable_eplb", "num_redundant_experts"):
                    raise ValueError(f"pool {pool.name!r}: {error}") from error
        scheduled = self.autoscaling.entries if self.autoscaling.policy == "scheduled" else ()
        for entry in scheduled:
            for name in entry.replicas:
                if name not in names:
                    raise ValueError(f"autoscaling names a pool {name!r}; pools are {', '.join(names) or 'auto'}")
        return self


def read_cluster_file(path: str | Path) -> ClusterFile:
    """Read and check a cluster file. Raises: ConfigError naming the file and the path of the field"""
    return read_section(Path(path), ClusterFile)
