"""Bit masks on logits, against a loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slipstream.kernels import token_mask
from slipstream.kernels.token_mask import keep_allowed_


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 1000])
@pytest.mark.parametrize("chunk", [1, 1 << 22])
def test_only_allowed_tokens_keep_their_logits(
    vocab_size: int, chunk: int, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(token_mask, "_CHUNK_ELEMENTS", chunk)
    draw = np.random.default_rng(seed)
    rows = draw.permutation(9)[:5]
    masks = draw.integers(-(2**31), 2**31, size=(5, -(-vocab_size // 32)), dtype=np.int32)
    masks[0], masks[1] = -1, 0
    logits = torch.from_numpy(draw.standard_normal((9, vocab_size)).astype(np.float32))
    expected = logits.clone()
    for place, row in enumerate(rows.tolist()):
        for token in range(vocab_size):
            if not (int(masks[place, token // 32]) & 0xFFFFFFFF) >> (token % 32) & 1:
                expected[row, token] = float("-inf")
    keep_allowed_(logits, torch.from_numpy(rows), torch.from_numpy(masks))
    assert torch.equal(logits, expected)


def test_no_rows() -> None:
    logits = torch.ones(2, 40)
    keep_allowed_(logits, torch.zeros(0, dtype=torch.int64), torch.zeros((0, 2), dtype=torch.int32))
    assert torch.equal(logits, torch.ones(2, 40))
