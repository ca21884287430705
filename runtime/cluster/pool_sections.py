"""The sections of a cluster file that say what runs where: the model, pools, degrees, replicas, devices.

Owns names, defaults and ranges; turns into the values that placement decides over.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ...placement.plan import Constraint, Degrees, Role
from ...sdk.errors import ConfigError
from ..config import EngineOptions
from .sections import Section

Count = Annotated[int, Field(ge=1, le=65_536)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,48}[a-z0-9])?$")]
Auto = Literal["auto"]


class EngineSection(Section):
    """Options of the engine, under the engine's names; what is not said is the engine's default."""

    dtype: str = "auto"
    device: str = "auto"
    quantization: str = "none"
    kernels: str = "auto"
    kv_cache_dtype: str = "auto"
    max_model_len: Count | None = None
    max_num_seqs: Count = 256
    max_num_batched_tokens: Annotated[int, Field(ge=1)] = 2048
    block_size: Count = 16
    kv_cache_memory_bytes: Annotated[int, Field(ge=1)] | None = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    enable_prefix_caching: bool = True
    scheduling_policy: str = "fcfs"
    num_threads: Count | None = None
    deterministic: bool = False
    overlap: bool = False
    even_chunks: bool = True
    enable_eplb: bool = False
    num_redundant_experts: Annotated[int, Field(ge=0)] = 0
    eplb_step_interval: Count = 3000
    step_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    seed: int | None = None

    def under(self, own: EngineSection) -> EngineSection:
        """Return these options with those that another section says itself in their place."""
        return EngineSection(**{**self.model_dump(exclude_unset=True), **own.model_dump(exclude_unset=True)})

    def options(self, model: str, degrees: Degrees) -> EngineOptions:
        """Return what a replica of such a cut is set up with. Raises: ConfigError naming the option"""
        known = {field.name for field in fields(EngineOptions)}
        return EngineOptions(
            model=model,
            tensor_parallel_size=degrees.tp,
            pipeline_parallel_size=degrees.pp,
            expert_parallel_size=degrees.ep,
            enable_expert_parallel=degrees.experts_over_tp,
            **{name: value for name, value in self.model_dump().items() if name in known},
        )

    @model_validator(mode="after")
    def _must_hold_together(self) -> Self:
        # Whether experts are spread is up to the degrees: what depends on it is checked with them.
        alone = self.model_copy(update={"enable_eplb": False, "num_redundant_experts": 0})
        try:
            alone.options("any", Degrees())
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self


class ModelSection(Section):
    """What is served. ``path``: a Hugging Face directory, or for planning alone its config.json."""

    path: Annotated[str, Field(min_length=1)]
    served_names: tuple[Annotated[str, Field(min_length=1)], ...] = ()


class DegreesSection(Section):
    """How a replica is cut; an axis that is left out is 1."""

    tp: Count = 1
    pp: Count = 1
    ep: Count = 1
    experts_over_tp: bool = False

    @property
    def value(self) -> Degrees:
        """The degrees as placement has them."""
        return Degrees(tp=self.tp, pp=self.pp, ep=self.ep, experts_over_tp=self.experts_over_tp)

    @model_validator(mode="after")
    def _one_way_for_experts(self) -> Self:
        if self.experts_over_tp and self.ep != 1:
            raise ValueError("give ep or experts_over_tp, not both")
        return self


class ReplicasSection(Section):
    """How many replicas there may be; ``max`` left out is no limit but the devices."""

    min: Annotated[int, Field(ge=0, le=65_536)] = 1
    max: Count | None = None

    @property
    def fixed(self) -> int | None:
        """The number where there is no choice."""
        return self.min if self.min == self.max else None

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max {self.max} is below min {self.min}")
        return self


class DevicesSection(Section):
    """On which devices a pool may run.

    - ``types``: names of the device table. ``labels``: what a node's labels must say. ``nodes``: names of nodes.
    - ``spread``: the label whose values replicas are spread over, such as ``rack``.
    """

    types: tuple[str, ...] = ()
    labels: dict[str, str] = Field(default_factory=dict)
    nodes: tuple[str, ...] = ()
    spread: str | None = None

    @property
    def value(self) -> Constraint:
        """The constraint as placement has it."""
        return Constraint(
            device_types=frozenset(self.types), labels=self.labels, nodes=frozenset(self.nodes), spread=self.spread
        )


def _no_choice(value: Any) -> Any:
    """Let a bare number stand for exactly so many, and ``auto`` for any number."""
    if value == "auto":
        return {}
    if isinstance(value, int) and not isinstance(value, bool):
        return {"min": value, "max": value}
    return value


def none_if_auto(value: Any) -> Any:
    """Let ``auto`` stand for what the planner is to choose."""
    return None if value == "auto" else value


AutoDegrees = Annotated[
    DegreesSection | None, BeforeValidator(none_if_auto, json_schema_input_type=Auto | DegreesSection)
]
Replicas = Annotated[
    ReplicasSection, BeforeValidator(_no_choice, json_schema_input_type=Auto | Count | ReplicasSection)
]


class PoolSection(Section):
    """The replicas that share a role, a cut and a kind of device. ``engine``: what differs from the file's own."""

    name: Name
    role: Literal["prefill", "decode", "mixed"] = "mixed"
    degrees: AutoDegrees = None
    replicas: Replicas = ReplicasSection()
    devices: DevicesSection = DevicesSection()
    engine: EngineSection = EngineSection()

    @property
    def kind(self) -> Role:
        """The role as placement has it."""
        return Role(self.role)
