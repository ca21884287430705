"""One rank: builds the stack that it is asked for, measures its arms, and answers with the times.

A process of its own, on a host of its own; started by ``ranks``. Pinned to one core, with gloo's threads beside it on
the same: what the wire costs in work is paid by the rank that uses it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from slipstream.benchmarks.overlap.core_watch import CALM, CoreWatch
from slipstream.benchmarks.overlap.stack import Order, Stack, StackShape
from slipstream.comm.collectives import Collectives
from slipstream.comm.local_groups import local_group
from slipstream.comm.mesh import MeshShape
from slipstream.comm.overlap import run_interleaved, run_plain
from slipstream.comm.overlap_cost import PassCost
from slipstream.comm.overlap_measure import Clocks, measure_pass, ways_that_gain
from slipstream.comm.overlap_meter import OverlapMeter
from slipstream.comm.overlap_split import Cuts, cuts_worth_trying, part_sizes
from slipstream.comm.torch_groups import GroupSettings, Rendezvous, open_groups

_CPU = torch.device("cpu")
_BYTES = 4
"""The bytes of a float32."""
UNIT = 32
"""Rows that products are filled up to."""
_MOST_ROUNDS = 4
"""Rounds that are run for each that is wanted, where they are not calm."""
_TIMEOUT_S = 120.0


class Bench:
    """One stack, one step, and the ways to run it."""

    def __init__(self, group: Collectives, point: dict[str, Any]) -> None:
        shape = StackShape(
            hidden=point["hidden"],
            intermediate=point["intermediate"],
            layers=point["layers"],
            experts=point["experts"],
            spread=point["spread"],
        )
        self.group = group
        self.tokens: int = point["tokens"]
        self.order: Order = point["order"]
        (self.alone,) = local_group(1)
        self.stack = Stack(shape, rank=group.rank, ranks=group.size, seed=5, most_tokens=self.tokens)
        self.x_TH = torch.randn((self.tokens, shape.hidden), generator=torch.Generator().manual_seed(6))
        self.zeros_TH = torch.zeros_like(self.x_TH)
        self.cost = self._measure_cost()
        found = ways_that_gain(
            group,
            lambda tokens, cuts: self._run(group, tokens, cuts),
            [self.tokens],
            lambda tokens: cuts_worth_trying(self.cost, tokens, unit=UNIT),
            clock=time.perf_counter,
            device=_CPU,
        )
        self.cuts = found[0][1] if found else None
        self.meter = OverlapMeter(time.perf_counter, wire_s=self._expected_s)

    def arms(self) -> dict[str, Callable[[], None]]:
        """Return what is compared."""
        arms: dict[str, Callable[[], None]] = {
            "compute": lambda: self._run(self.alone, self.tokens, None),
            "wire": self._exchange_only,
            "serial": lambda: self._run(self.group, self.tokens, None),
            "overlapped": lambda: self._run(self.group, self.tokens, self.cuts, self.meter),
        }
        if self.cuts is None and self.tokens > 1:
            arms["halves"] = lambda: self._run(self.group, self.tokens, (self.tokens // 2,))
        if self.cuts is not None:
            arms["compute_cut"] = lambda: self._run(self.alone, self.tokens, self.cuts)
        return arms

    def _run(self, group: Collectives, tokens: int, cuts: Cuts | None, meter: OverlapMeter | None = None) -> None:
        order: Order = "plain" if group.size == 1 else self.order
        parts = self.stack.parts(tokens, cuts or ())
        run_interleaved(self.stack.pieces(group, self.x_TH[:tokens], parts, order), meter=meter)

    def _exchange_only(self) -> None:
        if self.stack.shape.spread:
            run_plain(self.stack.exchange_only(self.group, self.x_TH))
            return
        for _ in range(self.cost.collectives):
            self.group.all_reduce(self.zeros_TH).wait()

    def _measure_cost(self) -> PassCost:
        quarter = max(1, self.tokens // 4)
        cost = measure_pass(
            self.group,
            lambda tokens: self._run(self.alone, tokens, None),
            sorted({1, quarter, 2 * quarter, max(self.tokens - quarter, 1), self.tokens}),
            collectives=2 * self.stack.shape.layers,
            bytes_per_token=self.x_TH.shape[1] * _BYTES,
            clocks=Clocks(wall=time.perf_counter, work=time.process_time),
            device=_CPU,
        )
        if not self.stack.shape.spread:
            return cost
        # Each of ``top_k`` experts is another rank's as often as chance has it; a token's row goes there once, and each
        # expert's comes back: two exchanges of about so many of an all-reduce's bytes.
        away = (self.group.size - 1) / self.group.size
        return replace(cost, bytes_per_token=cost.bytes_per_token * away * self.stack.shape.top_k)

    def _expected_s(self, result: Tensor) -> float:
        return self.cost.collective_s(result.numel() * _BYTES)


def measure(group: Collectives, point: dict[str, Any], core: int) -> dict[str, Any]:
    """Run all arms of a point in turns; return each one's times in the calmest ``repeats`` rounds."""
    repeats: int = point["repeats"]
    with torch.inference_mode():
        bench = Bench(group, point)
        rounds = list(_rounds(group, bench.arms(), CoreWatch(core), repeats=repeats))
    totals = bench.meter.totals
    calmest = sorted(rounds, key=lambda round_: round_.disturbance)[:repeats]
    return {
        "cuts": bench.cuts,
        "times_s": {name: [round_.times_s[name] for round_ in calmest] for name in calmest[0].times_s},
        "others": calmest[-1].disturbance,
        "rounds": len(rounds),
        "wire_work": bench.cost.wire_work,
        "expected_serial_s": bench.cost.serial_s(bench.tokens),
        "expected_overlapped_s": bench.cost.overlapped_s(part_sizes(bench.cuts, bench.tokens)) if bench.cuts else None,
        "metered_hidden_s": totals.hidden_s / (len(rounds) + 1),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One run of each arm; ``disturbance``, of any of them on any rank: the share of its core that others used."""

    times_s: dict[str, float]
    disturbance: float


def _rounds(
    group: Collectives, arms: dict[str, Callable[[], None]], watch: CoreWatch, *, repeats: int
) -> Iterator[Round]:
    """Run rounds until there are ``repeats`` calm ones, or too many; every rank sees the same."""
    names = list(arms)
    calm = 0
    for number in range(_MOST_ROUNDS * repeats + 1):
        times_s, others = {}, 0.0
        for place in range(len(names)):
            # Every arm comes first, and follows the others, as often.
            name = names[(number + place) % len(names)]
            group.barrier()
            watch.start()
            began_s = time.perf_counter()
            arms[name]()
            times_s[name] = time.perf_counter() - began_s
            others = max(others, watch.others_share())
        (disturbance,) = group.all_reduce(torch.tensor([others]), op="max").wait().tolist()
        # The first one warms up.
        if number:
            calm += disturbance <= CALM
            yield Round(times_s=times_s, disturbance=disturbance)
        if calm == repeats:
            return


def _connect(options: argparse.Namespace) -> Collectives:
    """Meet the other ranks; rank 0 hosts the rendezvous."""
    mesh = MeshShape(tp=options.ranks)
    settings = GroupSettings(
        clock=time.monotonic,
        host_address=options.host_address,
        timeout_s=_TIMEOUT_S,
        open_timeout_s=_TIMEOUT_S,
        wire_yields=not options.busy_wire,
    )
    meet = Rendezvous.host if options.rank == 0 else Rendezvous.join
    rendezvous = meet(options.address, options.port, timeout_s=_TIMEOUT_S)
    return open_groups(mesh.place(options.rank), rendezvous, settings).tp


def main() -> None:
    """Meet the other ranks, then answer one line for each line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--address", required=True, help="of rank 0")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host-address", required=True, help="of this rank")
    parser.add_argument("--busy-wire", action="store_true", help="gloo's threads compete with those that compute")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    core = cores[options.rank % len(cores)]
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    group = _connect(options)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(group, json.loads(line), core)), flush=True)
    group.close()


if __name__ == "__main__":
    main()
