"""One request's news between the session that brings them and the task that waits for them.

Collects what several steps brought while the task was busy into one event, so that a slow reader costs memory for the
tokens that it asked for and no more: more tokens than ``n * max_tokens`` are a peer's fault. One event loop's own.
"""

from __future__ import annotations

import asyncio

from ...comm.kv.transfer import Ending
from ...sdk.errors import EngineUnavailable, SlipstreamError
from ..messages import EngineRequest, TokenLogprobs
from .engine_client import HandOffReport, PromptScores, RequestEvent, SampleEvent, TakeToken
from .session import Ending as SampleEnding


class Mailbox:
    """News of one request that nobody has read yet.

    ``sent_on``: its computed prompt goes to another replica, so that at most one token comes here. ``awaits``: it waits
    for what another replica sends.
    Raises: EngineUnavailable from ``add_*`` when the peer sends what cannot be
    """

    # Slots, as in all that each token touches: a thousand streams are more than a processor's cache holds.
    __slots__ = (
        "_endings", "_error", "_hand_off", "_logprobs", "_loop", "_scores", "_sent_on", "_take_token", "_tokens",
        "_tokens_left", "_waiter", "awaits", "key", "open_samples", "request",
    )  # fmt: skip

    def __init__(
        self,
        key: int,
        request: EngineRequest,
        *,
        take_token: TakeToken | None = None,
        sent_on: bool = False,
        awaits: bool = False,
    ) -> None:
        self.key = key
        self.awaits = awaits
        self._sent_on = sent_on
        self._take_token = take_token
        self.request = request
        self._tokens_left = _tokens_left(request, sent_on=sent_on)
        self.open_samples = sum(left >= 0 for left in self._tokens_left)
        self._hand_off: HandOffReport | None = None
        self._tokens: dict[int, list[int]] = {}
        self._logprobs: dict[int, list[TokenLogprobs]] = {}
        self._scores: dict[int, TokenLogprobs] = {}
        self._endings: dict[int, SampleEnding] = {}
        self._error: SlipstreamError | None = None
        # Kept: asking for it costs a system call.
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None

    def add_token(self, index: int, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """Take in a sample's next token."""
        left = self._tokens_left
        if index >= len(left) or left[index] <= 0:
            raise EngineUnavailable(f"the replica sent a token too many for sample {index} of {self._name}")
        left[index] -= 1
        if logprobs is None and self._taken(index, token_id):
            return
        self._tokens.setdefault(index, []).append(token_id)
        if logprobs is not None:
            self._logprobs.setdefault(index, []).append(logprobs)
        self._wake()

    def _taken(self, index: int, token_id: int) -> bool:
        """Offer a token to whoever would take it without being woken.

        Only while the reader waits: then it has read, and passed on, all that came before.
        """
        waiter = self._waiter
        if self._take_token is None or waiter is None or waiter.done():
            return False
        try:
            return self._take_token(index, token_id)
        except Exception as error:
            # The reader's own fault, and not the session's, which is everybody's.
            waiter.set_exception(error)
            return True

    def add_scores(self, scores: PromptScores) -> None:
        """Take in prompt log-probabilities; those of a prompt that was computed again come again, and are the same."""
        request, end = self.request, scores.position + len(scores.entries)
        if request.params.prompt_logprobs is None or scores.position < 1 or end > len(request.prompt_token_ids):
            raise EngineUnavailable(f"the replica sent prompt log-probabilities that {self._name} has no place for")
        self._scores.update(enumerate(scores.entries, start=scores.position))
        self._wake()

    def add_ending(self, ending: SampleEnding) -> None:
        """Take in a sample's end."""
        if not self.is_open(ending.index):
            raise EngineUnavailable(f"the replica ended sample {ending.index} of {self._name} twice")
        self._tokens_left[ending.index] = -1
        self.open_samples -= 1
        self._endings[ending.index] = ending
        self._wake()

    def add_hand_off(self, report: HandOffReport) -> None:
        """Take in what became of a prompt that was sent on: the request ends with it."""
        if not self._sent_on or not self.open_samples:
            raise EngineUnavailable(f"the replica told of a hand-off that {self._name} has not")
        if report.ending == Ending.COMMITTED and self._tokens_left[0]:
            raise EngineUnavailable(f"the replica handed {self._name} over without having told its token")
        self._tokens_left[0] = -1
        self.open_samples = 0
        self._hand_off = report
        self._wake()

    def is_open(self, index: int) -> bool:
        """Return whether there is such a sample and it has not ended."""
        return 0 <= index < len(self._tokens_left) and self._tokens_left[index] >= 0

    def fail(self, error: SlipstreamError) -> None:
        """End the request with an error, raised once what came before it has been read."""
        if self._error is None and self.open_samples:
            self._error = error
            self.open_samples = 0
            self._wake()

    async def next(self) -> RequestEvent | None:
        """Wait for news and return all there are as one event; None when every sample has ended and was read."""
        while True:
            if self._tokens or self._endings or self._scores or self._hand_off is not None:
                return self._take()
            if self._error is not None:
                raise self._error
            if not self.open_samples:
                return None
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def _take(self) -> RequestEvent:
        tokens, self._tokens = self._tokens, {}
        logprobs, self._logprobs = self._logprobs, {}
        scores, self._scores = self._scores, {}
        endings, self._endings = self._endings, {}
        hand_off, self._hand_off = self._hand_off, None
        samples = []
        for index in tokens if not endings else sorted({*tokens, *endings}):
            ending = endings.get(index)
            samples.append(
                SampleEvent(
                    index=index,
                    token_ids=tuple(tokens.get(index, ())),
                    logprobs=tuple(logprobs.get(index, ())),
                    finish_reason=None if ending is None else ending.reason,
                    stop_token_id=None if ending is None else ending.stop_token_id,
                )
            )
        ended = endings.values()
        return RequestEvent(
            request_id=self.request.request_id,
            samples=tuple(samples),
            prompt_scores=_runs(scores) if scores else (),
            cached_tokens=sum(ending.cached_tokens for ending in ended),
            preemptions=sum(ending.preemptions for ending in ended),
            queue_s=min((ending.queue_s for ending in ended if ending.queue_s is not None), default=None),
            hand_off=hand_off,
        )

    @property
    def _name(self) -> str:
        return f"request {self.request.request_id!r}"

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _tokens_left(request: EngineRequest, *, sent_on: bool) -> list[int]:
    """Return how many tokens may come for each sample, -1 of one that is over."""
    if sent_on:
        return [1]
    if not request.generated:
        return [request.max_tokens] * request.params.n
    return [-1 if tokens is None else request.max_tokens - len(tokens) for tokens in request.generated]


def _runs(scores: dict[int, TokenLogprobs]) -> tuple[PromptScores, ...]:
    """Put entries by position together into unbroken runs."""
    runs: list[tuple[int, list[TokenLogprobs]]] = []
    for position in sorted(scores):
        if not runs or position != runs[-1][0] + len(runs[-1][1]):
            runs.append((position, []))
        runs[-1][1].append(scores[position])
    return tuple(PromptScores(position=position, entries=tuple(entries)) for position, entries in runs)
