"""The sampler's arithmetic: noise against integers, draws against softmax, rows against their neighbours."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from slipstream.kernels.logit_edits import add_to_logits_, mask_tokens_, penalize_repetition_
from slipstream.kernels.sample import draw
from slipstream.kernels.sample_noise import gumbel_noise
from slipstream.kernels.sample_settings import DrawSettings
from slipstream.kernels.token_logprobs import token_logprobs

MASK_32 = (1 << 32) - 1
MASK_64 = (1 << 64) - 1
GOLDEN_64 = 0x9E3779B97F4A7C15


def integer_mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK_64
    return z ^ (z >> 31)


def integer_hash(seed: int, position: int, token: int) -> int:
    """The 24 bits of (seed, position, token), in Python's unbounded integers."""
    key = integer_mix((integer_mix((seed + GOLDEN_64) & MASK_64) + (position + 1) * GOLDEN_64) & MASK_64)
    low, high = key & MASK_32, key >> 32
    z = (token * 0x9E3779B9 + low) & MASK_32
    z = ((z ^ (z >> 16)) * 0x7FEB352D) & MASK_32
    z ^= high
    z = ((z ^ (z >> 15)) * 0x846CA68B) & MASK_32
    return (z ^ (z >> 16)) >> 8


def noise_of(seeds: object, positions: object, tokens: object) -> np.ndarray:
    """Noise of broadcast (seed, position, token) triples, one token a row."""
    seed, position, token = np.broadcast_arrays(np.asarray(seeds), np.asarray(positions), np.asarray(tokens))
    flat = [torch.from_numpy(np.ascontiguousarray(part.ravel().astype(np.int64))) for part in (seed, position, token)]
    return gumbel_noise(flat[0], flat[1], flat[2].unsqueeze(-1)).squeeze(-1).numpy()


def uniform_of(seeds: object, positions: object, tokens: object) -> np.ndarray:
    return np.exp(-np.exp(-noise_of(seeds, positions, tokens)))


def chi_square_limit(degrees: int, z: float = 4.5) -> float:
    """Wilson and Hilferty's approximation of the chi-square quantile; z 4.5 is passed once in 300,000 by chance."""
    return degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3


def settings(
    rows: int,
    *,
    temperature: object = 1.0,
    top_p: object = 1.0,
    top_k: object = 0,
    min_p: object = 0.0,
    seed: object = 0,
    position: object = 0,
) -> DrawSettings:
    def column(value: object, dtype: type) -> np.ndarray:
        return np.broadcast_to(np.asarray(value, dtype), (rows,)).copy()

    return DrawSettings(
        temperatures=column(temperature, np.float64),
        top_ps=column(top_p, np.float64),
        top_ks=column(top_k, np.int64),
        min_ps=column(min_p, np.float64),
        seeds=column(seed, np.int64),
        positions=column(position, np.int64),
    )


# Noise


def test_noise_equals_the_integer_implementation(seed: int) -> None:
    generator = np.random.default_rng(seed)
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), *generator.integers(-(2**63), 2**63 - 1, 200).tolist()]
    positions = [0, 1, 2**20, *generator.integers(0, 2**31, len(seeds) - 3).tolist()]
    tokens = generator.integers(0, 300_000, (len(seeds), 7))
    tokens[:, 0] = 0
    noise = gumbel_noise(torch.tensor(seeds), torch.tensor(positions), torch.from_numpy(tokens)).numpy()
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        for column, token in enumerate(tokens[row].tolist()):
            u = (integer_hash(seed % 2**64, position, token) + 1) / (2**24 + 1)
            assert noise[row, column] == pytest.approx(-math.log(-math.log(u)), rel=1e-8, abs=1e-12)
            assert integer_hash(seed % 2**64, position, token) == round(
                math.exp(-math.exp(-noise[row, column])) * (2**24 + 1) - 1
            )


def test_noise_lies_in_its_range() -> None:
    noise = noise_of(np.arange(1_000_000), 5, 7)
    assert noise.min() >= -2.82
    assert noise.max() <= 16.6356


@pytest.mark.parametrize("varied", ["seed", "position", "token"])
def test_noise_is_uniform_along_each_argument(varied: str) -> None:
    count = 1 << 17
    running = np.arange(count)
    for base in (0, 1, 987_654_321):
        uniform = uniform_of(*(running + base if varied == name else 3 for name in ("seed", "position", "token")))
        bins = np.bincount((uniform * 256).astype(np.int64), minlength=256)
        statistic = ((bins - count / 256) ** 2 / (count / 256)).sum()
        assert statistic < chi_square_limit(255), f"{varied} from {base}: chi-square {statistic:.0f}"
        # Kolmogorov and Smirnov: 2.8 / sqrt(n) is passed once in three million.
        ordered = np.sort(uniform)
        distance = np.abs(ordered - (np.arange(count) + 0.5) / count).max()
        assert distance < 2.8 / math.sqrt(count), f"{varied} from {base}: distance {distance:.2g}"


@pytest.mark.parametrize("neighbour", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, -1), (0, 1, -1)])
@pytest.mark.parametrize("varied", ["seed", "position", "token"])
def test_noise_of_neighbours_is_independent(varied: str, neighbour: tuple[int, int, int]) -> None:
    count = 1 << 17
    arguments = [np.arange(count) if varied == name else np.full(count, 9) for name in ("seed", "position", "token")]
    here = uniform_of(*arguments)
    there = uniform_of(*(argument + offset for argument, offset in zip(arguments, neighbour, strict=True)))
    table = np.bincount((here * 16).astype(np.int64) * 16 + (there * 16).astype(np.int64), minlength=256)
    statistic = ((table - count / 256) ** 2 / (count / 256)).sum()
    assert statistic < chi_square_limit(255), f"{varied}, neighbour {neighbour}: chi-square {statistic:.0f}"
    correlation = np.corrcoef(here, there)[0, 1]
    assert abs(correlation) < 5 / math.sqrt(count), f"{varied}, neighbour {neighbour}: correlation {correlation:.2g}"


def test_low_bits_of_the_hash_are_balanced() -> None:
    hashed = np.rint(uniform_of(np.arange(256)[:, None], 3, np.arange(512)[None, :]) * (2**24 + 1) - 1).astype(np.int64)
    for bit in range(24):
        share = ((hashed >> bit) & 1).mean()
        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(hashed.size), f"bit {bit}: {share}"


# Distributions


FILTERS = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.8},
    {"top_k": 4},
    {"top_p": 0.8},
    {"top_p": 0.35, "temperature": 1.5},
    {"min_p": 0.2},
    {"temperature": 1.3, "min_p": 0.05, "top_k": 9, "top_p": 0.9},
]


def expected_probabilities(logits: np.ndarray, *, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) / temperature)
    weights[weights < min_p * weights.max()] = 0
    if top_k:
        weights[weights < np.sort(weights)[-top_k]] = 0
    above = np.array([weights[weights > weight].sum() for weight in weights])
    weights[above >= top_p * weights.sum()] = 0
    return weights / weights.sum()


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("varied", ["seed", "position"])
def test_draws_follow_the_filtered_softmax(varied: str, filters: dict[str, float]) -> None:
    count = 40_000
    logits = np.array([2.0, 1.5, 1.5, 0.7, 0.1, -0.4, -1.0, -1.0, -2.0, -3.1, 0.3, -0.2, -7.0], np.float32)
    probabilities = expected_probabilities(logits, **filters)
    drawn = draw(
        torch.from_numpy(np.tile(logits, (count, 1))), settings(count, **filters, **{varied: np.arange(count)})
    )
    counts = np.bincount(drawn.token_ids_R.numpy(), minlength=logits.size)
    assert counts[probabilities == 0].sum() == 0
    likely = probabilities * count >= 5
    statistic = ((counts - probabilities * count)[likely] ** 2 / (probabilities * count)[likely]).sum()
    assert statistic < chi_square_limit(int(likely.sum()) - 1), f"{filters}: {counts} for {probabilities * count}"


def test_draws_over_a_flat_vocabulary_are_uniform() -> None:
    count, vocabulary = 20_000, 500
    drawn = draw(torch.zeros(count, vocabulary), settings(count, seed=np.arange(count)))
    counts = np.bincount(drawn.token_ids_R.numpy(), minlength=vocabulary)
    statistic = ((counts - count / vocabulary) ** 2 / (count / vocabulary)).sum()
    assert statistic < chi_square_limit(vocabulary - 1)


# Rows are strangers to each other


def test_a_row_does_not_depend_on_its_batch(seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows, vocabulary = 48, 5000
    scales = generator.choice([0.0, 0.1, 1.0, 5.0, 40.0], (rows, 1))
    logits = (generator.standard_normal((rows, vocabulary)) * scales).astype(np.float32)
    logits[generator.random(logits.shape) < 0.1] = -np.inf
    mixed = settings(
        rows,
        temperature=generator.choice([0.0, 1e-4, 0.3, 1.0, 2.0, 100.0], rows),
        top_p=generator.choice([0.1, 0.5, 0.9, 0.999, 1.0], rows),
        top_k=generator.choice([0, 1, 2, 50, 4999, 5000, 9999], rows),
        min_p=generator.choice([0.0, 0.01, 0.5, 1.0], rows),
        seed=generator.integers(-(2**63), 2**63 - 1, rows),
        position=generator.integers(0, 100_000, rows),
    )
    together = draw(torch.from_numpy(logits), mixed).token_ids_R.tolist()
    for row in range(rows):
        alone = draw(torch.from_numpy(logits[row : row + 1].copy()), mixed.rows(row, row + 1)).token_ids_R.item()
        assert alone == together[row], f"row {row}"


def test_logprobs_of_a_row_do_not_depend_on_its_batch(seed: int) -> None:
    generator = np.random.default_rng(seed)
    logits = torch.from_numpy((generator.standard_normal((40, 7001)) * 4).astype(np.float32))
    tokens = torch.from_numpy(generator.integers(0, 7001, 40))
    together = token_logprobs(logits, tokens, 20)
    for row in range(40):
        alone = token_logprobs(logits[row : row + 1].clone(), tokens[row : row + 1], 5)
        assert torch.equal(alone.logprobs_R, together.logprobs_R[row : row + 1])
        assert torch.equal(alone.top_ids_RK[0], together.top_ids_RK[row, :5])
        assert torch.equal(alone.top_logprobs_RK[0], together.top_logprobs_RK[row, :5])


# Edges


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0], [-math.inf, -math.inf, -2.0, -2.0]])
    assert draw(logits, settings(3, temperature=0.0)).token_ids_R.tolist() == [1, 0, 2]
    assert draw(logits, settings(3, temperature=[0.0, 1e-6, 0.0], top_p=0.5)).token_ids_R.tolist() == [1, 0, 2]
    assert draw(logits, settings(3, temperature=[0.0, 0.0, 1.0], top_k=1)).token_ids_R.tolist()[:2] == [1, 0]


def test_rows_that_are_no_distribution_are_reported() -> None:
    nan, inf = math.nan, math.inf
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, nan, 2.0], [0.0, inf, 1.0], [-inf, -inf, -inf], [0.0, -inf, -inf]])
    for temperature in (0.0, 1.0):
        for filters in ({}, {"top_p": 0.9}, {"top_k": 2, "min_p": 0.1, "top_p": 0.5}):
            drawn = draw(logits, settings(5, temperature=temperature, **filters))
            assert drawn.valid_R.tolist() == [True, False, False, False, True]
            assert drawn.token_ids_R[4] == 0
            assert all(0 <= token < 3 for token in drawn.token_ids_R.tolist())


def test_extreme_settings_leave_the_most_likely_token() -> None:
    generator = np.random.default_rng(3)
    logits = torch.from_numpy(generator.standard_normal((64, 300)).astype(np.float32))
    best = logits.argmax(-1).tolist()
    for filters in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 2e-5}):
        assert draw(logits, settings(64, seed=np.arange(64), **filters)).token_ids_R.tolist() == best


def test_a_vocabulary_of_one() -> None:
    assert draw(torch.zeros(2, 1), settings(2, top_p=0.5, top_k=3, min_p=0.1)).token_ids_R.tolist() == [0, 0]
    assert token_logprobs(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64), 5).logprobs_R.tolist() == [0.0, 0.0]


# Edits and log-probabilities


def test_edits_touch_only_their_entries() -> None:
    logits = torch.tensor([[1.0, -1.0, 0.0, 2.0], [1.0, -1.0, 0.0, 2.0]])
    rows, ids = torch.tensor([0, 0, 0]), torch.tensor([0, 1, 0])
    penalize_repetition_(logits, rows, ids, torch.full((3,), 2.0))
    add_to_logits_(logits, torch.tensor([1]), torch.tensor([3]), torch.tensor([-0.5]))
    mask_tokens_(logits, torch.tensor([1, 1]), torch.tensor([2, 2]))
    assert logits.tolist() == [[0.5, -2.0, 0.0, 2.0], [1.0, -1.0, -math.inf, 1.5]]


def test_logprobs_equal_log_softmax(seed: int) -> None:
    generator = np.random.default_rng(seed)
    logits = torch.from_numpy((generator.standard_normal((17, 1000)) * 6).astype(np.float32))
    tokens = torch.from_numpy(generator.integers(0, 1000, 17))
    made = token_logprobs(logits, tokens, 8)
    expected = torch.log_softmax(logits.double(), -1)
    chosen = expected.gather(1, tokens.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(made.logprobs_R.double(), chosen, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(made.top_logprobs_RK.double(), expected.topk(8).values, atol=2e-6, rtol=1e-6)
    assert made.top_ids_RK.tolist() == logits.topk(8).indices.tolist()
    assert made.ranks_R.tolist() == ((expected > chosen.unsqueeze(-1)).sum(-1) + 1).tolist()


def test_equal_logprobs_come_in_the_order_of_ids() -> None:
    logits = torch.tensor([[0.0, 2.0, -0.0, 2.0, -1.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    made = token_logprobs(logits, torch.tensor([2, 5]), 4)
    assert made.top_ids_RK.tolist() == [[1, 3, 0, 2], [0, 1, 2, 3]]
    assert made.ranks_R.tolist() == [3, 1]
    assert token_logprobs(logits, torch.tensor([2, 5]), 99).top_ids_RK.shape == (2, 6)
    assert token_logprobs(logits, torch.tensor([2, 5]), 0).top_ids_RK.shape == (2, 0)


@pytest.mark.parametrize("vocabulary", [127, 128, 512, 1000])
@pytest.mark.parametrize("special", [None, math.nan, math.inf, -math.inf])
def test_greedy_takes_the_first_of_equals_wherever_it_stands(seed: int, vocabulary: int, special: float | None) -> None:
    logits = torch.randint(-9, 9, (40, vocabulary), generator=torch.Generator().manual_seed(seed)).float()
    if special is not None:
        logits[3, 5], logits[4, vocabulary - 1], logits[5] = special, special, special
    zeros = np.zeros(40)
    drawn = draw(
        logits,
        DrawSettings(
            temperatures=zeros,
            top_ps=zeros + 1,
            top_ks=zeros.astype(np.int64),
            min_ps=zeros,
            seeds=zeros.astype(np.int64),
            positions=zeros.astype(np.int64),
        ),
    )
    best, first = logits.max(dim=-1)
    assert torch.equal(drawn.valid_R, best.isfinite())
    assert torch.equal(drawn.token_ids_R[drawn.valid_R], first[drawn.valid_R])
