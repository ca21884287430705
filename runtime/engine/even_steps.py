"""How much work goes into a step, so that the steps of a pipeline take equally long.

Stages work on different steps at the same time, and each waits for the longest. Work is counted in units of one token
without context; attention adds ``attention_ratio`` a position of context, so that later chunks of a prompt are smaller.
A step decodes its share of all sequences that do, and prompts are spread over the next steps: all that wait, and what
the last steps had, which keeps shares from shrinking as prompts are worked off. What a token budget of the same size
holds at the start of a prompt is the most.

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
"""Steps are not made smaller than this, or a quarter of the most: a step reads all weights however few its tokens."""
SPREAD_STEPS = 16
"""Prompts are spread over so many steps, or as many as are on their way at once if these are more."""


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
    def spread(self) -> int:
        """Over how many steps prompts are spread."""
        return max(self.steps, SPREAD_STEPS)

    @property
    def enough(self) -> float:
        """As much work of prompts as can be spread: more need not be counted."""
        return self.most * self.spread

    def share(self, decodes: float, chunks: float) -> float:
        """Return a step's part of the work of all decodes, and of all chunks of the steps that they are spread over."""
        least = min(LEAST_WORK, self.most / 4.0)
        return min(self.most, max(least, decodes / self.steps + chunks / self.spread))

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
