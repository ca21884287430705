"""Plans for a cluster file: what it asks for, put to the planner.

Owns the way from sections to the planner's question: which sets of pools are compared, what engines are set up for,
which measured steps count for which devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...placement.calibration import calibrate
from ...placement.model_cut import Cut
from ...placement.plan import Degrees, Role
from ...placement.plan_memory import EngineLimits, MemoryTraits
from ...placement.plan_search import search
from ...placement.question import PoolRequest, Question, Ranking
from ...placement.step_cost import Efficiency
from ...placement.topology import Topology
from ...sdk.errors import ConfigError
from .cluster_file import ClusterFile
from .model_sizes_file import read_model_sizes
from .pool_sections import DevicesSection, EngineSection
from .profile_file import Profile

_CPU = MemoryTraits(base_bytes=400 << 20, packs_head=True, attention_bytes=16 << 20)
"""A process on a CPU, where nobody has measured it."""

CPU_TYPES = "cpu"
"""How names of types begin whose devices are CPUs."""


def plan_cluster(
    file: ClusterFile, topology: Topology, *, directory: Path, profiles: Sequence[Profile] = ()
) -> Ranking:
    """Return the ranked plans for a cluster file on a topology. ``directory``: where the file's paths start.

    Raises: ConfigError naming the field; CheckpointError naming the model's file
    """
    return search(question_of(file, topology, directory=directory, profiles=profiles))


def question_of(
    file: ClusterFile, topology: Topology, *, directory: Path, profiles: Sequence[Profile] = ()
) -> Question:
    """Return what the planner is asked. Raises: as ``plan_cluster``"""
    engine = file.engine
    place = Path(file.model.path).expanduser()
    model = read_model_sizes(
        place if place.is_absolute() else directory / place,
        dtype=engine.dtype,
        quantization=engine.quantization,
        kv_cache_dtype=engine.kv_cache_dtype,
        kv_transfer_dtype=file.kv_transport.dtype,
    )
    _check_names(file, topology)
    cpus = [name for name in topology.device_types if name.startswith(CPU_TYPES)]
    efficiencies: dict[str, Efficiency] = {}
    traits = dict.fromkeys(cpus, _CPU)
    for profile in profiles:
        device = topology.device_types.get(profile.device_type)
        if device is None:
            raise ConfigError("profile", f"is of {profile.device_type!r}, which the topology does not have")
        cut = Cut(model=profile.sizes, degrees=Degrees())
        efficiencies[profile.device_type] = calibrate(profile.steps, cut=cut, device=device, start=profile.start)
        if profile.traits is not None:
            traits[profile.device_type] = profile.traits
    return Question(
        topology=topology,
        model=model,
        alternatives=_alternatives(file, topology),
        workload=file.read_workload(directory),
        objectives=file.objectives.value,
        efficiencies=efficiencies,
        traits=traits,
    )


def limits_of(engine: EngineSection) -> EngineLimits:
    """Return what an engine with these options is set up for, as far as planning goes."""
    return EngineLimits(
        max_num_batched_tokens=engine.max_num_batched_tokens,
        max_num_seqs=engine.max_num_seqs,
        max_model_len=engine.max_model_len,
        block_size=engine.block_size,
        utilization=engine.gpu_memory_utilization,
        max_kv_bytes=engine.kv_cache_memory_bytes,
    )


def _alternatives(file: ClusterFile, topology: Topology) -> tuple[tuple[PoolRequest, ...], ...]:
    """Return the sets of pools to compare: the file's own, or mixed replicas against prefill and decode."""
    if file.pools is not None:
        return (
            tuple(
                PoolRequest(
                    name=pool.name,
                    role=pool.kind,
                    degrees=None if pool.degrees is None else pool.degrees.value,
                    # Too few devices for all replicas: one of each pool has to fit, the controller adds others later.
                    least=min(1, pool.replicas.min) if file.place_what_fits else pool.replicas.min,
                    most=pool.replicas.max,
                    constraint=pool.devices.value,
                    limits=limits_of(file.engine_of(pool)),
                )
                for pool in file.pools
            ),
        )
    limits = limits_of(file.engine)

    def pool(name: str, role: Role, devices: DevicesSection) -> PoolRequest:
        return PoolRequest(name=name, role=role, constraint=devices.value, limits=limits)

    anywhere = file.devices
    allowed = anywhere.value
    types = sorted({node.device_type for node in topology.nodes if allowed.allows(node)})
    found = [
        (pool("mixed", Role.MIXED, anywhere),),
        (pool("prefill", Role.PREFILL, anywhere), pool("decode", Role.DECODE, anywhere)),
    ]
    if len(types) > 1:
        # One pool for each kind of device: replicas of a pool are alike.
        found.append(
            tuple(pool(f"mixed-{name}", Role.MIXED, anywhere.model_copy(update={"types": (name,)})) for name in types)
        )
    return tuple(found)


def _check_names(file: ClusterFile, topology: Topology) -> None:
    """Refuse types and nodes that the topology does not have: a typing error would otherwise plan nothing."""
    sections = [("devices", file.devices)] + [
        (f"pools[{index}].devices", pool.devices) for index, pool in enumerate(file.pools or ())
    ]
    nodes = {node.name for node in topology.nodes}
    for path, section in sections:
        for name in section.types:
            if name not in topology.device_types:
                known = ", ".join(sorted(topology.device_types))
                raise ConfigError(f"{path}.types", f"{name!r} is not in the device table; known are {known}")
        for name in section.nodes:
            if name not in nodes:
                raise ConfigError(f"{path}.nodes", f"there is no node {name!r}")
