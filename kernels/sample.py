"""Draw tokens from logits: filters, position-keyed Gumbel noise, the best of the slices of a vocabulary.

Owns what a draw is. It must not know requests, slots or token tables: it is given logits, and numbers by row. On a
request's way it stands between the model's last matrix product and ``runtime.worker.sampler``.

A token is a function of its own row alone, bit for bit, whatever else is in the batch and however the batch is cut:

- noise is an integer hash of (seed, position, token), the same on every device up to the last bit of two logarithms;
- filters are value thresholds (every tie at the cut stays), so no sort order enters;
- probability masses are sums of integers (``sample_masses``), which have no rounding order to depend on;
- every other sum, maximum or comparison is of one element, or exact.

Two ways come to the same tokens: torch's operations (``sample_race``) and kernels (``sample_tiles``).

Shapes: R rows, V vocabulary
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .backends import uses_triton
from .sample_masses import masses
from .sample_noise import gumbel_noise
from .sample_race import best_by_race, draw_by_race
from .sample_settings import COLDEST_TEMPERATURE, DrawnTokens, DrawSettings
from .sample_tiles import best_by_tiles, choose_by_kernel, draw_by_tiles, fits_tiles


def draw_reference(logits_RV: Tensor, settings: DrawSettings) -> DrawnTokens:
    """Draw one token a row: ``argmax(logits / temperature + noise)`` over what min_p, then top_k, then top_p leave.

    - min_p leaves the logits from ``best + temperature * log(min_p)`` on, rounded to float32;
    - top_k leaves those that are no smaller than the k-th largest;
    - top_p leaves those for which all that is strictly more likely has less than top_p of the mass that is left.

    Equal scores go to the lowest token id. Rows below ``COLDEST_TEMPERATURE`` take the largest logit.

    Shapes: logits_RV [R, V] float32, already edited; not changed here
    Source: Gumbel-max sampling (Maddison et al., arXiv 1411.0030, section 2); min_p (arXiv 2407.01082); nucleus
    sampling (arXiv 1904.09751)
    """
    tokens_R, valid_R = torch.zeros(logits_RV.shape[0], dtype=torch.int64), torch.zeros(logits_RV.shape[0]).bool()
    ids_1V = torch.arange(logits_RV.shape[1]).unsqueeze(0)
    for row, logits_V in enumerate(logits_RV.cpu()):
        best, token = logits_V.max(dim=0)
        valid_R[row] = best.isfinite()
        temperature = torch.tensor(settings.temperatures[row])
        if valid_R[row] and temperature >= COLDEST_TEMPERATURE:
            seed_1, position_1 = (torch.tensor([each[row]]) for each in (settings.seeds, settings.positions))
            noise_V = gumbel_noise(seed_1, position_1, ids_1V)[0]
            scores_V = logits_V.double() / temperature + noise_V
            token = scores_V.masked_fill(
                ~_left(logits_V, best, temperature, settings.rows(row, row + 1)), -math.inf
            ).argmax()
        tokens_R[row] = token
    return DrawnTokens(token_ids_R=tokens_R.to(logits_RV.device), valid_R=valid_R.to(logits_RV.device))


def _left(logits_V: Tensor, best: Tensor, temperature: Tensor, settings: DrawSettings) -> Tensor:
    """Return which tokens the filters of one row leave."""
    descending_V = logits_V.sort(descending=True).values
    floor = (
        (best.double() + temperature * math.log(settings.min_ps[0])).float() if settings.min_ps[0] > 0 else -math.inf
    )
    left_V = logits_V >= floor
    if 0 < settings.top_ks[0] < logits_V.numel():
        left_V &= logits_V >= descending_V[settings.top_ks[0] - 1]
    if settings.top_ps[0] < 1.0:
        masses_V = masses(logits_V.unsqueeze(0), best.unsqueeze(0), temperature.unsqueeze(0))[0] * left_V
        likelier_V = (masses_V * (logits_V > logits_V.unsqueeze(-1))).sum(dim=-1)
        left_V &= likelier_V.double() < settings.top_ps[0] * masses_V.sum().double()
    return left_V


def draw(logits_RV: Tensor, settings: DrawSettings) -> DrawnTokens:
    """As ``draw_reference``."""
    if uses_triton("sample", logits_RV) and fits_tiles(logits_RV):
        return draw_by_tiles(logits_RV, settings)
    return draw_by_race(logits_RV, settings)


def draw_best(logits_RV: Tensor, settings: DrawSettings, *, first_id: int) -> tuple[Tensor, Tensor]:
    """Return each row's best token of a slice of the vocabulary and its score, for rows without filters.

    ``choose_best`` over the slices gives what ``draw`` gives over the whole. The score is NaN where the slice's logits
    hold NaN or +inf.

    Shapes: logits_RV [R, V of the slice] float32, column 0 being token ``first_id``; returns scores_R float64, ids_R
    int64
    """
    if uses_triton("sample", logits_RV) and fits_tiles(logits_RV):
        return best_by_tiles(logits_RV, settings, first_id=first_id)
    return best_by_race(logits_RV, settings, first_id=first_id)


def choose_best(scores_SR: Tensor, ids_SR: Tensor) -> DrawnTokens:
    """Return the token with the largest score among the slices', the lowest id among equals.

    Shapes: scores_SR [slices, R] float64; ids_SR [slices, R] int64
    """
    if uses_triton("sample", scores_SR):
        return choose_by_kernel(scores_SR, ids_SR)
    best_R = scores_SR.amax(0)
    last = torch.iinfo(torch.int64).max
    return DrawnTokens(
        token_ids_R=torch.where(scores_SR == best_R, ids_SR, last).amin(0).masked_fill_(~best_R.isfinite(), 0),
        valid_R=best_R.isfinite(),
    )
