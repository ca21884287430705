"""Log-probabilities of given tokens, their ranks, and the most likely tokens.

Shapes: R rows, V vocabulary, K the most likely tokens
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .sample_masses import chunk_rows, mass_scale, masses


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobRows:
    """Log-probabilities of given tokens, and of the most likely ones from the top down (lowest id first among equals).

    Shapes: logprobs_R [R] float32, ranks_R [R] int64 (from 1), top_ids_RK [R, K] int64, top_logprobs_RK [R, K] float32
    """

    logprobs_R: Tensor
    ranks_R: Tensor
    top_ids_RK: Tensor
    top_logprobs_RK: Tensor


def token_logprobs(logits_RV: Tensor, token_ids_R: Tensor, k: int) -> LogprobRows:
    """Return log-softmax of the model's own logits: each row's given token with its rank, and its k most likely.

    The rank is one more than the number of tokens strictly more likely. ``k`` beyond the vocabulary means all of it.

    Shapes: logits_RV [R, V] float32, not edited; token_ids_R [R] int64
    """
    vocabulary = logits_RV.shape[1]
    best_R = logits_RV.amax(dim=-1)
    ones_R = torch.ones_like(best_R, dtype=torch.float64)
    masses_R = torch.empty_like(token_ids_R)
    for start in range(0, logits_RV.shape[0], step := chunk_rows(logits_RV)):
        part = slice(start, start + step)
        masses_R[part] = masses(logits_RV[part], best_R[part], ones_R[part]).sum(dim=-1)
    normalizer_R = best_R.double() + torch.log(masses_R.double() / mass_scale(vocabulary))
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
