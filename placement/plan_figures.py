"""What a deployment as a whole will do: its replicas' rates added up, KV movement, cost and power.

Owns how replicas go together. Requests are shared out by what replicas can do; between prefill and decode pools the
slower side counts, and the movement of KV between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .objectives import Goal, Objectives
from .plan import Role
from .replica_rates import Point, ReplicaRates, largest_part
from .topology import Link
from .workload import Workload

SPLIT_MUST_GAIN = 1.05
"""By how much prefill and decode pools must be better than mixed replicas to be put before them: they have more parts
that can fail, and KV has to cross the network."""

_BUSIEST_LINK = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Replicas that are alike: of one pool, one cut, one type of device, alike links."""

    pool: str
    rates: ReplicaRates
    count: int

    @property
    def role(self) -> Role:
        """What the replicas do with a request."""
        return self.rates.role

    @property
    def devices(self) -> int:
        """The devices of all the replicas."""
        return self.count * self.rates.cost.cut.degrees.ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFigures:
    """What one group will do: each replica's point of operation, and its memory."""

    pool: str
    role: Role
    count: int
    point: Point


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a plan is predicted to do.

    ``misses``: bounds that it does not keep, as sentences; ``excess``: by what factor the worst is missed, 1 for
    none. ``limit``: what keeps it from more.

    Units: first_token_s at the objectives' quantile, per_token_s mean; tokens are those of answers; costs in the
    currency of the device table
    """

    requests_per_s: float
    tokens_per_s: float
    first_token_s: float
    per_token_s: float
    cost_per_hour: float
    power_w: float
    transfer_s: float
    devices: int
    split: bool
    groups: tuple[GroupFigures, ...]
    limit: str
    misses: tuple[str, ...]
    excess: float

    @property
    def cost_per_million_tokens(self) -> float:
        """Cost of a million tokens of answers."""
        return self.cost_per_hour / 3600 / self.tokens_per_s * 1e6

    @property
    def joules_per_token(self) -> float:
        """Energy of a token of an answer, at full power."""
        return self.power_w / self.tokens_per_s

    def goal_value(self, goal: Goal) -> float:
        """Return the figure that a goal is about; less is better."""
        match goal:
            case Goal.THROUGHPUT:
                return -self.tokens_per_s
            case Goal.COST:
                return self.cost_per_million_tokens
            case Goal.POWER:
                return self.joules_per_token
            case Goal.TIME_TO_FIRST_TOKEN:
                return self.first_token_s
            case Goal.TIME_PER_TOKEN:
                return self.per_token_s

    def rank(self, goal: Goal) -> tuple[float, ...]:
        """Return what plans are sorted by: bounds first, then the goal, then cost, latency and fewer devices.

        A split has to gain more than ``SPLIT_MUST_GAIN`` over what is not split.
        """
        value = self.goal_value(goal)
        if self.split:
            value = value / SPLIT_MUST_GAIN if value < 0 else value * SPLIT_MUST_GAIN
        # Rounded, so that what is equal but for the last bits is decided by what comes next.
        latency = self.first_token_s + 100 * self.per_token_s
        return tuple(
            float(f"{number:.6g}")
            for number in (max(1.0, self.excess), value, self.cost_per_hour, latency, float(self.devices))
        )


def combine(groups: Sequence[Group], kv_link: Link | None, workload: Workload, objectives: Objectives) -> Figures:
    """Return what groups of replicas do together. ``kv_link``: from prefill to decode, None without such."""
    capacity = _capacities(groups, kv_link, workload)
    roles = _by_role(groups)
    split = min(
        sum(capacity[index] for index in roles[Role.PREFILL]), sum(capacity[index] for index in roles[Role.DECODE])
    )
    mixed = sum(capacity[index] for index in roles[Role.MIXED])
    total = split + mixed
    served = total if workload.requests_per_s is None else min(total, workload.requests_per_s)
    shares = {Role.MIXED: mixed, Role.PREFILL: split, Role.DECODE: split}
    figures = []
    for index, group in enumerate(groups):
        together = sum(capacity[other] for other in roles[group.role])
        own = served * shares[group.role] / total * capacity[index] / together / group.count
        fullest = group.rates.fullest
        # Rounding must not push a replica to a point beyond its fullest.
        point = fullest if own >= fullest.requests_per_s * (1 - 1e-9) else group.rates.at(own)
        figures.append(GroupFigures(pool=group.pool, role=group.role, count=group.count, point=point))
    transfer_s = exposed_s = 0.0
    if kv_link is not None:
        transfer_s, exposed_s = _transfer(groups, kv_link, workload)
    first = max((each.point.first_token_s for each in figures if each.role is not Role.DECODE), default=0.0)
    per_token = max((each.point.per_token_s for each in figures if each.role is not Role.PREFILL), default=0.0)
    cost = sum(group.devices * group.rates.cost.device.price_per_hour for group in groups)
    power = sum(group.devices * group.rates.cost.device.power_w for group in groups)
    misses, excess = _misses(objectives, workload, first + exposed_s, per_token, cost, power, served)
    return Figures(
        requests_per_s=served,
        tokens_per_s=served * workload.mean_output,
        first_token_s=first + exposed_s,
        per_token_s=per_token,
        cost_per_hour=cost,
        power_w=power,
        transfer_s=transfer_s,
        devices=sum(group.devices for group in groups),
        split=kv_link is not None,
        groups=tuple(figures),
        limit=_limit(groups, figures, capacity, roles, served < total * (1 - 1e-9)),
        misses=misses,
        excess=excess,
    )


def _by_role(groups: Sequence[Group]) -> dict[Role, list[int]]:
    return {role: [index for index, group in enumerate(groups) if group.role is role] for role in Role}


def _capacities(groups: Sequence[Group], kv_link: Link | None, workload: Workload) -> list[float]:
    """Return the requests per second that each group can take, bounds kept."""
    capacities = []
    for group in groups:
        each = group.rates.fullest.requests_per_s
        if kv_link is not None and group.role is not Role.MIXED:
            seconds = _kv_bytes(group.rates, workload) / (_pairs(groups, group) * kv_link.bytes_per_s)
            each = min(each, _BUSIEST_LINK / seconds)
        capacities.append(each * group.count)
    return capacities


def _kv_bytes(rates: ReplicaRates, workload: Workload) -> float:
    """Return the bytes of KV that a request moves, on average."""
    tokens = sum(share * length for length, share in workload.prompts)
    return rates.cost.cut.model.moved_bytes_per_token() * tokens


def _pairs(groups: Sequence[Group], own: Group) -> int:
    """Return how many links of devices a replica's movement goes over at once: the fewer ranks of both sides."""
    other = Role.DECODE if own.role is Role.PREFILL else Role.PREFILL
    ranks = own.rates.cost.cut.degrees.ranks
    return min(ranks, *(g.rates.cost.cut.degrees.ranks for g in groups if g.role is other))


def _transfer(groups: Sequence[Group], kv_link: Link, workload: Workload) -> tuple[float, float]:
    """Return the seconds of a request's movement, and how many of them do not hide behind its prefill.

    Layers go as they are computed, so that at least the last one is left when prefill ends.
    """
    slowest = exposed = 0.0
    for group in groups:
        if group.role is Role.PREFILL:
            pace = _pairs(groups, group) * kv_link.bytes_per_s
            seconds = _kv_bytes(group.rates, workload) / pace + kv_link.latency_s
            prefill = group.rates.points[0].first_token_s
            left = max(seconds - prefill, seconds / len(group.rates.cost.cut.model.layers))
            slowest, exposed = max(slowest, seconds), max(exposed, left)
    return slowest, exposed


def _misses(
    objectives: Objectives,
    workload: Workload,
    first_s: float,
    per_token_s: float,
    cost: float,
    power: float,
    served: float,
) -> tuple[tuple[str, ...], float]:
    found: list[tuple[float, str]] = []

    def check(value: float, bound: float | None, sentence: str) -> None:
        if bound is not None and value > bound * (1 + 1e-9):
            found.append((value / bound, sentence))

    check(
        first_s,
        objectives.time_to_first_token_s,
        f"the first token takes {first_s:.3g} s, more than {objectives.time_to_first_token_s} s",
    )
    check(
        per_token_s,
        objectives.time_per_token_s,
        f"a token takes {per_token_s:.3g} s, more than {objectives.time_per_token_s} s",
    )
    check(cost, objectives.cost_per_hour, f"it costs {cost:.2f} an hour, more than {objectives.cost_per_hour}")
    check(power, objectives.power_w, f"it takes {power:.0f} W, more than {objectives.power_w}")
    wanted = workload.requests_per_s
    if wanted is not None and served < wanted * (1 - 1e-9):
        found.append((wanted / served, f"it serves {served:.3g} of the {wanted:g} requests a second"))
    return tuple(sentence for _, sentence in found), max((excess for excess, _ in found), default=1.0)


def _limit(
    groups: Sequence[Group],
    figures: Sequence[GroupFigures],
    capacity: Sequence[float],
    roles: dict[Role, list[int]],
    has_room: bool,
) -> str:
    """Say what keeps a plan from more: the side that is full, what bounds its batch, what its steps spend time on."""
    prefill = sum(capacity[index] for index in roles[Role.PREFILL])
    decode = sum(capacity[index] for index in roles[Role.DECODE])
    if roles[Role.PREFILL]:
        slower = Role.PREFILL if prefill < decode else Role.DECODE
        index = roles[slower][0]
    else:
        index = roles[Role.MIXED][0]
    group, point = groups[index], figures[index].point
    spends = largest_part(point.cost)
    if has_room:
        return f"nothing at this load; steps spend most on {spends}"
    running = "" if group.role is Role.PREFILL else f" run {point.batch} sequences at once and"
    return f"{group.role} replicas{running} are bound by {group.rates.full_because}; steps spend most on {spends}"
