"""POST /v1/chat/completions: a conversation in, answers out.

Owns how an answer's text becomes content and tool calls, whole and as a stream: both go through the same
``_Sample``, piece by piece, so that the deltas of a stream put together are the whole answer.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from ...sdk.errors import InvalidRequest
from ...sdk.results import Logprob, RequestOutput
from .answer import Call, Streamed, Whole
from .direct_line import DirectLine
from .generation import Piece, PromptRun, run_together
from .logprobs import ChatLogprobs, chat_logprobs
from .prompts import check_model, check_sequences, prepare_chat
from .requests import ChatBody, StreamOptions
from .response_format import answer_format
from .responses import (
    LAST_EVENT,
    ChatChoice,
    ChatCompletion,
    ChatMessage,
    EventTemplate,
    FunctionCall,
    ToolCall,
    to_event,
    usage_of,
)
from .sampling import chat_params
from .tool_choice import ToolUse, settle_tools
from .tools import Parsed, ParsedCall


async def chat(call: Call) -> Whole | Streamed:
    """Serve one chat request."""
    body = ChatBody.parse(call.body)
    settings = call.gateway.settings
    check_model(body.model, settings)
    if isinstance(body.messages, list) and len(body.messages) > settings.limits.max_messages:
        raise InvalidRequest("messages", f"at most {settings.limits.max_messages}, got {len(body.messages)}")
    samples = body.n or 1
    check_sequences(1, samples, settings)
    model = call.gateway.replicas.current()
    params = chat_params(body, model.defaults)
    wanted = answer_format(body)
    tools = settle_tools(body, settings, model.tokenizer, wanted)
    if tools.needs_special_tokens:
        params = replace(params, skip_special_tokens=False)
    if (held_to := tools.grammar or wanted) is not None:
        params = replace(params, structured_outputs=held_to.constraint)
    prepared = await prepare_chat(
        model,
        body.messages,
        tools=tools.shown,
        add_generation_prompt=body.add_generation_prompt is not False,
        template_variables=body.chat_template_kwargs or {},
        cache_salt=body.cache_salt,
    )
    answer_id = call.record.answer_id = f"chatcmpl-{secrets.token_hex(16)}"
    call.record.prompt_tokens += len(prepared.token_ids)
    request = model.factory.make(
        f"{answer_id}-0", prepared, params, arrival_time_s=call.record.arrival_s, priority=body.priority or 0
    )
    line = DirectLine()
    run = PromptRun(call.gateway, model, request, call.record, index=0, text=prepared.text, held_to=held_to, line=line)
    writer = _Writer(call, body, answer_id, params.n, tools, line)
    pieces = run_together([run], timeout_s=call.time_left_s)
    if body.stream:
        return Streamed(events=writer.events(pieces, run.output), line=line)
    async with aclosing(pieces):
        async for piece in pieces:
            writer.samples[piece.sample].take(piece)
    return Whole(body=writer.whole(run.output))


class _Sample:
    """One answer as it grows: its text sorted into content and calls."""

    def __init__(self, tools: ToolUse) -> None:
        self._tools = tools
        self._parser = None if tools.make_parser is None else tools.make_parser()
        self.content = ""
        self.calls: list[ToolCall] = []
        self.finish_reason: str | None = None

    def take(self, piece: Piece) -> tuple[str, list[ToolCall]]:
        """Take a piece in and return what it adds."""
        parsed = self._parse(piece)
        added = [self._call(call) for call in parsed.calls[: self._room]]
        self.content += parsed.content
        self.calls += added
        if piece.finish_reason is not None:
            called = bool(self.calls) and piece.finish_reason == "stop"
            self.finish_reason = "tool_calls" if called else piece.finish_reason
        return parsed.content, added

    @property
    def _room(self) -> int | None:
        return max(0, 1 - len(self.calls)) if self._tools.at_most_one else None

    def _parse(self, piece: Piece) -> Parsed:
        if self._parser is None:
            return Parsed(content=piece.text)
        parsed = self._parser.feed(piece.text)
        if piece.finish_reason is None:
            return parsed
        last = self._parser.finish()
        return Parsed(content=parsed.content + last.content, calls=parsed.calls + last.calls)

    def _call(self, call: ParsedCall) -> ToolCall:
        function: FunctionCall = {"name": call.name, "arguments": call.arguments}
        return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


class _Writer:
    """Writes the answer to one request."""

    def __init__(self, call: Call, body: ChatBody, answer_id: str, n: int, tools: ToolUse, line: DirectLine) -> None:
        self._body = body
        self.samples = [_Sample(tools) for _ in range(n)]
        self._envelope: ChatCompletion = {
            "id": answer_id,
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(call.gateway.wall_clock()),
            "model": body.model or call.gateway.settings.model_name,
            "choices": [],
        }
        self._line = line
        # Whether all that comes between the first piece and the last is content.
        self._options = body.stream_options or StreamOptions()
        self._content_is_all = (
            tools.make_parser is None
            and not body.logprobs
            and not body.return_token_ids
            and not self._options.continuous_usage_stats
        )

    def whole(self, output: RequestOutput) -> ChatCompletion:
        """Write the answer in one piece."""
        choices: list[ChatChoice] = []
        for index, (sample, drawn) in enumerate(zip(self.samples, output.outputs, strict=True)):
            message: ChatMessage = {"role": "assistant", "content": sample.content, "refusal": None}
            if sample.calls:
                message["content"] = sample.content or None
                message["tool_calls"] = sample.calls
            choice: ChatChoice = {
                "index": index,
                "message": message,
                "logprobs": self._logprobs(drawn.token_ids, drawn.logprobs or []),
                "finish_reason": sample.finish_reason,
                "stop_reason": drawn.stop_reason,
            }
            if self._body.return_token_ids:
                choice["token_ids"] = drawn.token_ids
            choices.append(choice)
        answer: ChatCompletion = {**self._envelope, "choices": choices, "usage": usage_of([output])}
        if self._body.return_token_ids:
            answer["prompt_token_ids"] = output.prompt_token_ids
        return answer

    async def events(self, pieces: AsyncGenerator[Piece], output: RequestOutput) -> AsyncGenerator[bytes]:
        """Write the answer as a stream: for each sample its role, then what pieces add, then why it ended."""
        options = self._options
        if options.include_usage:
            self._envelope["usage"] = None
        begun: set[int] = set()
        async with aclosing(pieces):
            async for piece in pieces:
                delta: ChatMessage = {}
                if piece.sample not in begun:
                    begun.add(piece.sample)
                    delta = {"role": "assistant", "content": ""}
                    if self._content_is_all:
                        self._line.open(piece.sample, self._template(piece.sample))
                if (choice := self._piece(piece, delta)) is not None:
                    event: ChatCompletion = {**self._envelope, "choices": [choice]}
                    if options.include_usage and options.continuous_usage_stats:
                        event["usage"] = usage_of([output])
                    yield to_event(event)
        if options.include_usage:
            yield to_event({**self._envelope, "choices": [], "usage": usage_of([output])})
        yield LAST_EVENT

    def _template(self, sample: int) -> EventTemplate:
        return EventTemplate(lambda text: {**self._envelope, "choices": [_only_content(sample, text)]})

    def _piece(self, piece: Piece, delta: ChatMessage) -> ChatChoice | None:
        """Write what one piece adds, None when that is nothing."""
        sample = self.samples[piece.sample]
        numbered = len(sample.calls)
        content, calls = sample.take(piece)
        if content:
            delta["content"] = content
        if calls:
            delta["tool_calls"] = [{**call, "index": numbered + place} for place, call in enumerate(calls)]
        logprobs = self._logprobs(piece.token_ids, piece.logprobs)
        wants_ids = bool(self._body.return_token_ids and piece.token_ids)
        if not (delta or logprobs or sample.finish_reason or wants_ids):
            return None
        choice: ChatChoice = {
            "index": piece.sample,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": sample.finish_reason,
        }
        if sample.finish_reason is not None:
            choice["stop_reason"] = piece.stop_reason
        if wants_ids:
            choice["token_ids"] = piece.token_ids
        return choice

    def _logprobs(self, token_ids: list[int], tables: list[dict[int, Logprob]]) -> ChatLogprobs | None:
        if not self._body.logprobs or not tables:
            return None
        return chat_logprobs(list(zip(token_ids, tables, strict=True)), top=self._body.top_logprobs or 0)


def _only_content(index: int, content: str) -> ChatChoice:
    """Write a piece that brings content and nothing else."""
    return {"index": index, "delta": {"content": content}, "logprobs": None, "finish_reason": None}
