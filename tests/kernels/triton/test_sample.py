"""Drawing by kernels, against the reference and against torch's way; a row against its company."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from slipstream.kernels import backends, sample_tiles
from slipstream.kernels.sample import choose_best, draw, draw_best, draw_reference
from slipstream.kernels.sample_masses import masses
from slipstream.kernels.sample_settings import DrawnTokens, DrawSettings
from slipstream.tests.kernels.test_sample import settings

# What the interpreter says where a number passes float32, or a row is no distribution: on a GPU it is silence.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

SCALES = [0.0, 0.1, 1.0, 5.0, 40.0]


def random_logits(generator: np.random.Generator, rows: int, vocabulary: int) -> Tensor:
    """Rows from flat to peaked, one in ten of their tokens impossible."""
    values = generator.standard_normal((rows, vocabulary)) * generator.choice(SCALES, (rows, 1))
    values[generator.random(values.shape) < 0.1] = -np.inf
    values[:, generator.integers(vocabulary)] = 0.5
    return torch.from_numpy(values.astype(np.float32))


def random_settings(generator: np.random.Generator, rows: int, vocabulary: int) -> DrawSettings:
    return settings(
        rows,
        temperature=generator.choice([0.0, 1e-4, 0.3, 1.0, 2.0, 100.0], rows),
        top_p=generator.choice([0.01, 0.1, 0.5, 0.9, 0.999, 1.0], rows),
        top_k=generator.choice([0, 1, 2, 50, vocabulary - 1, vocabulary, vocabulary + 9], rows),
        min_p=generator.choice([0.0, 0.0, 0.01, 0.5, 1.0], rows),
        seed=generator.integers(-(2**63), 2**63 - 1, rows),
        position=generator.integers(0, 100_000, rows),
    )


def by_torch(logits_RV: Tensor, drawing: DrawSettings) -> DrawnTokens:
    backends.use("torch")
    try:
        return draw(logits_RV, drawing)
    finally:
        backends.use("triton")


def assert_same(found: DrawnTokens, expected: DrawnTokens) -> None:
    assert found.valid_R.tolist() == expected.valid_R.tolist()
    assert found.token_ids_R[found.valid_R].tolist() == expected.token_ids_R[found.valid_R].tolist()


@pytest.mark.parametrize(("vocabulary", "rows"), [(1, 2), (2, 6), (255, 8), (256, 8), (257, 8), (1500, 16)])
def test_kernels_draw_what_the_reference_draws(vocabulary: int, rows: int, seed: int, launches: list[str]) -> None:
    generator = np.random.default_rng(seed)
    logits_RV = random_logits(generator, rows, vocabulary)
    drawing = random_settings(generator, rows, vocabulary)
    before_RV = logits_RV.clone()
    drawn = draw(logits_RV, drawing)
    assert launches == ["_scan_kernel", "_draw_kernel"]
    assert torch.equal(logits_RV, before_RV)
    assert_same(drawn, draw_reference(logits_RV, drawing))
    assert_same(drawn, by_torch(logits_RV, drawing))


def test_a_real_vocabulary_without_filters(seed: int) -> None:
    generator = np.random.default_rng(seed)
    logits_RV = torch.from_numpy((generator.standard_normal((3, 32_003)) * [[0.0], [1.0], [5.0]]).astype(np.float32))
    drawing = settings(3, seed=generator.integers(0, 1000, 3), temperature=0.8)
    assert_same(draw(logits_RV, drawing), draw_reference(logits_RV, drawing))


def test_cuts_of_a_nucleus_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    # Eight equals are less likely than the one above them: they are out, or in, by a part in a thousand million.
    logits_V = torch.full((300,), -math.inf)
    logits_V[5:45:5] = 1.0
    logits_V[290] = 3.1
    rows = 16
    logits_RV = logits_V.repeat(rows, 1)
    masses_8 = masses(logits_V[None, [290, *range(5, 45, 5)]], logits_V[290:291], torch.ones(1).double())
    share = masses_8[0, 0].item() / masses_8.sum().item()
    shares = np.resize([share * (1 - 1e-9), share * (1 + 1e-9)], rows)
    drawing = settings(rows, seed=np.arange(rows) // 2, top_p=shares)
    expected = draw_reference(logits_RV, drawing)
    assert set(expected.token_ids_R[::2].tolist()) == {290}
    assert len(set(expected.token_ids_R[1::2].tolist())) > 1
    assert_same(draw(logits_RV, drawing), expected)
    # The estimates never decide.
    monkeypatch.setattr(sample_tiles, "_DOUBT", 2.0)
    assert_same(draw(logits_RV, drawing), expected)


def test_doubt_asks_the_exact_masses(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(seed)
    logits_RV = torch.from_numpy(generator.standard_normal((6, 600)).astype(np.float32))
    drawing = settings(6, seed=generator.integers(0, 1000, 6), top_p=0.3, top_k=[0, 40] * 3)
    expected = draw_reference(logits_RV, drawing)
    for doubt in (2.0, 0.0):
        monkeypatch.setattr(sample_tiles, "_DOUBT", doubt)
        assert_same(draw(logits_RV, drawing), expected)


def test_equals_at_the_cut_stay(seed: int) -> None:
    generator = np.random.default_rng(seed)
    logits_RV = torch.from_numpy(generator.integers(-3, 4, (8, 530)).astype(np.float32))
    logits_RV[:, 7], logits_RV[:, 400] = 0.0, -0.0
    ks = generator.choice([1, 5, 60, 120, 300, 529], 8)
    drawing = settings(8, seed=generator.integers(0, 1000, 8), top_k=ks, top_p=[1.0, 0.6] * 4)
    assert_same(draw(logits_RV, drawing), draw_reference(logits_RV, drawing))


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits_RV = torch.zeros(3, 900)
    logits_RV[0, [299, 700, 301]] = 3.0
    logits_RV[2, :] = -math.inf
    logits_RV[2, [511, 512]] = -2.0
    assert draw(logits_RV, settings(3, temperature=[0.0, 1e-6, 0.0], top_p=0.5)).token_ids_R.tolist() == [299, 0, 511]


def test_a_row_does_not_depend_on_its_batch(seed: int) -> None:
    generator = np.random.default_rng(seed)
    logits_RV = random_logits(generator, 6, 700)
    drawing = random_settings(generator, 6, 700)
    order = generator.permutation(6)
    together = draw(logits_RV, drawing)
    picked = DrawSettings(**{name: getattr(drawing, name)[order] for name in DrawSettings.__slots__})
    # Rows of a larger tensor: what lies between them is not looked at.
    wide_RV = torch.full((6, 720), math.nan)
    wide_RV[:, :700] = logits_RV[order]
    shuffled = draw(wide_RV[:, :700], picked)
    assert shuffled.token_ids_R.tolist() == together.token_ids_R[order].tolist()
    for row in range(6):
        alone = draw(logits_RV[row : row + 1].clone(), drawing.rows(row, row + 1))
        assert torch.equal(alone.token_ids_R, together.token_ids_R[row : row + 1])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_no_distribution_are_reported(temperature: float) -> None:
    nan, inf = math.nan, math.inf
    logits_RV = torch.full((5, 700), -inf)
    logits_RV[:, 0], logits_RV[3, 0] = 0.0, -inf
    logits_RV[1, 600], logits_RV[2, 300] = nan, inf
    for filters in ({}, {"top_p": 0.9}, {"top_k": 2, "min_p": 0.1, "top_p": 0.5}):
        drawn = draw(logits_RV, settings(5, temperature=temperature, **filters))
        assert drawn.valid_R.tolist() == [True, False, False, False, True]
        assert drawn.token_ids_R[drawn.valid_R].tolist() == [0, 0]
        assert all(0 <= token < 700 for token in drawn.token_ids_R.tolist())


def test_no_rows(launches: list[str]) -> None:
    assert draw(torch.empty(0, 50), settings(0)).token_ids_R.tolist() == []
    assert launches == []


def test_slices_give_what_the_whole_gives(seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows, vocabulary = 10, 1201
    logits_RV = random_logits(generator, rows, vocabulary)
    logits_RV[:2, 100:] = -math.inf
    logits_RV[3, 1100], logits_RV[4, :] = math.nan, -math.inf
    drawing = settings(
        rows,
        temperature=generator.choice([0.0, 1e-4, 0.3, 1.0, 2.0], rows),
        seed=generator.integers(-(2**63), 2**63 - 1, rows),
    )
    edges = [0, *sorted(generator.choice(np.arange(1, vocabulary), 2, replace=False).tolist()), vocabulary]
    parts = [draw_best(logits_RV[:, a:b], drawing, first_id=a) for a, b in itertools.pairwise(edges)]
    drawn = choose_best(torch.stack([scores for scores, _ in parts]), torch.stack([ids for _, ids in parts]))
    assert_same(drawn, draw_reference(logits_RV, drawing))
    assert drawn.valid_R.tolist() == [True] * 3 + [False] * 2 + [True] * 5


def test_slices_that_score_alike() -> None:
    nan, inf = math.nan, math.inf
    scores_SR = torch.tensor(
        [[1.0, -inf, nan, 2.0, -inf], [1.0, 0.5, 9.0, nan, -inf], [0.0, 0.5, 3.0, 1.0, -inf]]
    ).double()
    ids_SR = torch.tensor([[30, 0, 1, 2, 3], [20, 12, 11, 12, 13], [9, 22, 21, 22, 23]])
    drawn = choose_best(scores_SR, ids_SR)
    assert drawn.valid_R.tolist() == [True, True, False, False, False]
    assert drawn.token_ids_R.tolist() == [20, 12, 0, 0, 0]
    backends.use("torch")
    by_torch_way = choose_best(scores_SR, ids_SR)
    assert torch.equal(by_torch_way.valid_R, drawn.valid_R)
    assert torch.equal(by_torch_way.token_ids_R, drawn.token_ids_R)
