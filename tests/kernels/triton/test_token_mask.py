"""Bit masks on logits by a kernel, against the reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from slipstream.kernels.token_mask import keep_allowed_, keep_allowed_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [1, 31, 32, 33, 3000])
def test_kernel_is_the_reference(vocabulary: int, dtype: torch.dtype, seed: int, launches: list[str]) -> None:
    draw = np.random.default_rng(seed)
    rows_N = torch.from_numpy(draw.permutation(6)[:4])
    masks = draw.integers(-(2**31), 2**31, size=(4, -(-vocabulary // 32)), dtype=np.int32)
    masks[0], masks[1] = -1, 0
    # Rows of a larger tensor: what lies between them stays as it is.
    wide_RV = torch.full((6, vocabulary + 7), math.nan, dtype=dtype)
    wide_RV[:, :vocabulary] = torch.from_numpy(draw.standard_normal((6, vocabulary))).to(dtype)
    expected_RV = wide_RV.clone()
    keep_allowed_reference(expected_RV[:, :vocabulary], rows_N, torch.from_numpy(masks))
    keep_allowed_(wide_RV[:, :vocabulary], rows_N, torch.from_numpy(masks))
    assert launches == ["_keep_allowed_kernel"]
    assert torch.equal(wide_RV.nan_to_num(7.0), expected_RV.nan_to_num(7.0))


def test_no_rows(launches: list[str]) -> None:
    logits_RV = torch.ones(2, 40)
    keep_allowed_(logits_RV, torch.zeros(0, dtype=torch.int64), torch.zeros((0, 2), dtype=torch.int32))
    assert torch.equal(logits_RV, torch.ones(2, 40))
    assert launches == []


def test_masks_of_another_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="masks_NW is"):
        keep_allowed_(torch.ones(2, 40), torch.zeros(1, dtype=torch.int64), torch.zeros((1, 1), dtype=torch.int32))
