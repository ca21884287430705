"""Which replicas a request goes to: the pair, or the one replica, where it is expected to cost least.

A core: no clock, no asyncio, no sessions; all that it knows it is told. The cost of a route is the time to the first
token (what is queued there and what of the prompt is not cached, over the measured rate), the part of the transfer that
prefill does not hide, and the time for each token at the decode replica once this request runs there too. What cannot
be is left out before: no room in the model's length, the blocks or the queue, draining, an open breaker between two.

Prompts that are short, or mostly cached where they would be decoded, are not split; replicas that do both compete with
pairs. Costs that are as good as equal go by turns. Of large pools a few replicas are looked at: those with the most of
the prompt cached, and some drawn anew for each request, so that several gateways do not all find the same.

On a request's way: after admission; ``request`` decides what becomes of it, and asks here again when a replica is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, islice

from ...comm.kv.transfer import Ending
from ..rpc.engine_client import BlockChanges, EngineLoadReport, HandOffReport
from .breaker import Breaker, BreakerSettings
from .link_speeds import LinkSpeeds
from .prefix_index import PrefixIndex
from .prompt_digests import PromptDigests
from .routes import Ask, Cost, ReplicaFacts, Route, RouterSettings, Split, Whole
from .standing import Sent, Standing

_PAIR_FAILURES = frozenset(
    {
        Ending.NO_ANSWER,
        Ending.LEASE_EXPIRED,
        Ending.UNACKNOWLEDGED,
        Ending.PEER_LOST,
        Ending.BAD_REFERENCE,
        Ending.BAD_CHECKSUM,
        Ending.BAD_FRAME,
    }
)
"""Endings that speak against the way between two replicas, not against a request, and not of a lack of room."""

_STALL_WEIGHT = 0.02
"""What a second by which a prompt's computing holds up one sequence that decodes there counts for, in seconds."""

_CLOSE = 4
"""How many of the best of either side are paired with one another."""

_SMOOTHING = 0.05
_CROWDING_SMOOTHING = 0.2

_MASK_64 = (1 << 64) - 1


@dataclass(slots=True)
class _Half:
    """What a replica would cost a request, as far as that does not depend on the other replica."""

    standing: Standing
    queue_s: float
    compute_s: float
    decode_s: float
    weighed_s: float
    cached: int
    computed: int


@dataclass(slots=True)
class _Pair:
    """A way to serve a request: by two replicas, or by one (no ``prefill``)."""

    total_s: float
    prefill: _Half | None
    decode: _Half
    transfer_s: float

    @property
    def turn(self) -> int:
        """How long ago these were chosen: the less the longer."""
        return self.decode.standing.turn + (0 if self.prefill is None else self.prefill.standing.turn)


class Router:
    """All replicas of a model, and the choice among them. ``salt`` makes gateways draw differently."""

    def __init__(
        self,
        settings: RouterSettings | None = None,
        *,
        breakers: BreakerSettings | None = None,
        max_blocks: int = 4 << 20,
        salt: int = 0,
    ) -> None:
        self._settings = settings or RouterSettings()
        self._breaker_settings = breakers or BreakerSettings()
        self._max_blocks = max_blocks
        self._salt = salt
        self._standings: dict[str, Standing] = {}
        self._prefills: list[Standing] = []
        self._decoders: list[Standing] = []
        # Replicas whose blocks have the same names share an index.
        self._caches: dict[tuple[int, int | None], tuple[PromptDigests, PrefixIndex]] = {}
        self._links = LinkSpeeds(
            first_bytes_per_s=self._settings.first_link_bytes_per_s, first_kv_bytes=self._settings.first_kv_bytes
        )
        self._breakers: dict[tuple[str, str], Breaker] = {}
        self._on_way: dict[Route, tuple[int, tuple[Standing, ...]]] = {}
        self._turn = 0
        # How long prompts wait at present: computing one twice costs the more.
        self._crowding_s = 0.0
        self._typical_rate = 0.0
        self._typical_token_s = 0.0

    # ------------------------------------------------------------------ what it is told

    def join(self, name: str, facts: ReplicaFacts) -> None:
        """Take in a replica, or a new life of one: what was known of an earlier one is forgotten."""
        self.leave(name)
        standing = self._standings[name] = Standing(name, facts, self._settings, turn=self._turn)
        if facts.role != "prefill":
            self._decoders.append(standing)
        elif facts.sends_kv:
            self._prefills.append(standing)
        if facts.block_size:
            key = (facts.block_size, facts.rope_threshold)
            if key not in self._caches:
                digests = PromptDigests(block_size=facts.block_size, rope_threshold=facts.rope_threshold)
                self._caches[key] = (digests, PrefixIndex(max_blocks=self._max_blocks))
            self._caches[key][1].join(name)

    def leave(self, name: str) -> None:
        """Forget a replica that is gone, or that may get nothing new. Idempotent."""
        self._standings.pop(name, None)
        self._prefills = [each for each in self._prefills if each.name != name]
        self._decoders = [each for each in self._decoders if each.name != name]
        for _, index in self._caches.values():
            index.leave(name)
        self._links.forget(name)
        for pair in [pair for pair in self._breakers if name in pair]:
            del self._breakers[pair]

    def has(self, name: str) -> bool:
        """Return whether a replica has joined."""
        return name in self._standings

    def note_load(self, name: str, load: EngineLoadReport, now_s: float) -> None:
        """Take in a replica's newest report; of one that has not joined, nothing."""
        standing = self._standings.get(name)
        if standing is None:
            return
        standing.note(load, now_s)
        self._typical_rate = _nearer(self._typical_rate, load.prefill_tokens_per_s)
        self._typical_token_s = _nearer(self._typical_token_s, load.token_s)

    def note_blocks(self, name: str, changes: BlockChanges) -> None:
        """Take in what a replica's prefix cache has got and given up."""
        standing = self._standings.get(name)
        if standing is not None and standing.facts.block_size:
            self._caches[_cache_key(standing)][1].note(name, changes)

    def note_hand_off(self, route: Split, report: HandOffReport | None, now_s: float) -> None:
        """Learn from how a hand-off ended; None: nothing was heard of it, because a replica or the way to it broke."""
        pair = (route.prefill, route.decode)
        if route.prefill not in self._standings or route.decode not in self._standings:
            return
        if report is not None and report.ending == Ending.COMMITTED:
            self._links.note(*pair, report, tokens=route.cost.sent_tokens)
            self._breakers.pop(pair, None)
        elif report is None or report.ending in _PAIR_FAILURES:
            if pair not in self._breakers:
                self._breakers[pair] = Breaker(self._breaker_settings)
            self._breakers[pair].failed(now_s)

    def ended(self, route: Route) -> None:
        """Note that a request is over at its replicas, however; idempotent."""
        number, standings = self._on_way.pop(route, (0, ()))
        for standing in standings:
            standing.drop(number)

    # ------------------------------------------------------------------ what can be asked of it

    @property
    def open_breakers(self) -> list[tuple[str, str]]:
        """Pairs that nothing is sent over now but tries."""
        return [pair for pair, breaker in self._breakers.items() if breaker.open]

    def cached_tokens(self, ask: Ask) -> dict[str, int]:
        """Return how much of a prompt each replica has cached; those with nothing are left out."""
        found: dict[str, int] = {}
        # The last token is always computed: the next one is drawn from it.
        most = len(ask.prompt) - 1
        for (size, _), (digests, index) in self._caches.items():
            if len(index):
                strides = digests.strides(ask.prompt, generated=ask.generated, cache_salt=ask.cache_salt)
                for name, blocks in index.hits(strides).items():
                    found[name] = min(blocks * size, most)
        return found

    def route(self, ask: Ask, now_s: float) -> Route | None:
        """Choose for a request and count it as sent; None while no replica can take it.

        The caller says ``ended`` of every route that it got.
        """
        cached = self.cached_tokens(ask)
        route = self._choose(ask, cached, now_s)
        if route is not None:
            self._count(route, ask, now_s)
        return route

    # ------------------------------------------------------------------ choosing

    def _choose(self, ask: Ask, cached: dict[str, int], now_s: float) -> Route | None:
        tokens, pinned = len(ask.prompt), ask.decode

        def fits(standing: Standing, tokens: int) -> bool:
            return (
                standing.name not in ask.exclude
                and (ask.generation is None or standing.facts.generation == ask.generation)
                and (standing.takes_requests or standing.name == pinned)
                and standing.could_hold(tokens)
            )

        pool = self._decoders if not pinned else [each for each in self._decoders if each.name == pinned]
        decoders = self._looked_at(pool, cached, tokens, lambda each: fits(each, tokens + ask.max_tokens))
        if not decoders:
            return None
        wholes = [self._half(each, ask, cached, now_s, decodes=True) for each in decoders]
        short = 0 if ask.must_split else self._settings.whole_below_tokens
        long = [half for half in wholes if half.standing.facts.receives_kv and half.computed >= short]
        pairs: list[_Pair] = []
        if long and ask.may_split and ask.max_tokens > 1:
            beginners = self._looked_at(self._prefills, cached, tokens, lambda each: fits(each, tokens + 1))
            halves = [self._half(each, ask, cached, now_s, decodes=False) for each in beginners]
            pairs = self._pairs(halves, long, now_s)
            self._note_crowding(halves)
        alone = wholes
        if ask.must_split:
            alone = []
        elif pairs:
            # A replica that only decodes computes a prompt when that is short there, or when no pair can do it.
            alone = [half for half in wholes if half.standing.facts.role == "mixed" or half.computed < short]
        least_decode_s = min(half.decode_s for half in wholes)
        return self._best(alone, pairs, least_decode_s=least_decode_s, tried=len(wholes) + len(pairs))

    def _best(self, alone: list[_Half], pairs: list[_Pair], *, least_decode_s: float, tried: int) -> Route | None:
        options = [_Pair(half.weighed_s + half.decode_s, None, half, 0.0) for half in alone] + pairs
        if not options:
            return None
        most_s = self._as_good_as(min(option.total_s for option in options), least_decode_s)
        chosen = min((option for option in options if option.total_s <= most_s), key=lambda option: option.turn)
        prefill, decode = chosen.prefill, chosen.decode
        first = prefill or decode
        cost = Cost(
            queue_s=first.queue_s,
            compute_s=first.compute_s,
            transfer_s=chosen.transfer_s,
            decode_s=decode.decode_s,
            total_s=chosen.total_s,
            cached_tokens=first.cached,
            computed_tokens=first.computed,
            sent_tokens=0 if prefill is None else decode.computed,
            tried=tried,
        )
        if prefill is None:
            return Whole(replica=decode.standing.name, cost=cost)
        return Split(prefill=prefill.standing.name, decode=decode.standing.name, cost=cost)

    def _pairs(self, prefills: list[_Half], decodes: list[_Half], now_s: float) -> list[_Pair]:
        """Return the pairs that may be best."""
        prefills.sort(key=lambda half: (half.weighed_s, half.standing.turn))
        decodes.sort(key=lambda half: (half.decode_s, half.standing.turn))
        # The best of either side first; the others only when breakers keep those apart.
        return self._pairs_of(prefills[:_CLOSE], decodes[:_CLOSE], now_s) or self._pairs_of(prefills, decodes, now_s)

    def _pairs_of(self, prefills: list[_Half], decodes: list[_Half], now_s: float) -> list[_Pair]:
        links, breakers = self._links, self._breakers
        found: list[_Pair] = []
        most_s = float("inf")
        for prefill in prefills:
            # A transfer costs nothing at best: from here on nobody can be better.
            if prefill.weighed_s + decodes[0].decode_s > most_s:
                break
            name = prefill.standing.name
            for decode in decodes:
                so_far_s = prefill.weighed_s + decode.decode_s
                if so_far_s > most_s:
                    break
                to = decode.standing.name
                if breakers and (name, to) in breakers and not breakers[name, to].lets(now_s):
                    continue
                transfer_s = links.extra_s(name, to, tokens=decode.computed, hidden_behind_s=prefill.compute_s)
                found.append(_Pair(so_far_s + transfer_s, prefill, decode, transfer_s))
                as_good_s = self._as_good_as(so_far_s + transfer_s, decodes[0].decode_s)
                if as_good_s < most_s:
                    most_s = as_good_s
        return found

    def _as_good_as(self, cost_s: float, decode_s: float) -> float:
        """Return what a cost may be to count as equal to this one, of which ``decode_s`` is everybody's."""
        return cost_s + (cost_s - decode_s) * self._settings.tie_share + self._settings.tie_s

    def _half(self, standing: Standing, ask: Ask, cached: dict[str, int], now_s: float, *, decodes: bool) -> _Half:
        have = cached.get(standing.name, 0)
        computed = len(ask.prompt) - have
        rate = standing.rate or self._typical_rate or self._settings.first_tokens_per_s
        queue_s = standing.queued_tokens(now_s, rate) / rate
        compute_s = computed / rate
        recent_s = standing.recent_tokens(now_s) / rate
        compute_weight = self._settings.compute_weight + self._settings.crowding_weight * self._crowding_s
        weighed_s = queue_s + compute_weight * compute_s + self._settings.recent_weight * recent_s
        if not decodes:
            return _Half(standing, queue_s, compute_s, 0.0, weighed_s, have, computed)
        # While the prompt is computed, those that decode there wait.
        weighed_s += _STALL_WEIGHT * compute_s * standing.sequences
        return _Half(standing, queue_s, compute_s, self._decode_s(standing, ask), weighed_s, have, computed)

    def _note_crowding(self, halves: list[_Half]) -> None:
        if halves:
            queue_s = sum(half.queue_s for half in halves) / len(halves)
            self._crowding_s += _CROWDING_SMOOTHING * (queue_s - self._crowding_s)

    def _decode_s(self, standing: Standing, ask: Ask) -> float:
        """Return what the tokens after the first cost there once this request runs too."""
        sequences = standing.sequences + ask.sequences
        if standing.pace.measured:
            token_s = standing.pace.token_s(min(sequences, standing.facts.max_num_seqs))
        else:
            typical_s = self._typical_token_s or self._settings.first_token_s
            token_s = typical_s * (0.5 + 0.5 * sequences)
        tokens = min(float(ask.max_tokens), self._settings.token_weight)
        # Beyond the slots a sequence waits until others have ended: about half of what each of those has left.
        rounds = max(0, sequences - standing.facts.max_num_seqs) / standing.facts.max_num_seqs
        return token_s * (tokens + rounds * self._settings.token_weight)

    def _looked_at(
        self, pool: list[Standing], cached: dict[str, int], tokens: int, fits: Callable[[Standing], bool]
    ) -> list[Standing]:
        """Return those that are compared: all of a small pool, of a large one the best cached and some drawn.

        Those without free blocks for the prompt are among them only when all are.
        """
        count = self._settings.choices
        if len(pool) <= count:
            chosen = [each for each in pool if fits(each)]
        else:
            hit = sorted((each for each in pool if each.name in cached), key=lambda each: -cached[each.name])
            chosen = list(islice(filter(fits, hit), count // 2))
            names = {each.name for each in chosen}
            start = _mixed(self._turn ^ self._salt) % len(pool)
            drawn = (each for each in chain(pool[start:], pool[:start]) if each.name not in names and fits(each))
            chosen += islice(drawn, count - len(chosen))
        return [each for each in chosen if each.has_room(tokens)] or chosen

    def _count(self, route: Route, ask: Ask, now_s: float) -> None:
        """Note what a route brings to its replicas, and that it was their turn."""
        self._turn += 1
        number, tokens, cost = self._turn, len(ask.prompt), route.cost
        match route:
            case Whole(replica=name):
                # Where a ticket waits, its sequence is counted already.
                works = [(self._standings[name], cost.computed_tokens, 0 if name == ask.decode else ask.sequences)]
            case Split(prefill=name, decode=to):
                works = [(self._standings[name], cost.computed_tokens, 1)]
                if to != ask.decode:
                    works.append((self._standings[to], 0, ask.sequences))
                if (name, to) in self._breakers:
                    self._breakers[name, to].went(now_s)
        for standing, computed, sequences in works:
            standing.turn = number
            blocks = standing.blocks_for(tokens)
            cached = cost.cached_tokens if computed else 0
            standing.send(number, Sent(now_s, computed, cached, sequences, blocks))
        self._on_way[route] = (number, tuple(standing for standing, _, _ in works))


def _cache_key(standing: Standing) -> tuple[int, int | None]:
    return standing.facts.block_size, standing.facts.rope_threshold


def _nearer(typical: float, measured: float) -> float:
    """Return a running mean with one more value in it; 0 is none."""
    if measured <= 0:
        return typical
    return measured if typical <= 0 else typical + _SMOOTHING * (measured - typical)


def _mixed(number: int) -> int:
    """Return a number in which every bit depends on every bit of another (splitmix64's finish)."""
    number = (number + 0x9E3779B97F4A7C15) & _MASK_64
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return number ^ (number >> 31)
