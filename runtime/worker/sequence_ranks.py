"""What the sequence-parallel ranks of a stage settle among themselves: which steps are divided, and what was drawn.

They have the same weights, and each keeps the KV of whole sequences. The first of them draws, and the others take its
tokens: what they compute alike may differ in the last bits, because their batches do, and at a near-tie that would be
another token. A row's last tokens are always the first rank's (``comm.sequence_split``); of a divided step it only
lacks what prompts' log-probabilities need.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...comm.collectives import Collectives, Work
from ...comm.sequence_split import SequenceSplit, StepDivision, tokens_of
from ..messages import Int32Array

FEWEST_TOKENS = 256
"""Rows of fewer are computed by every rank: dividing them would save less than the exchanges of all layers take."""
_GRAIN = 64


class SequenceRanks:
    """One rank's side of it; without a group it is the only one, and all of it is nothing. One thread uses it."""

    def __init__(
        self,
        group: Collectives | None,
        *,
        block_size: int,
        fewest_tokens: int = FEWEST_TOKENS,
        grain: int = _GRAIN,
    ) -> None:
        """Divide rows of at least ``fewest_tokens``, at multiples of ``grain`` positions and whole blocks."""
        self._group = group
        self._split = None
        if group is not None:
            self._split = SequenceSplit(
                rank=group.rank,
                ranks=group.size,
                fewest_tokens=fewest_tokens,
                grain=block_size * max(1, -(-grain // block_size)),
            )
        self._given: Work | None = None

    @property
    def draws(self) -> bool:
        """Whether this rank draws, if its stage is the last."""
        return self._group is None or self._group.rank == 0

    def divide(self, starts: Int32Array, counts: Int32Array) -> StepDivision | None:
        """Return how a step is divided; None: every rank computes all of it.

        Shapes: starts, counts [rows]
        """
        return None if self._split is None else self._split.divide(starts, counts)

    def bring(self, hidden_TH: Tensor, division: StepDivision, wanted: NDArray[np.bool_]) -> Tensor:
        """Bring the hidden states of ``wanted`` tokens to the rank that draws; return them where they stand in the
        step. What stands elsewhere, and on the other ranks, has no meaning.

        Shapes: hidden_TH [tokens of this rank, hidden size]; wanted [tokens of the step]; returns [those, hidden size]
        """
        assert self._group is not None, "a step is divided over the ranks of a group"
        step_TH = hidden_TH.new_empty((len(wanted), hidden_TH.shape[1]))
        places = tokens_of(division.computed)
        step_TH.index_copy_(0, self._on_device(places, step_TH), hidden_TH)
        sent = [tokens_of(division.pieces_of(rank)) for rank in range(division.ranks)]
        sent = [tokens[wanted[tokens]] if rank else tokens[:0] for rank, tokens in enumerate(sent)]
        counts = [len(tokens) for tokens in sent]
        if not sum(counts):
            return step_TH
        nobody = [0] * division.ranks
        own = step_TH.index_select(0, self._on_device(sent[division.rank], step_TH))
        found_NH = self._group.all_to_all(
            own,
            send_counts=[len(own), *nobody[1:]],
            receive_counts=nobody if division.rank else counts,
        ).wait()
        if division.rank == 0:
            step_TH.index_copy_(0, self._on_device(np.concatenate(sent), step_TH), found_NH)
        return step_TH

    def share(self, token_ids: Int32Array, device: torch.device) -> Int32Array:
        """Return what the rank that draws has drawn; the others' ``token_ids`` only say how many.

        Shapes: token_ids [rows], the same number on all ranks
        """
        if self._group is None:
            return token_ids
        drawn = self._group.broadcast(torch.from_numpy(np.array(token_ids)).to(device), root=0)
        if self.draws:
            # The others take them when they have come so far; this rank need not wait for that before the next step.
            previous, self._given = self._given, drawn
            if previous is not None:
                previous.wait()
            return token_ids
        found: Int32Array = drawn.wait().cpu().numpy()
        return found

    @staticmethod
    def _on_device(tokens: NDArray[np.int64], like: Tensor) -> Tensor:
        return torch.from_numpy(tokens).to(like.device)
