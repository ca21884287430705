"""``slipstream plan``: a cluster file and a topology in, ranked plans out, as text or as JSON.

Owns what is printed. The command line hands in paths and prints what comes back. Where the topology comes from is
``topology_choice``'s to decide.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...placement.explain import SHOWN, places, report, sentence, structure, verdict, why_first
from ...placement.plan_figures import Figures
from ...placement.question import RankedPlan, Ranking
from .cluster_file import ClusterFile, read_cluster_file
from .planning import plan_cluster
from .profile_file import read_profile
from .topology_choice import ReadRunning, choose_topology


def plan_command(
    file: Path,
    *,
    topology: Path | None,
    address: str | None = None,
    running: ReadRunning | None = None,
    profiles: Sequence[Path] = (),
    as_json: bool = False,
) -> tuple[str, bool]:
    """Return what to print, and whether there is a plan. ``address``, ``running``: as ``choose_topology`` takes them.

    Raises: ConfigError or CheckpointError naming the file and the field
    """
    cluster = read_cluster_file(file)
    chosen = choose_topology(file, cluster, topology=topology, address=address, running=running)
    measured = [read_profile(profile) for profile in profiles]
    ranking = plan_cluster(cluster, chosen.topology, directory=file.parent, profiles=measured)
    if as_json:
        records = {**as_records(cluster, ranking), "topology": list(chosen.said)}
        return json.dumps(records, indent=1), bool(ranking.plans)
    text = "\n".join(chosen.said) + "\n\n" + report(ranking, cluster.objectives.value)
    if ranking.plans:
        where = [line for pool in ranking.plans[0].pools for line in places(pool)]
        text += "\n\nWhere the first plan's ranks are, in their order:\n" + "\n".join(f"  {line}" for line in where)
    return text, bool(ranking.plans)


def as_records(cluster: ClusterFile, ranking: Ranking) -> dict[str, Any]:
    """Return a ranking as what JSON can say."""
    objectives = cluster.objectives.value
    found = bool(ranking.plans)
    return {
        "name": cluster.name,
        "objective": objectives.goal.value,
        "plans": [_record(plan, sentence(plan, objectives)) for plan in ranking.plans[:SHOWN]],
        "why_first": why_first(ranking, objectives) if found else None,
        "split": verdict(ranking, objectives) if found else None,
        "refused": list(ranking.refused),
    }


def _record(plan: RankedPlan, limits: str) -> dict[str, Any]:
    return {
        "structure": structure(plan),
        "pools": [
            {
                "name": pool.name,
                "role": pool.role.value,
                "degrees": {
                    "tp": pool.degrees.tp,
                    "pp": pool.degrees.pp,
                    "ep": pool.degrees.ep,
                    "experts_over_tp": pool.degrees.experts_over_tp,
                },
                "replicas": [[str(device) for device in place.devices] for place in pool.replicas],
            }
            for pool in plan.pools
        ],
        "predicted": _figures(plan.figures),
        "limits": limits,
    }


def _figures(figures: Figures) -> dict[str, Any]:
    return {
        "requests_per_s": figures.requests_per_s,
        "tokens_per_s": figures.tokens_per_s,
        "time_to_first_token_s": figures.first_token_s,
        "time_per_token_s": figures.per_token_s,
        "kv_transfer_s": figures.transfer_s,
        "cost_per_hour": figures.cost_per_hour,
        "cost_per_million_tokens": figures.cost_per_million_tokens,
        "power_w": figures.power_w,
        "joules_per_token": figures.joules_per_token,
        "devices": figures.devices,
        "batches": {each.pool: each.point.batch for each in figures.groups},
        "misses": list(figures.misses),
    }
