"""Log-probabilities by kernels, against the reference and against torch's way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from slipstream.kernels import backends
from slipstream.kernels.token_logprobs import token_logprobs, token_logprobs_reference

# What the interpreter says where a row is no distribution: on a GPU it is silence.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.mark.parametrize(("vocabulary", "k"), [(1, 5), (2, 0), (255, 3), (257, 7), (2300, 20)])
def test_kernels_give_the_reference(vocabulary: int, k: int, seed: int, launches: list[str]) -> None:
    generator = np.random.default_rng(seed)
    values = generator.standard_normal((4, vocabulary)) * [[0.0], [0.3], [3.0], [30.0]]
    # Many equals, and what is impossible.
    values[1:3] = values[1:3].round(1)
    values[3, generator.random(vocabulary) < 0.5] = -np.inf
    values[3, 0] = 1.0
    logits_RV = torch.from_numpy(values.astype(np.float32))
    token_ids_R = torch.from_numpy(generator.integers(0, vocabulary, 4))
    made = token_logprobs(logits_RV, token_ids_R, k)
    assert launches == ["_scan_kernel", "_mass_kernel", "_logprob_kernel"]
    expected = token_logprobs_reference(logits_RV, token_ids_R, k)
    torch.testing.assert_close(made.logprobs_R, expected.logprobs_R, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(made.top_logprobs_RK, expected.top_logprobs_RK, atol=1e-6, rtol=1e-6)
    assert torch.equal(made.top_ids_RK, expected.top_ids_RK)
    assert torch.equal(made.ranks_R, expected.ranks_R)
    backends.use("torch")
    by_torch = token_logprobs(logits_RV, token_ids_R, k)
    assert torch.equal(made.top_ids_RK, by_torch.top_ids_RK)
    torch.testing.assert_close(made.logprobs_R, by_torch.logprobs_R, atol=1e-7, rtol=1e-7)


def test_the_whole_vocabulary_in_order() -> None:
    logits_RV = torch.tensor([[0.0, 2.0, -0.0, 2.0, -math.inf, 0.0, -math.inf]])
    made = token_logprobs(logits_RV, torch.tensor([2]), 99)
    assert made.top_ids_RK.tolist() == [[1, 3, 0, 2, 5, 4, 6]]
    assert made.ranks_R.tolist() == [3]
    assert made.top_logprobs_RK[0, -1] == -math.inf


def test_a_row_does_not_depend_on_its_batch(seed: int) -> None:
    generator = np.random.default_rng(seed)
    logits_RV = torch.from_numpy((generator.standard_normal((5, 600)) * 4).astype(np.float32))
    token_ids_R = torch.from_numpy(generator.integers(0, 600, 5))
    together = token_logprobs(logits_RV, token_ids_R, 6)
    for row in range(5):
        alone = token_logprobs(logits_RV[row : row + 1].clone(), token_ids_R[row : row + 1], 3)
        assert torch.equal(alone.logprobs_R, together.logprobs_R[row : row + 1])
        assert torch.equal(alone.top_ids_RK[0], together.top_ids_RK[row, :3])
        assert torch.equal(alone.top_logprobs_RK[0], together.top_logprobs_RK[row, :3])


@pytest.mark.parametrize("broken", [math.nan, -math.nan, math.inf])
def test_rows_that_are_no_distribution_end(broken: float) -> None:
    logits_RV = torch.randn(2, 520)
    logits_RV[0, 300] = broken
    made = token_logprobs(logits_RV, torch.tensor([1, 1]), 9)
    assert made.top_ids_RK.min() >= 0 and made.top_ids_RK.max() < 520
    expected = token_logprobs_reference(logits_RV[1:], torch.tensor([1]), 9)
    assert torch.equal(made.top_ids_RK[1:], expected.top_ids_RK)


def test_no_rows() -> None:
    made = token_logprobs(torch.empty(0, 40), torch.empty(0, dtype=torch.int64), 2)
    assert made.top_ids_RK.shape == (0, 2) and made.ranks_R.shape == (0,)
