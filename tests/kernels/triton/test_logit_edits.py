"""Edits of logits by kernels, against a loop in numpy and against torch's way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from slipstream.kernels import backends
from slipstream.kernels.logit_edits import EditEntries, LogitEdits, edit_logits_


def entries(generator: np.random.Generator, rows: int, vocabulary: int, count: int, *, twice: bool) -> EditEntries:
    """Distinct pairs, some of them outside of the vocabulary; with ``twice`` all of them twice."""
    places = generator.choice(rows * (vocabulary + 5), count, replace=False)
    places = np.concatenate((places, places)) if twice else places
    generator.shuffle(places)
    row = places // (vocabulary + 5)
    return EditEntries(
        rows=row,
        token_ids=places % (vocabulary + 5) - 2,
        amounts=(row % 3 * 0.5 + 0.5).astype(np.float32),
    )


def edited(logits: np.ndarray, edits: LogitEdits) -> np.ndarray:
    """What the edits come to, one by one."""
    logits = logits.copy()
    raw: np.ndarray | None = None
    for name in ("bias", "mask", "repetition", "counts"):
        each: EditEntries = getattr(edits, name)
        raw = logits.copy()
        for row, token, amount in zip(each.rows, each.token_ids, each.amounts, strict=True):
            if 0 <= token < logits.shape[1]:
                value = raw[row, token]
                logits[row, token] = {
                    "bias": value + amount,
                    "mask": -math.inf,
                    "repetition": value / amount if value > 0 else value * amount,
                    "counts": value + amount,
                }[name]
    return logits


@pytest.mark.parametrize("count", [0, 1, 70])
def test_all_kinds_in_their_order(count: int, seed: int, launches: list[str]) -> None:
    generator = np.random.default_rng(seed)
    rows, vocabulary = 5, 100
    logits = generator.standard_normal((rows, vocabulary)).astype(np.float32)
    kinds = {
        name: entries(generator, rows, vocabulary, count, twice=name == "repetition")
        for name in ("bias", "mask", "repetition", "counts")
    }
    edits = LogitEdits(**kinds)
    # Rows of a larger tensor.
    wide_RV = torch.full((rows, 128), math.nan)
    logits_RV = wide_RV[:, :vocabulary]
    logits_RV.copy_(torch.from_numpy(logits))
    edit_logits_(logits_RV, edits)
    assert np.array_equal(logits_RV.numpy(), edited(logits, edits))
    assert wide_RV[:, vocabulary:].isnan().all()
    assert "_edit_kernel" in launches or count < 70
    backends.use("torch")
    by_torch_RV = torch.from_numpy(logits.copy())
    edit_logits_(by_torch_RV, edits)
    assert torch.equal(by_torch_RV, logits_RV)


def test_nothing_to_edit(launches: list[str]) -> None:
    logits_RV = torch.ones(2, 3)
    none = EditEntries()
    edit_logits_(logits_RV, LogitEdits(bias=none, mask=none, repetition=none, counts=none))
    assert logits_RV.tolist() == [[1.0] * 3] * 2
    assert launches == []
