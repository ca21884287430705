"""How fast recent steps were: prompt tokens a second, and the time of a step that decodes. Pure; time is an argument.

A step's time is what it added to the steps before: from the moment its predecessor was done, or it was handed over
where that came later, to the moment it was done itself. So stages that work side by side count once.
"""

from __future__ import annotations

import math

from ..messages import StepPlan

PREFILL_TOKENS = 16_384.0
"""Over about so many of the last prompt tokens the rate is measured."""
DECODE_STEPS = 32.0
"""Over about so many of the last steps that decode their time is measured."""


class StepRates:
    """The rates of an engine.

    The prompt rate is the slope of a line through the origin, of steps' times against their prompt tokens: a step of
    few tokens, which takes as long as reading the weights does, says little about a long prompt and weighs as little.
    """

    def __init__(self) -> None:
        self._squares = self._products = 0.0
        self._decode_steps = self._decode_s = 0.0
        self._done_s = -math.inf

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens a second, 0 before any."""
        return self._squares / self._products if self._products > 0.0 else 0.0

    @property
    def token_s(self) -> float:
        """Seconds of a step that decodes, 0 before any."""
        return self._decode_s / self._decode_steps if self._decode_steps > 0.0 else 0.0

    def note(self, plan: StepPlan, *, submitted_s: float, done_s: float) -> None:
        """Take in a step that is over; steps come in order."""
        spent_s = done_s - max(submitted_s, self._done_s)
        self._done_s = done_s
        rows = len(plan.slots)
        tokens = plan.num_tokens
        if tokens > rows:
            # Rows of one token decode, but for a prompt's last one here and there.
            decodes = int((plan.counts == 1).sum())
            self._note_prefill(float(tokens - decodes), spent_s)
        else:
            decodes = rows
        if decodes:
            kept = 1.0 - 1.0 / DECODE_STEPS
            self._decode_steps = self._decode_steps * kept + 1.0
            self._decode_s = self._decode_s * kept + spent_s

    def _note_prefill(self, tokens: float, spent_s: float) -> None:
        kept = math.exp(-tokens / PREFILL_TOKENS)
        self._squares = self._squares * kept + tokens * tokens
        self._products = self._products * kept + tokens * spent_s
