"""The arithmetic that decoding and prefill share: scores, softmax and values of one range of keys, and the merge
of several ranges.

The bits of a query depend on its own keys alone: the rows of a product do not depend on one another if their
number is a multiple of ``QUERY_UNIT`` (fp32 products of 1, 2, 3 or 5 rows take other paths), a softmax is made row
by row, and what is merged is merged in the order of the keys.

Shapes: P pairs of row and KV head, M queries times query heads of a KV head, L keys, S spans, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention_span import AttentionOptions
from .attention_workspace import AttentionWorkspace

QUERY_UNIT = 4
# The softmax over spans always has a multiple of so many places: its order of summing stays the same.
_SPAN_PLACES = 16


def gather_keys_values(
    layer_cache: Tensor, rows: Tensor, *, keys: int, workspace: AttentionWorkspace
) -> tuple[Tensor, Tensor]:
    """Return keys and values, contiguous per row and KV head; valid until the next call.

    Shapes: layer_cache [2, blocks, KV heads, block size, head size] contiguous, or [1, ...] of keys that are values
    too; rows [pairs * blocks of a pair], see ``KeyLayout.gather``; returns two [pairs, keys, head size]
    """
    block_size, head_size = layer_cache.shape[3:]
    shape = (rows.shape[0], block_size * head_size)
    found = workspace.take("keys", shape), workspace.take("values", shape)
    parts = layer_cache.view(layer_cache.shape[0], -1, shape[1])
    for stored, out in zip(parts, found, strict=False):
        torch.index_select(stored, 0, rows, out=out)
    return found[0].view(-1, keys, head_size), found[len(parts) - 1].view(-1, keys, head_size)


def scaled_scores(
    q_PMD: Tensor, keys_PLD: Tensor, options: AttentionOptions, *, workspace: AttentionWorkspace
) -> Tensor:
    """Return scores, capped but without a mask, [pairs, queries, keys]; valid until the next call."""
    scores_PML = workspace.take("scores", (q_PMD.shape[0], q_PMD.shape[1], keys_PLD.shape[1]))
    # beta=0: what the buffer held does not count, only its memory does.
    torch.baddbmm(scores_PML, q_PMD, keys_PLD.transpose(1, 2), beta=0, alpha=options.scale, out=scores_PML)
    cap_scores_(scores_PML, options)
    return scores_PML


def cap_scores_(scores: Tensor, options: AttentionOptions) -> None:
    """Cap scores that have no mask yet, in place. Torch rounds the last of a thread's share in another way than others
    where it is no whole vector.
    """
    if options.soft_cap is not None:
        # Rounded once: for numbers of 16 bits, through float32.
        capped = scores if scores.dtype == torch.float32 else scores.float()
        capped.div_(options.soft_cap).tanh_().mul_(options.soft_cap)
        if capped is not scores:
            scores.copy_(capped)


def attend_whole(
    scores_PML: Tensor, values_PLD: Tensor, *, sinks_PM: Tensor | None, weights_PML: Tensor, result_PMD: Tensor
) -> None:
    """Compute the attention over all keys that there are.

    Shapes: sinks_PM [pairs, queries] float32; weights_PML like the scores, overwritten; result_PMD [pairs, queries,
    head size], written
    """
    if sinks_PM is None:
        torch.softmax(scores_PML, dim=-1, out=weights_PML)
        torch.bmm(weights_PML, values_PLD, out=result_PMD)
        return
    exact_PML = torch.softmax(scores_PML, dim=-1, dtype=torch.float32)
    torch.bmm(weights_PML.copy_(exact_PML), values_PLD, out=result_PMD)
    _count_sinks_(result_PMD, scores_PML.amax(-1).float(), exact_PML.amax(-1).reciprocal(), sinks_PM)


def _count_sinks_(result_PMD: Tensor, peaks_PM: Tensor, totals_PM: Tensor, sinks_PM: Tensor) -> None:
    """Let sinks, scores without values, have their share of results that were made without them.

    Shapes: peaks_PM, totals_PM, sinks_PM [pairs, queries] float32: largest scores, sums of exponentials relative to
    them, and the sinks
    """
    with_sinks_PM = totals_PM + (sinks_PM - peaks_PM).exp_()
    result_PMD.mul_(totals_PM.div(with_sinks_PM).unsqueeze(-1))


def attend_some(scores_PML: Tensor, values_PLD: Tensor, *, workspace: AttentionWorkspace) -> tuple[Tensor, Tensor]:
    """Return the attention over some of the keys, and the logarithm of its sum of exponentials, by which it counts
    beside the others; valid until the next call.

    Shapes: returns [pairs, queries, head size]; [pairs, queries] float32
    """
    if scores_PML.dtype == torch.float32:
        weights_PML = workspace.take("weights", scores_PML.shape)
        torch.softmax(scores_PML, dim=-1, out=weights_PML)
    else:
        weights_PML = torch.softmax(scores_PML, dim=-1, dtype=torch.float32)
    # The largest score's weight is the reciprocal of the sum that is relative to it.
    log_sums_PM = scores_PML.amax(-1).float() - weights_PML.amax(-1).log()
    result_PMD = workspace.take("results", (*scores_PML.shape[:2], values_PLD.shape[-1]))
    return torch.bmm(weights_PML.to(scores_PML.dtype), values_PLD, out=result_PMD), log_sums_PM


def attend_span(scores_PML: Tensor, values_PLD: Tensor, *, result_PMD: Tensor, peaks_2PM: Tensor) -> None:
    """Compute the attention over one span of keys, and what ``merge_spans`` needs to weigh it.

    Shapes: result_PMD [pairs, queries, head size], written; peaks_2PM [2, pairs, queries] float32, written: the
    largest score and its weight
    """
    weights_PML = torch.softmax(scores_PML, dim=-1, dtype=torch.float32)
    peaks_2PM[0] = scores_PML.amax(-1)
    torch.amax(weights_PML, -1, out=peaks_2PM[1])
    torch.bmm(weights_PML.to(scores_PML.dtype), values_PLD, out=result_PMD)


def merge_spans(
    results_PSMD: Tensor, maxima_PSM: Tensor, peak_weights_PSM: Tensor, sinks_PM: Tensor | None = None
) -> Tensor:
    """Return the attention over all spans, float32 [pairs, queries, head size].

    A span's sum of exponentials, relative to its largest score, is the reciprocal of that score's weight. A query
    that sees one span gives that span's result exactly: its share is 1, all others 0.

    Shapes: results_PSMD [pairs, spans, queries, head size]; maxima_PSM, peak_weights_PSM [pairs, spans, queries]
    float32, a maximum of -inf for a span that is not there; sinks_PM [pairs, queries] float32
    Source: Flash-Decoding (Dao et al., 2023): keys split into spans, combined by their log-sum-exp
    """
    pairs, spans, queries = maxima_PSM.shape
    places = _SPAN_PLACES * -(-spans // _SPAN_PLACES)
    shares_PMS = maxima_PSM.new_full((pairs, queries, places), float("-inf"))
    shares_PMS[..., :spans] = maxima_PSM.transpose(1, 2)
    shares_PMS = torch.softmax(shares_PMS, dim=-1)
    largest_PM = shares_PMS.amax(-1)
    shares_PMS[..., :spans].div_(peak_weights_PSM.transpose(1, 2))
    sums_PM1 = shares_PMS.sum(-1, keepdim=True)
    shares_PMS.div_(sums_PM1)
    merged_PMD = results_PSMD.mul(shares_PMS[..., :spans].transpose(1, 2).unsqueeze(-1)).sum(1)
    if sinks_PM is not None:
        # Relative to the largest score of all spans; with one span, exactly its own sum.
        _count_sinks_(merged_PMD, maxima_PSM.amax(1), sums_PM1.squeeze(-1).div_(largest_PM), sinks_PM)
    return merged_PMD
