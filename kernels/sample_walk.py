"""The steps of a draw within one row, for kernels: lists of tiles, walks over them, thresholds, the winner.

A walk goes over a list of tile numbers in memory, GROUP tiles at a time. All of a program's threads write the list and
read it, so there is a barrier on either side of the writing.

Scores are compared relative to the row's best logit, in powers of two. Let r = 2**24 - hash, so that a token's uniform
number is u = 1 - r / (2**24 + 1). The estimate ``decay - log2(r)``, with ``decay = (logit - best) * scale``, is never
below the score ``decay - log2(-log(u)) - log2(2**24 + 1)``, because ``-log(u) >= 1 - u``: whatever has an estimate
below a score that was reached cannot win. Only what is left is scored in float64. A tile's best estimate is that of its
least time, ``r / 2**decay``: an exponential a token, and a logarithm a tile.

Two tuples go through all of it: ``row`` is (pointer to the logits, pointer to the list, vocabulary), ``drawing`` is
(best logit, temperature, scale, key, first id), temperature a float64, scale its reciprocal in powers of two.

A token takes part when its logit is at least ``floor`` (min_p, top_k) and above ``cut`` (what the nucleus left).
"""

from __future__ import annotations

from .launch import jit, tl
from .sample_masses import masses_of
from .sample_noise import hash_tokens, noise_of_hashes


@jit
def list_tiles(row, is_wanted_T, TILES: tl.constexpr):
    """Write the numbers of the wanted tiles, ascending; return how many they are."""
    list_ptr = row[1]
    wanted_T = is_wanted_T.to(tl.int32)
    tl.debug_barrier()
    tl.store(list_ptr + tl.cumsum(wanted_T, axis=0) - 1, tl.arange(0, TILES), mask=is_wanted_T)
    tl.debug_barrier()
    return tl.sum(wanted_T, axis=0)


@jit
def load_listed(row, first, count, TILE: tl.constexpr, GROUP: tl.constexpr):
    """Return the logits of listed tiles from ``first`` on, -inf where there are none; their columns and tiles."""
    row_ptr, list_ptr, vocabulary = row
    places_G = first + tl.arange(0, GROUP)
    tiles_G = tl.load(list_ptr + places_G, mask=places_G < count, other=0)
    columns_GT = tiles_G[:, None] * TILE + tl.arange(0, TILE)[None, :]
    is_there_GT = (columns_GT < vocabulary) & (places_G < count)[:, None]
    return tl.load(row_ptr + columns_GT, mask=is_there_GT, other=float("-inf")), columns_GT, tiles_G


@jit
def first_largest_of(row, best_T, TILE: tl.constexpr):
    """Return the largest logit, the first column of it, and it as a score (float64): NaN if it is +inf."""
    row_ptr, vocabulary = row[0], row[2]
    best = tl.max(best_T, axis=0)
    columns = tl.argmax(best_T, axis=0) * TILE + tl.arange(0, TILE)
    x = tl.load(row_ptr + columns, mask=columns < vocabulary, other=float("-inf"))
    column = tl.min(tl.where(x == best, columns, vocabulary - 1), axis=0)
    return best, column, tl.where(best == float("inf"), float("nan"), best).to(tl.float64)


@jit
def order_of(x):
    """Return int32 numbers in the order of float32 ones."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def value_at(order):
    """Return the float32 number at a place of ``order_of``."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def floor_of_top_k(row, best_T, best, k, TILES: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr):
    """Return a number which exactly the k largest logits, and what equals the last of them, are not below.

    A search by halves in the order of float32, ended as soon as k are found. The k-th best of the tiles' best logits is
    no larger than the number sought, so few tiles are read: those that reach the middle of what is left.
    """
    top = order_of(best).to(tl.int64) + 1  # fewer than k reach it
    low = order_of(tl.full((), float("-inf"), tl.float32)).to(tl.int64)  # k reach it
    high = top
    orders_T = order_of(best_T)
    count = tl.full((), TILES, tl.int32)
    while (high - low > 1) & (count != k):
        middle = (low + high) >> 1
        reached = tl.sum((orders_T >= middle.to(tl.int32)).to(tl.int32), axis=0)
        is_low = reached >= k
        count = tl.where(is_low, reached, count)
        low = tl.where(is_low, middle, low)
        high = tl.where(is_low, high, middle)
    high = top
    count = tl.full((), 0x7FFFFFFF, tl.int32)
    while (high - low > 1) & (count != k):
        middle = (low + high) >> 1
        value = value_at(middle.to(tl.int32))
        listed = list_tiles(row, best_T >= value, TILES)
        reached_GT = tl.zeros((GROUP, TILE), tl.int32)
        for first in range(0, listed, GROUP):
            x, _columns_GT, _tiles_G = load_listed(row, first, listed, TILE, GROUP)
            reached_GT += (x >= value).to(tl.int32)
        reached = tl.sum(tl.sum(reached_GT, axis=1), axis=0)
        is_low = reached >= k
        count = tl.where(is_low, reached, count)
        low = tl.where(is_low, middle, low)
        high = tl.where(is_low, high, middle)
    return value_at(low.to(tl.int32))


@jit
def times_of(decay, key, token_ids):
    """Return when tokens arrive at the earliest, in a race that the first to arrive wins."""
    return (16777216 - hash_tokens(key, token_ids)).to(tl.float32) * tl.exp2(-decay)


@jit
def estimate_again(
    row,
    drawing,
    estimate_ptr,
    mass_ptr,
    best_T,
    floor,
    cut,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Return the estimate of each tile, -inf where nothing takes part, and of the mass of all that takes part."""
    best, scale, key, first_id = drawing[0], drawing[2], drawing[3], drawing[4]
    is_wanted_T = (best_T >= floor) & (best_T > cut)
    count = list_tiles(row, is_wanted_T, TILES)
    for first in range(0, count, GROUP):
        x, columns_GT, tiles_G = load_listed(row, first, count, TILE, GROUP)
        is_in_GT = (x >= floor) & (x > cut)
        decay_GT = (x - best) * scale
        times_GT = tl.where(is_in_GT, times_of(decay_GT, key, columns_GT + first_id), float("inf"))
        masses_GT = tl.where(is_in_GT, tl.exp2(decay_GT), 0.0)
        is_listed_G = first + tl.arange(0, GROUP) < count
        tl.store(estimate_ptr + tiles_G, -tl.log2(tl.min(times_GT, axis=1)), mask=is_listed_G)
        tl.store(mass_ptr + tiles_G, tl.sum(masses_GT, axis=1), mask=is_listed_G)
    # Other threads load what these have stored.
    tl.debug_barrier()
    tiles_T = tl.arange(0, TILES)
    estimate_T = tl.load(estimate_ptr + tiles_T, mask=is_wanted_T, other=float("-inf"))
    return estimate_T, tl.sum(tl.load(mass_ptr + tiles_T, mask=is_wanted_T, other=0.0), axis=0)


@jit
def winner(row, drawing, estimate_T, floor, cut, TILES: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr):
    """Return the column of the best-scored token, the lowest among equals; its score (float64) and its logit."""
    row_ptr, vocabulary = row[0], row[2]
    best, temperature, scale, key, first_id = drawing
    # The token with the best estimate is scored first; what cannot reach its score is not looked at.
    columns = tl.argmax(estimate_T, axis=0) * TILE + tl.arange(0, TILE)
    x = tl.load(row_ptr + columns, mask=columns < vocabulary, other=float("-inf"))
    is_in = (x >= floor) & (x > cut)
    times = tl.where(is_in, times_of((x - best) * scale, key, columns + first_id), float("inf"))
    place = tl.argmin(times, axis=0)
    hashed = tl.sum(tl.where(tl.arange(0, TILE) == place, hash_tokens(key, columns + first_id), 0), axis=0)
    distance = (tl.max(tl.where(tl.arange(0, TILE) == place, x, float("-inf")), axis=0) - best).to(tl.float64)
    reached = (distance / temperature + noise_of_hashes(hashed)) * 1.4426950408889634 - 24.00000009
    # Float32 is good to a thousandth where it matters: from 2**-50 of the best token on.
    is_near_T = estimate_T >= reached.to(tl.float32) - 0.001
    count = list_tiles(row, is_near_T, TILES)
    score = tl.full((), float("-inf"), tl.float64)
    token = tl.full((), 0, tl.int32)
    for first in range(0, count, GROUP):
        x_GT, columns_GT, _tiles_G = load_listed(row, first, count, TILE, GROUP)
        noise_GT = noise_of_hashes(hash_tokens(key, columns_GT + first_id))
        is_in_GT = (x_GT >= floor) & (x_GT > cut)
        scores_GT = tl.where(is_in_GT, x_GT.to(tl.float64) / temperature + noise_GT, float("-inf"))
        best_score = tl.max(tl.max(scores_GT, axis=1), axis=0)
        tied_GT = tl.where(scores_GT == best_score, columns_GT, 0x7FFFFFFF)
        best_token = tl.min(tl.min(tied_GT, axis=1), axis=0)
        # Tiles come in ascending order: of equal scores, the one before stays.
        token = tl.where(best_score > score, best_token, token)
        score = tl.maximum(best_score, score)
    return token, score, tl.load(row_ptr + token)


@jit
def is_outside(
    row,
    drawing,
    best_T,
    floor,
    value,
    above,
    total,
    top_p,
    mass_scale,
    doubt,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Return whether a logit is outside of the nucleus, given estimates of the mass above it and of the whole mass.

    Where the estimates are nearer to the cut than a part ``doubt`` of the whole mass, it is asked in integers.
    """
    best, temperature = drawing[0], drawing[1]
    limit = top_p * total.to(tl.float64)
    is_out = above.to(tl.float64) >= limit
    if tl.abs(above.to(tl.float64) - limit) <= doubt * total.to(tl.float64):
        count = list_tiles(row, (best_T >= floor) & (best_T > float("-inf")), TILES)
        above_GT = tl.zeros((GROUP, TILE), tl.int64)
        total_GT = tl.zeros((GROUP, TILE), tl.int64)
        for first in range(0, count, GROUP):
            x, _columns_GT, _tiles_G = load_listed(row, first, count, TILE, GROUP)
            masses_GT = tl.where(x >= floor, masses_of(x, best, temperature, mass_scale), 0)
            total_GT += masses_GT
            above_GT += tl.where(x > value, masses_GT, 0)
        above_mass = tl.sum(tl.sum(above_GT, axis=1), axis=0).to(tl.float64)
        is_out = above_mass >= top_p * tl.sum(tl.sum(total_GT, axis=1), axis=0).to(tl.float64)
    # Nothing is above the most likely token.
    return is_out & (above > 0.0)
