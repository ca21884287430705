"""``LLM``: a model in this process, for scripts, notebooks and tests.

The same engine core and executor as the servers use, without any of their processes: whoever calls ``generate`` turns
the engine's crank. Names follow vLLM's ``LLM``, so that a script moves over by changing one import.
"""

from __future__ import annotations

import difflib
import threading
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import fields
from os import PathLike, fspath
from types import TracebackType
from typing import Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..sdk.errors import ConfigError, InvalidRequest
from ..sdk.params import SamplingParams
from ..sdk.results import RequestOutput, StreamOutput
from .clock import monotonic_clock, strftime_now
from .collector import RequestCollector
from .config import EngineOptions
from .engine.outputs import StepOutputs
from .engine.sequence import Sequence as EngineSequence
from .engine.sequence import SequenceState
from .messages import EngineRequest
from .prompts import PreparedPrompt, Prompt, RequestFactory, Seeds, TokensPrompt, is_token_list
from .text.tokenizer import Tokenizer
from .worker.launch import launch_engine, model_directory

Messages = Sequence[Mapping[str, Any]]


class _Job:
    """One call's requests on their way: what is still to be submitted, and what came back."""

    def __init__(self, requests: list[EngineRequest]) -> None:
        self.unsubmitted = deque(requests)
        self.unfinished = {request.request_id for request in requests}
        self.events: deque[StreamOutput] = deque()


class LLM:
    """A model and its engine, in this process.

    ``options`` are the fields of ``EngineOptions`` (``dtype``, ``max_model_len``, ``max_num_seqs``,
    ``max_num_batched_tokens``, ``block_size``, ``enable_prefix_caching``, ...). Safe to call from several threads:
    their requests run together. Use as a context manager, or call ``close``.

    Raises: ConfigError naming the option; CheckpointError naming the file and the tensor.
    """

    def __init__(self, model: str | PathLike[str], **options: Any) -> None:
        self.options = _checked_options(fspath(model), options)
        self._clock = monotonic_clock
        tokenizer_path = self.options.tokenizer or self.options.model
        # The tokenizer first: it is quick, and a missing file should not cost the time of loading weights.
        self._tokenizer = (
            None
            if self.options.skip_tokenizer_init
            else Tokenizer.from_directory(model_directory(tokenizer_path), strftime_now=strftime_now)
        )
        self._launched = launch_engine(self.options, clock=self._clock)
        self._engine = self._launched.engine
        self._factory = RequestFactory(
            tokenizer=self._tokenizer,
            vocab_size=self._launched.spec.vocab_size,
            max_model_len=self._launched.config.max_model_len,
            eos_token_ids=self._launched.eos_token_ids,
            seeds=Seeds(self.options.seed),
        )
        self._lock = threading.RLock()
        self._jobs: dict[str, tuple[_Job, RequestCollector]] = {}
        self._next_request = 0

    # ------------------------------------------------------------------ generating

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Generate for every prompt and return the results in the prompts' order.

        ``prompts``: text, ``{"prompt": ...}``, token ids or ``{"prompt_token_ids": [...]}``, one or many.
        ``sampling_params``: one for all or one each; None takes the model's own suggestions. ``priority``: one number
        each, lower first, with ``scheduling_policy="priority"``. ``use_tqdm``: show a progress bar on a terminal.

        Raises: InvalidRequest, before any work is done; EngineError when a step failed.
        """
        return self._finish_all(self._make_requests(self._prepare_all(prompts), sampling_params, priority), use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, through the model's chat template.

        Raises: InvalidRequest naming ``messages`` when the template cannot take them.
        """
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations = cast("Sequence[Messages]", [messages] if one else messages)
        prompts = [
            self.render_chat(
                conversation,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                chat_template_kwargs=chat_template_kwargs,
            )
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def render_chat(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> TokensPrompt:
        """Return one conversation as a prompt for ``generate`` or ``stream``, through the model's chat template.

        Raises: InvalidRequest naming ``messages`` when the template cannot take them.
        """
        if self._tokenizer is None:
            raise InvalidRequest("messages", "a chat needs a tokenizer, and skip_tokenizer_init left it out")
        text = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, **(chat_template_kwargs or {})
        )
        # The template has put the special tokens in itself.
        return {"prompt": text, "prompt_token_ids": self._tokenizer.encode(text, add_special_tokens=False)}

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
    ) -> Generator[StreamOutput, None, None]:
        """Generate for every prompt together and yield each piece as it comes.

        The requests are checked at once, and started with the first ``next``. Leaving the loop early aborts what has
        not finished.
        """
        requests = self._make_requests(self._prepare_all(prompts), sampling_params, priority)
        return self._run(requests)

    # ------------------------------------------------------------------ around it

    def get_tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer, None when ``skip_tokenizer_init`` left it out."""
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the sampling parameters that the model's generation config suggests."""
        defaults = self._launched.generation
        suggested: dict[str, Any] = {
            "temperature": 0.0 if defaults.do_sample is False else defaults.temperature,
            "top_p": defaults.top_p,
            "top_k": defaults.top_k,
            "min_p": defaults.min_p,
            "repetition_penalty": defaults.repetition_penalty,
            "max_tokens": defaults.max_new_tokens,
        }
        return SamplingParams(**{name: value for name, value in suggested.items() if value is not None})

    def reset_prefix_cache(self) -> int:
        """Forget cached prefixes that no request uses; return how many blocks became free."""
        with self._lock:
            return self._engine.scheduler.pool.reset_prefix_cache()

    def close(self) -> None:
        """End what runs and free the engine. Closing twice does nothing."""
        with self._lock:
            self._engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ inside

    def _prepare_all(self, prompts: object) -> list[PreparedPrompt]:
        if isinstance(prompts, str | Mapping) or is_token_list(prompts):
            return [self._factory.prepare(prompts)]
        if not isinstance(prompts, Sequence):
            raise InvalidRequest("prompts", f"must be a prompt or a list of prompts, got {type(prompts).__name__}")
        return [self._factory.prepare(prompt) for prompt in prompts]

    def _make_requests(
        self,
        prompts: list[PreparedPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None,
    ) -> list[tuple[EngineRequest, RequestCollector]]:
        """Make every request and check that it fits, before any is started."""
        params = _one_each("sampling_params", sampling_params or self.get_default_sampling_params(), len(prompts))
        priorities = _one_each("priority", 0 if priority is None else priority, len(prompts))
        made = []
        for prompt, own_params, own_priority in zip(prompts, params, priorities, strict=True):
            with self._lock:
                self._next_request += 1
                request = self._factory.make(
                    str(self._next_request), prompt, own_params, arrival_time_s=self._clock(), priority=own_priority
                )
            self._engine.scheduler.check_fits(request)
            if own_params.structured_outputs is not None:
                self._launched.grammars.compile(own_params.structured_outputs)
            collector = RequestCollector(
                request, prompt=prompt.text, tokenizer=self._tokenizer, eos_token_ids=self._launched.eos_token_ids
            )
            made.append((request, collector))
        return made

    def _finish_all(self, made: list[tuple[EngineRequest, RequestCollector]], use_bar: bool) -> list[RequestOutput]:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        show = use_bar and len(made) > 1 and console.is_terminal
        with Progress(*columns, console=console, disable=not show, transient=True) as progress:
            task = progress.add_task("generating", total=len(made))
            for piece in self._run(made):
                if piece.finish_reason is not None and piece.output.finished:
                    progress.advance(task)
        return [collector.output for _, collector in made]

    def _run(self, made: list[tuple[EngineRequest, RequestCollector]]) -> Generator[StreamOutput, None, None]:
        """Run one call's requests to their end, yielding every piece."""
        job = _Job([request for request, _ in made])
        collectors = {request.request_id: collector for request, collector in made}
        try:
            while job.unfinished or job.events:
                with self._lock:
                    if not job.events:
                        self._submit(job, collectors)
                        self._route(self._engine.step())
                while job.events:
                    yield job.events.popleft()
        finally:
            with self._lock:
                for request_id in job.unfinished:
                    self._jobs.pop(request_id, None)
                    self._engine.abort(request_id)

    def _submit(self, job: _Job, collectors: dict[str, RequestCollector]) -> None:
        """Hand over as many of a job's requests as the engine's queue takes now."""
        while job.unsubmitted and self._engine.scheduler.queue_room > 0:
            request = job.unsubmitted.popleft()
            self._engine.submit(request)
            self._jobs[request.request_id] = (job, collectors[request.request_id])

    def _route(self, outputs: StepOutputs) -> None:
        """Give each token to its request, and end in the engine what a stop string has ended."""
        now_s = self._clock()
        for sequence, position, entries in outputs.prompt_logprobs:
            if sequence.request_id in self._jobs:
                self._jobs[sequence.request_id][1].add_prompt_logprobs(position, entries)
        ended = list(outputs.finished)
        for place, (sequence, token_id) in enumerate(zip(outputs.sequences, outputs.token_ids, strict=True)):
            if sequence.request_id not in self._jobs:
                continue
            job, collector = self._jobs[sequence.request_id]
            logprobs = outputs.logprobs.get(place)
            text = collector.add_token(sequence.index, token_id, logprobs, now_s=now_s)
            job.events.append(collector.piece(sequence.index, text, [token_id]))
            if collector.found_stop_string(sequence.index) and sequence.state is not SequenceState.FINISHED:
                self._engine.scheduler.abort_sequence(sequence)
                ended.append(sequence)
        for sequence in ended:
            if sequence.request_id in self._jobs:
                self._end(sequence, now_s)

    def _end(self, sequence: EngineSequence, now_s: float) -> None:
        job, collector = self._jobs[sequence.request_id]
        assert sequence.finish_reason is not None
        collector.note_scheduling(
            first_scheduled_time_s=sequence.first_scheduled_time_s,
            cached_tokens=(sequence.cached_tokens or 0) if sequence.index == 0 else 0,
            preemptions=sequence.preemptions,
        )
        text = collector.end(sequence.index, sequence.finish_reason, sequence.stop_token_id, now_s=now_s)
        job.events.append(collector.piece(sequence.index, text, []))
        if collector.output.finished:
            job.unfinished.discard(sequence.request_id)
            del self._jobs[sequence.request_id]


def _checked_options(model: str, options: dict[str, Any]) -> EngineOptions:
    known = [field.name for field in fields(EngineOptions)]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known))}"
            raise ConfigError(name, f"is not an option of LLM{hint}")
    return EngineOptions(model=model, **options)


def _one_each(field: str, given: Any, count: int) -> list[Any]:
    """Spread one value over all prompts, or check that there is one for each."""
    if isinstance(given, Sequence):
        if len(given) != count:
            raise InvalidRequest(field, f"{len(given)} were given for {count} prompts: give one for all, or one each")
        return list(given)
    return [given] * count
