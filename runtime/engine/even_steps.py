"""How much work goes into a step, so that the steps of a pipeline take equally long.

Stages work on different steps at the same time, and each waits for the longest. Work is counted in units of one token
without context; attention adds ``attention_ratio`` a position of context, so that later chunks of a prompt are smaller.
A step gets its share of a round: of all the work that is in the pipeline and that could join it, over as many steps as
are on their way at once. What a token budget of the same size holds at the start of a prompt is the most.

Pure numbers: it must not know requests, blocks or clocks.

Source: chunks of even size against bubbles, SARATHI (arXiv 2308.16369); shares of what waits, gLLM (arXiv 2504.14775)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..messages import Int32Array

LEAST_WORK = 128.0
"""Steps are not made smaller than this for evenness: a step reads all weights however few tokens it has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvenSteps:
    """Shares work out to steps.

    - ``attention_ratio``: see ``ModelFacts.attention_ratio``. ``max_tokens``: a step's token budget.
    - ``block_size``: chunks end where blocks do, unless they end their prompt.
    - ``steps``: how many are on their way at once.
    """

    attention_ratio: float
    max_tokens: int
    block_size: int
    steps: int

    def work(self, starts: Int32Array, counts: Int32Array) -> NDArray[np.float64]:
        """Return the work of rows of ``counts`` tokens with ``starts`` positions before them.

        Shapes: starts, counts, returns [rows]
        """
        return counts * (1.0 + self.attention_ratio * (starts + counts / 2.0))

    @property
    def most(self) -> float:
        """The most work of a step: a whole token budget at the start of a prompt."""
        return self.max_tokens * (1.0 + self.attention_ratio * self.max_tokens / 2.0)

    @property
    def most_of_round(self) -> float:
        """As much work as a round can take: more need not be counted."""
        return self.most * self.steps

    def share(self, work: float) -> float:
        """Return a step's part of a round's work: what is on its way and what could join it."""
        return min(self.most, max(LEAST_WORK, work / self.steps))

    def chunk(self, start: int, lacking: int, *, work: float) -> int:
        """Return how many tokens of a prompt fit into some work; 0 when less than to the next block's end does.

        Units: start, positions that are computed; lacking, tokens that are not
        """
        if work <= 0.0:
            return 0
        # The positive root of count * (1 + ratio * (start + count / 2)) = work, in the form that allows a ratio of 0.
        first = 1.0 + self.attention_ratio * start
        fits = 2.0 * work / (first + math.sqrt(first * first + 2.0 * self.attention_ratio * work))
        if lacking <= fits:
            return lacking
        end = (start + int(fits)) // self.block_size * self.block_size
        return max(0, end - start)

    def least_chunk(self, start: int, lacking: int) -> int:
        """Return how many tokens of a prompt go into a step that has no time for it, so that no prompt waits for ever:
        those to the next block's end.
        """
        return min(lacking, self.block_size - start % self.block_size)
