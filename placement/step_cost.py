"""How long a step of one pipeline stage takes: a roofline for each operation, and the exchanges between ranks.

An operation takes as long as its arithmetic or its traffic with memory needs, whichever is more, at the share of the
device's figures that is reached. Exchanges wait for the slowest link of their group. Nothing is taken to overlap, so
that figures are those of the plain path.

Owns the formulas. ``Efficiency`` is what calibration replaces.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from .model_cut import Cut, Product
from .model_sizes import ExpertMlp, GroupedAttention, LatentAttention, Layer
from .replica_links import ReplicaLinks
from .topology import DeviceType, Link

_OPERATIONS_PER_LAYER = 12
"""Launches of a layer besides its exchanges: products, norms, rotation, attention, activation."""

LINEAR, EXPERTS, ATTENTION, HEAD = "linear layers", "experts", "attention", "output head"
OVERHEAD, SUMS, EXCHANGE, SENDS = "launches", "sums over tp", "exchange of experts' rows", "sends between stages"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a step computes: rows that draw one token each, and chunks of prompts.

    ``decode_context``: positions that a decoding row attends to, on average. ``prefill_start``: positions that are
    computed before a chunk. ``prefill_rows``: chunks, of which ``prefill_tokens`` are the tokens together.
    """

    decode_rows: float = 0
    decode_context: float = 0
    prefill_tokens: float = 0
    prefill_start: float = 0
    prefill_rows: float = 1

    @property
    def tokens(self) -> float:
        """All tokens of the step."""
        return self.decode_rows + self.prefill_tokens


def _one(_: float) -> float:
    return 1.0


def _one_of_two(_: float, __: float) -> float:
    return 1.0


def _as_many(rows: float) -> float:
    return rows


def filled_rows(rows: float) -> float:
    """Return the rows that a product on a CPU computes for so many: it is made for few sizes (a test holds this against
    ``kernels/cpu/row_buckets.py``).
    """
    pieces, rest = divmod(math.ceil(rows), 256)
    if rest > 64:
        rest = -(-rest // 32) * 32
    elif rest > 8:
        rest = -(-rest // 8) * 8
    return float(256 * pieces + rest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """How a device falls short of its figures.

    The shares are guesses in the middle of what engines reach. Factors multiply times and come from measured steps: of
    all but attention by tokens, for steps that decode and for chunks of prompts; of attention by rows and context, and
    by tokens and positions before them. ``rows``: how many rows a product computes for so many.

    Units: operation_s, a launch; step_s, a step as a whole
    """

    compute: float = 0.6
    bandwidth: float = 0.75
    attention_compute: float = 0.4
    attention_bandwidth: float = 0.6
    link: float = 0.75
    operation_s: float = 2e-6
    step_s: float = 5e-4
    decode_linear: Callable[[float], float] = _one
    prefill_linear: Callable[[float], float] = _one
    decode_attention: Callable[[float, float], float] = _one_of_two
    prefill_attention: Callable[[float, float], float] = _one_of_two
    rows: Callable[[float], float] = _as_many

    def linear_factor(self, step: Step) -> float:
        """Return the factor of all but attention: between the two kinds, by whose tokens the step's are."""
        tokens = self.rows(step.tokens)
        decoding = step.decode_rows / step.tokens
        if decoding in (0.0, 1.0):
            return self.decode_linear(tokens) if decoding else self.prefill_linear(tokens)
        return float(self.decode_linear(tokens) ** decoding * self.prefill_linear(tokens) ** (1 - decoding))


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """The seconds of a step on one stage, by what they are spent on."""

    parts: dict[str, float] = field(default_factory=dict)
    by_memory: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """The cost of steps of a replica: a cut model on devices of one type, joined by links."""

    cut: Cut
    device: DeviceType
    links: ReplicaLinks
    efficiency: Efficiency = field(default_factory=Efficiency)

    def stage(self, stage: int, step: Step) -> StageCost:
        """Return what a step costs on one stage, with what it sends to the next."""
        parts: dict[str, float] = {}
        by_memory: dict[str, float] = {}
        layers = self.cut.stage(stage)
        tokens = self.efficiency.rows(step.tokens)
        factor = self.efficiency.linear_factor(step)

        def add(name: str, seconds: float, memory_s: float = 0.0) -> None:
            parts[name] = parts.get(name, 0.0) + seconds
            by_memory[name] = by_memory.get(name, 0.0) + memory_s

        for layer, count in layers:
            add(ATTENTION, *_times(count, self._attention(layer, step)))
            add(LINEAR, *_times(count * factor, self._products(self.cut.attention_products, tokens)))
            if isinstance(layer.mlp, ExpertMlp):
                add(EXPERTS, *_times(count * factor, self._experts(layer.mlp, tokens)))
                add(LINEAR, *_times(count * factor, self._products(self.cut.shared_products(layer.mlp), tokens)))
                add(EXCHANGE, count * self._exchange(layer.mlp, tokens))
            else:
                add(LINEAR, *_times(count * factor, self._products(self.cut.mlp_products(layer.mlp), tokens)))
            add(SUMS, count * self._sums(layer, tokens))
        num_layers = sum(count for _, count in layers)
        launches = num_layers * _OPERATIONS_PER_LAYER * self.efficiency.operation_s + self.efficiency.step_s
        add(OVERHEAD, launches * factor)
        if stage == self.cut.degrees.pp - 1:
            head = Product(inputs=self.cut.model.hidden, outputs=self.cut.vocabulary)
            drawn = step.decode_rows + (step.prefill_rows if step.prefill_tokens else 0)
            add(HEAD, *_times(factor, self._products((head,), drawn)))
        else:
            add(SENDS, self._send(tokens))
        return StageCost(parts=parts, by_memory=by_memory)

    def _products(self, products: tuple[Product, ...], rows: float, *, copies: float = 1) -> tuple[float, float]:
        """Return the seconds, and how many of them memory alone would take, of matrix products over some rows."""
        model = self.cut.model
        flops = self._flops(model.linear_dtype) * self.efficiency.compute
        bandwidth = self.device.memory_bytes_per_s * self.efficiency.bandwidth
        seconds = memory_s = 0.0
        for product in products:
            moved = (product.inputs + product.outputs) * rows * model.number_bytes
            memory = (product.numbers * copies * model.weight_bytes + moved) / bandwidth
            seconds += max(2 * product.numbers * rows / flops, memory)
            memory_s += memory
        return seconds, memory_s

    def _experts(self, mlp: ExpertMlp, tokens: float) -> tuple[float, float]:
        ranks = self.cut.expert_ranks
        router = Product(inputs=self.cut.model.hidden, outputs=mlp.experts)
        routed = self._products((router,), tokens / ranks)
        slots = self.cut.slots(mlp)
        rows = tokens * mlp.top_k * slots / mlp.experts
        # Of the rank's experts only those are read that a token has chosen.
        touched = slots * (1 - (1 - mlp.top_k / mlp.experts) ** tokens)
        experts = self._products(self.cut.mlp_products(mlp), rows, copies=touched)
        return routed[0] + experts[0], routed[1] + experts[1]

    def _attention(self, layer: Layer, step: Step) -> tuple[float, float]:
        """Return the seconds of attention itself, without its linear layers, in one layer."""
        bandwidth = self.device.memory_bytes_per_s * self.efficiency.attention_bandwidth
        flops = self._flops(self.cut.model.dtype) * self.efficiency.attention_compute
        kv_bytes = self.cut.kv_layer_bytes
        seconds = memory_s = 0.0
        if step.decode_rows:
            seen = _seen(layer, step.decode_context)
            work = step.decode_rows * seen * self._score_flops(absorbed=True) / flops
            memory = step.decode_rows * seen * kv_bytes / bandwidth
            factor = self.efficiency.decode_attention(step.decode_rows, seen)
            seconds += max(work, memory) * factor
            memory_s += memory * factor
        if step.prefill_tokens:
            chunk = step.prefill_tokens / step.prefill_rows
            seen = _seen(layer, step.prefill_start + (chunk + 1) / 2)
            work = step.prefill_tokens * seen * self._score_flops(absorbed=False) / flops
            memory = step.prefill_rows * (step.prefill_start + chunk) * kv_bytes / bandwidth
            factor = self.efficiency.prefill_attention(step.prefill_tokens, step.prefill_start)
            seconds += max(work, memory) * factor
            memory_s += memory * factor
        return seconds, memory_s

    def _score_flops(self, *, absorbed: bool) -> float:
        """Return the arithmetic of one query row against one position, over the rank's heads."""
        match self.cut.model.attention:
            case GroupedAttention(head_dim=head_dim):
                each = 4 * head_dim
            case LatentAttention() as latent if absorbed:
                # Decoding works on the compressed vector itself.
                each = 2 * (2 * latent.kv_rank + latent.rotary_dim)
            case LatentAttention() as latent:
                each = 2 * (latent.plain_dim + latent.rotary_dim + latent.value_dim)
        return each * self.cut.heads

    def _sums(self, layer: Layer, tokens: float) -> float:
        """Return the seconds of a layer's sums over the tensor-parallel ranks."""
        if self.links.tp is None:
            return 0.0
        degrees = self.cut.degrees
        one = all_reduce_s(self._hidden_bytes(tokens), degrees.tp, self._link(self.links.tp))
        if not isinstance(layer.mlp, ExpertMlp) or self.cut.expert_ranks == 1:
            return 2 * one
        shared = one if layer.mlp.shared_intermediate else 0.0
        # The experts' columns are summed over the rows of one rank's share.
        columns = 0.0
        if not degrees.experts_over_tp:
            share = self._hidden_bytes(tokens / degrees.ep)
            columns = all_reduce_s(share, degrees.tp, self._link(self.links.tp))
        return one + shared + columns

    def _exchange(self, mlp: ExpertMlp, tokens: float) -> float:
        """Return the seconds in which rows go to their experts' ranks and back, and every rank gets all results."""
        ranks = self.cut.expert_ranks
        if ranks == 1 or self.links.experts is None:
            return 0.0
        link = self._link(self.links.experts)
        own = tokens / ranks
        # A row goes once to each other rank that has a chosen expert of it, and comes back once for each expert.
        out = own * (ranks - 1) * (1 - (1 - 1 / ranks) ** mlp.top_k)
        back = own * mlp.top_k * (ranks - 1) / ranks
        # Counts go ahead of the rows, and the shares are put together at the end.
        gathered = own * (ranks - 1)
        moved = self._hidden_bytes(out + back + gathered)
        return moved / link.bytes_per_s + 4 * link.latency_s

    def _send(self, tokens: float) -> float:
        if self.links.stages is None:
            return 0.0
        link = self._link(self.links.stages)
        return self._hidden_bytes(tokens) / link.bytes_per_s + link.latency_s

    def _hidden_bytes(self, tokens: float) -> float:
        return tokens * self.cut.model.hidden * self.cut.model.number_bytes

    def _link(self, link: Link) -> Link:
        return Link(bytes_per_s=link.bytes_per_s * self.efficiency.link, latency_s=link.latency_s)

    def _flops(self, dtype: str) -> float:
        """Return the arithmetic a second in a type; in the nearest that the device has where it lacks it."""
        for name in (dtype, "bfloat16", "float16", "float32"):
            if name in self.device.flops:
                return self.device.flops[name]
        return max(self.device.flops.values())


def all_reduce_s(message_bytes: float, ranks: int, link: Link) -> float:
    """Return the seconds in which ``ranks`` add up a message, as a ring sends it or a tree does, whichever is less."""
    if ranks == 1:
        return 0.0
    ring = 2 * (ranks - 1) * (message_bytes / ranks / link.bytes_per_s + link.latency_s)
    tree = 2 * (ranks - 1).bit_length() * (message_bytes / link.bytes_per_s + link.latency_s)
    return min(ring, tree)


def _seen(layer: Layer, context: float) -> float:
    return context if layer.window is None else min(context, layer.window)


def _times(factor: float, cost: tuple[float, float]) -> tuple[float, float]:
    return cost[0] * factor, cost[1] * factor
