"""Turns what the engine drew for one request into a ``RequestOutput``: text, log-probabilities, reasons, timings.

Owns stop strings (they are found where text is made) and the difference between token ids and text. Knows neither the
scheduler nor the model; the front end routes each token here and ends a sequence in the engine when told to.

On a request's way: last, after the engine.
"""

from __future__ import annotations

from dataclasses import replace

from ..sdk.params import SamplingParams
from ..sdk.results import CompletionOutput, Logprob, RequestMetrics, RequestOutput, StreamOutput
from .messages import EngineRequest, FinishReason, TokenLogprobs
from .text.detokenizer import IncrementalDetokenizer
from .text.stop_strings import StopStringMatcher
from .text.tokenizer import Tokenizer


class _SampleText:
    """Text and stop strings of one sample; without a tokenizer there is no text."""

    __slots__ = ("_detokenizer", "_fed", "_matcher", "_min_tokens")

    def __init__(self, tokenizer: Tokenizer | None, params: SamplingParams) -> None:
        self._detokenizer = (
            IncrementalDetokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens)
            if tokenizer is not None and params.detokenize
            else None
        )
        self._matcher = (
            StopStringMatcher(params.stop_strings, include_in_output=params.include_stop_str_in_output)
            if params.stop_strings
            else None
        )
        self._min_tokens = params.min_tokens
        self._fed = 0

    @property
    def stop_string(self) -> str | None:
        """The stop string that was found, None while there is none."""
        return None if self._matcher is None else self._matcher.matched

    def feed(self, token_id: int) -> str:
        """Return the text that is final now that another token is known."""
        self._fed += 1
        text = "" if self._detokenizer is None else self._detokenizer.feed(token_id)
        return text if self._matcher is None else self._filter(text)

    def finish(self) -> str:
        """Return the text that was held back for tokens that will not come."""
        text = "" if self._detokenizer is None else self._filter(self._detokenizer.finish())
        if self._matcher is not None and self._matcher.matched is None:
            text += self._matcher.finish()
        return text

    def _filter(self, text: str) -> str:
        if self._matcher is None:
            return text
        if self._matcher.matched is not None:
            return ""
        return self._matcher.feed(text, searchable=self._fed > self._min_tokens)


class RequestCollector:
    """Collects one request's samples.

    ``stream`` gathers what changed since it was last taken, when somebody wants it.
    """

    __slots__ = (
        "_eos_token_ids", "_prompt_logprobs", "_request", "_silent_stops", "_texts", "_tokenizer", "output",
    )  # fmt: skip

    def __init__(
        self,
        request: EngineRequest,
        *,
        prompt: str | None,
        tokenizer: Tokenizer | None,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        params = request.params
        self._request = request
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        # Tokens that end a sample and are left out of its text.
        self._silent_stops = frozenset() if params.include_stop_str_in_output else frozenset(request.stop_ids)
        self._texts = [_SampleText(tokenizer, params) for _ in range(params.n)]
        self._prompt_logprobs: dict[int, dict[int, Logprob]] = {}
        self.output = RequestOutput(
            request_id=request.request_id,
            prompt=prompt,
            prompt_token_ids=request.prompt_token_ids.tolist(),
            outputs=[_empty_output(index, params) for index in range(params.n)],
            finished=False,
            metrics=RequestMetrics(arrival_time_s=request.arrival_time_s),
            prompt_logprobs=[None] if params.prompt_logprobs is not None else None,
        )

    def add_token(self, index: int, token_id: int, logprobs: TokenLogprobs | None, *, now_s: float) -> str:
        """Take in a sample's next token and return the text that it added.

        ``found_stop_string`` says afterwards whether the sample ends here and the engine must be told.
        """
        sample = self.output.outputs[index]
        if not sample.token_ids and self.output.metrics.first_token_time_s is None:
            self.output.metrics = replace(self.output.metrics, first_token_time_s=now_s)
        sample.token_ids.append(token_id)
        if logprobs is not None and sample.logprobs is not None:
            sample.logprobs.append(self._table(logprobs))
            sample.cumulative_logprob = (sample.cumulative_logprob or 0.0) + float(logprobs.logprobs[0])
        text = "" if token_id in self._silent_stops else self._texts[index].feed(token_id)
        sample.text += text
        return text

    def found_stop_string(self, index: int) -> bool:
        """Return whether one of the stop strings stands in a sample's text."""
        return self._texts[index].stop_string is not None

    def end(self, index: int, reason: FinishReason, stop_token_id: int | None, *, now_s: float) -> str:
        """Close a sample: note why it ended, and return the last of its text.

        A stop string that was found goes before all other reasons.
        """
        sample = self.output.outputs[index]
        text = self._texts[index].finish()
        sample.text += text
        if (stop_string := self._texts[index].stop_string) is not None:
            sample.finish_reason, sample.stop_reason = FinishReason.STOP.value, stop_string
        else:
            is_eos = stop_token_id in self._eos_token_ids and stop_token_id not in self._request.params.stop_ids
            sample.finish_reason, sample.stop_reason = reason.value, None if is_eos else stop_token_id
        if all(other.finished for other in self.output.outputs):
            self.output.finished = True
            self.output.metrics = replace(self.output.metrics, finished_time_s=now_s)
        return text

    def add_prompt_logprobs(self, position: int, entries: tuple[TokenLogprobs, ...]) -> None:
        """Take in the log-probabilities of prompt tokens from ``position`` on.

        A preempted prompt is computed again and its entries come again, with the same values.
        """
        for offset, entry in enumerate(entries):
            self._prompt_logprobs[position + offset] = self._table(entry)
        length = len(self.output.prompt_token_ids)
        if len(self._prompt_logprobs) == length - 1:
            self.output.prompt_logprobs = [None, *(self._prompt_logprobs[place] for place in range(1, length))]

    def note_scheduling(self, *, first_scheduled_time_s: float | None, cached_tokens: int, preemptions: int) -> None:
        """Record what the scheduler knows about one of the samples; the request's figures are their sum."""
        metrics = self.output.metrics
        times = [time_s for time_s in (metrics.first_scheduled_time_s, first_scheduled_time_s) if time_s is not None]
        self.output.num_cached_tokens += cached_tokens
        self.output.metrics = replace(
            metrics,
            first_scheduled_time_s=min(times, default=None),
            preemptions=metrics.preemptions + preemptions,
        )

    def piece(self, index: int, text: str, token_ids: list[int]) -> StreamOutput:
        """Return what these new tokens and this new text added to a sample, for whoever streams them."""
        sample = self.output.outputs[index]
        return StreamOutput(
            request_id=self.output.request_id,
            index=index,
            text=text,
            token_ids=token_ids,
            finish_reason=sample.finish_reason,
            output=self.output,
        )

    def _table(self, entry: TokenLogprobs) -> dict[int, Logprob]:
        """Return one position's table: the most likely tokens by rank, and the token that stands there."""
        ids, values = entry.token_ids.tolist(), entry.logprobs.tolist()
        ranks = [entry.rank, *range(1, len(ids))]
        return {
            token_id: Logprob(logprob=value, rank=rank, decoded_token=self._decoded(token_id))
            for token_id, value, rank in reversed(list(zip(ids, values, ranks, strict=True)))
        }

    def _decoded(self, token_id: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.decode([token_id], skip_special_tokens=False)


def _empty_output(index: int, params: SamplingParams) -> CompletionOutput:
    wanted = params.logprobs is not None
    return CompletionOutput(index=index, logprobs=[] if wanted else None, cumulative_logprob=0.0 if wanted else None)
