"""One rank: loads the model that it is asked for, computes prompts alone and divided, and answers with the times.

A process of its own, on a host of its own; started by ``overlap.ranks``. Pinned to one core with one thread, so that as
many ranks as there are cores are a fair many: gloo's threads share the rank's core.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from slipstream.benchmarks.overlap.core_watch import CoreWatch
from slipstream.comm.groups import MeshGroups
from slipstream.comm.mesh import MeshShape
from slipstream.comm.open_mesh import open_mesh_groups
from slipstream.comm.overlap import Begun, Parts, run_plain
from slipstream.comm.ring import RingPass
from slipstream.comm.ring_order import ring_hops
from slipstream.comm.sequence_split import SequenceSplit
from slipstream.comm.torch_groups import GroupSettings, Rendezvous
from slipstream.runtime.models.decoder import load_decoder
from slipstream.runtime.models.forward import build_divided_batch
from slipstream.runtime.models.kv_cache import KvCache
from slipstream.runtime.models.registry import read_model_spec
from slipstream.runtime.models.sharding import Shard
from slipstream.runtime.worker.step_batch import StepRows
from slipstream.runtime.worker.step_forward import StepForward
from slipstream.runtime.worker.wire_meter import ring_meter

_CPU = torch.device("cpu")
_BLOCK = 16
_GRAIN = 64
_TIMEOUT_S = 600.0


class Bench:
    """One model, and the ways to compute a prompt of it."""

    def __init__(self, groups: MeshGroups, question: dict[str, Any]) -> None:
        assert groups.sp is not None
        self.group = groups.sp
        self.tokens: int = question["tokens"]
        self.chunk: int = question["chunk"]
        spec = read_model_spec(Path(question["model"]))
        self.model = load_decoder(
            question["model"], spec, dtype=torch.float32, device=_CPU, groups=groups, shard=Shard(place=groups.place)
        )
        blocks = -(-self.tokens // _BLOCK)
        self.cache = KvCache.allocate(spec, num_blocks=blocks, block_size=_BLOCK, dtype=torch.float32, device=_CPU)
        self.table = np.arange(blocks, dtype=np.int32)[None]
        self.prompt = torch.randint(0, spec.vocab_size, (self.tokens,), generator=torch.Generator().manual_seed(1))
        self.split = SequenceSplit(rank=self.group.rank, ranks=self.group.size, fewest_tokens=1, grain=_GRAIN)
        self.kv_shape = (2 * spec.num_kv_heads, spec.head_dim)
        self.meter = ring_meter(self.group, bytes_per_token=4 * int(np.prod(self.kv_shape)))
        self.layers = StepForward(self.model, self.cache, block_size=_BLOCK, deterministic=False, ring_meter=self.meter)

    def arms(self) -> dict[str, Callable[[], None]]:
        """Return what is compared."""
        return {"alone": self._alone, "divided": self._divided, "serial": self._serial, "wire": self._wire}

    def _rows(self) -> list[StepRows]:
        rows = []
        for start in range(0, self.tokens, self.chunk):
            count = min(self.chunk, self.tokens - start)
            rows.append(
                StepRows(
                    token_ids_T=self.prompt[start : start + count],
                    starts=np.array([start], np.int32),
                    counts=np.array([count], np.int32),
                    prompt_lengths=np.array([self.tokens], np.int32),
                    block_tables=self.table,
                )
            )
        return rows

    def _alone(self) -> None:
        """One rank computes all of it; the others' cores are idle."""
        if self.group.rank == 0:
            for rows in self._rows():
                self.layers.run(rows)

    def _divided(self) -> None:
        for rows in self._rows():
            division = self.split.divide(rows.starts, rows.counts)
            assert division is not None, "chunks are long"
            self.layers.run_divided(rows, None, division)

    def _serial(self) -> None:
        """As divided, but for each hop is waited for before anything is attended to."""
        for rows in self._rows():
            division = self.split.divide(rows.starts, rows.counts)
            assert division is not None, "chunks are long"
            batch = build_divided_batch(
                division,
                token_ids=rows.token_ids_T,
                prompt_lengths=rows.prompt_lengths,
                block_tables=rows.block_tables,
                block_size=_BLOCK,
                spec=self.model.spec,
                dtype=torch.float32,
                device=_CPU,
            )
            run_plain(_at_once(self.model.forward_parts(batch, self.cache)))

    def _wire(self) -> None:
        """Exchange as much as often, and compute nothing."""
        hops = ring_hops(self.group.rank, self.group.size)
        for rows in self._rows():
            division = self.split.divide(rows.starts, rows.counts)
            assert division is not None, "chunks are long"
            own = torch.zeros((division.num_tokens, *self.kv_shape))
            for _ in range(self.model.spec.num_layers):
                passing = RingPass(self.group, own, division.tokens_of_piece)
                for hop in hops:
                    passing.take(hop, passing.begin(hop).wait())


def _at_once(steps: Parts) -> Parts:
    """Run a piece that waits for each work as soon as it has begun."""
    said = next(steps)
    while True:
        result = None
        if isinstance(said, Begun):
            said.work.wait()
        else:
            result = yield said
        try:
            said = next(steps) if result is None else steps.send(result)
        except StopIteration as stop:
            return cast("Tensor", stop.value)


@torch.inference_mode()
def measure(groups: MeshGroups, question: dict[str, Any], core: int) -> dict[str, Any]:
    """Run all arms in turns; return each one's times, and what the meter saw of the divided ones."""
    bench, watch = Bench(groups, question), CoreWatch(core)
    arms = list(bench.arms().items())
    times_s: dict[str, list[float]] = {name: [] for name, _ in arms}
    work_s: dict[str, list[float]] = {name: [] for name, _ in arms}
    others: list[float] = []
    warm = bench.meter.totals
    for number in range(question["repeats"] + 1):
        if number == 1:
            # The first round warms up.
            warm = bench.meter.totals
        for place in range(len(arms)):
            name, run = arms[(number + place) % len(arms)]
            bench.group.barrier(_TIMEOUT_S)
            watch.start()
            began_s, began_work_s = time.perf_counter(), time.process_time()
            run()
            if number:
                times_s[name].append(time.perf_counter() - began_s)
                work_s[name].append(time.process_time() - began_work_s)
                others.append(watch.others_share())
            bench.group.barrier(_TIMEOUT_S)
    totals, rounds = bench.meter.totals, question["repeats"]
    return {
        "times_s": times_s,
        "work_s": work_s,
        "others": max(others),
        "compute_s": (totals.compute_s - warm.compute_s) / rounds,
        "exposed_s": (totals.exposed_s - warm.exposed_s) / rounds,
    }


def _connect(options: argparse.Namespace) -> MeshGroups:
    """Meet the other ranks; rank 0 hosts the rendezvous."""
    mesh = MeshShape(sp=options.ranks)
    settings = GroupSettings(
        clock=time.monotonic,
        host_address=options.host_address,
        timeout_s=_TIMEOUT_S,
        open_timeout_s=_TIMEOUT_S,
        wire_yields=not options.busy_wire,
    )
    meet = Rendezvous.host if options.rank == 0 else Rendezvous.join
    rendezvous = meet(options.address, options.port, timeout_s=_TIMEOUT_S)
    return open_mesh_groups(mesh.place(options.rank), rendezvous, settings)


def main() -> None:
    """Meet the other ranks, then answer one line for each line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--address", required=True, help="of rank 0")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host-address", required=True, help="of this rank")
    parser.add_argument("--busy-wire", action="store_true")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    core = cores[options.rank % len(cores)]
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    groups = _connect(options)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(groups, json.loads(line), core)), flush=True)
    groups.close()


if __name__ == "__main__":
    main()
