"""Moves experts between ranks while they serve, so that every rank has about as much to do.

Every ``interval`` steps the ranks of a group add up which experts tokens went to, and by the policy ``affinity`` which
experts the same tokens went to, and all come to the same next placement (``placement.expert_plan``), because they
compute it from the same numbers. A rank that
gets an expert reads it from the checkpoint on a thread of its own, and brings at most one a step into the form that it
multiplies with; when all ranks say that they are ready, all switch before the same step. Nothing waits meanwhile, and
no request notices: which replica computes changes no bits.

Source: the problem and its two policies are those of EPLB (DeepSeek-V3, arXiv 2412.19437, section 3.4)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ...comm.collectives import Collectives
from ...comm.expert_map import ExpertMap, map_of
from ...placement.expert_counts import DecayedCounts
from ...placement.expert_moves import Rebalance
from ...placement.expert_plan import next_placement
from ...placement.experts import ExpertPlacement
from ...sdk.errors import CheckpointError
from ..models.expert_ranks import ExpertRanks
from ..models.experts import SlotProducts

logger = logging.getLogger(__name__)

ReadExpert = Callable[[int, int], tuple[Tensor, Tensor]]
"""Reads (layer, expert): gate|up and down, as much of them as the rank has."""

Prepare = Callable[[Tensor], Callable[[Tensor, Tensor | None], Tensor]]
"""Brings a weight into the form that the rank multiplies with."""

_ASK_EVERY = 4
_READY, _ON_ITS_WAY, _FAILED = 0, 1, 2
_HALF_LIFE_INTERVALS = 1.0


@dataclass(frozen=True, slots=True)
class _Plan:
    """What to change to, and every layer's tables for it."""

    rebalance: Rebalance
    maps: tuple[ExpertMap, ...]


@dataclass(slots=True)
class _Change:
    """A placement on its way: planned, then read, then prepared; by layer and slot of this rank."""

    planned: Future[_Plan]
    reading: dict[tuple[int, int], Future[tuple[Tensor, Tensor]]] | None = None
    prepared: dict[tuple[int, int], SlotProducts] = field(default_factory=dict)
    failed: bool = False

    @property
    def state(self) -> int:
        """What the other ranks have to know: the largest of all ranks' says what to do."""
        if self.failed:
            return _FAILED
        return _READY if self.reading is not None and not self.reading else _ON_ITS_WAY


class ExpertBalance:
    """The experts of a rank's layers. ``begin_step`` is called before every step, on every rank of the group."""

    def __init__(
        self,
        layers: dict[int, ExpertRanks],
        placement: ExpertPlacement,
        *,
        interval: int,
        policy: str,
        read: ReadExpert,
        prepare_gate_up: Prepare,
        prepare_down: Prepare,
        device: torch.device,
    ) -> None:
        """Take the layers by their number, and the placement they begin with, whose layers are these in order.

        ``policy``: one of ``placement.expert_plan``'s.
        """
        self._numbers = tuple(layers)
        self._layers = tuple(layers.values())
        self._group: Collectives = self._layers[0].group
        self._placement = placement
        self._interval = interval
        self._read = read
        self._prepare_gate_up, self._prepare_down = prepare_gate_up, prepare_down
        self._device = device
        self._counts = DecayedCounts(
            len(self._layers), placement.num_experts, half_life_steps=_HALF_LIFE_INTERVALS * interval
        )
        self._pairs_LEE: Tensor | None = None
        if policy == "affinity":
            for layer in self._layers:
                layer.count_pairs()
            self._pairs_LEE = torch.zeros((len(self._layers), placement.num_experts, placement.num_experts))
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="slipstream-experts")
        self._change: _Change | None = None
        self._steps = 0
        self.switches = 0
        """Placements that have been put into force."""

    @property
    def placement(self) -> ExpertPlacement:
        """The placement in force."""
        return self._placement

    def begin_step(self) -> None:
        """Count loads, prepare what has been read, and switch when all ranks are ready."""
        self._steps += 1
        if self._change is not None:
            self._go_on(self._change)
        elif self._steps % self._interval == 0:
            self._plan()

    def close(self) -> None:
        """Stop reading."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    def _plan(self) -> None:
        own_LE = torch.stack([layer.load_E for layer in self._layers]).to(self._device)
        for layer in self._layers:
            layer.load_E.zero_()
        # Counts add up exactly, in whatever order.
        all_LE = self._group.all_reduce(own_LE).wait()
        self._counts.observe(all_LE.tolist(), steps=self._interval)
        if self._pairs_LEE is not None:
            self._observe_pairs(self._pairs_LEE)
        loads = self._counts.counts
        if not all(any(layer) for layer in loads):
            return
        # Some layers take a while: beside the steps, on every rank for itself.
        self._change = _Change(planned=self._worker.submit(self._next_plan, loads))

    def _observe_pairs(self, pairs_LEE: Tensor) -> None:
        """Let what was counted fade as loads do, and add what the ranks have counted since."""
        pairs_LEE.mul_(0.5 ** (1 / _HALF_LIFE_INTERVALS))
        for layer, all_EE in zip(self._layers, pairs_LEE, strict=True):
            assert layer.pairs_EE is not None, "begun with this object"
            all_EE += self._group.all_reduce(layer.pairs_EE).wait().to(all_EE.device)
            layer.pairs_EE.zero_()

    def _next_plan(self, loads: Sequence[Sequence[float]]) -> _Plan:
        # Nobody writes to the pairs meanwhile: the next interval is looked at when this one's plan is in force.
        pairs = None if self._pairs_LEE is None else partial(_pairs_of, self._pairs_LEE)
        change = next_placement(self._placement, loads, pairs=pairs)
        placement = change.placement
        maps = tuple(map_of(placement, index, device=self._device) for index in range(placement.num_layers))
        return _Plan(change, maps)

    def _go_on(self, change: _Change) -> None:
        if change.reading is None:
            if change.planned.done():
                change.reading = self._begin_reading(change.planned.result().rebalance)
        else:
            self._prepare_one(change, change.reading)
        if self._steps % _ASK_EVERY:
            return
        state = torch.tensor([change.state], dtype=torch.int64, device=self._device)
        worst = int(self._group.all_reduce(state, op="max").wait())
        if worst == _READY:
            self._switch(change, change.planned.result())
        elif worst == _FAILED:
            # Some rank cannot have its experts: all stay as they are, and try again at the next interval.
            self._change = None

    def _begin_reading(self, change: Rebalance) -> dict[tuple[int, int], Future[tuple[Tensor, Tensor]]]:
        rank, per_rank = self._group.rank, self._placement.slots_per_rank
        return {
            (move.layer, move.slot - rank * per_rank): self._worker.submit(
                self._read, self._numbers[move.layer], move.expert
            )
            for move in change.moves
            if move.destination == rank
        }

    def _prepare_one(self, change: _Change, reading: dict[tuple[int, int], Future[tuple[Tensor, Tensor]]]) -> None:
        for place, weights in list(reading.items()):
            if weights.done():
                try:
                    gate_up, down = weights.result()
                except CheckpointError:
                    logger.exception("experts stay where they are: layer %d cannot be read", self._numbers[place[0]])
                    change.failed = True
                    return
                change.prepared[place] = (self._prepare_gate_up(gate_up), self._prepare_down(down))
                del reading[place]
                return

    def _switch(self, change: _Change, plan: _Plan) -> None:
        rank, placement = self._group.rank, plan.rebalance.placement
        for index, layer in enumerate(self._layers):
            held = dict(zip(self._placement.experts_on(index, rank), layer.slots, strict=True))
            slots = tuple(
                change.prepared.get((index, slot)) or held[expert]
                for slot, expert in enumerate(placement.experts_on(index, rank))
            )
            layer.switch(plan.maps[index], slots)
        self.switches += placement != self._placement
        self._placement, self._change = placement, None


def _pairs_of(pairs_LEE: Tensor, layer: int) -> list[list[float]]:
    """Return one layer's pairs as numbers: of all layers at once they would take gigabytes."""
    pairs: list[list[float]] = pairs_LEE[layer].tolist()
    return pairs
