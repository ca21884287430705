"""The words of the router: what it is told of replicas and requests, and what it answers. Pure values."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..messages import Int32Array
from ..rpc.engine_client import EngineFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaFacts:
    """What the router has to know of a replica for as long as it is there.

    ``role``: "prefill", "decode" or "mixed". ``generation`` of its model: replicas of others answer otherwise.
    ``block_size`` 0: nothing is known of its cached blocks. ``rope_threshold`` as in ``EngineFacts``.
    """

    role: str = "mixed"
    generation: int = 0
    block_size: int = 0
    rope_threshold: int | None = None
    max_model_len: int = 1 << 30
    max_num_seqs: int = 256
    sends_kv: bool = False
    receives_kv: bool = False

    @classmethod
    def of(cls, facts: EngineFacts, *, generation: int = 0) -> ReplicaFacts:
        """Return what a replica said of itself when it was met."""
        return cls(
            role=facts.role,
            generation=generation,
            block_size=facts.block_size,
            rope_threshold=facts.rope_threshold,
            max_model_len=facts.max_model_len,
            max_num_seqs=facts.max_num_seqs,
            sends_kv=facts.sends_kv,
            receives_kv=facts.receives_kv,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request that looks for its replicas.

    Shapes: prompt [known tokens] int32: of a request that goes on, with what it has ``generated`` (so many at the end)
    ``max_tokens``: that may still come. ``may_split``: False of several samples, of the prompt's log-probabilities, and
    of whatever else one replica has to do alone. ``exclude``: replicas that it must not go to (again). ``generation``:
    that it was begun with, None of one that any may answer. ``decode``: where a ticket of it waits already; then only
    another prefill replica is looked for, or that replica itself (``Whole``), to compute all of it. ``must_split``:
    only a pair is of use, however short the prompt is.
    """

    prompt: Int32Array
    max_tokens: int
    generated: int = 0
    sequences: int = 1
    cache_salt: str | None = None
    may_split: bool = True
    must_split: bool = False
    exclude: frozenset[str] = frozenset()
    generation: int | None = None
    decode: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a route is expected to take: for logs, metrics and people.

    ``cached_tokens``: of the prompt, at the replica that computes it; ``computed_tokens``: that are left to compute.
    ``sent_tokens``: whose KV moves. ``tried``: how many replicas or pairs were compared.
    Units: queue_s, until its prompt is begun; compute_s, of its prompt; transfer_s, of KV that prefill does not hide;
    decode_s, its tokens as weighed, with how it slows others; total_s, what routes were compared by
    """

    queue_s: float = 0.0
    compute_s: float = 0.0
    transfer_s: float = 0.0
    decode_s: float = 0.0
    total_s: float = 0.0
    cached_tokens: int = 0
    computed_tokens: int = 0
    sent_tokens: int = 0
    tried: int = 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Whole:
    """One replica does all of it."""

    replica: str
    cost: Cost = field(default_factory=Cost)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Split:
    """One replica computes the prompt, the other goes on from there."""

    prefill: str
    decode: str
    cost: Cost = field(default_factory=Cost)


Route = Whole | Split


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    """How the router weighs.

    ``whole_below_tokens``: prompts with fewer tokens to compute at the decode replica are not split.
    ``choices``: of larger pools so many replicas are looked at closely, half of them for what they have cached.
    ``token_weight``: a second more for each token counts as much as so many seconds more to the first one.
    ``compute_weight``: how much a second of computing counts against a second of waiting: computing also takes what
    later requests would have had; ``crowding_weight`` is added for each second that prompts wait. ``recent_s``,
    ``recent_weight``: how long work that was sent counts beyond its end, and how much, so that load between paced
    requests is not zero. ``tie_s``, ``tie_share``: costs that are nearer than both together are equal, and then it goes
    by turns. ``report_lag_s``: how old a report may be when it comes.
    Units: first_tokens_per_s, first_token_s, first_link_bytes_per_s, first_kv_bytes: before anything was measured
    """

    whole_below_tokens: int = 256
    choices: int = 8
    token_weight: float = 100.0
    compute_weight: float = 1.3
    crowding_weight: float = 0.1
    recent_s: float = 10.0
    recent_weight: float = 0.03
    tie_s: float = 0.002
    tie_share: float = 0.02
    report_lag_s: float = 0.05
    first_tokens_per_s: float = 2000.0
    first_token_s: float = 0.02
    first_link_bytes_per_s: float = 1e9
    first_kv_bytes: float = 65536.0
