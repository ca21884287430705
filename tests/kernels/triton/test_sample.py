"""Drawing by kernels, against the reference and against torch's way; a row against its company."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from slipstream.kernels import backends
from slipstream.kernels.sample import draw, draw_reference
from slipstream.kernels.sample_settings import DrawnTokens, DrawSettings
from slipstream.tests.kernels.test_sample import settings

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


@pytest.mark.parametrize("vocabulary", [1, 2, 255, 256, 257, 2048, 5003])
def test_kernels_draw_what_the_reference_draws(vocabulary: int, seed: int, launches: list[str]) -> None:
    generator = np.random.default_rng(seed)
    rows = 12
    logits_RV = random_logits(generator, rows, vocabulary)
    drawing = random_settings(generator, rows, vocabulary)
    before_RV = logits_RV.clone()
    drawn = draw(logits_RV, drawing)
    assert launches == ["_scan_kernel", "_draw_kernel"]
    assert torch.equal(logits_RV, before_RV)
    assert_same(drawn, draw_reference(logits_RV, drawing))
    assert_same(drawn, by_torch(logits_RV, drawing))


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
