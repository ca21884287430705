"""Recorded decoding steps against the same steps computed as ever: hidden states and caches, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from slipstream.runtime.models.decoder import Decoder, load_decoder
from slipstream.runtime.models.kv_cache import KvCache
from slipstream.runtime.models.registry import read_model_spec
from slipstream.runtime.worker.recorded_steps import MOST_ROWS, RecordedSteps
from slipstream.runtime.worker.step_batch import StepRows
from slipstream.runtime.worker.step_forward import StepForward
from slipstream.tests.kernels.native_ways import compiled_or_skip, torch_alone
from slipstream.tests.models.checkpoints import VOCABULARY, make_checkpoint

CPU = torch.device("cpu")
BLOCK = 8
LONGEST = 320  # two spans of keys
BLOCKS = 16 * LONGEST // BLOCK

Load = Callable[[str, str, str], Decoder]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    @cache
    def path_of(name: str) -> Path:
        return make_checkpoint(name, tmp_path_factory.mktemp("checkpoints") / name)

    def load_case(name: str, dtype: str, quantization: str) -> Decoder:
        path, torch_dtype = path_of(name), getattr(torch, dtype)
        spec = read_model_spec(path)
        return load_decoder(path, spec, dtype=torch_dtype, device=CPU, quantization=quantization)

    return load_case


class Sequences:
    """Sequences that come, grow by a token a step, and go; their blocks are handed out as they are needed."""

    def __init__(self, seed: int) -> None:
        self._draw = np.random.default_rng(seed)
        self._free = self._draw.permutation(BLOCKS).tolist()
        self._lengths: list[int] = []
        self._blocks: list[list[int]] = []

    def rows(self, new: list[int], decoded: int) -> StepRows:
        """Return a step: prompts of ``new`` lengths, and the next token of the first ``decoded`` sequences."""
        picked = [*range(decoded), *range(len(self), len(self) + len(new))]
        self._lengths += [0] * len(new)
        self._blocks += [[] for _ in new]
        counts = [1] * decoded + new
        starts = [self._lengths[sequence] for sequence in picked]
        for sequence, count in zip(picked, counts, strict=True):
            self._lengths[sequence] += count
            while len(self._blocks[sequence]) * BLOCK < self._lengths[sequence]:
                self._blocks[sequence].append(self._free.pop())
        most = max(len(self._blocks[sequence]) for sequence in picked)
        tables = np.full((len(picked), most), 2**31 - 1, np.int32)
        for row, sequence in enumerate(picked):
            tables[row, : len(self._blocks[sequence])] = self._blocks[sequence]
        return StepRows(
            token_ids_T=torch.from_numpy(self._draw.integers(0, VOCABULARY, sum(counts))),
            starts=np.array(starts, np.int32),
            counts=np.array(counts, np.int32),
            prompt_lengths=np.array([max(1, start) for start in starts], np.int32),
            block_tables=tables,
        )

    def leave(self, sequence: int) -> None:
        """End a sequence; what it had is given to others."""
        self._free += self._blocks.pop(sequence)
        self._draw.shuffle(self._free)
        del self._lengths[sequence]

    def __len__(self) -> int:
        return len(self._lengths)


class Twins:
    """A decoder's layers twice, with a cache each: as they are, and recorded."""

    def __init__(self, decoder: Decoder) -> None:
        self.caches = [KvCache.allocate(decoder.spec, BLOCKS, BLOCK, decoder.dtype, CPU) for _ in range(2)]
        for layer in (*self.caches[0].layers, *self.caches[1].layers):
            layer.fill_(float("nan"))
        recorded = RecordedSteps.where_possible(decoder, self.caches[1])
        assert recorded is not None
        self.recorded = recorded
        self._decoder = decoder
        self._ways = [
            StepForward(decoder, cache, block_size=BLOCK, deterministic=False, recorded=each)
            for cache, each in zip(self.caches, (None, recorded), strict=True)
        ]

    @torch.inference_mode()
    def step(self, rows: StepRows) -> None:
        logits = [self._decoder.logits(way.run(rows)) for way in self._ways]
        assert not logits[0].isnan().any()
        assert torch.equal(*logits)

    def check_caches(self) -> None:
        for one, other in zip(self.caches[0].layers, self.caches[1].layers, strict=True):
            assert torch.equal(one.nan_to_num(7.5), other.nan_to_num(7.5))


def live(twins: Twins, seed: int, *, steps: int = 50) -> None:
    """Let up to nine sequences come and go."""
    sequences, draw = Sequences(seed), np.random.default_rng(seed)
    for _ in range(steps):
        while len(sequences) and draw.random() < 0.1:
            sequences.leave(int(draw.integers(len(sequences))))
        if not len(sequences) or (len(sequences) < 9 and draw.random() < 0.3):
            decoded = len(sequences) if draw.random() < 0.5 else 0
            twins.step(sequences.rows([int(draw.choice([1, 5, 40, 250]))], decoded))
        else:
            twins.step(sequences.rows([], int(draw.integers(1, len(sequences) + 1))))
    for batch in range(1, 10):
        while len(sequences) < batch:
            twins.step(sequences.rows([7], 0))
        for _ in range(BLOCK + 2):
            twins.step(sequences.rows([], batch))
    twins.check_caches()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("dtype", "quantization"), [("float32", "none"), ("bfloat16", "none"), ("float32", "int8"), ("bfloat16", "int4")]
)
def test_every_format_gives_the_same_bits(load: Load, seed: int, threads: int, dtype: str, quantization: str) -> None:
    twins = Twins(load("llama", dtype, quantization))
    live(twins, seed)
    assert set(range(1, 10)) <= set(twins.recorded.sizes)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", ["llama_biases", "llama_dynamic", "mistral_window", "qwen3_mixed_layers"])
def test_every_kind_of_layer_gives_the_same_bits(load: Load, seed: int, name: str) -> None:
    twins = Twins(load(name, "bfloat16", "none"))
    live(twins, seed)
    assert set(range(1, 10)) <= set(twins.recorded.sizes)


@pytest.mark.usefixtures("compiled")
def test_two_models_in_turns(load: Load, seed: int) -> None:
    both = [Twins(load(name, "float32", "none")) for name in ("llama", "mistral_window")]
    sequences = [Sequences(seed + i) for i in range(2)]
    for twins, own in zip(both, sequences, strict=True):
        twins.step(own.rows([9, 30, 4], 0))
    for batch in (3, 2, 3, 1, 2, 3):
        for twins, own in zip(both, sequences, strict=True):
            twins.step(own.rows([], batch))
    assert [twins.recorded.sizes for twins in both] == [(1, 2, 3)] * 2


@pytest.mark.usefixtures("compiled")
def test_large_steps_and_prompts_are_not_recorded(load: Load, seed: int) -> None:
    twins, sequences = Twins(load("llama", "float32", "none")), Sequences(seed)
    twins.step(sequences.rows([3] * (MOST_ROWS + 1), 0))
    twins.step(sequences.rows([], MOST_ROWS + 1))
    twins.step(sequences.rows([5], 2))
    assert not twins.recorded.sizes
    twins.step(sequences.rows([], MOST_ROWS))
    assert list(twins.recorded.sizes) == [MOST_ROWS]


@pytest.mark.usefixtures("compiled")
def test_a_model_of_other_operations_is_refused_for_good(
    load: Load, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "slipstream.runtime.worker.recorded_steps")
    twins = Twins(load("mixtral", "float32", "none"))
    live(twins, seed, steps=10)
    assert twins.recorded.sizes == () and not twins.recorded.take(np.ones(1, np.int32))
    assert len(caplog.records) == 1 and "the operation aten." in caplog.text


def test_where_there_are_no_recordings(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = load("llama", "float32", "none")
    cache = KvCache.allocate(decoder.spec, 4, BLOCK, decoder.dtype, CPU)
    with torch_alone():
        assert RecordedSteps.where_possible(decoder, cache) is None
    compiled_or_skip()
    assert RecordedSteps.where_possible(decoder, cache) is not None
    monkeypatch.setenv("SLIPSTREAM_RECORDED_STEPS", "0")
    assert RecordedSteps.where_possible(decoder, cache) is None
