"""Which way experts on several ranks get their tokens, by the number of tokens in a step: tried, with the other ranks.

Both ways give the same bits (``models.expert_ranks``), so the choice is one of time alone. It is made once, when the
rank is ready, on the groups that will carry the exchanges: every layer shape is tried with more and more tokens, until
gathering is no longer faster. The slowest rank counts, and all ranks come to the same answer.
"""

from __future__ import annotations

import logging
import statistics

import torch
from torch import Tensor

from ...comm.overlap import run_plain
from ..clock import monotonic_clock
from ..models.decoder import Decoder
from ..models.expert_ranks import ALWAYS, NEVER, ExpertRanks
from ..models.model_spec import ModelSpec, MoeSpec

logger = logging.getLogger(__name__)

SIZES = (1, 4, 16, 64, 256, 1024)
"""Tokens of a step that are tried: beyond the last that was faster gathered, tokens are exchanged."""

_REPEATS = 5
_LOADING_S = 600.0
"""How long a rank waits for others that are still reading their weights."""


@torch.inference_mode()
def set_exchange(choice: str, model: Decoder, spec: ModelSpec) -> None:
    """Say for every expert layer up to how many tokens are gathered; all ranks of a stage call it at the same time.

    ``choice``: ``all_to_all``, ``gather``, or ``auto`` for what is faster. ``spec`` is the rank's.
    """
    tried: dict[MoeSpec, int] = {}
    for index, experts in model.expert_layers.items():
        if choice == "auto" and not tried:
            for group in experts.groups:
                group.barrier(_LOADING_S)
        mlp = spec.layers[index].mlp
        assert isinstance(mlp, MoeSpec), "only a mixture has experts"
        if choice == "auto" and mlp not in tried:
            tried[mlp] = most_gathered(experts, _Tokens(spec, mlp, model))
            logger.info("experts are gathered in steps of up to %d tokens, and exchanged in larger ones", tried[mlp])
        experts.most_gathered = tried[mlp] if choice == "auto" else (ALWAYS if choice == "gather" else NEVER)


class _Tokens:
    """Made-up tokens for a layer, whose experts are drawn evenly."""

    def __init__(self, spec: ModelSpec, mlp: MoeSpec, model: Decoder) -> None:
        self._mlp = mlp
        self._hidden_size = spec.hidden_size
        self._dtype, self._device = model.dtype, model.device
        # The same on all ranks: those with the other columns of an expert get the same tokens.
        self._draw = torch.Generator().manual_seed(0)

    def hidden(self, tokens: int) -> Tensor:
        """Return their hidden states."""
        x_TH = torch.randn((tokens, self._hidden_size), generator=self._draw)
        return x_TH.to(device=self._device, dtype=self._dtype)

    def route(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights and experts, evenly drawn."""
        tokens, mlp = x_TH.shape[0], self._mlp
        experts_TA = torch.rand((tokens, mlp.num_experts), generator=self._draw).topk(mlp.top_k).indices
        weights_TA = torch.full((tokens, mlp.top_k), 1 / mlp.top_k)
        return weights_TA.to(self._device), experts_TA.to(self._device)


def most_gathered(experts: ExpertRanks, tokens: _Tokens) -> int:
    """Return the most of ``SIZES`` up to which a layer was faster gathered; what it has counted is forgotten."""
    most = NEVER
    for size in SIZES:
        seconds: dict[int, list[float]] = {NEVER: [], ALWAYS: []}
        for round_ in range(_REPEATS + 1):
            for way in (NEVER, ALWAYS) if round_ % 2 else (ALWAYS, NEVER):
                experts.most_gathered = way
                x_TH = tokens.hidden(size)
                experts.group.barrier()
                began_s = monotonic_clock()
                # Reading a number waits for a device that computes by itself.
                float(run_plain(experts.mix(x_TH, tokens.route))[0, 0])
                seconds[way].append(monotonic_clock() - began_s)
        # The first round does not count.
        exchanged_s, gathered_s = _slowest(experts, [statistics.median(times[1:]) for times in seconds.values()])
        if gathered_s >= exchanged_s:
            break
        most = size
    experts.load_E.zero_()
    return most


def _slowest(experts: ExpertRanks, seconds: list[float]) -> list[float]:
    """Return the slowest rank's times, the same on all."""
    slowest = torch.tensor(seconds, dtype=torch.float64, device=experts.load_E.device)
    for group in experts.groups:
        slowest = group.all_reduce(slowest, op="max").wait()
    found: list[float] = slowest.tolist()
    return found
