"""Drawing by torch's operations, on any device: a race in float32, exactly pruned, then scores in float64.

Shapes: R rows, N some of the rows, V vocabulary, K columns, E entries: a ragged list of (row, token) pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .cpu.native import native_for
from .sample_masses import chunk_rows, masses
from .sample_noise import HASH_RANGE, noise_of, row_keys, token_hash, uniform
from .sample_settings import COLDEST_TEMPERATURE, DrawnTokens, DrawSettings

_BLOCK = 128  # values whose largest is found before its place is


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Some rows being drawn.

    Shapes: logits_NV float32; temperatures_N float64, above 0; keys_N int64 (seed and position, hashed);
    times_NV float32: an estimate of each token's arrival time in the race that the smallest wins, see ``_race``.
    ``first_id``: the token of column 0, where the columns are a slice of the vocabulary
    """

    logits_NV: Tensor
    temperatures_N: Tensor
    keys_N: Tensor
    times_NV: Tensor
    first_id: int = 0

    def select(self, index: Tensor) -> _Rows:
        if index.numel() == self.logits_NV.shape[0]:
            return self
        return _Rows(
            logits_NV=self.logits_NV[index],
            temperatures_N=self.temperatures_N[index],
            keys_N=self.keys_N[index],
            times_NV=self.times_NV[index],
            first_id=self.first_id,
        )


def draw_by_race(logits_RV: Tensor, settings: DrawSettings) -> DrawnTokens:
    """As ``sample.draw``."""
    if not (settings.temperatures >= COLDEST_TEMPERATURE).any():
        best_R, first_R = first_largest(logits_RV)
        return DrawnTokens(token_ids_R=first_R, valid_R=best_R.isfinite())
    rows, vocabulary = logits_RV.shape
    ids_V = torch.arange(vocabulary, dtype=torch.int32, device=logits_RV.device)
    step = chunk_rows(logits_RV)
    parts = [
        _draw_rows(logits_RV[start : start + step], settings.rows(start, start + step), ids_V)
        for start in range(0, rows, step)
    ]
    return DrawnTokens(
        token_ids_R=torch.cat([part.token_ids_R for part in parts]), valid_R=torch.cat([part.valid_R for part in parts])
    )


def best_by_race(logits_RV: Tensor, settings: DrawSettings, *, first_id: int) -> tuple[Tensor, Tensor]:
    """As ``sample.draw_best``."""
    device = logits_RV.device
    best_R, first_R = first_largest(logits_RV)
    scores_R, columns_R = best_R.double(), first_R
    sampled = np.flatnonzero(settings.temperatures >= COLDEST_TEMPERATURE)
    for start in range(0, sampled.size, step := chunk_rows(logits_RV)):
        index_N = torch.from_numpy(sampled[start : start + step]).to(device)
        temperatures_N = torch.from_numpy(settings.temperatures[sampled[start : start + step]]).to(device)
        integers_2N = np.stack((settings.seeds, settings.positions))[:, sampled[start : start + step]]
        keys_N = row_keys(*torch.from_numpy(integers_2N).to(device))
        ids_V = torch.arange(first_id, first_id + logits_RV.shape[1], dtype=torch.int32, device=device)
        logits_NV = logits_RV.index_select(0, index_N)
        times_NV = _race(logits_NV, best_R[index_N], temperatures_N, keys_N, ids_V)
        rows = _Rows(
            logits_NV=logits_NV, temperatures_N=temperatures_N, keys_N=keys_N, times_NV=times_NV, first_id=first_id
        )
        columns_R[index_N], scores_R[index_N] = _winners(rows)
    scores_R.masked_fill_(best_R.isnan() | (best_R == math.inf), math.nan).masked_fill_(best_R == -math.inf, -math.inf)
    return scores_R, columns_R + first_id


def _draw_rows(logits_RV: Tensor, settings: DrawSettings, ids_V: Tensor) -> DrawnTokens:
    device = logits_RV.device
    greedy = settings.temperatures < COLDEST_TEMPERATURE
    # Greedy rows of a mixed batch run along at temperature 1, unfiltered, and are overruled at the end.
    temperatures_R = torch.from_numpy(np.where(greedy, 1.0, settings.temperatures)).to(device)
    integers_2R = torch.from_numpy(np.stack((settings.seeds, settings.positions))).to(device)
    keys_R = row_keys(integers_2R[0], integers_2R[1])
    best_R, first_R = first_largest(logits_RV)
    valid_R = best_R.isfinite()
    floor_R = _filter_floor(logits_RV, best_R, temperatures_R, settings, ~greedy)

    times_RV = _race(logits_RV, best_R, temperatures_R, keys_R, ids_V)
    if floor_R is not None:
        times_RV.masked_fill_(logits_RV < floor_R.unsqueeze(-1), math.inf)
    rows = _Rows(logits_NV=logits_RV, temperatures_N=temperatures_R, keys_N=keys_R, times_NV=times_RV)
    tokens_R, _ = _winners(rows)
    nucleus = np.flatnonzero(~greedy & (settings.top_ps < 1.0))
    if nucleus.size:
        index_N = torch.from_numpy(nucleus).to(device)
        top_ps_N = torch.from_numpy(settings.top_ps[nucleus]).to(device)
        weights_NV = masses(logits_RV[index_N], best_R[index_N], temperatures_R[index_N])
        if floor_R is not None:
            weights_NV.masked_fill_(logits_RV[index_N] < floor_R[index_N].unsqueeze(-1), 0)
        tokens_R[index_N] = _nucleus_winners(
            rows.select(index_N), tokens_R[index_N], weights_NV, top_ps_N, valid_R[index_N]
        )
    first_wins_R = torch.from_numpy(greedy).to(device) | ~valid_R
    return DrawnTokens(token_ids_R=torch.where(first_wins_R, first_R, tokens_R), valid_R=valid_R)


def first_largest(values_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's largest value and where it stands first, as ``max`` does; NaN counts as the largest."""
    compiled = native_for(values_RV)
    if compiled is not None and values_RV.dtype == torch.float32 and values_RV.dim() == 2 and values_RV.shape[1]:
        rows, size = values_RV.shape
        best_R, first_R = values_RV.new_empty(rows), values_RV.new_empty(rows, dtype=torch.int64)
        threads, row_stride = torch.get_num_threads(), values_RV.stride(0)
        compiled.first_largest(
            values_RV.data_ptr(), best_R.data_ptr(), first_R.data_ptr(), rows, size, row_stride, threads
        )
        return best_R, first_R
    if not _in_blocks(values_RV):
        best_R, first_R = values_RV.max(dim=-1)
        return best_R, first_R
    blocks_RB = values_RV.unflatten(-1, (-1, _BLOCK)).amax(-1)
    best_R, block_R = blocks_RB.max(dim=-1)
    return best_R, block_R * _BLOCK + _block_of(values_RV, block_R).argmax(-1)


def _first_least(values_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's least value and where it stands first, as ``min`` does; NaN counts as the least."""
    if not _in_blocks(values_RV):
        least_R, first_R = values_RV.min(dim=-1)
        return least_R, first_R
    blocks_RB = values_RV.unflatten(-1, (-1, _BLOCK)).amin(-1)
    least_R, block_R = blocks_RB.min(dim=-1)
    return least_R, block_R * _BLOCK + _block_of(values_RV, block_R).argmin(-1)


def _in_blocks(values_RV: Tensor) -> bool:
    # On a CPU, the place of an extreme is found value by value, the extreme itself sixteen values at a time: so the
    # values of blocks are compared first.
    return not values_RV.is_cuda and values_RV.shape[-1] % _BLOCK == 0


def _block_of(values_RV: Tensor, block_R: Tensor) -> Tensor:
    places_RB = (block_R * _BLOCK).unsqueeze(-1) + torch.arange(_BLOCK, device=values_RV.device)
    return values_RV.gather(1, places_RB)


def _filter_floor(
    logits_RV: Tensor, best_R: Tensor, temperatures_R: Tensor, settings: DrawSettings, sampled: NDArray[np.bool_]
) -> Tensor | None:
    """Return the smallest logit that min_p and top_k leave in each row, -inf without them; None if no row has any."""
    vocabulary = logits_RV.shape[1]
    limited = np.flatnonzero(sampled & (settings.top_ks > 0) & (settings.top_ks < vocabulary))
    relative = sampled & (settings.min_ps > 0)
    if not limited.size and not relative.any():
        return None
    floor_R = torch.full_like(best_R, -math.inf)
    if relative.any():
        logs_R = torch.from_numpy(np.log(settings.min_ps, where=relative, out=np.full(relative.size, -np.inf)))
        floor_R = (best_R.double() + temperatures_R * logs_R.to(best_R.device)).float()
    if limited.size:
        rows_N = torch.from_numpy(limited).to(best_R.device)
        ks_N = torch.from_numpy(settings.top_ks[limited]).to(best_R.device)
        logits_NV = logits_RV if limited.size == logits_RV.shape[0] else logits_RV.index_select(0, rows_N)
        largest_NK = logits_NV.topk(int(settings.top_ks[limited].max()), dim=-1).values
        kth_N = largest_NK.gather(1, ks_N.unsqueeze(-1) - 1).squeeze(-1)
        # Where min_p leaves fewer than k tokens, top_k takes no more; where it leaves as many, their k-th is this one.
        floor_R[rows_N] = torch.maximum(floor_R[rows_N], kth_N)
    return floor_R


def _race(logits_RV: Tensor, best_R: Tensor, temperatures_R: Tensor, keys_R: Tensor, ids_V: Tensor) -> Tensor:
    """Return an estimate of each token's arrival time, float32: never late, and early by a known factor at most.

    ``argmax(x + gumbel)``, x being logit / T less its row's maximum and gumbel = -log(-log(u)), is ``argmin`` of the
    times ``-log(u) / exp(x)``. A logarithm for a whole vocabulary is dear, and ``1 - u <= -log(u) <= (1 - u) / u``: so
    the estimate is ``(1 - u) / exp(x)``, times 2**24 + 1, and ``_winners`` turns it into an exact answer.
    """
    decay_RV = logits_RV - best_R.unsqueeze(-1)
    decay_RV.mul_(temperatures_R.reciprocal().float().unsqueeze(-1)).exp_()
    remainder_RV = token_hash(keys_R.unsqueeze(-1), ids_V).neg_().add_(HASH_RANGE)
    return torch.div(remainder_RV, decay_RV, out=decay_RV)


def _winners(rows: _Rows) -> tuple[Tensor, Tensor]:
    """Return the column of each row's best-scored token, the lowest among equals, among those with a finite time
    estimate; and its score, float64.

    Exact pruning. Let j have the smallest estimate e_j. The winner w arrives no later than j, at most at e_j / u_j, and
    its own estimate is never late: e_w <= e_j / u_j. So only tokens within that bound are scored in float64, one or
    two a row as a rule; u_j is at least 2**-24.01, and an estimate at least 1, so none of them is more than 33.3 below
    the best scaled logit, where float32 still has x to 1e-5. (The textbook bound of 19.6, the width of the noise,
    leaves most of a flat vocabulary.)
    """
    least_N, nearest_N = _first_least(rows.times_NV)
    bound_N = least_N / uniform(token_hash(rows.keys_N, (nearest_N + rows.first_id).to(torch.int32)))
    rounding = 1.001  # of float32 in the estimates; about 1e-5 would do
    rows_E, ids_E = (rows.times_NV <= (bound_N * rounding).float().unsqueeze(-1)).nonzero(as_tuple=True)
    noise_E = noise_of(token_hash(rows.keys_N[rows_E], (ids_E + rows.first_id).to(torch.int32)))
    scores_E = rows.logits_NV[rows_E, ids_E].double() / rows.temperatures_N[rows_E] + noise_E

    best_N = torch.full_like(rows.temperatures_N, -math.inf).scatter_reduce_(0, rows_E, scores_E, "amax")
    last = rows.logits_NV.shape[1] - 1
    tied_ids_E = torch.where(scores_E == best_N[rows_E], ids_E, last)
    # A row without entries (its logits are no numbers) gets the last id, which is not used.
    return torch.full_like(nearest_N, last).scatter_reduce_(0, rows_E, tied_ids_E, "amin"), best_N


def _nucleus_winners(rows: _Rows, tokens_N: Tensor, weights_NV: Tensor, top_ps_N: Tensor, valid_N: Tensor) -> Tensor:
    """Return the best-scored token of each nucleus, given the best of the whole row, without sorting.

    The nucleus is the tokens such that everything strictly more likely weighs less than top_p of all. The best score
    of a superset that lies in the nucleus is the nucleus's best; one that does not shows that nothing at or below its
    logit is in the nucleus either, so only what is above it remains. The most likely token always is: hence this ends.
    """
    tokens_N = tokens_N.clone()
    open_N = valid_N
    limits_N = top_ps_N * weights_NV.sum(dim=-1).double()
    index_N = torch.arange(tokens_N.shape[0], device=tokens_N.device)
    drawn_N = tokens_N
    while True:
        above_NV = rows.logits_NV > rows.logits_NV.gather(1, drawn_N.unsqueeze(-1))
        masses_N = torch.where(above_NV, weights_NV, 0).sum(dim=-1)
        again_N = (open_N & (masses_N.double() >= limits_N)).nonzero().squeeze(-1)
        if not again_N.numel():
            return tokens_N
        rows = rows.select(again_N)
        rows = replace(rows, times_NV=rows.times_NV.masked_fill(~above_NV[again_N], math.inf))
        weights_NV, limits_N, open_N = weights_NV[again_N], limits_N[again_N], open_N[again_N]
        index_N = index_N[again_N]
        drawn_N, _ = _winners(rows)
        tokens_N[index_N] = drawn_N
