"""Draw tokens from logits: edits of the logits, filters, position-keyed Gumbel noise, log-probabilities.

Owns the arithmetic of sampling. It must not know requests, slots or token tables: it is given logits, and numbers by
row. On a request's way it stands between the model's last matrix product and ``runtime.worker.sampler``.

A token is a function of its own row alone, bit for bit, whatever else is in the batch and however the batch is cut:

- noise is an integer hash of (seed, position, token), the same on every device up to the last bit of two logarithms;
- filters are value thresholds (every tie at the cut stays), so no sort order enters;
- probability masses are sums of integers (``_weights``), which have no rounding order to depend on;
- every other sum, maximum or comparison is of one element, or exact.

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

COLDEST_TEMPERATURE = 1e-5
"""Lower temperatures are greedy: their quotients would leave the range where float64 resolves the noise."""

_HASH_BITS = 24
_HASH_RANGE = 1 << _HASH_BITS
_BLOCK = 128  # values whose largest is found before its place is
_CHUNK_ELEMENTS_CPU = 1 << 18  # logits worked on at once: the temporaries stay in cache
_CHUNK_ELEMENTS_GPU = 1 << 24  # bounds the temporaries' memory


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


_GOLDEN_64 = _signed(0x9E3779B97F4A7C15, 64)
_MIX_64_1 = _signed(0xBF58476D1CE4E5B9, 64)
_MIX_64_2 = _signed(0x94D049BB133111EB, 64)
_GOLDEN_32 = _signed(0x9E3779B9, 32)
_MIX_32_1 = _signed(0x7FEB352D, 32)
_MIX_32_2 = _signed(0x846CA68B, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawSettings:
    """How to draw each row; host arrays, because which filters are on decides which work is done at all.

    Shapes: temperatures, top_ps, min_ps [R] float64; top_ks, seeds, positions [R] int64
    Temperature 0, top_p 1, top_k 0 and min_p 0 are off. Seeds are 64 bits in two's complement.
    """

    temperatures: NDArray[np.float64]
    top_ps: NDArray[np.float64]
    top_ks: NDArray[np.int64]
    min_ps: NDArray[np.float64]
    seeds: NDArray[np.int64]
    positions: NDArray[np.int64]

    def rows(self, start: int, stop: int) -> DrawSettings:
        """The settings of rows ``start`` to ``stop``."""
        return DrawSettings(
            temperatures=self.temperatures[start:stop],
            top_ps=self.top_ps[start:stop],
            top_ks=self.top_ks[start:stop],
            min_ps=self.min_ps[start:stop],
            seeds=self.seeds[start:stop],
            positions=self.positions[start:stop],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnTokens:
    """Drawn tokens. A row is not ``valid`` when its logits hold NaN or +inf or only -inf; its token means nothing then.

    Shapes: token_ids_R [R] int64, valid_R [R] bool
    """

    token_ids_R: Tensor
    valid_R: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobRows:
    """Log-probabilities of given tokens, and of the most likely ones from the top down (lowest id first among equals).

    Shapes: logprobs_R [R] float32, ranks_R [R] int64 (from 1), top_ids_RK [R, K] int64, top_logprobs_RK [R, K] float32
    """

    logprobs_R: Tensor
    ranks_R: Tensor
    top_ids_RK: Tensor
    top_logprobs_RK: Tensor


# Noise


def gumbel_noise(seeds_B: Tensor, positions_B: Tensor, token_ids_BK: Tensor) -> Tensor:
    """Return the standard Gumbel noise of tokens at positions: a pure function of (seed, position, token).

    Seed and position are mixed in 64 bits, once a row; the token is mixed into that key in 32 bits, because on a CPU
    whole vocabularies are hashed, and 32-bit products are several times faster. The two halves of the key enter at
    different rounds, so that rows whose low halves are near each other still differ.

    Shapes: seeds_B, positions_B [rows] int64; token_ids_BK [rows, K] int64; returns [rows, K] float64 in [-2.9, 16.7]
    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014) for the key; the rounds
    of Wellons's lowbias32 (github.com/skeeto/hash-prospector) for the token
    """
    keys_B = _row_keys(seeds_B, positions_B)
    return _noise(_hash(keys_B.unsqueeze(-1), token_ids_BK.to(torch.int32)))


def _row_keys(seeds_R: Tensor, positions_R: Tensor) -> Tensor:
    return _mix_64(_mix_64(seeds_R + _GOLDEN_64) + (positions_R + 1) * _GOLDEN_64)


def _mix_64(z: Tensor) -> Tensor:
    # Products wrap modulo 2**64 in two's complement on CPU and GPU alike, as the unsigned original's do; torch shifts
    # arithmetically, so the copies of the sign bit are masked away.
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _MIX_64_1
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _MIX_64_2
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def _hash(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Return 24 bits for each token id, int32; the shapes broadcast. In place where it can: this is the hot loop."""
    z = token_ids * _GOLDEN_32 + keys.to(torch.int32)
    shifted = torch.empty_like(z)
    _xor_shift_32_(z, 16, shifted).mul_(_MIX_32_1).bitwise_xor_((keys >> 32).to(torch.int32))
    _xor_shift_32_(z, 15, shifted).mul_(_MIX_32_2)
    _xor_shift_32_(z, 16, shifted)
    return z.bitwise_right_shift_(32 - _HASH_BITS).bitwise_and_(_HASH_RANGE - 1)


def _xor_shift_32_(z: Tensor, bits: int, scratch: Tensor) -> Tensor:
    torch.bitwise_right_shift(z, bits, out=scratch)
    return z.bitwise_xor_(scratch.bitwise_and_((1 << (32 - bits)) - 1))


def _uniform(hashed: Tensor) -> Tensor:
    return (hashed.double() + 1.0) / (_HASH_RANGE + 1.0)


def _noise(hashed: Tensor) -> Tensor:
    return -torch.log(-torch.log(_uniform(hashed)))


# Edits of the logits, sparse: only the rows that ask pay


def add_to_logits_(logits_RV: Tensor, rows_E: Tensor, token_ids_E: Tensor, amounts_E: Tensor) -> None:
    """Add an amount to single logits in place: logit_bias, and frequency and presence penalties as negative amounts.

    Shapes: logits_RV float32; rows_E, token_ids_E [E] int64, no pair twice; amounts_E [E] float32
    """
    logits_RV[rows_E, token_ids_E] += amounts_E


def mask_tokens_(logits_RV: Tensor, rows_E: Tensor, token_ids_E: Tensor) -> None:
    """Make tokens impossible in place, for instance the end tokens before ``min_tokens``.

    Shapes: logits_RV float32; rows_E, token_ids_E [E] int64
    """
    logits_RV[rows_E, token_ids_E] = -math.inf


def penalize_repetition_(logits_RV: Tensor, rows_E: Tensor, token_ids_E: Tensor, penalties_E: Tensor) -> None:
    """Divide positive logits by the penalty and multiply the others, in place; a pair that comes twice counts once.

    Shapes: logits_RV float32; rows_E, token_ids_E [E] int64; penalties_E [E] float32, one value within a row
    Source: CTRL (arXiv 1909.05858), section 4.1
    """
    logits_E = logits_RV[rows_E, token_ids_E]
    logits_RV[rows_E, token_ids_E] = torch.where(logits_E > 0, logits_E / penalties_E, logits_E * penalties_E)


# Drawing


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


def draw(logits_RV: Tensor, settings: DrawSettings) -> DrawnTokens:
    """Draw one token a row: ``argmax(logits / temperature + noise)`` over what min_p, then top_k, then top_p leave.

    Equal scores go to the lowest token id. Rows at temperature 0 take the largest logit.

    Shapes: logits_RV [R, V] float32, already edited; not changed here
    Source: Gumbel-max sampling (Maddison et al., arXiv 1411.0030, section 2); min_p (arXiv 2407.01082); nucleus
    sampling (arXiv 1904.09751)
    """
    if not (settings.temperatures >= COLDEST_TEMPERATURE).any():
        best_R, first_R = _first_largest(logits_RV)
        return DrawnTokens(token_ids_R=first_R, valid_R=best_R.isfinite())
    rows, vocabulary = logits_RV.shape
    ids_V = torch.arange(vocabulary, dtype=torch.int32, device=logits_RV.device)
    step = _chunk_rows(logits_RV)
    parts = [
        _draw_rows(logits_RV[start : start + step], settings.rows(start, start + step), ids_V)
        for start in range(0, rows, step)
    ]
    return DrawnTokens(
        token_ids_R=torch.cat([part.token_ids_R for part in parts]), valid_R=torch.cat([part.valid_R for part in parts])
    )


def draw_best(logits_RV: Tensor, settings: DrawSettings, *, first_id: int) -> tuple[Tensor, Tensor]:
    """Return each row's best token of a slice of the vocabulary and its score, for rows without filters.

    ``choose_best`` over the slices gives what ``draw`` gives over the whole. The score is NaN where the slice's logits
    hold NaN or +inf.

    Shapes: logits_RV [R, V of the slice] float32, column 0 being token ``first_id``; returns scores_R float64, ids_R
    int64
    """
    device = logits_RV.device
    best_R, first_R = _first_largest(logits_RV)
    scores_R, columns_R = best_R.double(), first_R
    sampled = np.flatnonzero(settings.temperatures >= COLDEST_TEMPERATURE)
    for start in range(0, sampled.size, step := _chunk_rows(logits_RV)):
        index_N = torch.from_numpy(sampled[start : start + step]).to(device)
        temperatures_N = torch.from_numpy(settings.temperatures[sampled[start : start + step]]).to(device)
        integers_2N = np.stack((settings.seeds, settings.positions))[:, sampled[start : start + step]]
        keys_N = _row_keys(*torch.from_numpy(integers_2N).to(device))
        ids_V = torch.arange(first_id, first_id + logits_RV.shape[1], dtype=torch.int32, device=device)
        logits_NV = logits_RV.index_select(0, index_N)
        times_NV = _race(logits_NV, best_R[index_N], temperatures_N, keys_N, ids_V)
        rows = _Rows(
            logits_NV=logits_NV, temperatures_N=temperatures_N, keys_N=keys_N, times_NV=times_NV, first_id=first_id
        )
        columns_R[index_N], scores_R[index_N] = _winners(rows)
    scores_R.masked_fill_(best_R.isnan() | (best_R == math.inf), math.nan).masked_fill_(best_R == -math.inf, -math.inf)
    return scores_R, columns_R + first_id


def choose_best(scores_SR: Tensor, ids_SR: Tensor) -> DrawnTokens:
    """Return the token with the largest score among the slices', the lowest id among equals.

    Shapes: scores_SR [slices, R] float64; ids_SR [slices, R] int64
    """
    best_R = scores_SR.amax(0)
    last = torch.iinfo(torch.int64).max
    return DrawnTokens(
        token_ids_R=torch.where(scores_SR == best_R, ids_SR, last).amin(0).masked_fill_(~best_R.isfinite(), 0),
        valid_R=best_R.isfinite(),
    )


def _draw_rows(logits_RV: Tensor, settings: DrawSettings, ids_V: Tensor) -> DrawnTokens:
    device = logits_RV.device
    greedy = settings.temperatures < COLDEST_TEMPERATURE
    # Greedy rows of a mixed batch run along at temperature 1, unfiltered, and are overruled at the end.
    temperatures_R = torch.from_numpy(np.where(greedy, 1.0, settings.temperatures)).to(device)
    integers_2R = torch.from_numpy(np.stack((settings.seeds, settings.positions))).to(device)
    keys_R = _row_keys(integers_2R[0], integers_2R[1])
    best_R, first_R = _first_largest(logits_RV)
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
        weights_NV = _weights(logits_RV[index_N], best_R[index_N], temperatures_R[index_N])
        if floor_R is not None:
            weights_NV.masked_fill_(logits_RV[index_N] < floor_R[index_N].unsqueeze(-1), 0)
        tokens_R[index_N] = _nucleus_winners(
            rows.select(index_N), tokens_R[index_N], weights_NV, top_ps_N, valid_R[index_N]
        )
    first_wins_R = torch.from_numpy(greedy).to(device) | ~valid_R
    return DrawnTokens(token_ids_R=torch.where(first_wins_R, first_R, tokens_R), valid_R=valid_R)


def _first_largest(values_RV: Tensor) -> tuple[Tensor, Tensor]:
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
    remainder_RV = _hash(keys_R.unsqueeze(-1), ids_V).neg_().add_(_HASH_RANGE)
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
    bound_N = least_N / _uniform(_hash(rows.keys_N, (nearest_N + rows.first_id).to(torch.int32)))
    rounding = 1.001  # of float32 in the estimates; about 1e-5 would do
    rows_E, ids_E = (rows.times_NV <= (bound_N * rounding).float().unsqueeze(-1)).nonzero(as_tuple=True)
    noise_E = _noise(_hash(rows.keys_N[rows_E], (ids_E + rows.first_id).to(torch.int32)))
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


# Probability masses and log-probabilities


def _chunk_rows(logits_RV: Tensor) -> int:
    elements = _CHUNK_ELEMENTS_GPU if logits_RV.is_cuda else _CHUNK_ELEMENTS_CPU
    return max(1, elements // logits_RV.shape[1])


def _mass_scale(vocabulary: int) -> float:
    # The largest power of two for which a whole row of the heaviest weight still fits 63 bits.
    return float(1 << (62 - (vocabulary - 1).bit_length()))


def _weights(logits_RV: Tensor, best_R: Tensor, temperatures_R: Tensor) -> Tensor:
    """Return ``exp((logit - best) / temperature)`` in fixed point, int64.

    Integer sums are exact and so independent of order, batch and device. For 32k tokens one unit is 2**-47 of the best
    token: the sum of a whole row is off by less than 1.2e-10 of it.
    """
    decay_RV = logits_RV.double().sub_(best_R.double().unsqueeze(-1)).div_(temperatures_R.unsqueeze(-1)).exp_()
    return decay_RV.mul_(_mass_scale(logits_RV.shape[1])).round_().long()


def token_logprobs(logits_RV: Tensor, token_ids_R: Tensor, k: int) -> LogprobRows:
    """Return log-softmax of the model's own logits: each row's given token with its rank, and its k most likely.

    The rank is one more than the number of tokens strictly more likely. ``k`` beyond the vocabulary means all of it.

    Shapes: logits_RV [R, V] float32, not edited; token_ids_R [R] int64
    """
    vocabulary = logits_RV.shape[1]
    best_R = logits_RV.amax(dim=-1)
    ones_R = torch.ones_like(best_R, dtype=torch.float64)
    masses_R = torch.empty_like(token_ids_R)
    for start in range(0, logits_RV.shape[0], step := _chunk_rows(logits_RV)):
        part = slice(start, start + step)
        masses_R[part] = _weights(logits_RV[part], best_R[part], ones_R[part]).sum(dim=-1)
    normalizer_R = best_R.double() + torch.log(masses_R.double() / _mass_scale(vocabulary))
    chosen_R1 = logits_RV.gather(1, token_ids_R.unsqueeze(-1))
    top_ids_RK = _largest(logits_RV, min(k, vocabulary))
    top_logits_RK = logits_RV.gather(1, top_ids_RK)
    return LogprobRows(
        logprobs_R=(chosen_R1.squeeze(-1).double() - normalizer_R).float(),
        ranks_R=(logits_RV > chosen_R1).sum(dim=-1) + 1,
        top_ids_RK=top_ids_RK,
        top_logprobs_RK=(top_logits_RK.double() - normalizer_R.unsqueeze(-1)).float(),
    )


def _largest(logits_RV: Tensor, k: int) -> Tensor:
    """Return the ids of the k largest logits in order, the lowest id first among equals."""
    vocabulary = logits_RV.shape[1]
    if k == 0:
        return torch.empty((logits_RV.shape[0], 0), dtype=torch.int64, device=logits_RV.device)
    top = logits_RV.topk(min(k + 1, vocabulary), dim=-1)
    ids_RK = top.indices[:, :k].clone()
    tied_N = (top.values[:, 1:] == top.values[:, :-1]).any(dim=-1).nonzero().squeeze(-1)
    if tied_N.numel():
        # topk leaves the order of equals open. Unique integers do not: the float's bits made monotonic, then the id.
        bits_NV = (logits_RV[tied_N] + 0.0).view(torch.int32)
        ordered_NV = (bits_NV ^ ((bits_NV >> 31) & 0x7FFFFFFF)).long()
        descending_V = torch.arange(vocabulary - 1, -1, -1, device=logits_RV.device)
        ids_RK[tied_N] = ((ordered_NV << 32) + descending_V).topk(k, dim=-1).indices
    return ids_RK
