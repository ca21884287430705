"""What a generation returns: texts, token ids, log-probabilities and timings.

Owns the result types, with the names that users of vLLM's ``LLM`` know. Pure data; made by ``runtime.llm``.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """One entry of a log-probability table.

    ``logprob`` is the natural logarithm of the model's own probability (before temperature, penalties and
    filters); ``rank`` counts from 1 and is None for prompt alternatives whose rank was not asked for.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestMetrics:
    """When things happened to a request: seconds on the engine's monotonic clock, durations in seconds.

    ``first_token_time_s`` belongs to whichever sequence of the request came first.
    """

    arrival_time_s: float
    first_scheduled_time_s: float | None = None
    first_token_time_s: float | None = None
    finished_time_s: float | None = None
    preemptions: int = 0

    @property
    def queue_s(self) -> float | None:
        """Seconds between arrival and the first step that worked on the request."""
        return None if self.first_scheduled_time_s is None else self.first_scheduled_time_s - self.arrival_time_s

    @property
    def ttft_s(self) -> float | None:
        """Time to first token, in seconds."""
        return None if self.first_token_time_s is None else self.first_token_time_s - self.arrival_time_s

    @property
    def latency_s(self) -> float | None:
        """Seconds between arrival and the last token of the last sequence."""
        return None if self.finished_time_s is None else self.finished_time_s - self.arrival_time_s

    def tpot_s(self, output_tokens: int) -> float | None:
        """Mean time per output token after the first, in seconds, for a sequence of ``output_tokens`` tokens."""
        if self.finished_time_s is None or self.first_token_time_s is None or output_tokens < 2:
            return None
        return (self.finished_time_s - self.first_token_time_s) / (output_tokens - 1)


@dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """One generated sequence of a request.

    ``finish_reason`` is None while it runs, then ``"stop"`` (end-of-sequence token, stop id or stop string),
    ``"length"`` (``max_tokens`` or the model's limit), ``"abort"``, or ``"error"`` (the model's logits were not
    numbers: what it had generated until then stands). ``stop_reason`` is the stop string or stop id that ended it,
    None for the end-of-sequence token.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        """Whether the sequence has ended."""
        return self.finish_reason is not None


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """What one prompt returned, or has returned so far when it comes from a stream.

    ``prompt_logprobs`` has one entry per prompt token; the first is None because nothing precedes it.
    ``num_cached_tokens`` counts prompt tokens whose KV came from the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOutput:
    """What one step added to one sample of a request.

    ``text`` and ``token_ids`` are new; text may come later than its tokens, when a character or a possible stop string
    is not complete. ``finish_reason`` is None until the sample's last piece. ``output`` is the request as it is so far:
    it goes on growing.
    """

    request_id: str
    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    output: RequestOutput
