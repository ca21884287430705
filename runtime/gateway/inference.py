"""The gateway behind the public gRPC service: the same keys, admission, limits, prompts and errors as over HTTP.

Owns the order of these for a call, its line in the log and its place in the metrics. What is asked has the names of
``POST /v1/completions`` and is read by the same body, so that both ways in mean the same.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from ...sdk.errors import SlipstreamError
from ...sdk.results import Logprob
from ..rpc.codec_inference import read_kept, write_kept
from ..rpc.inference import AnswerNews, Ask, Caller, InferenceRefused, ModelFacts, Scored, TextLine
from ..rpc.inference_server import InferenceServer
from ..rpc.tls import Tls
from .direct_line import DirectLine
from .errors import answer_for
from .gateway import Gateway
from .generation import Piece, PromptRun
from .json_body import json_digest
from .prompts import check_model, check_sequences, prepare
from .record import RequestRecord, request_id_of
from .requests import CompletionBody
from .response_format import answer_format
from .sampling import completion_params
from .trace import trace_of
from .turns import end_turn, take_turn

logger = logging.getLogger(__name__)

ENDPOINT = "grpc"
_SHORTEST_S = 0.01


class GatewayInference:
    """An ``InferenceHost``."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def check(self, caller: Caller) -> None:
        """Raise InferenceRefused for one whose key is not let in."""
        try:
            self._gateway.keys.check(caller.authorization)
        except SlipstreamError as error:
            raise _refusal(error) from error

    def models(self) -> tuple[ModelFacts, ...]:
        """Return the served names."""
        gateway = self._gateway
        length = gateway.replicas.current().facts.max_model_len if gateway.replicas.attached else 0
        return tuple(
            ModelFacts(name=name, max_model_len=length, created_s=gateway.started_s)
            for name in gateway.settings.served_model_names
        )

    async def generate(self, ask: Ask, caller: Caller, line: TextLine | None) -> AsyncGenerator[AnswerNews]:
        """Run a request; see ``InferenceHost.generate``."""
        gateway = self._gateway
        record = RequestRecord(
            request_id=request_id_of(ask.request_id.encode("utf-8", "backslashreplace")),
            arrival_s=gateway.clock(),
            trace=trace_of(caller.traceparent),
            stream=True,
        )
        # Until it is known better: whoever stops reading has left.
        record.outcome = "cancelled"
        try:
            record.caller = gateway.keys.check(caller.authorization)
            async with aclosing(self._admitted(ask, caller, record, line)) as answer:
                async for news in answer:
                    yield news
            record.outcome = "ok"
        except Exception as error:
            if not isinstance(error, SlipstreamError):
                logger.exception("request failed", extra={"request_id": record.request_id})
            refusal = _refusal(error)
            record.outcome, record.error = answer_for(error).outcome, str(refusal)
            raise refusal from error
        finally:
            self._note(record)

    async def _admitted(
        self, ask: Ask, caller: Caller, record: RequestRecord, line: TextLine | None
    ) -> AsyncGenerator[AnswerNews]:
        ticket = await take_turn(self._gateway, record)
        try:
            kept = self._kept(ask, caller, record) if ask.idempotency_key else self._answer(ask, caller, record, line)
            async with aclosing(kept) as answer:
                async for news in answer:
                    yield news
        finally:
            end_turn(self._gateway, record, ticket)

    async def _kept(self, ask: Ask, caller: Caller, record: RequestRecord) -> AsyncGenerator[AnswerNews]:
        """Answer a request that has a key, or give the answer that was given under it."""
        gateway = self._gateway
        digest = json_digest(ENDPOINT, ask.body)
        claim = gateway.kept.claim(record.caller, ask.idempotency_key, digest, now_s=gateway.clock())
        if claim.ended_s is not None:
            for news in read_kept(bytes(claim.body or b"")):
                yield news
            return
        try:
            # All of it goes through here: nothing over a line of its own.
            async with aclosing(self._answer(ask, caller, record, None)) as answer:
                async for news in answer:
                    claim.add(write_kept(news))
                    yield news
            gateway.kept.keep(claim, now_s=gateway.clock())
        finally:
            gateway.kept.forget(claim)

    async def _answer(
        self, ask: Ask, caller: Caller, record: RequestRecord, line: TextLine | None
    ) -> AsyncGenerator[AnswerNews]:
        gateway = self._gateway
        body = CompletionBody.parse(ask.body)
        check_model(body.model, gateway.settings)
        check_sequences(1, body.n or 1, gateway.settings)
        model = gateway.replicas.current()
        params = completion_params(body, model.defaults)
        if (wanted := answer_format(body)) is not None:
            params = replace(params, structured_outputs=wanted.constraint)
        prepared = await prepare(
            model,
            body.prompt,
            add_special_tokens=body.add_special_tokens is not False,
            cache_salt=body.cache_salt,
        )
        answer_id = record.answer_id = f"cmpl-{secrets.token_hex(16)}"
        request = model.factory.make(
            f"{answer_id}-0", prepared, params, arrival_time_s=record.arrival_s, priority=body.priority or 0
        )
        record.prompt_tokens += len(prepared.token_ids)
        # What goes over the line is text and nothing else.
        text_is_all = line is not None and body.logprobs is None and not body.return_token_ids
        direct = SampleLine(line) if text_is_all and line is not None else None
        run = PromptRun(
            gateway,
            model,
            request,
            record,
            index=0,
            text=body.prompt if isinstance(body.prompt, str) else None,
            held_to=wanted,
            line=direct,
        )
        begun = False
        async with aclosing(run.pieces(timeout_s=self._time_left_s(caller, record))) as pieces:
            async for piece in pieces:
                if piece.text or piece.token_ids or piece.finish_reason is not None:
                    yield _news(piece, answer_id="" if begun else answer_id, with_ids=bool(body.return_token_ids))
                    begun = True
                if direct is not None:
                    direct.begin(piece.sample)

    def _time_left_s(self, caller: Caller, record: RequestRecord) -> float:
        limit_s = self._gateway.settings.limits.request_timeout_s
        # Asked when the call came, so that both count from then.
        wanted_s = limit_s if caller.timeout_s is None else min(caller.timeout_s, limit_s)
        return max(wanted_s - (self._gateway.clock() - record.arrival_s), _SHORTEST_S)

    def _note(self, record: RequestRecord) -> None:
        elapsed_s = self._gateway.clock() - record.arrival_s
        self._gateway.metrics.request_ended(ENDPOINT, record.outcome, elapsed_s)
        fields = {
            "request_id": record.request_id,
            "trace_id": record.trace_id,
            "method": ENDPOINT,
            "outcome": record.outcome,
            "elapsed_s": round(elapsed_s, 6),
            "ttft_s": None if record.ttft_s is None else round(record.ttft_s, 6),
            "answer_id": record.answer_id,
            "prompt_tokens": record.prompt_tokens,
            "output_tokens": record.output_tokens,
            "error": record.error,
        }
        logger.info("request", extra={"fields": fields})


def grpc_server(gateway: Gateway, host: str, port: int | None, *, tls: Tls | None) -> InferenceServer | None:
    """Return the public gRPC service of a gateway; None where no port is given for it.

    Raises: ConfigError naming ``address``
    """
    if port is None:
        return None
    shown = f"[{host}]" if ":" in host else host
    most = gateway.settings.limits.max_concurrent_requests
    return InferenceServer(GatewayInference(gateway), f"{shown}:{port}", max_requests=most, tls=tls)


class SampleLine(DirectLine):
    """A direct line that leads to a caller's session: open to each sample whose first piece has been passed on."""

    __slots__ = ("_begun", "_to")

    def __init__(self, to: TextLine) -> None:
        super().__init__()
        self._to = to
        self._begun: set[int] = set()

    def begin(self, sample: int) -> None:
        """Let a sample's text through from now on."""
        self._begun.add(sample)

    def is_open(self, sample: int) -> bool:
        """Return whether a sample's text may be written now."""
        return sample in self._begun and self._to.keeps_up

    def write(self, sample: int, text: str) -> None:
        """Write a sample's next text."""
        self._to.write(sample, text)


def _news(piece: Piece, *, answer_id: str, with_ids: bool) -> AnswerNews:
    output = piece.output
    usage = None
    if piece.finish_reason is not None and output.finished:
        written = sum(len(sample.token_ids) for sample in output.outputs)
        usage = (len(output.prompt_token_ids), output.num_cached_tokens, written)
    return AnswerNews(
        sample=piece.sample,
        text=piece.text,
        token_ids=tuple(piece.token_ids) if with_ids else (),
        logprobs=tuple(map(_scored, piece.token_ids, piece.logprobs)),
        finish_reason=piece.finish_reason or "",
        stop_reason=piece.stop_reason,
        answer_id=answer_id,
        usage=usage,
    )


def _scored(token_id: int, table: dict[int, Logprob]) -> tuple[Scored, ...]:
    """Return one position's table, the drawn token first."""
    order = [token_id, *(other for other in table if other != token_id)]
    return tuple(
        Scored(each, entry.logprob, entry.rank or 0, entry.decoded_token or "")
        for each in order
        if (entry := table.get(each)) is not None
    )


def _refusal(error: Exception) -> InferenceRefused:
    answer = answer_for(error)
    told = answer.body["error"]
    return InferenceRefused(
        answer.status,
        told["message"],
        param=told["param"] or "",
        retry_after_s=float(answer.headers.get("retry-after", 0)),
    )
