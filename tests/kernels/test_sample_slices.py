"""Drawing from slices of the vocabulary: the best of the slices' best is what the whole row draws."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from slipstream.kernels.sample import choose_best, draw, draw_best
from slipstream.tests.kernels.test_sample import settings


def in_slices(logits: torch.Tensor, cuts: list[int], drawing: object) -> tuple[list[int], list[bool]]:
    edges = [0, *cuts, logits.shape[1]]
    scores, ids = zip(
        *(
            draw_best(logits[:, first:last].contiguous(), drawing, first_id=first)  # type: ignore[arg-type]
            for first, last in itertools.pairwise(edges)
        ),
        strict=True,
    )
    drawn = choose_best(torch.stack(scores), torch.stack(ids))
    return drawn.token_ids_R.tolist(), drawn.valid_R.tolist()


@pytest.mark.parametrize("slices", [1, 2, 3, 7])
def test_slices_give_what_the_whole_gives(seed: int, slices: int) -> None:
    generator = np.random.default_rng(seed)
    rows, vocabulary = 48, 2999
    scales = generator.choice([0.0, 0.1, 1.0, 5.0, 40.0], (rows, 1))
    values = (generator.standard_normal((rows, vocabulary)) * scales).astype(np.float32)
    values[generator.random(values.shape) < 0.1] = -np.inf
    # Whole slices without a token that may be drawn.
    values[:5, 100:] = -np.inf
    logits = torch.from_numpy(values)
    drawing = settings(
        rows,
        temperature=generator.choice([0.0, 1e-4, 0.3, 1.0, 2.0, 100.0], rows),
        seed=generator.integers(-(2**63), 2**63 - 1, rows),
        position=generator.integers(0, 100_000, rows),
    )
    cuts = sorted(generator.choice(np.arange(1, vocabulary), slices - 1, replace=False).tolist())
    tokens, valid = in_slices(logits, cuts, drawing)
    assert tokens == draw(logits, drawing).token_ids_R.tolist()
    assert all(valid)


def test_equals_in_several_slices_go_to_the_lowest() -> None:
    logits = torch.zeros((2, 12))
    logits[1, [3, 5, 9]] = 2.0
    assert in_slices(logits, [4, 8], settings(2, temperature=0.0)) == ([0, 3], [True, True])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_no_distribution_are_reported_wherever_it_is(bad: float, temperature: float) -> None:
    logits = torch.zeros((3, 12))
    logits[1, 10] = bad
    logits[2, :] = -math.inf
    _, valid = in_slices(logits, [4, 8], settings(3, temperature=temperature))
    assert valid == [True, False, False]
