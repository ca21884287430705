"""From a cluster file to what the controller is to keep. Pure: the file, a plan and what was wanted before go in.

What the file leaves open is taken from the plan. Generations say what a running replica can be taken over as: ``model``
is another number whenever something that tokens depend on differs, in all pools alike; ``cut`` when something else
does that a replica is started with. Numbers of replicas, limits and gateways change neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from ...comm.handshake import SECRET_VARIABLE
from ...placement.plan import Constraint, Degrees, Role
from ...placement.question import RankedPlan, Ranking
from ...placement.topology import DeviceType
from ...sdk.errors import Blame, ConfigError, SlipstreamError
from ..cluster.cluster_file import ClusterFile
from ..cluster.pool_sections import EngineSection
from ..config import EngineOptions
from ..controller.gateway_keeper import GatewayOrder
from ..controller.launch import MARK_VARIABLE, Launch
from ..controller.ledger import Deployment, PoolRecord
from ..driver_command import DRIVER_MODULE, KV_TRANSPORTS, engine_arguments, role_arguments
from ..reconcile.desired import Generation, Limits, PoolWish

RANK_MODULE = DRIVER_MODULE
GATEWAY_MODULE = "slipstream.runtime.gateway.cluster_main"
"""What is run for each rank and for each gateway."""

_OF_THE_ENGINE = ("dtype", "quantization", "kv_cache_dtype", "deterministic")
_OF_THE_MODEL = ("model", *_OF_THE_ENGINE)
"""Options that tokens depend on; a pool may say those of the engine for itself."""

_OF_NO_REPLICA = ("max_queued_requests", "seed")
"""Options that replace no replica: a limit holds for those that start from then on, seeds are drawn by gateways."""

_OF_TRANSFERS = ("transfer_timeout_s", "max_parked_bytes", "serial_below_tokens")
"""What replicas of a split are told of transfers."""

_MOST_REASONS = 3


class NoPlan(SlipstreamError):
    """The cluster has no room for what the file asks for; the message says what is missing."""

    retryable = True
    blame = Blame.CALLER


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """One pool with nothing left open."""

    name: str
    role: Role
    degrees: Degrees
    replicas: int
    constraint: Constraint
    engine: EngineSection


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What does not come from the file.

    ``secret``, ``mark``, ``watch_address``: drawn when the deployment is begun. ``nodes``: by name, the first gateway's
    first. ``host``: what gateways listen on where the file leaves it open, their node's own address if empty.
    ``api_keys``: what the file's variable says.
    """

    secret: str
    mark: str
    watch_address: str
    nodes: tuple[str, ...]
    host: str = ""
    api_keys: tuple[str, ...] = ()


def check_can_run(file: ClusterFile) -> None:
    """Refuse what can be planned and not be run. Raises: ConfigError"""
    pools = file.pools or ()
    if all(pool.kind is Role.MIXED for pool in pools) and file.pools is not None:
        return
    if file.kv_transport.kind not in KV_TRANSPORTS:
        raise ConfigError(
            "kv_transport.kind",
            f"{file.kv_transport.kind} can be planned with and not be run yet: give one of {', '.join(KV_TRANSPORTS)}",
        )
    split = (file.engine,) if file.pools is None else (file.engine_of(p) for p in pools if p.kind is not Role.MIXED)
    if file.kv_transport.dtype != "auto" and any(engine.deterministic for engine in split):
        raise ConfigError(
            "kv_transport.dtype", f"{file.kv_transport.dtype} rounds, which deterministic engines do not: use auto"
        )
    decoding = {_of_the_model(file.engine_of(pool)) for pool in pools if pool.kind is Role.DECODE}
    for index, pool in enumerate(pools):
        if pool.kind is Role.PREFILL and _of_the_model(file.engine_of(pool)) not in decoding:
            raise ConfigError(
                f"pools[{index}].engine",
                f"pool {pool.name!r} has nobody to hand its prompts to: no pool of role decode has the same "
                f"{', '.join(_OF_THE_ENGINE)}",
            )


def _of_the_model(engine: EngineSection) -> tuple[object, ...]:
    return tuple(getattr(engine, name) for name in _OF_THE_ENGINE)


def leaves_open(file: ClusterFile) -> bool:
    """Say whether a plan is needed: whether the file leaves pools, degrees or numbers of replicas open."""
    return file.pools is None or any(pool.degrees is None or pool.replicas.fixed is None for pool in file.pools)


def choose(file: ClusterFile, ranking: Ranking | None) -> tuple[Chosen, ...]:
    """Return the pools, with what the file leaves open as in the best plan that can be run.

    Raises: NoPlan saying why nothing fits
    """
    if not leaves_open(file):
        return tuple(
            Chosen(
                name=pool.name,
                role=pool.kind,
                degrees=pool.degrees.value,
                replicas=pool.replicas.fixed,
                constraint=pool.devices.value,
                engine=file.engine_of(pool),
            )
            for pool in file.pools or ()
            if pool.degrees is not None and pool.replicas.fixed is not None
        )
    plan = _best(ranking)
    if file.pools is None:
        return tuple(
            Chosen(
                name=planned.name,
                role=planned.role,
                degrees=planned.degrees,
                replicas=len(planned.replicas),
                constraint=planned.constraint,
                engine=file.engine,
            )
            for planned in plan.pools
        )
    planned_by_name = {planned.name: planned for planned in plan.pools}
    found = []
    for pool in file.pools:
        planned = planned_by_name[pool.name]
        fixed = pool.replicas.fixed
        found.append(
            Chosen(
                name=pool.name,
                role=pool.kind,
                degrees=planned.degrees if pool.degrees is None else pool.degrees.value,
                # Where the file says a number, what does not fit now is added when there is room.
                replicas=max(len(planned.replicas), pool.replicas.min) if fixed is None else fixed,
                constraint=pool.devices.value,
                engine=file.engine_of(pool),
            )
        )
    return tuple(found)


def make_deployment(
    file: ClusterFile,
    chosen: Sequence[Chosen],
    *,
    directory: Path,
    given: Given,
    device_types: Mapping[str, DeviceType],
    previous: Deployment,
) -> Deployment:
    """Return what is wanted from now on. ``directory``: the cluster file's, where its paths start.

    Raises: ConfigError naming the option of an engine that a pool cannot have
    """
    model_path = str(model_directory(file, directory))
    options = {pool.name: _options(file, pool, model_path) for pool in chosen}
    records = {pool.name: _record(file, pool, options[pool.name]) for pool in chosen}
    generations, highest = _generations(records, previous)
    environment = {SECRET_VARIABLE: given.secret, MARK_VARIABLE: given.mark}
    names = file.model.served_names or (Path(model_path).name,)
    wishes = tuple(
        PoolWish(
            name=pool.name,
            role=pool.role,
            degrees=pool.degrees,
            replicas=pool.replicas,
            generation=generations[pool.name],
            constraint=pool.constraint,
        )
        for pool in chosen
    )
    return Deployment(
        desired=replace(previous.desired, pools=wishes, partial=file.place_what_fits),
        launches={
            pool.name: Launch(
                module=RANK_MODULE,
                arguments=_arguments(file, pool.role, options[pool.name], hosts=len(given.nodes)),
                environment=environment,
            )
            for pool in chosen
        },
        pools=records,
        highest=highest,
        gateways=_gateways(file, names, given, environment),
        limits=Limits(loading_s=file.limits.start_timeout_s, drain_s=file.limits.drain_timeout_s),
        device_types=device_types,
        network=previous.network,
        device_link=previous.device_link,
        watch_address=given.watch_address,
        secret=given.secret,
        mark=given.mark,
        model_path=model_path,
        served_names=names,
    )


def model_directory(file: ClusterFile, directory: Path) -> Path:
    """Return where the model is on every node; a relative path starts at the cluster file."""
    path = Path(file.model.path).expanduser()
    return Path(path if path.is_absolute() else directory / path).resolve()


def _best(ranking: Ranking | None) -> RankedPlan:
    if ranking is not None and ranking.plans:
        return ranking.plans[0]
    reasons = "; ".join(ranking.refused[:_MOST_REASONS]) if ranking is not None else ""
    raise NoPlan(f"no plan fits on this cluster: {reasons or 'there are too few devices'}")


def _options(file: ClusterFile, pool: Chosen, model_path: str) -> EngineOptions:
    options = pool.engine.options(model_path, pool.degrees)
    return replace(options, max_queued_requests=file.limits.max_queued_requests)


def _arguments(file: ClusterFile, role: Role, options: EngineOptions, *, hosts: int) -> tuple[str, ...]:
    """Return what each rank of a pool is started with."""
    kind = file.kv_transport.kind
    shares = role_arguments(
        role,
        kv_transport=kind,
        kv_address="{address}",
        # Shared memory is of one host; whoever asks for it by name is not to be told that it is of several.
        across_hosts=hosts > 1 and kind != "shm",
        transfer_dtype=file.kv_transport.dtype,
    )
    if shares:
        section = file.kv_transport
        timeout = ("--kv-transfer-timeout", str(section.transfer_timeout_s))
        shares += (*timeout, "--kv-max-parked-bytes", str(section.max_parked_bytes))
        if section.serial_below_tokens is not None:
            shares += ("--kv-serial-below-tokens", str(section.serial_below_tokens))
    own = ("--replica", "{replica}", "--rank", "{rank}", "--address", "{address}")
    near = ("--ranks-on-host", "{ranks_on_host}", "--ranks-per-host", "{ranks_per_host}")
    others = ("--start-timeout", str(file.limits.start_timeout_s), "--listen", "{address}:0")
    return (*own, *near, *others, *shares, *engine_arguments(options), "--", options.model)


def _record(file: ClusterFile, pool: Chosen, options: EngineOptions) -> PoolRecord:
    """Return what a pool's engines are, in two parts, each option that is not as it is without one on a line."""
    said = {each.name: getattr(options, each.name) for each in fields(EngineOptions)}
    plain = {each.name: each.default for each in fields(EngineOptions)}
    others = {
        name: value
        for name, value in said.items()
        if value != plain[name] and name not in (*_OF_THE_MODEL, *_OF_NO_REPLICA)
    }
    constraint = pool.constraint
    others |= {"role": pool.role.value}
    if pool.role is not Role.MIXED:
        section = file.kv_transport
        others["kv_transport"] = section.kind
        if section.dtype != "auto":
            others["kv_transfer_dtype"] = section.dtype
        others |= {name: getattr(section, name) for name in _OF_TRANSFERS}
    others |= {f"label {label}": value for label, value in constraint.labels.items()}
    for name, several in (("device types", constraint.device_types), ("nodes", constraint.nodes)):
        if several:
            others[name] = ",".join(sorted(several))
    return PoolRecord(
        model=tuple(f"{name}={said[name]}" for name in _OF_THE_MODEL),
        cut=tuple(f"{name}={value}" for name, value in sorted(others.items())),
    )


def _generations(records: Mapping[str, PoolRecord], previous: Deployment) -> tuple[dict[str, Generation], Generation]:
    """Return each pool's generation, and the highest numbers that were ever given.

    What was there keeps its number; what is new gets one that nothing has had, because replicas of pools that were
    taken away may still be about.
    """
    models = {
        record.model: wish.generation.model
        for wish in previous.desired.pools
        if (record := previous.pools.get(wish.name)) is not None
    }
    highest = previous.highest
    generations = {}
    new_cut = highest.cut + 1
    for name, record in records.items():
        if record.model not in models:
            highest = replace(highest, model=highest.model + 1)
            models[record.model] = highest.model
        before, wish = previous.pools.get(name), previous.desired.pool(name)
        cut = new_cut
        if before is not None and wish is not None and before.cut == record.cut:
            cut = wish.generation.cut
        generations[name] = Generation(model=models[record.model], cut=cut)
    highest = replace(highest, cut=max([highest.cut, *(each.cut for each in generations.values())]))
    return generations, highest


def _gateways(
    file: ClusterFile, names: Sequence[str], given: Given, environment: Mapping[str, str]
) -> tuple[GatewayOrder, ...]:
    section, limits = file.gateway, file.limits
    arguments = [argument for name in names for argument in ("--served-model-name", name)]
    options: dict[str, object] = {
        "max-concurrent-requests": limits.max_concurrent_requests,
        "max-body-bytes": section.max_body_bytes,
        "request-timeout-s": limits.request_timeout_s,
        "drain-timeout-s": limits.drain_timeout_s,
        "tool-call-parser": section.tool_call_parser,
        "log-level": section.log_level,
    }
    if file.engine.seed is not None:
        options["seed"] = file.engine.seed
    if file.kv_transport.split_from_tokens is not None:
        options["split-from-tokens"] = file.kv_transport.split_from_tokens
    for option, value in options.items():
        arguments += [f"--{option}", str(value)]
    found = []
    for index in range(section.count):
        rounds, place = divmod(index, max(1, len(given.nodes)))
        found.append(
            GatewayOrder(
                name=str(index),
                node=given.nodes[place] if given.nodes else "",
                host=given.host if section.host == "auto" else section.host,
                port=section.port + rounds if section.port else 0,
                module=GATEWAY_MODULE,
                watch=(given.watch_address,),
                arguments=tuple(arguments),
                environment=environment,
                api_keys=given.api_keys,
                drain_s=limits.drain_timeout_s,
            )
        )
    return tuple(found)
