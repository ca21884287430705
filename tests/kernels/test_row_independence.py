"""A row's bits depend on that row alone: not on batch mates, on the chunk it is computed in, or on padding.

Three layers: what the products, softmaxes and sums of torch are trusted with; the attention over whole sequences,
however they are cut; norms, activation and rotary positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as functional

from slipstream.kernels.activation import silu_and_mul
from slipstream.kernels.attention import paged_attention, prepare_attention
from slipstream.kernels.attention_plan import build_attention_plan
from slipstream.kernels.cpu.attention_keys import SPAN_KEYS
from slipstream.kernels.cpu.attention_products import QUERY_UNIT, merge_spans
from slipstream.kernels.cpu.attention_workspace import AttentionWorkspace
from slipstream.kernels.norm import add_rms_norm, rms_norm
from slipstream.kernels.rope_kv import apply_rope_
from slipstream.tests.kernels.native_ways import torch_alone

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTH = 700


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [64, 128])
def test_products_of_a_row_are_the_same_for_any_batch_and_padding(
    seed: int, head_size: int, dtype: torch.dtype
) -> None:
    lengths = [length for length in (64, 128, 192, 256) if dtype != torch.float32 or length != 192]
    values, queries = (
        random(seed, 32, SPAN_KEYS, head_size, dtype=dtype),
        random(seed + 1, 32, 96, head_size, dtype=dtype),
    )
    for used in (40, 100, 150, SPAN_KEYS):
        weights = torch.zeros(32, 96, SPAN_KEYS, dtype=dtype)
        weights[..., :used] = random(seed + 2, 32, 96, used, dtype=dtype).abs()
        expected = torch.bmm(weights, values)
        scores = torch.bmm(queries, values.transpose(1, 2))
        for pairs in (1, 3, 32):
            for rows in (QUERY_UNIT, 12, 96):
                for length in (length for length in lengths if length >= used):
                    few, keys = weights[:pairs, :rows, :length].contiguous(), values[:pairs, :length]
                    assert torch.equal(torch.bmm(few, keys), expected[:pairs, :rows]), (used, pairs, rows, length)
                    found = torch.bmm(queries[:pairs, :rows].contiguous(), keys.transpose(1, 2))
                    assert torch.equal(found, scores[:pairs, :rows, :length]), (used, pairs, rows, length)


@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_of_a_row_is_the_same_with_more_hidden_keys_and_in_float32(seed: int, dtype: torch.dtype) -> None:
    scores = random(seed, 50, SPAN_KEYS, dtype=dtype)
    for used in (1, 60, 64, 150):
        scores[:, used:] = -6e4
        expected = torch.softmax(scores, -1)
        for length in (64, 128, 192, SPAN_KEYS):
            if length >= used:
                few = scores[3:9, :length].contiguous()
                assert torch.equal(torch.softmax(few, -1), expected[3:9, :length])
                assert torch.equal(torch.softmax(few, -1, dtype=torch.float32).to(dtype), expected[3:9, :length])


@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_is_the_same_with_more_absent_spans_and_exact_for_one(seed: int, dtype: torch.dtype) -> None:
    results, maxima = random(seed, 6, 20, 12, 64, dtype=dtype), random(seed + 1, 6, 20, 12)
    weights = random(seed + 2, 6, 20, 12).abs() + 0.01
    for spans in (1, 2, 5, 16):
        hidden = maxima.clone()
        hidden[:, spans:] = -1e30
        expected = merge_spans(results[:, :spans], maxima[:, :spans], weights[:, :spans])
        for places in (spans, spans + 1, 17, 20):
            found = merge_spans(results[:, :places], hidden[:, :places], weights[:, :places])
            assert torch.equal(found, expected), (spans, places)
            assert torch.equal(
                merge_spans(results[2:3, :places], hidden[2:3, :places], weights[2:3, :places])[0], found[2]
            )
        if spans == 1:
            assert torch.equal(expected.to(dtype), results[:, 0])


class Sequences:
    """Two sequences in a paged cache; attends to any pieces of them."""

    def __init__(
        self, seed: int, *, dtype: torch.dtype, heads: tuple[int, int], head_size: int, block_size: int
    ) -> None:
        generator = np.random.default_rng(seed)
        blocks = -(-LENGTH // block_size)
        self.block_size, self.kv_heads, self.dtype = block_size, heads[1], dtype
        self.tables = generator.permutation(2 * blocks).reshape(2, blocks).astype(np.int32)
        self.cache = random(seed, 2, 2 * blocks, heads[1], block_size, head_size, dtype=dtype)
        self.queries = random(seed + 1, 2, LENGTH, heads[0], head_size, dtype=dtype)
        self.workspace = AttentionWorkspace(dtype=dtype, device=CPU)

    def attend(self, pieces: Sequence[tuple[int, int, int]], window: int | None) -> list[torch.Tensor]:
        """Attend to pieces (sequence, first position, end) in one step."""
        owners = [sequence for sequence, _, _ in pieces]
        plan = build_attention_plan(
            starts=np.array([first for _, first, _ in pieces], np.int32),
            counts=np.array([end - first for _, first, end in pieces], np.int32),
            block_tables=self.tables[owners],
            block_size=self.block_size,
            heads=self.queries.shape[2],
            kv_heads=self.kv_heads,
            head_size=self.queries.shape[-1],
            window=window,
            dtype=self.dtype,
            device=CPU,
            deterministic=True,
        )
        queries = torch.cat([self.queries[sequence, first:end] for sequence, first, end in pieces])
        tokens, heads, _ = queries.shape
        prepared = prepare_attention(plan, self.cache, tokens=tokens, heads=heads, workspace=self.workspace)
        found = paged_attention(queries, self.cache, prepared, scale=0.11)
        return list(found.split([end - first for _, first, end in pieces]))


def cuts(generator: np.random.Generator, largest: int) -> list[tuple[int, int]]:
    """Cut a sequence into chunks of random lengths."""
    chunks, done = [], 0
    while done < LENGTH:
        end = min(LENGTH, done + int(generator.integers(1, largest + 1)))
        chunks.append((done, end))
        done = end
    return chunks


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize(("heads", "head_size"), [((3, 1), 64), ((4, 2), 128)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_a_position_is_the_same_however_the_sequence_is_cut(
    seed: int, dtype: torch.dtype, heads: tuple[int, int], head_size: int, window: int | None
) -> None:
    """By torch's operations; for the compiled ones ``test_native_prefill.py`` does this."""
    generator = np.random.default_rng(seed)
    with torch_alone():
        problem = Sequences(seed, dtype=dtype, heads=heads, head_size=head_size, block_size=16)
        (expected,) = problem.attend([(0, 0, LENGTH)], window)
        for largest in (70, 500):
            for first, end in cuts(generator, largest):
                other = int(generator.integers(0, LENGTH - 40))
                mates = [
                    (1, other, other + int(generator.integers(1, 40))) for _ in range(int(generator.integers(0, 3)))
                ]
                found = problem.attend([*mates, (0, first, end)], window)[-1]
                assert torch.equal(found, expected[first:end]), (first, end, mates)
        every = problem.attend([(0, position, position + 1) for position in range(0, LENGTH, 5)], window)
        assert torch.equal(torch.cat(every), expected[::5]), "decoded, many positions in one step"
        for position in (0, 63, 64, 191, 255, 256, 511, 512):
            (alone,) = problem.attend([(0, position, position + 1)], window)
            assert torch.equal(alone, expected[position : position + 1]), position


def assert_rows_alone_equal(operation: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> None:
    together = operation(rows)
    for first, end in ((0, 1), (5, 6), (2, 9), (1, 32), (7, 300)):
        assert torch.equal(operation(rows[first:end].clone()), together[first:end]), (first, end)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [768, 2048, 112])
def test_norms_activation_and_rope_of_a_row_are_the_same_in_any_batch(seed: int, dtype: torch.dtype, size: int) -> None:
    """The activation where it promises so: at 112, fp32 rows do depend on where threads divide them."""
    rows, weight = random(seed, 301, 2 * size, dtype=dtype), random(seed + 1, 2 * size, dtype=dtype)
    assert_rows_alone_equal(lambda x: rms_norm(x, weight, 1e-5), rows)
    assert_rows_alone_equal(lambda x: add_rms_norm(x, x * 3, weight, 1e-5)[0], rows)
    if size % 64 == 0:
        assert_rows_alone_equal(silu_and_mul, rows)
    angles = random(seed + 2, 301, 16, dtype=dtype)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        heads = x[:, : 2 * size // 16 * 16].reshape(len(x), -1, 16).clone()
        apply_rope_(heads, angles[: len(x)].cos(), functional.pad(angles[: len(x), 8:], (8, 0)).sin())
        return heads

    together = rotate(rows)
    for end in (1, 2, 31, 300):
        assert torch.equal(rotate(rows[:end]), together[:end])
