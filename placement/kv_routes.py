"""Who sends which part of a request's KV to whom, between any two cuts of one model.

Owns the arithmetic of global layers, heads and token positions; blocks' numbers and bytes are not known here. Every
layer and head that a rank of the target holds comes from exactly one rank of the source. Where several ranks of the
source hold the same, they share the work: each sends to other ranks, or, if there are too few of those, other layers.

With H KV heads, rank r of t holds heads [floor(rH/t), floor((r+1)H/t)), or head floor(rH/t) alone where t > H: then
t/H ranks hold the same head. Earlier stages have one layer more where they do not divide evenly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import gcd

MAX_DEGREE = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """How a replica's ranks hold the KV of a model: layers over pp, heads over tp, all of it ``copies`` times.

    Copies are ranks that hold the same layers and heads because they divide something else (sequences, experts). Ranks
    count with tp fastest, then copies, then pp.

    Raises: ValueError naming what is below 1, or too large to be meant
    """

    layers: int
    kv_heads: int
    block_size: int
    tp: int = 1
    pp: int = 1
    copies: int = 1

    def __post_init__(self) -> None:
        for name in ("layers", "kv_heads", "block_size", "tp", "pp", "copies"):
            value = getattr(self, name)
            if not 1 <= value <= MAX_DEGREE:
                raise ValueError(f"{name} must be from 1 to {MAX_DEGREE}, got {value}")
        if self.pp > self.layers:
            raise ValueError(f"pp {self.pp} is more than the {self.layers} layers")

    @property
    def ranks(self) -> int:
        """The ranks of the replica."""
        return self.pp * self.copies * self.tp

    def layers_of(self, rank: int) -> range:
        """Return the layers that a rank holds."""
        return self.stage_layers(rank // (self.copies * self.tp))

    def heads_of(self, rank: int) -> range:
        """Return the heads that a rank holds."""
        return self.tp_heads(rank % self.tp)

    def stage_layers(self, stage: int) -> range:
        """Return the layers of a pipeline stage."""
        base, extra = divmod(self.layers, self.pp)
        first = stage * base + min(stage, extra)
        return range(first, first + base + (stage < extra))

    def tp_heads(self, place: int) -> range:
        """Return the heads at a place among the tensor-parallel ranks."""
        first = place * self.kv_heads // self.tp
        if self.tp > self.kv_heads:
            return range(first, first + 1)
        return range(first, (place + 1) * self.kv_heads // self.tp)

    def holders(self, layer: int, head: int) -> tuple[int, ...]:
        """Return the ranks that hold a head of a layer."""
        stage = next(stage for stage in range(self.pp) if layer in self.stage_layers(stage))
        places = [place for place in range(self.tp) if head in self.tp_heads(place)]
        first = stage * self.copies
        return tuple((first + copy) * self.tp + place for copy in range(self.copies) for place in places)


@dataclass(frozen=True, slots=True, kw_only=True)
class KvRoute:
    """What one rank of the source sends to one rank of the target: these heads of these layers, for all tokens.

    Layers and heads are the model's, not a rank's own; layers may come with a step.
    """

    source: int
    target: int
    layers: range
    heads: range


@lru_cache(maxsize=256)
def kv_routes(source: KvLayout, target: KvLayout) -> tuple[KvRoute, ...]:
    """Return all routes between two layouts of one model.

    Raises: ValueError when they are not of one model
    """
    for name in ("layers", "kv_heads"):
        if getattr(source, name) != getattr(target, name):
            raise ValueError(f"the source has {getattr(source, name)} {name}, the target {getattr(target, name)}")
    stages = [each.stage_layers(stage) for each in (source, target) for stage in range(each.pp)]
    heads = [each.tp_heads(place) for each in (source, target) for place in range(each.tp)]
    return tuple(
        route
        for layer_part in _parts(stages)
        for head_part in _parts(heads)
        for route in _shared_out(
            source.holders(layer_part.start, head_part.start),
            target.holders(layer_part.start, head_part.start),
            layer_part,
            head_part,
        )
    )


def token_cuts(tokens: range, block_sizes: Iterable[int]) -> list[int]:
    """Return where a run of tokens is cut so that no piece crosses a block on either side, both ends included."""
    if not tokens:
        return []
    cuts = {tokens.start, tokens.stop}
    for size in set(block_sizes):
        cuts.update(range(-(-tokens.start // size) * size, tokens.stop, size))
    return sorted(cuts)


def _parts(ranges: Sequence[range]) -> list[range]:
    """Return the pieces between all ends of some ranges: each range is a run of whole pieces."""
    ends = sorted({end for each in ranges for end in (each.start, each.stop)})
    return [range(first, end) for first, end in pairwise(ends)]


def _shared_out(senders: Sequence[int], receivers: Sequence[int], layers: range, heads: range) -> Iterator[KvRoute]:
    """Share out what some ranks all hold, and others all want."""
    # As many groups as come out even. A group with more than one sender has a layer from each in turn, and each of its
    # receivers begins with another.
    groups = gcd(len(senders), len(receivers))
    turns = len(senders) // groups
    for index, receiver in enumerate(receivers):
        group = senders[index % groups :: groups]
        for turn, sender in enumerate(group):
            own = range(layers.start + (turn - index // groups) % turns, layers.stop, turns)
            if own:
                yield KvRoute(source=sender, target=receiver, layers=own, heads=heads)
