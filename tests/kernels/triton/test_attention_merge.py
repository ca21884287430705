"""Merging partials: the kernel against its reference, and against one softmax over all keys."""

from __future__ import annotations

import math

import pytest
import torch

from slipstream.kernels.attention_merge import merge_partials, merge_partials_reference
from slipstream.kernels.attention_span import AttentionOptions, Partials

CLOSE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def random_partials(counts: list[int], heads: int, size: int) -> tuple[Partials, torch.Tensor]:
    """Return partials of rows with so many spans, and what stands before each row's; memory around them is NaN."""
    total = sum(counts)
    partials = Partials(
        results_CND=torch.randn(total + 3, heads, size),
        peaks_CN=torch.randn(total + 3, heads) * 4,
        totals_CN=torch.rand(total + 3, heads) + 1,
    )
    for each in (partials.results_CND, partials.peaks_CN, partials.totals_CN):
        each[total:] = math.nan
    return partials, torch.tensor([0, *counts]).cumsum(0).int()


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize(("heads", "size"), [(1, 512), (3, 80)])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_kernel_is_the_reference(heads: int, size: int, has_sinks: bool, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    partials, first_items_R1 = random_partials([1, 0, 9, 2], heads, size)
    partials.peaks_CN[1] = -math.inf
    partials.results_CND[1], partials.totals_CN[1] = 0.0, 0.0
    tokens_R = torch.tensor([2, 0, 1, 3], dtype=torch.int32)
    options = AttentionOptions(scale=1.0, v_scale=0.5, sinks_N=torch.randn(heads) * 3 if has_sinks else None)
    merged, expected = torch.empty(4, heads, size, dtype=dtype), torch.empty(4, heads, size, dtype=dtype)
    merge_partials(partials, first_items_R1, tokens_R, options, merged)
    merge_partials_reference(partials, first_items_R1, tokens_R, options, expected)
    torch.testing.assert_close(merged, expected, rtol=CLOSE[dtype], atol=CLOSE[dtype])
    assert not merged[0].any()


def test_reference_is_one_softmax(seed: int) -> None:
    torch.manual_seed(seed)
    scores_C, values_CD, sink = torch.randn(7).double() * 5, torch.randn(7, 32).double(), torch.randn(1)
    cuts = [slice(0, 2), slice(2, 3), slice(3, 7)]
    peaks = torch.stack([scores_C[cut].max() for cut in cuts])
    weights = [(scores_C[cut] - peak).exp() for cut, peak in zip(cuts, peaks, strict=True)]
    partials = Partials(
        results_CND=torch.stack([weight @ values_CD[cut] for weight, cut in zip(weights, cuts, strict=True)]).float()[
            :, None
        ],
        peaks_CN=(peaks[:, None] / math.log(2)).float(),
        totals_CN=torch.stack([weight.sum() for weight in weights]).float()[:, None],
    )
    merged = torch.empty(1, 1, 32)
    options = AttentionOptions(scale=1.0, sinks_N=sink)
    merge_partials_reference(partials, torch.tensor([0, 3]).int(), torch.zeros(1).int(), options, merged)
    expected = torch.cat((scores_C, sink.double())).softmax(0)[:-1] @ values_CD
    torch.testing.assert_close(merged[0, 0].double(), expected, rtol=1e-6, atol=1e-6)


def test_a_row_is_the_same_in_any_company(seed: int) -> None:
    torch.manual_seed(seed)
    counts = [3, 11, 1]
    partials, first_items_R1 = random_partials(counts, 2, 64)
    options = AttentionOptions(scale=1.0)
    together = torch.empty(3, 2, 64)
    merge_partials(partials, first_items_R1, torch.arange(3).int(), options, together)
    for row, count in enumerate(counts):
        own = slice(int(first_items_R1[row]), int(first_items_R1[row + 1]))
        alone = torch.empty(1, 2, 64)
        merge_partials(
            Partials(
                results_CND=partials.results_CND[own].clone(),
                peaks_CN=partials.peaks_CN[own].clone(),
                totals_CN=partials.totals_CN[own].clone(),
            ),
            torch.tensor([0, count]).int(),
            torch.zeros(1).int(),
            options,
            alone,
        )
        assert torch.equal(alone[0], together[row])


def test_what_does_not_fit_is_refused() -> None:
    partials, first_items_R1 = random_partials([1], 2, 64)
    tokens_R, options = torch.zeros(1).int(), AttentionOptions(scale=1.0)
    with pytest.raises(ValueError, match="out_TND"):
        merge_partials(partials, first_items_R1, tokens_R, options, torch.empty(1, 2, 32))
    with pytest.raises(ValueError, match="first_items_R1"):
        merge_partials(partials, first_items_R1[:1], tokens_R, options, torch.empty(1, 2, 64))
    options = AttentionOptions(scale=1.0, sinks_N=torch.zeros(3))
    with pytest.raises(ValueError, match="sinks_N"):
        merge_partials(partials, first_items_R1, tokens_R, options, torch.empty(1, 2, 64))
