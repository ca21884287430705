"""What gateway and replica say to one another within a session, as plain values, and who says it.

Commands go to the replica, events come back; ``codec`` turns both into bytes. Knows neither gRPC nor the engine: a
driver implements ``EngineHost``, the gRPC server and the in-process client talk to it.

A request is known by its ``key`` here, a number that the client counts up from 1 within a session: news of a step are
columns of numbers, and no name travels more than once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ...sdk.errors import SlipstreamError
from ..messages import EngineRequest, FinishReason, TokenLogprobs
from .engine_client import BlockChanges, EngineFacts, EngineLoadReport, HandOffReport, PromptScores, SendTo

PROTOCOL_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """Start a request; the replica ends it by itself when ``timeout_s`` seconds have passed.

    ``send_to``: only compute the prompt and draw the next token here; both go to another replica, which goes on.
    ``ticket``: do nothing but wait for the KV that another replica sends under this name, or for ``GoOn``. A request
    has one of the two at most, and one sample then. ``trace_id``: of the request in all processes, 32 hex digits.
    """

    key: int
    request: EngineRequest
    timeout_s: float
    send_to: SendTo | None = None
    ticket: str = ""
    trace_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """End a request; nothing more is heard of it."""

    key: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortSample:
    """End one sample; its ending still comes."""

    key: int
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GoOn:
    """Compute here, from the beginning, a request that waits for KV: it will not come."""

    key: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """Take no more requests from anybody, and say when there are none."""


Command = Submit | Abort | AbortSample | GoOn | Drain


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """The first event of a session."""

    epoch: str
    load: EngineLoadReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """A sample has ended; see ``RequestEvent`` and ``SampleEvent`` for the fields."""

    key: int
    index: int
    reason: FinishReason
    stop_token_id: int | None
    cached_tokens: int
    preemptions: int
    queue_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepNews:
    """What a step meant for one session, in columns: ``token_ids[i]`` is new in sample ``indices[i]`` of ``keys[i]``.

    ``logprobs`` by the same place, where they were asked for; ``prompt_scores``: (key, scores). Tokens of a sample come
    before its ending.
    """

    keys: list[int]
    indices: list[int]
    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs]
    prompt_scores: list[tuple[int, PromptScores]]
    endings: list[Ending]
    load: EngineLoadReport

    @property
    def weight(self) -> int:
        """How much memory this takes, counted in numbers."""
        scores = sum(_size(entry) for _, part in self.prompt_scores for entry in part.entries)
        return len(self.keys) + len(self.endings) + sum(map(_size, self.logprobs.values())) + scores + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A request was refused, or ended by an error; nothing more comes of it."""

    key: int
    error: SlipstreamError


@dataclass(frozen=True, slots=True, kw_only=True)
class HandOffEnded:
    """What became of a request that was to be sent on; nothing more comes of it here. Its token came before."""

    key: int
    report: HandOffReport


@dataclass(frozen=True, slots=True, kw_only=True)
class BlocksChanged:
    """What the prefix cache has got and given up since the last time; a session begins with all that is there."""

    changes: BlockChanges


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How busy the replica is, while no step says so."""

    load: EngineLoadReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Drained:
    """The replica has no request left, as this session asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """The last event: the replica ends the session, and why."""

    error: SlipstreamError


Event = Opened | StepNews | Rejected | HandOffEnded | BlocksChanged | Load | Drained | Closed


def event_weight(event: Event) -> int:
    """Return how much memory an event takes, counted in numbers."""
    match event:
        case StepNews():
            return event.weight
        case BlocksChanged(changes=changes):
            # A digest is as long as two numbers.
            return 2 * (len(changes.stored) + len(changes.removed)) + 1
        case _:
            return 1


class HostSession(Protocol):
    """The replica's end of a session. All methods return at once but ``receive``, which one task may await."""

    def send(self, command: Command) -> None:
        """Take a command. Never raises for what the command says: what is wrong comes back as an event."""
        ...

    async def receive(self) -> list[Event]:
        """Wait for the next events, in order. The last one ever is ``Closed``; [] when this side closed first."""
        ...

    def refuse(self, key: int, error: SlipstreamError) -> None:
        """Answer a command that could not be read, but for whose request it was."""
        ...

    def end(self, error: SlipstreamError) -> None:
        """End the session from the replica's side: abort its requests and let ``Closed`` be its last event."""
        ...

    def close(self) -> None:
        """End the session and abort its requests. Idempotent."""
        ...


class EngineHost(Protocol):
    """What stands behind a server or an in-process client: an engine on its way through steps."""

    @property
    def facts(self) -> EngineFacts:
        """What this replica is."""
        ...

    def open_session(self) -> HostSession:
        """Open a session whose events are received on the running event loop.

        Raises: Overloaded when there are too many; EngineUnavailable when the engine is dead
        """
        ...


def _size(entry: TokenLogprobs) -> int:
    return len(entry.token_ids)
