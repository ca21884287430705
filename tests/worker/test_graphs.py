"""Decoding steps by graphs, on a CPU in the interpreter: buckets, rows that fill them, room for keys, what is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from slipstream.kernels import backends
from slipstream.kernels.launch import INTERPRETED
from slipstream.runtime.models.decoder import Decoder, load_decoder
from slipstream.runtime.models.kv_cache import KvCache
from slipstream.runtime.models.registry import read_model_spec
from slipstream.runtime.worker.graph_backend import graph_backend
from slipstream.runtime.worker.graphs import MOST_ROWS, DecodeGraphs, bucket_sizes
from slipstream.runtime.worker.step_batch import BatchBuilder, StepRows
from slipstream.runtime.worker.step_forward import StepForward
from slipstream.tests.fakes.replayed_graphs import ReplayedGraphs
from slipstream.tests.models.checkpoints import VOCABULARY, make_checkpoint

CPU = torch.device("cpu")
BLOCK, COLUMNS, MOST = 8, 8, 5
BLOCKS = MOST * COLUMNS

Load = Callable[[str], Decoder]


@pytest.fixture(autouse=True)
def _by_triton() -> Iterator[None]:
    if not INTERPRETED:
        pytest.skip("no Triton here, or it is not interpreted")
    # Everything else by torch: kernels take their time in the interpreter.
    backends.use("torch,attention=triton")
    yield
    backends.use("auto")


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    @cache
    def load_model(name: str) -> Decoder:
        path: Path = make_checkpoint(name, tmp_path_factory.mktemp(name))
        return load_decoder(path, read_model_spec(path), dtype=torch.float32, device=CPU)

    return load_model


@pytest.fixture
def decoder(load: Load) -> Decoder:
    return load("llama_biases")


def graphs_of(decoder: Decoder, cache: KvCache, backend: ReplayedGraphs) -> DecodeGraphs:
    graphs = DecodeGraphs.where_possible(
        BatchBuilder(model=decoder, cache=cache, deterministic=False),
        backend,
        scratch_block=BLOCKS,
        most_rows=MOST,
        most_columns=COLUMNS,
    )
    assert graphs is not None
    return graphs


class Pair:
    """A decoder with two caches: one way as ever, the other by graphs.

    Sequences have some keys and values already; the blocks that they enter later hold what is no number.
    """

    def __init__(self, decoder: Decoder, seed: int) -> None:
        self._draw = np.random.default_rng(seed)
        self._tables = self._draw.permutation(BLOCKS).astype(np.int32).reshape(MOST, COLUMNS)
        self._lengths = np.array([6, 15, 0, 31, 8], np.int32)
        self.caches = [KvCache.allocate(decoder.spec, BLOCKS + 1, BLOCK, torch.float32, CPU) for _ in range(2)]
        for one, other in zip(self.caches[0].layers, self.caches[1].layers, strict=True):
            one.fill_(float("nan"))
            for blocks, length in zip(self._tables, self._lengths, strict=True):
                entered = torch.from_numpy(blocks[: -(-int(length) // BLOCK)]).long()
                numbers = self._draw.standard_normal((2, len(entered), *one.shape[2:]), dtype=np.float32)
                one[:, entered] = torch.from_numpy(numbers)
            other.copy_(one)
        self.backend = ReplayedGraphs()
        with torch.inference_mode():
            self.graphs = graphs_of(decoder, self.caches[1], self.backend)
        self._ways = [
            StepForward(decoder, cache, block_size=BLOCK, deterministic=False, graphs=each)
            for cache, each in zip(self.caches, (None, self.graphs), strict=True)
        ]

    @torch.inference_mode()
    def warm_up(self) -> None:
        for size in self.graphs.missing:
            assert self.graphs.capture(size)

    @torch.inference_mode()
    def step(self, sequences: list[int], count: int = 1) -> None:
        """Compute the next tokens of some sequences both ways."""
        starts = self._lengths[sequences]
        rows = StepRows(
            token_ids_T=torch.from_numpy(self._draw.integers(0, VOCABULARY, count * len(sequences))),
            starts=starts,
            counts=np.full(len(sequences), count, np.int32),
            prompt_lengths=np.maximum(starts, 1),
            block_tables=self._tables[sequences],
        )
        self._lengths[sequences] += count
        as_ever, by_graph = (way.run(rows) for way in self._ways)
        assert not as_ever.isnan().any()
        assert torch.equal(as_ever, by_graph)

    def check_caches(self) -> None:
        """No sequence's block differs; the scratch block belongs to nobody."""
        for one, other in zip(self.caches[0].layers, self.caches[1].layers, strict=True):
            assert torch.equal(one[:, :BLOCKS].nan_to_num(7.5), other[:, :BLOCKS].nan_to_num(7.5))


@pytest.mark.parametrize("name", ["llama_biases", "qwen3_mixed_layers", "llama_dynamic"])
def test_steps_by_graphs_have_the_bits_of_other_steps(load: Load, name: str, seed: int) -> None:
    pair = Pair(load(name), seed)
    pair.warm_up()
    assert pair.graphs.sizes == bucket_sizes(MOST)
    # Into new blocks and to the ends of others, in graphs that are full and such as are filled up.
    for sequences in ([0], [1, 0, 2], [0, 1, 2, 3], [4, 1, 3, 0, 2]):
        pair.step(sequences)
    pair.check_caches()
    assert pair.graphs.replays == pair.backend.replays == 4


def test_preparing_a_bucket_touches_no_sequence(decoder: Decoder, seed: int) -> None:
    pair = Pair(decoder, seed)
    with torch.inference_mode():
        pair.graphs.prepare(5)
    pair.check_caches()
    scratch = pair.caches[1].layers[0][:, BLOCKS]
    assert not scratch.isnan().any() and scratch[:, :, 0].any() and not scratch[:, :, 1:].any()


def test_what_is_no_decoding_step_runs_as_ever(decoder: Decoder, seed: int) -> None:
    pair = Pair(decoder, seed)
    pair.step([0])
    assert not pair.graphs.replays, "nothing is captured before it is said"
    pair.warm_up()
    pair.step([0, 1], count=2)
    assert not pair.graphs.replays
    pair.step([0, 1])
    assert pair.backend.replays == 1


def test_a_step_that_a_graph_has_no_room_for_runs_as_ever(
    decoder: Decoder, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefixes shared by many rows are counted for each of them."""
    pair = Pair(decoder, seed)
    monkeypatch.setattr(DecodeGraphs, "room", lambda self, size: size)
    pair.warm_up()
    pair.step([0, 1])
    assert pair.graphs.replays == 1
    monkeypatch.setattr(DecodeGraphs, "room", lambda self, size: size - 1)
    pair.step([0, 1])
    assert pair.graphs.replays == 1


def test_a_pass_that_cannot_be_captured_is_told_and_left(
    decoder: Decoder, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    pair = Pair(decoder, seed)
    pair.backend.refuses = lambda: "operation not permitted when stream is capturing"
    with torch.inference_mode():
        pair.graphs.prepare(2)
        assert not pair.graphs.capture(2)
    assert "decoding steps are not captured as graphs: operation not permitted" in caplog.text
    assert not pair.graphs.missing
    pair.step([0, 1])
    assert not pair.graphs.replays


def test_room_is_for_what_the_cache_can_hold(decoder: Decoder) -> None:
    cache = KvCache.allocate(decoder.spec, BLOCKS + 1, BLOCK, torch.float32, CPU)
    graphs = graphs_of(decoder, cache, ReplayedGraphs())
    assert graphs.room(1) == 1, "a sequence of 128 positions is one span"
    assert graphs.room(5) == 5


def test_there_are_no_graphs_where_attention_is_not_by_triton(decoder: Decoder) -> None:
    backends.use("triton,attention=torch")
    cache = KvCache.allocate(decoder.spec, BLOCKS + 1, BLOCK, torch.float32, CPU)
    batches = BatchBuilder(model=decoder, cache=cache, deterministic=False)
    for backend in (ReplayedGraphs(), None):
        assert (
            DecodeGraphs.where_possible(batches, backend, scratch_block=BLOCKS, most_rows=4, most_columns=COLUMNS)
            is None
        )
        backends.use("triton")


def test_buckets_grow_by_at_most_a_half() -> None:
    assert bucket_sizes(1) == (1,)
    assert bucket_sizes(6) == (1, 2, 4, 6)
    sizes = bucket_sizes(256)
    assert sizes[-1] == 256 and len(sizes) < 20
    assert all(one < other <= 2 * one and (one < 4 or other <= 1.5 * one) for one, other in pairwise(sizes))
    assert bucket_sizes(4096)[-1] == MOST_ROWS


@pytest.mark.gpu
def test_cuda_captures_and_replays() -> None:
    backend = graph_backend(torch.device("cuda", 0))
    assert backend is not None
    x = torch.ones(4, device="cuda")
    captured = [backend.capture(partial(torch.mul, x, factor)) for factor in (2, 3)]
    x.fill_(5)
    for each, wanted in zip(captured, (10.0, 15.0), strict=True):
        each.replay()
        assert each.output.tolist() == [wanted] * 4
    with pytest.raises(RuntimeError):
        backend.capture(lambda: x * x.sum().item())


def test_a_cpu_captures_nothing() -> None:
    assert graph_backend(CPU) is None
