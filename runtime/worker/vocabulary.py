"""Sampling where each rank has the logits of a slice of the vocabulary.

Owns the exchange. A row that only asks for its best-scored token sends two numbers a rank: the best of each slice, and
its score, because the noise is a function of the token. What depends on the whole distribution (nucleus, top-k,
penalties, grammars, log-probabilities) gathers the row's logits. Every rank comes to the same tokens, so none has to be
told. With one rank, this is the sampler.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...comm.collectives import Collectives
from ...kernels.sample import choose_best, draw_best
from ..messages import Int32Array
from .grammar_masks import TokenMasks
from .sampler import SampledRows, Sampler, on_host


class VocabularySampler:
    """A sampler over the slices of a tensor-parallel group."""

    def __init__(self, sampler: Sampler, group: Collectives | None, *, vocabulary: range, vocab_size: int) -> None:
        """Draw from logits of the tokens ``vocabulary`` of ``vocab_size``; ``group`` None: they are all."""
        self._sampler = sampler
        self._group = group
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size

    def whole(self, logits_NL: Tensor) -> Tensor:
        """Return the logits of the whole vocabulary.

        Shapes: logits_NL [rows, own vocabulary] float32; returns [rows, vocabulary]
        """
        if self._group is None:
            return logits_NL
        rows, ranks = logits_NL.shape[0], self._group.size
        widest = -(-self._vocab_size // ranks)
        padded_NW = logits_NL.new_full((rows, widest), 0.0)
        padded_NW[:, : logits_NL.shape[1]] = logits_NL
        slices_SNW = self._group.all_gather(padded_NW).wait().view(ranks, rows, widest)
        sizes = [(rank + 1) * self._vocab_size // ranks - rank * self._vocab_size // ranks for rank in range(ranks)]
        return torch.cat([part[:, :size] for part, size in zip(slices_SNW, sizes, strict=True)], dim=1)

    def sample(
        self,
        logits_RL: Tensor,
        slots: Int32Array,
        positions: NDArray[np.int64],
        token_table: Int32Array,
        masks: TokenMasks | None = None,
    ) -> SampledRows:
        """Draw a token for every row; as ``Sampler.sample``.

        Shapes: logits_RL [rows, own vocabulary] float32; slots, positions [rows]; token_table [slots, max length]
        """
        if self._group is None:
            return self._sampler.sample(logits_RL, slots, positions, token_table, masks)
        whole = self._sampler.needs_all_logits(slots)
        if masks is not None:
            # A mask says what is left of all tokens; the step's other rows take the same way, for simplicity.
            whole[:] = True
        if whole.all():
            return self._sampler.sample(self.whole(logits_RL), slots, positions, token_table, masks)
        best = np.flatnonzero(~whole)
        drawn = self._draw_best(logits_RL, best, slots, positions)
        if not whole.any():
            return drawn
        return self._with_whole_rows(drawn, best, np.flatnonzero(whole), logits_RL, slots, positions, token_table)

    def _draw_best(
        self, logits_RL: Tensor, rows: NDArray[np.intp], slots: Int32Array, positions: NDArray[np.int64]
    ) -> SampledRows:
        assert self._group is not None
        with torch.inference_mode():
            logits_NL = logits_RL
            if len(rows) < logits_RL.shape[0]:
                logits_NL = logits_RL.index_select(0, torch.from_numpy(rows).to(logits_RL.device))
            settings = self._sampler.settings(slots[rows], positions[rows])
            scores_N, ids_N = draw_best(logits_NL, settings, first_id=self._vocabulary.start)
            # Token ids are exact in float64: one exchange carries both.
            pairs_S2N = self._group.all_gather(torch.stack((scores_N, ids_N.double())).unsqueeze(0)).wait()
            drawn = choose_best(pairs_S2N[:, 0], pairs_S2N[:, 1].long())
            token_ids, valid = on_host(drawn)
        return SampledRows(
            token_ids=token_ids,
            invalid_rows=tuple(np.flatnonzero(~valid).tolist()),
        )

    def _with_whole_rows(
        self,
        drawn: SampledRows,
        best: NDArray[np.intp],
        whole: NDArray[np.intp],
        logits_RL: Tensor,
        slots: Int32Array,
        positions: NDArray[np.int64],
        token_table: Int32Array,
    ) -> SampledRows:
        """Draw the rows that need all logits, and put both kinds together."""
        logits_NL = logits_RL.index_select(0, torch.from_numpy(whole).to(logits_RL.device))
        others = self._sampler.sample(self.whole(logits_NL), slots[whole], positions[whole], token_table)
        token_ids = np.empty(len(slots), np.int32)
        token_ids[best], token_ids[whole] = drawn.token_ids, others.token_ids
        invalid = [int(best[row]) for row in drawn.invalid_rows] + [int(whole[row]) for row in others.invalid_rows]
        return SampledRows(
            token_ids=token_ids,
            logprobs={int(whole[row]): entry for row, entry in others.logprobs.items()},
            invalid_rows=tuple(sorted(invalid)),
        )
