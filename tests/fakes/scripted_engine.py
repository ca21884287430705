"""An ``EngineClient`` without an engine: its tokens are a function of the request, and a test decides when they come.

The answer to a prompt is the prompt's own tokens from the beginning again, shifted by the sample's index, so that a
test can say what must come out. ``hold`` stops all answers until it is set; ``fail_after`` loses the replica, and
``lose_ends`` does so when a sample's last token has come and its end has not.
``taken`` counts the tokens that ``take_token`` took.
A request that is sent on goes to the one of ``peers`` that has its address; ``hand_off_ending`` says how that ends
(None: badly, after its token came), and any ending but "committed" comes before a token. It is reported when
``reports`` is set.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace

import numpy as np

from slipstream.runtime.messages import EngineRequest, FinishReason, TokenLogprobs
from slipstream.runtime.rpc.engine_client import (
    BlockChanges,
    EngineFacts,
    EngineLoadReport,
    HandOffReport,
    PromptScores,
    RequestEvent,
    SampleEvent,
    SendTo,
    TakeToken,
)
from slipstream.sdk.errors import DeadlineExceeded, EngineUnavailable, SlipstreamError


class ScriptedEngine:
    """Deterministic tokens; ``tokens_per_event`` of them come together."""

    def __init__(self, *, vocab_size: int, eos_token_ids: tuple[int, ...] = (), max_model_len: int = 256) -> None:
        self.facts = EngineFacts(
            epoch="scripted-1",
            model="scripted",
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            max_num_seqs=64,
            eos_token_ids=eos_token_ids,
            dtype="float32",
            device="cpu",
        )
        self.script: list[int] | None = None
        self.taken = 0
        self.tokens_per_event = 1
        self.hold = asyncio.Event()
        self.hold.set()
        self.hold_after = 0
        self.fail_after: int | None = None
        self.lose_ends = False
        self.refusal: SlipstreamError | None = None
        self.finish_reason: FinishReason | None = None
        self.requests: list[EngineRequest] = []
        self.live: set[str] = set()
        self.aborted: list[str] = []
        self.trace_ids: list[str] = []
        self.peers: dict[str, ScriptedEngine] = {}
        self.tickets: dict[str, str] = {}
        self.going_on: dict[str, asyncio.Event] = {}
        self.gone_on: list[str] = []
        self.hand_off_ending: str | None = "committed"
        self.reports = asyncio.Event()
        self.reports.set()
        self.aborted_samples: list[tuple[str, int]] = []
        self.changed = asyncio.Condition()

    async def connect(self, *, timeout_s: float) -> EngineFacts:
        return self.facts

    async def generate(
        self,
        request: EngineRequest,
        *,
        timeout_s: float,
        take_token: TakeToken | None = None,
        send_to: SendTo | None = None,
        ticket: str = "",
        trace_id: str = "",
    ) -> AsyncGenerator[RequestEvent]:
        if self.refusal is not None:
            raise self.refusal
        self.requests.append(request)
        self.trace_ids.append(trace_id)
        self.live.add(request.request_id)
        ended = False
        try:
            async with asyncio.timeout(timeout_s):
                if ticket:
                    await self._kv_of(ticket, request)
                async for event in self._sent(request, send_to) if send_to is not None else self._events(request):
                    if _taken(event, take_token):
                        self.taken += 1
                    else:
                        yield event
            ended = True
        except TimeoutError as error:
            raise DeadlineExceeded(f"{timeout_s:g} s have passed") from error
        finally:
            self.live.discard(request.request_id)
            if not ended:
                self.aborted.append(request.request_id)

    async def _kv_of(self, ticket: str, request: EngineRequest) -> None:
        """Wait for what another one sends, or for ``go_on``."""
        self.tickets[ticket] = request.request_id
        self.going_on.setdefault(request.request_id, asyncio.Event())
        await self.going_on[request.request_id].wait()

    async def _sent(self, request: EngineRequest, to: SendTo) -> AsyncGenerator[RequestEvent]:
        """Draw the next token, and hand over to the engine at that address."""
        if self.hold_after == 0:
            await self.hold.wait()
        if self.fail_after is not None and self.fail_after <= 0:
            raise EngineUnavailable("the replica was lost")
        if self.hand_off_ending is None or self.hand_off_ending == "committed":
            given = len(request.generated[0]) if request.generated and request.generated[0] is not None else 0
            token = self.answer(request, 0)[given]
            last = given + 1 == len(self.answer(request, 0))
            yield RequestEvent(request_id=request.request_id, samples=(self._sample(request, 0, [token], last=last),))
            if last:
                return
        if self.fail_after is not None:
            raise EngineUnavailable("the replica was lost")
        ending = self.hand_off_ending or "bad_checksum"
        if ending == "committed":
            receiver = self.peers[to.address]
            receiver.going_on[receiver.tickets[to.ticket]].set()
        await self.reports.wait()
        report = HandOffReport(ending=ending, bytes_moved=1000, prefill_s=2.0, wire_s=1.0, hidden_s=0.75, wait_s=0.25)
        yield RequestEvent(request_id=request.request_id, hand_off=report)

    async def go_on(self, request_id: str) -> None:
        self.gone_on.append(request_id)
        self.going_on.setdefault(request_id, asyncio.Event()).set()

    def watch_blocks(self, told: Callable[[BlockChanges], None]) -> None:
        self.told = told

    async def _events(self, request: EngineRequest) -> AsyncGenerator[RequestEvent]:
        if request.params.prompt_logprobs is not None:
            entries = tuple(self._logprobs(request, int(token)) for token in request.prompt_token_ids[1:])
            yield RequestEvent(
                request_id=request.request_id, prompt_scores=(PromptScores(position=1, entries=entries),)
            )
        answers = [self.answer(request, index) for index in range(request.params.n)]
        given = request.generated or tuple(np.empty(0, dtype=np.int32) for _ in answers)
        places = [len(answer) if tokens is None else len(tokens) for tokens, answer in zip(given, answers, strict=True)]
        drawn = 0
        while any(place < len(answer) for place, answer in zip(places, answers, strict=True)):
            if drawn >= self.hold_after:
                await self.hold.wait()
            await asyncio.sleep(0)
            for index, answer in enumerate(answers):
                if places[index] >= len(answer):
                    continue
                if (request.request_id, index) in self.aborted_samples:
                    places[index] = len(answer)
                    sample = SampleEvent(index=index, token_ids=(), finish_reason=FinishReason.ABORT)
                else:
                    tokens = answer[places[index] : places[index] + self.tokens_per_event]
                    places[index] += len(tokens)
                    drawn += len(tokens)
                    sample = self._sample(request, index, tokens, last=places[index] >= len(answer))
                lost = self.lose_ends and sample.finish_reason is not None
                if lost:
                    sample = replace(sample, finish_reason=None, stop_token_id=None)
                yield RequestEvent(request_id=request.request_id, samples=(sample,), cached_tokens=0, queue_s=0.0)
                if lost:
                    raise EngineUnavailable("the replica was lost")
                if self.fail_after is not None and drawn >= self.fail_after:
                    raise EngineUnavailable("the replica was lost")

    def answer(self, request: EngineRequest, index: int) -> list[int]:
        """Return the tokens of one sample."""
        source = self.script or request.prompt_token_ids.tolist()
        tokens: list[int] = []
        for place in range(request.max_tokens):
            token = source[(place + index) % len(source)]
            tokens.append(token)
            if token in request.stop_ids and len(tokens) > request.params.min_tokens:
                break
        return tokens

    def _sample(self, request: EngineRequest, index: int, tokens: list[int], *, last: bool) -> SampleEvent:
        stop = tokens[-1] if tokens[-1] in request.stop_ids else None
        reason = FinishReason.LENGTH if stop is None else FinishReason.STOP
        wants = request.params.logprobs is not None
        return SampleEvent(
            index=index,
            token_ids=tuple(tokens),
            logprobs=tuple(self._logprobs(request, token) for token in tokens) if wants else (),
            finish_reason=(self.finish_reason or reason) if last else None,
            stop_token_id=stop if last else None,
        )

    def _logprobs(self, request: EngineRequest, token: int) -> TokenLogprobs:
        top = max(request.params.logprobs or 0, request.params.prompt_logprobs or 0)
        ids = [token, *((token + offset) % self.facts.vocab_size for offset in range(top))]
        values = [-0.5, *(-0.5 - offset for offset in range(top))]
        return TokenLogprobs(
            token_ids=np.array(ids, dtype=np.int32), logprobs=np.array(values, dtype=np.float32), rank=1
        )

    async def abort_sample(self, request_id: str, index: int) -> None:
        self.aborted_samples.append((request_id, index))

    def load(self) -> EngineLoadReport | None:
        return EngineLoadReport(
            running=len(self.live), waiting=0, queue_room=10, blocks_total=100, blocks_available=100 - len(self.live),
            preemptions=0, prefix_hits=0, prefix_misses=0, draining=False,
        )  # fmt: skip

    async def drain(self, *, timeout_s: float) -> bool:
        return True

    async def close(self) -> None:
        pass


def _taken(event: RequestEvent, take_token: TakeToken | None) -> bool:
    if take_token is None or len(event.samples) != 1:
        return False
    (sample,) = event.samples
    alone = len(sample.token_ids) == 1 and not sample.logprobs and sample.finish_reason is None
    return alone and take_token(sample.index, sample.token_ids[0])
