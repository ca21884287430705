"""POST /v1/completions: prompts in, samples out.

Owns the order of choices (prompt by prompt, sample by sample), ``echo``, and how pieces become a stream. A stream's
pieces put together are the whole answer.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from ...sdk.params import SamplingParams
from ...sdk.results import CompletionOutput, Logprob, RequestOutput
from .answer import Call, Streamed, Whole
from .direct_line import DirectLine
from .generation import Piece, PromptRun, run_together
from .logprobs import CompletionLogprobs, Entry, completion_logprobs
from .prompts import check_model, check_sequences, prepare, split_prompts
from .replica import ServedModel
from .requests import CompletionBody, StreamOptions
from .response_format import answer_format
from .responses import LAST_EVENT, Completion, CompletionChoice, EventTemplate, Usage, to_event, usage_of
from .sampling import completion_params


async def complete(call: Call) -> Whole | Streamed:
    """Serve one completion request."""
    body = CompletionBody.parse(call.body)
    check_model(body.model, call.gateway.settings)
    prompts = split_prompts(body.prompt, call.gateway.settings)
    samples = body.n or 1
    check_sequences(len(prompts), samples, call.gateway.settings)
    call.gateway.admission.grow(call.ticket, len(prompts))
    model = call.gateway.replicas.current()
    params = completion_params(body, model.defaults)
    if (wanted := answer_format(body)) is not None:
        params = replace(params, structured_outputs=wanted.constraint)
    answer_id = call.record.answer_id = f"cmpl-{secrets.token_hex(16)}"
    line = DirectLine()
    runs, texts = [], []
    for index, prompt in enumerate(prompts):
        prepared = await prepare(
            model, prompt, add_special_tokens=body.add_special_tokens is not False, cache_salt=body.cache_salt
        )
        request = model.factory.make(
            f"{answer_id}-{index}", prepared, params, arrival_time_s=call.record.arrival_s, priority=body.priority or 0
        )
        text = prompt if isinstance(prompt, str) else None
        if body.echo and text is None:
            text = model.tokenizer.decode(prepared.token_ids.tolist(), skip_special_tokens=True)
        # Several prompts have one queue before their client, which a direct line would overtake.
        runs.append(
            PromptRun(
                call.gateway,
                model,
                request,
                call.record,
                index=index,
                text=text,
                held_to=wanted,
                line=line if len(prompts) == 1 else None,
            )
        )
        texts.append(text or "")
        call.record.prompt_tokens += len(prepared.token_ids)
    writer = _Writer(call, model, body, params, answer_id, texts, line)
    pieces = run_together(runs, timeout_s=call.time_left_s)
    outputs = [run.output for run in runs]
    if body.stream:
        return Streamed(events=writer.events(pieces, outputs), line=line)
    async with aclosing(pieces):
        async for _ in pieces:
            pass
    return Whole(body=writer.whole(outputs))


class _Writer:
    """Writes the answer to one request."""

    def __init__(
        self, call: Call, model: ServedModel, body: CompletionBody, params: SamplingParams, answer_id: str,
        texts: list[str], line: DirectLine,
    ) -> None:  # fmt: skip
        self._model = model
        self._body = body
        self._params = params
        self._texts = texts
        self._only_echo = body.max_tokens == 0
        self._envelope: Completion = {
            "id": answer_id,
            "object": "text_completion",
            "created": int(call.gateway.wall_clock()),
            "model": body.model or call.gateway.settings.model_name,
            "choices": [],
        }
        # Where the text of each sample's next token begins.
        self._offsets: dict[int, int] = {}
        self._line = line
        # Whether all that comes between the first piece and the last is text.
        self._options = body.stream_options or StreamOptions()
        self._text_is_all = (
            body.logprobs is None
            and not body.return_token_ids
            and not self._only_echo
            and not self._options.continuous_usage_stats
        )

    def whole(self, outputs: list[RequestOutput]) -> Completion:
        """Write the answer in one piece."""
        choices = [
            self._choice(
                prompt, sample.index, output, sample.text, sample.token_ids, sample.logprobs or [], sample, first=True
            )
            for prompt, output in enumerate(outputs)
            for sample in output.outputs
        ]
        return {**self._envelope, "choices": choices, "usage": self._usage(outputs)}

    async def events(self, pieces: AsyncGenerator[Piece], outputs: list[RequestOutput]) -> AsyncGenerator[bytes]:
        """Write the answer as a stream."""
        options = self._options
        if options.include_usage:
            self._envelope["usage"] = None
        seen: set[int] = set()
        async with aclosing(pieces):
            async for piece in pieces:
                index = piece.prompt * self._params.n + piece.sample
                if (first := index not in seen) and self._text_is_all:
                    self._line.open(index, self._template(index))
                seen.add(index)
                choice = self._choice(
                    piece.prompt, piece.sample, piece.output, piece.text, piece.token_ids, piece.logprobs, piece,
                    first=first,
                )  # fmt: skip
                if first or choice["text"] or choice["logprobs"] or piece.finish_reason or choice.get("token_ids"):
                    event: Completion = {**self._envelope, "choices": [choice]}
                    if options.include_usage and options.continuous_usage_stats:
                        event["usage"] = self._usage(outputs)
                    yield to_event(event)
        if options.include_usage:
            yield to_event({**self._envelope, "choices": [], "usage": self._usage(outputs)})
        yield LAST_EVENT

    def _template(self, index: int) -> EventTemplate:
        return EventTemplate(lambda text: {**self._envelope, "choices": [_written(index, text, None, None, None)]})

    def _usage(self, outputs: list[RequestOutput]) -> Usage:
        return usage_of(outputs, without_output=self._only_echo)

    def _choice(
        self, prompt: int, sample: int, output: RequestOutput, text: str, token_ids: list[int],
        tables: list[dict[int, Logprob]], end: Piece | CompletionOutput, *, first: bool,
    ) -> CompletionChoice:  # fmt: skip
        """Write one choice; ``first`` says whether the sample's answer begins here, with its echo."""
        index = prompt * self._params.n + sample
        if self._only_echo:
            text, token_ids, tables = "", [], []
        entries: list[Entry] = list(zip(token_ids, tables, strict=True)) if tables else []
        if first and self._body.echo:
            text = self._texts[prompt] + text
            prompt_tables = output.prompt_logprobs or []
            entries = [*zip(output.prompt_token_ids, prompt_tables, strict=bool(prompt_tables)), *entries]
        reason = end.finish_reason
        reason = "length" if self._only_echo and reason else reason
        stop_reason = None if self._only_echo else end.stop_reason
        choice = _written(index, text, self._logprobs(index, entries), reason, stop_reason)
        if self._body.return_token_ids:
            choice["token_ids"] = token_ids
            if first:
                choice["prompt_token_ids"] = output.prompt_token_ids
        if first and self._body.prompt_logprobs is not None and output.prompt_logprobs is not None:
            choice["prompt_logprobs"] = [_plain_table(table) for table in output.prompt_logprobs]
        return choice

    def _logprobs(self, index: int, entries: list[Entry]) -> CompletionLogprobs | None:
        if self._body.logprobs is None or not entries:
            return None
        offset = self._offsets.get(index, 0)
        written = completion_logprobs(entries, top=self._body.logprobs, offset=offset, decode=self._decode)
        self._offsets[index] = written["text_offset"][-1] + len(written["tokens"][-1])
        return written

    def _decode(self, token_id: int) -> str:
        return self._model.tokenizer.decode([token_id], skip_special_tokens=False)


def _written(
    index: int, text: str, logprobs: CompletionLogprobs | None, finish_reason: str | None, stop_reason: int | str | None
) -> CompletionChoice:
    """Write what every choice has."""
    return {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
        "stop_reason": stop_reason,
    }


def _plain_table(table: dict[int, Logprob] | None) -> dict[str, Any] | None:
    """Write one position's table as vLLM does: by token id."""
    if table is None:
        return None
    return {
        str(token_id): {"logprob": entry.logprob, "rank": entry.rank, "decoded_token": entry.decoded_token}
        for token_id, entry in table.items()
    }
