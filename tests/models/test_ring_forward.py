"""A decoder whose long rows are divided over ranks, the ranks being threads, against one that computes all of them:
hidden states and every rank's keys and values; what passes between ranks, to the byte.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from slipstream.comm.groups import MeshGroups
from slipstream.comm.local_groups import local_group, run_ranks
from slipstream.comm.mesh import MeshShape
from slipstream.comm.overlap import run_plain
from slipstream.comm.overlap_meter import OverlapMeter, OverlapTotals
from slipstream.comm.sequence_split import SequenceSplit, tokens_of
from slipstream.runtime.clock import monotonic_clock
from slipstream.runtime.models.decoder import load_decoder
from slipstream.runtime.models.forward import ForwardBatch, build_divided_batch, build_forward_batch
from slipstream.runtime.models.kv_cache import KvCache
from slipstream.runtime.models.model_spec import ModelSpec
from slipstream.runtime.models.registry import read_model_spec
from slipstream.runtime.models.sharding import Shard
from slipstream.tests.fakes.thread_peers import SentByGroup, local_mesh
from slipstream.tests.models.checkpoints import VOCABULARY, make_checkpoint

CPU = torch.device("cpu")
TOLERANCE = 1e-4
BLOCK = 4
LONGEST = 160

Row = tuple[int, int, int]
"""Sequence, first position, tokens."""

STEPS: list[list[Row]] = [
    # Two long prompts side by side, and one that is short.
    [(0, 0, 96), (1, 0, 61), (2, 0, 9)],
    # Decoding and a short chunk beside a chunk that begins in the middle of a block.
    [(0, 96, 1), (1, 61, 70), (2, 9, 3)],
    [(2, 12, 128), (0, 97, 1), (1, 131, 1)],
    # Nothing to divide.
    [(2, 140, 1), (0, 98, 5)],
    [(0, 103, 57)],
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What a rank made of the steps: hidden states where it computed them, its cache's numbers, its meter."""

    hidden: list[Tensor]
    tokens: list[np.ndarray]
    layers: list[Tensor]
    divided: int
    totals: OverlapTotals


class Runner:
    """One rank with a cache that held something that is not a number before."""

    def __init__(self, path: Path, groups: MeshGroups, *, deterministic: bool) -> None:
        self.groups = groups
        self.deterministic = deterministic
        self.decoder = load_decoder(
            path,
            read_model_spec(path),
            dtype=torch.float32,
            device=CPU,
            groups=groups,
            shard=Shard(place=groups.place, fixed_order=deterministic),
        )
        blocks_each = LONGEST // BLOCK
        shuffled = np.random.default_rng(3).permutation(3 * blocks_each + 2)[: 3 * blocks_each]
        self.tables = shuffled.reshape(3, blocks_each).astype(np.int32)
        self.cache = KvCache.allocate(
            self.decoder.spec, num_blocks=3 * blocks_each + 2, block_size=BLOCK, dtype=torch.float32, device=CPU
        )
        for layer in self.cache.layers:
            layer.fill_(float("nan"))

    def run(self, steps: Sequence[Sequence[Row]], prompts: Tensor) -> Ran:
        place = self.groups.place
        split = SequenceSplit(rank=place.sp, ranks=place.shape.sp, fewest_tokens=32, grain=BLOCK)
        meter = OverlapMeter(monotonic_clock, wire_s=lambda _: 0.0)
        hidden, tokens, divided = [], [], 0
        for rows in steps:
            batch, own = self._batch(rows, prompts, split)
            divided += batch.ring is not None
            with torch.inference_mode():
                hidden.append(run_plain(self.decoder.forward_parts(batch, self.cache), meter=meter))
            tokens.append(own)
        used = sorted({int(self.tables[sequence, p // BLOCK]) for sequence, p in _positions(steps)})
        layers = [layer[:, used].clone() for layer in self.cache.layers]
        return Ran(hidden=hidden, tokens=tokens, layers=layers, divided=divided, totals=meter.totals)

    def _batch(self, rows: Sequence[Row], prompts: Tensor, split: SequenceSplit) -> tuple[ForwardBatch, np.ndarray]:
        sequences, starts, counts = np.array(rows, dtype=np.int32).T
        given = {
            "token_ids": torch.cat([prompts[s, start : start + count] for s, start, count in rows]),
            "prompt_lengths": np.full(len(rows), LONGEST, np.int32),
            "block_tables": self.tables[sequences],
            "block_size": BLOCK,
            "spec": self.decoder.spec,
            "dtype": torch.float32,
            "device": CPU,
            "deterministic": self.deterministic,
        }
        division = split.divide(starts, counts) if split.ranks > 1 else None
        if division is None:
            return build_forward_batch(starts=starts, counts=counts, **given), np.arange(int(counts.sum()))
        return build_divided_batch(division, **given), tokens_of(division.computed)


def _positions(steps: Sequence[Sequence[Row]]) -> list[tuple[int, int]]:
    return [(s, position) for rows in steps for s, start, count in rows for position in range(start, start + count)]


def prompts() -> Tensor:
    return torch.randint(0, VOCABULARY, (3, LONGEST), generator=torch.Generator().manual_seed(5))


def run(
    path: Path,
    mesh: MeshShape,
    *,
    deterministic: bool = False,
    steps: Sequence[Sequence[Row]] = STEPS,
    sent: SentByGroup | None = None,
) -> list[Ran]:
    groups = local_mesh(mesh, sent=sent)

    def body(rank: int) -> Ran:
        try:
            return Runner(path, groups[rank], deterministic=deterministic).run(steps, prompts())
        except BaseException:
            groups[rank].close()
            raise

    return run_ranks(local_group(mesh.size, name="all"), lambda me: body(me.rank))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda name: make_checkpoint(name, tmp_path_factory.mktemp(name)))


def assert_same(ran: list[Ran], alone: Ran, mesh: MeshShape, *, exact: bool = False) -> None:
    bound = 0.0 if exact else TOLERANCE
    for rank, mine in enumerate(ran):
        assert mine.divided == sum(any(count >= 32 for *_, count in rows) for rows in STEPS)
        for found, tokens, expected in zip(mine.hidden, mine.tokens, alone.hidden, strict=True):
            assert (found - expected[tokens]).abs().max() <= bound
        # Heads are shared over tp; every sequence-parallel rank has all positions.
        heads = [layer.shape[2] for layer in mine.layers]
        first = mesh.place(rank).tp
        for layer, expected, count in zip(mine.layers, alone.layers, heads, strict=True):
            part = expected[:, :, first * count : (first + 1) * count] if count < expected.shape[2] else expected
            written = ~part.isnan()
            assert torch.equal(written, ~layer.isnan())
            assert (layer[written] - part[written]).abs().max() <= bound


@pytest.mark.parametrize(
    "mesh",
    [MeshShape(sp=2), MeshShape(sp=3), MeshShape(sp=4), MeshShape(sp=2, tp=2)],
    ids=lambda mesh: f"sp={mesh.sp} tp={mesh.tp}",
)
@pytest.mark.parametrize("name", ["llama", "qwen3_mixed_layers"])
def test_divided_steps_give_the_same(name: str, mesh: MeshShape, checkpoint: Callable[[str], Path]) -> None:
    (alone,) = run(checkpoint(name), MeshShape())
    assert_same(run(checkpoint(name), mesh), alone, mesh)


@pytest.mark.parametrize(
    "name", ["llama_mqa", "llama_narrow_heads", "mistral_window", "llama_dynamic", "mixtral", "qwen3_moe_dense_among"]
)
def test_other_models_give_the_same(name: str, checkpoint: Callable[[str], Path]) -> None:
    (alone,) = run(checkpoint(name), MeshShape())
    assert_same(run(checkpoint(name), MeshShape(sp=3)), alone, MeshShape(sp=3))


@pytest.mark.parametrize("name", ["llama", "llama_mqa", "qwen3_mixed_layers"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_deterministic_divided_steps_give_the_same_bits(
    name: str, ranks: int, checkpoint: Callable[[str], Path]
) -> None:
    (alone,) = run(checkpoint(name), MeshShape(), deterministic=True)
    mesh = MeshShape(sp=ranks)
    assert_same(run(checkpoint(name), mesh, deterministic=True), alone, mesh, exact=True)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_rank_sends_what_the_others_lack_and_nothing_else(ranks: int, checkpoint: Callable[[str], Path]) -> None:
    sent: SentByGroup = {}
    spec = read_model_spec(checkpoint("llama"))
    tokens = 8 * ranks
    # Pieces of equal size; the step after it has nothing to divide, and sends nothing.
    steps = [[(0, 0, 2 * tokens)], [(0, 2 * tokens, 1), (1, 0, 20)]]
    ran = run(checkpoint("llama"), MeshShape(sp=ranks), steps=steps, sent=sent)
    own_bytes = 2 * tokens // ranks * kv_bytes(spec)
    ((group, counter),) = sent.items()
    assert group == ("sp", tuple(range(ranks)))
    for rank in range(ranks):
        found = sum(count for (source, _), count in counter.items() if source == rank)
        assert found == spec.num_layers * (ranks - 1) * own_bytes
    # One work for a hop and layer, and each was begun before the attention that hides it.
    assert {mine.totals.works for mine in ran} == {spec.num_layers * (ranks // 2)}
    assert all(mine.totals.wire_s > 0.0 for mine in ran)


def kv_bytes(spec: ModelSpec) -> int:
    """Return the bytes of one token's keys and values in one layer."""
    return 2 * spec.num_kv_heads * spec.head_dim * 4


def test_a_batch_that_is_not_divided_has_no_ring(checkpoint: Callable[[str], Path]) -> None:
    runner = Runner(checkpoint("llama"), local_mesh(MeshShape())[0], deterministic=False)
    split = SequenceSplit(rank=0, ranks=2, fewest_tokens=64, grain=BLOCK)
    batch, _ = runner._batch([(0, 0, 63)], prompts(), split)
    assert batch.ring is None
    divided, own = runner._batch([(0, 0, 64)], prompts(), split)
    assert divided.ring is not None
    assert len(own) == divided.token_ids_T.shape[0] == 32
    assert divided.attended == 0
    whole = replace(divided, ring=None)
    assert whole.positions_T.tolist() == [*range(16), *range(48, 64)]
