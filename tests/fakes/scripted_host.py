"""A replica that says what a script says, whatever it is asked: for how clients take what cannot be."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from slipstream.runtime.messages import FinishReason
from slipstream.runtime.rpc.engine_client import EngineFacts, EngineLoadReport, HandOffReport, PromptScores
from slipstream.runtime.rpc.outbox import Outbox
from slipstream.runtime.rpc.session import Closed, Command, Ending, Event, GoOn, HandOffEnded, Opened, StepNews, Submit
from slipstream.sdk.errors import SlipstreamError
from slipstream.tests.fakes.gated_executor import score

LOAD = EngineLoadReport(
    running=1,
    waiting=0,
    queue_room=9,
    blocks_total=8,
    blocks_available=7,
    preemptions=0,
    prefix_hits=0,
    prefix_misses=0,
    draining=False,
)


@dataclass(frozen=True)
class Script:
    """What comes after a submit, after it goes on, and at the beginning."""

    name: str
    events: list[Event] = field(default_factory=list)
    gone_on: list[Event] = field(default_factory=list)
    opening: list[Event] = field(default_factory=list)
    sends_on: bool = False


class ScriptedHost:
    """An ``EngineHost`` without an engine; without a script it never opens a session. Keeps what it was told."""

    def __init__(self, script: Script | None) -> None:
        self._script = script
        self.commands: list[Command] = []
        self.sessions: list[ScriptedSession] = []

    @property
    def facts(self) -> EngineFacts:
        return EngineFacts(
            epoch="script",
            model="script",
            vocab_size=97,
            max_model_len=256,
            max_num_seqs=4,
            eos_token_ids=(),
            dtype="none",
            device="none",
        )

    def open_session(self) -> ScriptedSession:
        self.sessions.append(ScriptedSession(self._script, self.commands))
        return self.sessions[-1]


class ScriptedSession:
    def __init__(self, script: Script | None, commands: list[Command]) -> None:
        self._script = script
        self._commands = commands
        self._outbox = Outbox(asyncio.get_running_loop(), max_weight=1000)
        if script is not None:
            self.say(Opened(epoch="script", load=LOAD), *script.opening)

    def say(self, *events: Event) -> None:
        """Send events that no command asked for."""
        self._outbox.put(list(events))

    def send(self, command: Command) -> None:
        self._commands.append(command)
        if isinstance(command, Submit) and self._script is not None:
            self.say(*self._script.events)
        if isinstance(command, GoOn) and self._script is not None:
            self.say(*self._script.gone_on)

    async def receive(self) -> list[Event]:
        return await self._outbox.get()

    def refuse(self, key: int, error: SlipstreamError) -> None:
        raise AssertionError((key, error))

    def end(self, error: SlipstreamError) -> None:
        self._outbox.finish([Closed(error=error)])

    def close(self) -> None:
        self._outbox.finish([], discard=True)


def news(
    tokens: list[tuple[int, int, int]],
    *,
    endings: list[Ending] | None = None,
    prompt_scores: list[tuple[int, PromptScores]] | None = None,
) -> StepNews:
    """Make a step's news from (key, index, token) triples."""
    return StepNews(
        keys=[key for key, _, _ in tokens],
        indices=[index for _, index, _ in tokens],
        token_ids=[token for _, _, token in tokens],
        logprobs={},
        prompt_scores=prompt_scores or [],
        endings=endings or [],
        load=LOAD,
    )


def ending(key: int, index: int) -> Ending:
    return Ending(
        key=key,
        index=index,
        reason=FinishReason.LENGTH,
        stop_token_id=None,
        cached_tokens=0,
        preemptions=0,
        queue_s=None,
    )


def handed_over(key: int) -> HandOffEnded:
    return HandOffEnded(key=key, report=HandOffReport(ending="committed", bytes_moved=4096, wire_s=0.5))


def impossible_scripts() -> list[Script]:
    """Return what no replica may send to a request of two prompt tokens and at most two new ones, or to one sent on."""
    scores = PromptScores(position=1, entries=(score(1, 1, 0), score(1, 2, 0)))
    return [
        Script("news-of-nobody", [news([(7, 0, 1)])]),
        Script("news-of-key-0", [news([(0, 0, 1)])]),
        Script("a-sample-too-many", [news([(1, 1, 1)])]),
        Script("a-token-too-many", [news([(1, 0, 1)]), news([(1, 0, 2)]), news([(1, 0, 3)])]),
        Script("two-endings", [news([], endings=[ending(1, 3)])]),
        Script("scores-unasked", [news([], prompt_scores=[(1, scores)])]),
        Script("a-hand-off-unasked", [HandOffEnded(key=1, report=HandOffReport(ending="no_room"))]),
        Script("a-hand-off-of-nobody", [HandOffEnded(key=7, report=HandOffReport(ending="no_room"))], sends_on=True),
        Script("handed-over-without-its-token", [handed_over(1)], sends_on=True),
        Script("two-tokens-of-one-sent-on", [news([(1, 0, 1)]), news([(1, 0, 2)])], sends_on=True),
        Script("opened-twice", [Opened(epoch="script", load=LOAD)]),
    ]
