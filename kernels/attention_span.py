"""Attention of some queries to a stretch of paged keys, and how stretches are put together: what decoding, prefill
and shared prefixes have in common.

Keys are divided into spans of ``SPAN_KEYS`` at fixed positions (span s holds the keys from 512 s on). What a query gets
of a span is a partial: the weighted sum of values, the largest score and the sum of weights relative to it. Partials
are merged in the order of their spans by ``merge_partial`` alone, in registers or by ``attention_merge``. A key that a
query does not see counts exactly nothing, so that a row's bits depend neither on its tile's other rows nor on how its
keys were cut into tiles that some of them do not see.

Scores are kept in units of log2, as ``exp2`` takes them.

Shapes: M rows of a tile (queries and query heads of one KV head), D head size, n keys of a tile; N query heads, K KV
heads, L keys, C partials. A layer's cache is [2, num_blocks, K, block_size, D].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .launch import INTERPRETED, jit, tl
from .tiles import dot, rounded

SPAN_KEYS = 512
"""Keys of a span, a multiple of every tile's."""

LOG2_E = math.log2(math.e)
NO_WINDOW = 1 << 30
"""A window that no position reaches."""

_INTERPRETED = tl.constexpr(INTERPRETED)
_LOG2_E = tl.constexpr(LOG2_E)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionOptions:
    """What attention computes, alike for all tokens of a layer.

    - ``scale``: of scores; ``window``: position i sees j when 0 <= i - j < window; ``soft_cap``: scores become
      ``soft_cap * tanh(score / soft_cap)``.
    - ``sinks_N``: [query heads] float32, a score of each head that takes part in the softmax and has no value.
    - ``k_scale``, ``v_scale``: what numbers of a float8 cache are multiplied by to become keys and values.
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None
    sinks_N: Tensor | None = None
    k_scale: float = 1.0
    v_scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Partials:
    """What rows got of their spans, float32: values not yet divided, largest scores (log2), sums of weights.

    A span that nothing was seen of has a largest score of -inf. Shapes: results_CND [partials, query heads, size of
    a value], contiguous; peaks_CN, totals_CN [partials, query heads], contiguous
    """

    results_CND: Tensor
    peaks_CN: Tensor
    totals_CN: Tensor


def empty_partials(count: int, heads: int, value_size: int, device: torch.device) -> Partials:
    """Return room for ``count`` partials; nothing is in it."""
    return Partials(
        results_CND=torch.empty((count, heads, value_size), dtype=torch.float32, device=device),
        peaks_CN=torch.empty((count, heads), dtype=torch.float32, device=device),
        totals_CN=torch.empty((count, heads), dtype=torch.float32, device=device),
    )


def attend_reference(
    q_TND: Tensor, keys_LKD: Tensor, values_LKD: Tensor, is_seen_TL: Tensor, options: AttentionOptions
) -> Tensor:
    """Return the attention of queries to keys that each sees some of, zeros where it sees none; the softmax is float32.

    The window is in ``is_seen_TL``. Query head n belongs to KV head n // (N / K).

    Shapes: q_TND [queries, query heads, size]; keys_LKD, values_LKD [keys, KV heads, size]; is_seen_TL [queries, keys]
    bool; returns as q_TND
    Source: Attention is all you need (arXiv 1706.03762), section 3.2.1; soft cap: Gemma 2 (arXiv 2408.00118), section
    2; sinks: gpt-oss (arXiv 2508.10925), section 2.2
    """
    heads_per_kv = q_TND.shape[1] // keys_LKD.shape[1]
    keys_LND = (keys_LKD.float() * options.k_scale).repeat_interleave(heads_per_kv, dim=1)
    values_LND = (values_LKD.float() * options.v_scale).repeat_interleave(heads_per_kv, dim=1)
    scores_NTL = torch.einsum("tnd,lnd->ntl", q_TND.float(), keys_LND) * options.scale
    if options.soft_cap is not None:
        scores_NTL = options.soft_cap * torch.tanh(scores_NTL / options.soft_cap)
    scores_NTL = scores_NTL.masked_fill(~is_seen_TL, -math.inf)
    # One more key, that has no value: the sink, or one that counts nothing.
    extra_N = torch.full((q_TND.shape[1],), -math.inf, device=q_TND.device)
    extra_N = extra_N if options.sinks_N is None else options.sinks_N.float()
    extra_NT1 = extra_N[:, None, None].expand(*scores_NTL.shape[:2], 1)
    weights_NTL = torch.cat((scores_NTL, extra_NT1), dim=-1).softmax(-1)[..., :-1].nan_to_num(nan=0.0)
    return torch.einsum("ntl,lnd->tnd", weights_NTL, values_LND).to(q_TND.dtype)


@jit
def as_type_of(x, TYPE: tl.constexpr):
    """Return a tile of the cache as the type that is multiplied with; numbers of 8 bits fit any exactly."""
    if _INTERPRETED:
        # There products are float32 in any case.
        return x.to(tl.float32)
    return x.to(TYPE)


@jit
def log2_scores(products, scale, soft_cap, HAS_SOFT_CAP: tl.constexpr):
    """Return products of queries and keys as scores in units of log2."""
    if HAS_SOFT_CAP:
        # tanh(x) = 1 - 2 / (1 + exp(2 x)), right for the largest x too.
        scores = products * (scale / soft_cap * 2 * _LOG2_E)
        return (1.0 - 2.0 / (1.0 + tl.exp2(scores))) * (soft_cap * _LOG2_E)
    return products * (scale * _LOG2_E)


@jit
def take_scores(scores_Mn, peak_M, total_M):
    """Take a tile of scores (-inf: not seen) into a running softmax.

    Returns (weights relative to the new largest score, what earlier results are to be multiplied by, largest score, sum
    of weights).
    """
    new_peak_M = tl.maximum(peak_M, tl.max(scores_Mn, axis=1))
    # Rows that have seen nothing yet keep -inf, and weights of zero.
    base_M = tl.where(new_peak_M == float("-inf"), 0.0, new_peak_M)
    weights_Mn = tl.exp2(scores_Mn - base_M[:, None])
    kept_M = tl.exp2(peak_M - base_M)
    return weights_Mn, kept_M, new_peak_M, total_M * kept_M + tl.sum(weights_Mn, axis=1)


@jit
def attend_keys(
    q_MD,
    result_MD,
    peak_M,
    total_M,
    keys_ptr,
    values_ptr,
    table_ptr,
    begin,
    end,
    lowest_M,
    position_M,
    kv_heads,
    scale,
    soft_cap,
    HAS_SOFT_CAP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS_DIFFER: tl.constexpr,
):
    """Let a tile's rows attend to the keys from ``begin`` to before ``end``; return (result, peak, total).

    ``keys_ptr``, ``values_ptr``: those of one KV head in block 0; ``table_ptr``: the blocks of one sequence. Tiles of
    keys stand at multiples of BLOCK_N; nothing outside of [begin, end) is read, in the table neither. With ROWS_DIFFER
    row m sees only the keys ``lowest_M`` to ``position_M``, both included. Without MASKED ``begin`` and ``end`` must be
    multiples of BLOCK_N, and all rows see all keys. Begin with zeros, -inf, zeros: partials are what comes back.
    """
    d_D = tl.arange(0, BLOCK_D)
    for first in range(begin // BLOCK_N * BLOCK_N, end, BLOCK_N):
        key_n = first + tl.arange(0, BLOCK_N)
        if MASKED:
            is_there_n = (key_n >= begin) & (key_n < end)
            block_n = tl.load(table_ptr + key_n // BLOCK_SIZE, mask=is_there_n, other=0)
        else:
            block_n = tl.load(table_ptr + key_n // BLOCK_SIZE)
        # Caches are larger than 2^31 numbers.
        row_n = block_n.to(tl.int64) * (kv_heads * BLOCK_SIZE) + key_n % BLOCK_SIZE
        place_nD = row_n[:, None] * HEAD_SIZE + d_D[None, :]
        if MASKED:
            is_read_nD = is_there_n[:, None] & (d_D < HEAD_SIZE)[None, :]
            k_nD = tl.load(keys_ptr + place_nD, mask=is_read_nD, other=0.0)
            v_nD = tl.load(values_ptr + place_nD, mask=is_read_nD, other=0.0)
        elif BLOCK_D != HEAD_SIZE:
            is_read_nD = (d_D < HEAD_SIZE)[None, :]
            k_nD = tl.load(keys_ptr + place_nD, mask=is_read_nD, other=0.0)
            v_nD = tl.load(values_ptr + place_nD, mask=is_read_nD, other=0.0)
        else:
            k_nD = tl.load(keys_ptr + place_nD)
            v_nD = tl.load(values_ptr + place_nD)
        products_Mn = dot(q_MD, tl.trans(as_type_of(k_nD, q_MD.dtype)), tl.zeros((q_MD.shape[0], BLOCK_N), tl.float32))
        scores_Mn = log2_scores(products_Mn, scale, soft_cap, HAS_SOFT_CAP)
        if MASKED:
            is_seen_Mn = is_there_n[None, :]
            if ROWS_DIFFER:
                is_seen_Mn &= (key_n[None, :] <= position_M[:, None]) & (key_n[None, :] >= lowest_M[:, None])
            scores_Mn = tl.where(is_seen_Mn, scores_Mn, float("-inf"))
        weights_Mn, kept_M, peak_M, total_M = take_scores(scores_Mn, peak_M, total_M)
        result_MD = dot(rounded(weights_Mn, q_MD.dtype), as_type_of(v_nD, q_MD.dtype), result_MD * kept_M[:, None])
    return result_MD, peak_M, total_M


@jit
def merge_partial(result_MD, peak_M, total_M, span_MD, span_peak_M, span_total_M):
    """Take a span's partial into what earlier spans gave (zeros, -inf, zeros at first); one of nothing changes no bit.

    Returns (result, peak, total).
    """
    new_peak_M = tl.maximum(peak_M, span_peak_M)
    base_M = tl.where(new_peak_M == float("-inf"), 0.0, new_peak_M)
    kept_M = tl.exp2(peak_M - base_M)
    share_M = tl.exp2(span_peak_M - base_M)
    result_MD = result_MD * kept_M[:, None] + span_MD * share_M[:, None]
    return result_MD, new_peak_M, total_M * kept_M + span_total_M * share_M


@jit
def finish_rows(result_MD, peak_M, total_M, sink_M, v_scale, HAS_SINKS: tl.constexpr):
    """Return rows' attention of what all their spans gave: sinks (natural scores) join in, values are scaled.

    Rows that saw nothing are zeros.
    """
    if HAS_SINKS:
        sink_M = sink_M * _LOG2_E
        base_M = tl.maximum(peak_M, sink_M)
        kept_M = tl.exp2(peak_M - base_M)
        result_MD = result_MD * kept_M[:, None]
        total_M = total_M * kept_M + tl.exp2(sink_M - base_M)
    # A sum of weights is at least 1 where anything was seen.
    return result_MD * (v_scale / tl.where(total_M == 0.0, 1.0, total_M))[:, None]
