"""What a load test does: how many requests, of what size, when. Pure: everything random comes from a seed."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, fields

from ...sdk.errors import ConfigError

MAX_PROMPTS = 1_000_000

_CLOSED_LOOP_CONCURRENCY = 32
_OPEN_LOOP_CONCURRENCY = 4096

# Common and short: most tokenizers have each as one token, and the rest is calibrated.
_TEXT = (
    "a about all and are as at be but by can day do for from get go good had has have he her him his how if in into is"
    " it know like make man me my new no not now of on one or other out over people say see she so some take than that"
    " the them then there they this time to two up use was way we well were what when which who will with work would"
    " year you your"
)
_WORDS = _TEXT.split()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """A load test.

    Without ``request_rate`` the loop is closed: ``max_concurrency`` clients, each of which sends its next request when
    it has the answer to the last. With it the loop is open: requests come when they come (a Poisson process), whether
    or not the server keeps up, and wait only when ``max_concurrency`` are on their way.

    Units: request_rate, requests per second; prompt_tokens and output_tokens, tokens of one request
    Raises: ConfigError, naming the option
    """

    num_prompts: int = 100
    max_concurrency: int | None = None
    request_rate: float | None = None
    prompt_tokens: int = 128
    output_tokens: int = 64
    seed: int = 0
    request_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name != "seed" and value is not None and not 0 < value < math.inf:
                raise ConfigError(each.name, f"must be above 0, got {value!r}")
        if self.num_prompts > MAX_PROMPTS:
            raise ConfigError("num_prompts", f"must be at most {MAX_PROMPTS}, got {self.num_prompts}")

    @property
    def concurrency(self) -> int:
        """Requests that may be on their way at once."""
        usual = _CLOSED_LOOP_CONCURRENCY if self.request_rate is None else _OPEN_LOOP_CONCURRENCY
        return min(self.max_concurrency or usual, self.num_prompts)

    def arrivals(self) -> tuple[float, ...] | None:
        """Return when each request is due, in seconds after the start; None for a closed loop."""
        if self.request_rate is None:
            return None
        return poisson_arrivals(self.num_prompts, self.request_rate, seed=self.seed)


def poisson_arrivals(count: int, rate: float, *, seed: int) -> tuple[float, ...]:
    """Return ``count`` times of a Poisson process with ``rate`` per second; the first is 0."""
    drawn = random.Random(seed)
    times, now_s = [], 0.0
    for _ in range(count):
        times.append(now_s)
        now_s += drawn.expovariate(rate)
    return tuple(times)


def prompt_text(words: int, *, seed: int, index: int) -> str:
    """Return a prompt of so many words: another one for each index, so that no prefix is shared by chance."""
    return " ".join(random.Random(f"{seed}/{index}").choices(_WORDS, k=words))


def calibrated_words(wanted_tokens: int, *, tried_words: int, found_tokens: int) -> int:
    """Return how many words make ``wanted_tokens``, when ``tried_words`` made ``found_tokens``."""
    return max(1, round(tried_words * wanted_tokens / max(1, found_tokens)))
