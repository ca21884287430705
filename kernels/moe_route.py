"""The choice of experts for each token.

Shapes: T tokens, H hidden size, E experts, A chosen experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .linear import linear


def route(x_TH: Tensor, gate_EH: Tensor, *, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Return (weights, experts): the ``top_k`` most likely experts of each token, most likely first.

    The softmax over experts and the weights are float32 whatever the type of ``x``.

    Shapes: x_TH [tokens, hidden]; gate_EH [experts, hidden]; weights [tokens, top_k] float32; experts
    [tokens, top_k] int64
    Source: Mixtral (arXiv 2401.04088), section 2.1
    """
    return route_scores(linear(x_TH, gate_EH), top_k=top_k, normalize=normalize)


def route_scores(scores_TE: Tensor, *, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """As ``route``, from the scores that tokens give to experts.

    Shapes: scores_TE [tokens, experts] any float type
    """
    probabilities_TE = torch.softmax(scores_TE, dim=-1, dtype=torch.float32)
    weights_TA, experts_TA = torch.topk(probabilities_TE, top_k, dim=-1)
    if normalize:
        weights_TA = weights_TA / weights_TA.sum(-1, keepdim=True)
    return weights_TA, experts_TA
