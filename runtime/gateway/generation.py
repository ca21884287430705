"""Prompts on their way through the engine: events in, pieces of text out.

Owns what happens to a prompt between admission and answer: its collector, its stop strings, its share of the metrics,
its end. Leaving a generation early aborts it at the engine. It must not know how answers are written; what brings text
and nothing else it sends over the stream's direct line where that is open, and there is no piece of it then.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import cast

from ...sdk.errors import EngineError, EngineUnavailable, InvalidRequest
from ...sdk.results import CompletionOutput, Logprob, RequestOutput
from ..collector import RequestCollector
from ..messages import EngineRequest, FinishReason
from ..rpc.engine_client import RequestEvent, SampleEvent
from .attempts import Attempts
from .direct_line import DirectLine
from .errors import Draining
from .gateway import Gateway
from .record import RequestRecord
from .replica import ServedModel
from .response_format import AnswerFormat

_QUEUED_PIECES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one event added to one sample.

    ``logprobs`` has a table for each of ``token_ids`` when they were asked for. ``finish_reason`` comes with the last
    piece; ``output`` is the prompt's result so far, and goes on growing.
    """

    prompt: int
    sample: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]]
    finish_reason: str | None
    stop_reason: int | str | None
    output: RequestOutput


class PromptRun:
    """One prompt on its way."""

    __slots__ = (
        "_attempts", "_collector", "_gateway", "_held_to", "_index", "_last_token_s", "_line", "_model", "_record",
        "_request", "output",
    )  # fmt: skip

    def __init__(
        self,
        gateway: Gateway,
        model: ServedModel,
        request: EngineRequest,
        record: RequestRecord,
        *,
        index: int,
        text: str | None,
        held_to: AnswerFormat | None = None,
        line: DirectLine | None = None,
    ) -> None:
        self._gateway = gateway
        self._model = model
        self._request = request
        self._record = record
        self._index = index
        self._held_to = held_to
        # A text in which a stop string may end is not final when its token comes.
        self._line = None if request.params.stop_strings else line
        self._collector = RequestCollector(
            request, prompt=text, tokenizer=model.tokenizer, eos_token_ids=model.facts.eos_token_ids
        )
        self._last_token_s: list[float | None] = [None] * request.params.n
        self._attempts: Attempts | None = None
        self.output = self._collector.output

    async def pieces(self, *, timeout_s: float) -> AsyncGenerator[Piece]:
        """Run to the end and yield what comes; what a lost replica was to bring, another one does.

        Raises: what ``EngineClient.generate`` raises; EngineError when the engine gave a sample up, InvalidRequest when
        it gave up for what the answer is held to
        """
        ended = False
        self._gateway.metrics.prompt_tokens.inc(len(self._request.prompt_token_ids))
        attempts = self._attempts = Attempts(
            self._gateway,
            self._model,
            self._request,
            self._record,
            delivered=[sample.token_ids for sample in self.output.outputs],
            ends_s=self._gateway.clock() + timeout_s,
            take_token=None if self._line is None else self._take_token,
        )
        try:
            async with aclosing(attempts.news()) as news:
                async for number, event in news:
                    self._model = attempts.model(number) or self._model
                    self._note(event)
                    for sample in event.samples:
                        if (piece := self._take(attempts, number, sample)) is None:
                            continue
                        if sample.finish_reason is None and piece.finish_reason is not None:
                            await attempts.abort_sample(number, sample.index)
                        yield piece
            if not self.output.finished:
                raise EngineUnavailable("the engine's answer ended before the request did")
            ended = True
        except InvalidRequest as error:
            raise error if self._held_to is None else self._held_to.renamed(error) from error
        except EngineUnavailable as error:
            if self._gateway.admission.draining:
                raise Draining("the server stopped before the request was done") from error
            raise
        finally:
            self._record.output_tokens += sum(len(sample.token_ids) for sample in self.output.outputs)
            if not ended:
                self._gateway.metrics.aborted.inc()

    def _take_token(self, index: int, token_id: int) -> bool:
        """Send a token's text over the direct line; return False, and do nothing, when that is not open."""
        line = self._line
        if line is None or not line.is_open(index):
            return False
        now_s = self._gateway.clock()
        if text := self._collector.add_token(index, token_id, None, now_s=now_s):
            line.write(index, text)
        self._measure(index, 1, now_s)
        return True

    def _note(self, event: RequestEvent) -> None:
        for scores in event.prompt_scores:
            self._collector.add_prompt_logprobs(scores.position, scores.entries)
        self.output.num_cached_tokens = max(self.output.num_cached_tokens, event.cached_tokens)
        if event.queue_s is not None:
            self._gateway.metrics.queue_s.observe(event.queue_s)

    def _take(self, attempts: Attempts, number: int, event: SampleEvent) -> Piece | None:
        """Take a sample's news in; None when they are no news.

        They are none when another attempt has brought them, or when the sample has ended already, by a stop string that
        the engine did not know.
        """
        sample = self.output.outputs[event.index]
        if sample.finished or (skip := attempts.taken(number, event)) is None:
            return None
        if event.finish_reason is FinishReason.ABORT:
            attempts.given_up(number)
            return None
        now_s = self._gateway.clock()
        first = len(sample.token_ids)
        text = ""
        for place, token_id in enumerate(event.token_ids):
            if place < skip:
                continue
            logprobs = event.logprobs[place] if event.logprobs else None
            text += self._collector.add_token(event.index, token_id, logprobs, now_s=now_s)
            if self._collector.found_stop_string(event.index):
                text += self._collector.end(event.index, FinishReason.STOP, None, now_s=now_s)
                break
        else:
            if event.finish_reason is not None:
                self._refuse_broken_end(event.finish_reason)
                text += self._collector.end(event.index, event.finish_reason, event.stop_token_id, now_s=now_s)
        if sample.finish_reason is not None:
            attempts.over(number, event.index)
        elif len(sample.token_ids) == first:
            return None
        self._measure(event.index, len(sample.token_ids) - first, now_s)
        return self._piece(event.index, sample, text, first)

    def _refuse_broken_end(self, reason: FinishReason) -> None:
        """Raise for an end that is no answer: a truncated text must not look like a whole one."""
        if reason is FinishReason.ERROR:
            raise EngineError("the model's logits were not numbers: no token can be drawn from them")
        if reason is FinishReason.GRAMMAR:
            raise InvalidRequest("structured_outputs", "became too complex to follow along this answer: simplify them")

    def _piece(self, index: int, sample: CompletionOutput, text: str, first: int) -> Piece:
        return Piece(
            prompt=self._index,
            sample=index,
            text=text,
            token_ids=sample.token_ids[first:],
            logprobs=[] if sample.logprobs is None else sample.logprobs[first:],
            finish_reason=sample.finish_reason,
            stop_reason=sample.stop_reason,
            output=self.output,
        )

    def _measure(self, index: int, tokens: int, now_s: float) -> None:
        if tokens == 0:
            return
        metrics = self._gateway.metrics
        last_s = self._last_token_s[index]
        self._last_token_s[index] = now_s
        metrics.tokens.add(tokens, None if last_s is None else now_s - last_s)
        if last_s is None and index == 0:
            ttft_s = now_s - self._record.arrival_s
            metrics.ttft_s.observe(ttft_s)
            if self._record.ttft_s is None:
                self._record.ttft_s = ttft_s
        sender = None
        if self._attempts is not None and (last_s is not None or tokens > 1):
            # The first token is its sender's own, whoever brings it.
            sender = self._attempts.sender
        self._gateway.readiness.saw_token(self._model, now_s=now_s, sender=sender)


def run_together(runs: Sequence[PromptRun], *, timeout_s: float) -> AsyncGenerator[Piece]:
    """Run prompts side by side and yield their pieces as they come; the first error ends all of them."""
    return runs[0].pieces(timeout_s=timeout_s) if len(runs) == 1 else _merged(runs, timeout_s)


async def _merged(runs: Sequence[PromptRun], timeout_s: float) -> AsyncGenerator[Piece]:
    queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue(_QUEUED_PIECES)
    # No task group: it must not stay open across a yield. The tasks never outlive this generator all the same.
    tasks = [asyncio.create_task(_pump(run.pieces(timeout_s=timeout_s), queue)) for run in runs]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(pieces: AsyncIterator[Piece], queue: asyncio.Queue[Piece | Exception | None]) -> None:
    """Move one prompt's pieces into the common queue, then None, or what went wrong."""
    try:
        async with aclosing(cast("AsyncGenerator[Piece]", pieces)) as closing:
            async for piece in closing:
                await queue.put(piece)
    except Exception as error:
        await queue.put(error)
    else:
        await queue.put(None)
