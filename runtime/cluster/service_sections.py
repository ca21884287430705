"""The sections of a cluster file that say how well it serves: workload, objectives, KV movement, limits, scaling.

Owns names, defaults and ranges; turns into the values that placement decides over.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ...placement.objectives import Goal, Objectives
from ...placement.workload import quantiles
from .sections import Section

Tokens = Annotated[int, Field(ge=1, le=100_000_000)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Port = Annotated[int, Field(ge=0, le=65_535)]

QUANTILE_POINTS = 8
"""Lengths that stand for a distribution; prompts times answers is the number of kinds of requests."""


class LengthsSection(Section):
    """How long prompts or answers are: log-normal by ``median`` and ``p95``, or any of ``values``, equally often."""

    median: Tokens | None = None
    p95: Tokens | None = None
    values: tuple[Tokens, ...] = ()

    @property
    def lengths(self) -> tuple[int, ...]:
        """Equally likely lengths that stand for the distribution."""
        if self.values:
            return self.values
        assert self.median is not None, "checked when the file was read"
        if self.p95 is None:
            return (self.median,)
        return quantiles(median=self.median, p95=self.p95, count=QUANTILE_POINTS)

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if bool(self.values) == (self.median is not None):
            raise ValueError("give median (and p95), or values")
        if len(self.values) > QUANTILE_POINTS:
            raise ValueError(f"give at most {QUANTILE_POINTS} values; a trace file may have more")
        if self.median is not None and self.p95 is not None and self.p95 < self.median:
            raise ValueError(f"p95 {self.p95} is below median {self.median}")
        return self


def _fixed(value: Any) -> Any:
    """Let a bare number stand for a length that is always the same."""
    return {"median": value} if isinstance(value, int) and not isinstance(value, bool) else value


Lengths = Annotated[LengthsSection, BeforeValidator(_fixed, json_schema_input_type=Tokens | LengthsSection)]


class WorkloadSection(Section):
    """What clients will ask for: a trace, or distributions.

    - ``trace``: a CSV file with columns ``prompt_tokens`` and ``output_tokens``, and ``gap_ms`` where the rate is to be
      the trace's; relative to the cluster file.
    - ``requests_per_s``: left out, plans are for as many as can be served.
    - ``cached_share``: share of the prompt tokens that the prefix cache will have.
    """

    trace: str | None = None
    prompt_tokens: Lengths | None = None
    output_tokens: Lengths | None = None
    requests_per_s: Positive | None = None
    cached_share: Share = 0.0

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = (self.prompt_tokens is not None, self.output_tokens is not None)
        if given != ((False, False) if self.trace else (True, True)):
            raise ValueError("give trace, or both prompt_tokens and output_tokens")
        return self


class ObjectivesSection(Section):
    """What plans are ranked by, and what they have to keep to.

    ``quantile``: the share of requests that has to keep ``time_to_first_token_s``.
    """

    optimize: Literal["throughput", "cost", "power", "time_to_first_token", "time_per_token"] = "throughput"
    time_to_first_token_s: Positive | None = None
    time_per_token_s: Positive | None = None
    cost_per_hour: Positive | None = None
    power_w: Positive | None = None
    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.9

    @property
    def value(self) -> Objectives:
        """The objectives as placement has them."""
        return Objectives(goal=Goal(self.optimize), **self.model_dump(exclude={"optimize"}))


class KvTransportSection(Section):
    """How KV goes from prefill to decode replicas. ``auto``: the fastest that both ends have.

    - ``dtype``: of numbers on their way, as they are in the cache or of 8 bits (e4m3): half the bytes of bfloat16, and
      rounded, so that tokens may differ from those of replicas that do all of a request.
    - ``split_from_tokens``: prompts of which fewer tokens are to be computed stay at the decode replica; left out, as
      many as gateways take to be worth it.
    - ``serial_below_tokens``: shorter prompts are sent when they are computed, longer ones layer by layer; left out, as
      many as replicas take to be worth it.
    """

    kind: Literal["auto", "tcp", "shm", "nccl", "nixl"] = "auto"
    dtype: Literal["auto", "fp8"] = "auto"
    transfer_timeout_s: Positive = 30.0
    max_parked_bytes: Annotated[int, Field(ge=0)] = 2 << 30
    split_from_tokens: Annotated[int, Field(ge=1)] | None = None
    serial_below_tokens: Annotated[int, Field(ge=0)] | None = None


class LimitsSection(Section):
    """Bounds of the deployment as a whole."""

    max_concurrent_requests: Annotated[int, Field(ge=1)] = 2048
    max_queued_requests: Annotated[int, Field(ge=1)] = 4096
    request_timeout_s: Positive = 600.0
    start_timeout_s: Positive = 1800.0
    drain_timeout_s: Positive = 60.0


class GatewaySection(Section):
    """How clients reach the deployment.

    - ``host``: what gateways listen on; ``auto`` is their node's own address, and 127.0.0.1 on a Ray that ``up`` has
      started for one machine; ``0.0.0.0`` is all addresses.
    - ``port``: where several gateways are on one node, the next ones listen on the ports after it; 0 is any free one.
    - ``count``: gateways, over the nodes in turn.
    - ``watch_port``: where the controller tells them who serves; 0 is a free one, chosen when the deployment starts.
    - ``api_keys_env``: the environment variable that ``up`` finds the keys in which clients have to show, separated by
      commas or spaces; left out, no key is needed.
    """

    host: Annotated[str, Field(min_length=1, max_length=253)] = "auto"
    port: Port = 8000
    count: Annotated[int, Field(ge=1, le=1024)] = 1
    watch_port: Port = 0
    api_keys_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    max_body_bytes: Annotated[int, Field(ge=1)] = 8 << 20
    tool_call_parser: Literal["auto", "none", "hermes", "llama3_json", "mistral"] = "auto"
    log_level: Literal["debug", "info", "warning", "error"] = "info"


class _Scaling(Section):
    """What all policies keep to.

    - ``up_cooldown_s``, ``down_cooldown_s``: how long after a change the next may come.
    - ``stale_after_s``: figures older than this change nothing.
    """

    up_cooldown_s: Positive = 30.0
    down_cooldown_s: Positive = 300.0
    stale_after_s: Positive = 15.0


class StaticScaling(_Scaling):
    """As many replicas as the plan says, whatever comes."""

    policy: Literal["static"] = "static"


class TargetUtilizationScaling(_Scaling):
    """As many that the busiest resource of a pool is used to this share."""

    policy: Literal["target_utilization"]
    target: Annotated[float, Field(gt=0, le=1)] = 0.7


class SloScaling(_Scaling):
    """As many that the objectives' times are kept; fewer only where one less would keep them by ``margin``."""

    policy: Literal["slo"]
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.2


class RatioScaling(_Scaling):
    """Move replicas between prefill and decode when one waits ``imbalance`` times as long as the other."""

    policy: Literal["ratio"]
    imbalance: Annotated[float, Field(gt=1)] = 1.5


class ScheduleEntry(Section):
    """From ``hour`` (UTC, 0 to 24, fractions allowed) on, so many replicas of each pool."""

    hour: Annotated[float, Field(ge=0, lt=24)]
    replicas: dict[str, Annotated[int, Field(ge=0)]]


class ScheduledScaling(_Scaling):
    """By the time of day; before the day's first entry the last one holds."""

    policy: Literal["scheduled"]
    entries: Annotated[tuple[ScheduleEntry, ...], Field(min_length=1)]


Autoscaling = Annotated[
    StaticScaling | TargetUtilizationScaling | SloScaling | RatioScaling | ScheduledScaling,
    Field(discriminator="policy"),
]
