"""What a gateway can ask of an engine, wherever that engine is: the contract that every transport implements.

Values only; knows neither gRPC nor HTTP. One ``EngineClient`` stands for one replica. A contract suite in ``tests``
runs on every implementation.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

from ..messages import EngineRequest, FinishReason, StageTime, TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What a replica says of itself when it is met: enough to tokenize for it and to check requests.

    ``epoch`` differs each time the replica's process starts; answers of an earlier one are never taken for its own.
    ``replica``: its name in a cluster's views, "" of one that belongs to no cluster. ``role``: "prefill", "decode" or
    "mixed". ``rope_threshold``: only prompts of equal length may share blocks once they are longer, None without a
    limit (``ModelSpec.prefix_cache_key``). ``sends_kv``, ``receives_kv``: whether requests may be split over it.
    """

    epoch: str
    model: str
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    device: str
    replica: str = ""
    role: str = "mixed"
    block_size: int = 0
    rope_threshold: int | None = None
    sends_kv: bool = False
    receives_kv: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SendTo:
    """Where a computed prompt goes: to the replica of this name, whose driver listens at ``address``, where a request
    waits for it under ``ticket``.
    """

    replica: str
    address: str
    ticket: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HandOffReport:
    """How a hand-off ended: ``ending`` is a value of ``comm.kv.transfer.Ending``.

    Units: bytes_moved, of KV; prefill_s, from the first step of the prompt to its last; wire_s, in which frames were on
    their way; hidden_s, the part of it before the prompt was computed; wait_s, from then on to the end
    """

    ending: str
    bytes_moved: int = 0
    prefill_s: float = 0.0
    wire_s: float = 0.0
    hidden_s: float = 0.0
    wait_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockChanges:
    """Cached blocks by the first 16 bytes of their chained digests. ``reset``: forget all that was known before."""

    stored: tuple[bytes, ...] = ()
    removed: tuple[bytes, ...] = ()
    reset: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoadReport:
    """How busy a replica is; sent with steps, and on a timer while there are none.

    ``stages``: what each stage of several ranks has spent on steps since the engine started. ``queued_tokens``: known
    tokens of all requests whose KV is still to be computed. ``awaiting``: requests that wait for KV of others;
    ``sending``, ``receiving``: transfers on their way. ``kv_bytes_out``, ``kv_bytes_in``: moved since the start.
    Units: prefill_tokens_per_s, measured on recent steps, 0 before any; token_s, of a recent step that decodes
    """

    running: int
    waiting: int
    queue_room: int
    blocks_total: int
    blocks_available: int
    preemptions: int
    prefix_hits: int
    prefix_misses: int
    draining: bool
    stages: tuple[StageTime, ...] = ()
    queued_tokens: int = 0
    prefill_tokens_per_s: float = 0.0
    token_s: float = 0.0
    awaiting: int = 0
    sending: int = 0
    receiving: int = 0
    kv_bytes_out: int = 0
    kv_bytes_in: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleEvent:
    """What one or more steps meant for one sample of a request.

    ``finish_reason`` comes once, with the last event; ``stop_token_id`` is the token that ended it, where one did.
    ``logprobs`` has an entry for each token when they were asked for.
    """

    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptScores:
    """Log-probabilities of prompt tokens from ``position`` on."""

    position: int
    entries: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEvent:
    """News of one request. ``hand_off`` comes once, with the last event of one that was sent on.

    Units: queue_s, seconds between its arrival at the engine and its first step, in the event that ends a sample
    """

    request_id: str
    samples: tuple[SampleEvent, ...] = ()
    prompt_scores: tuple[PromptScores, ...] = ()
    cached_tokens: int = 0
    preemptions: int = 0
    queue_s: float | None = None
    hand_off: HandOffReport | None = None


TakeToken = Callable[[int, int], bool]
"""Offered a sample's index and its next token; returns whether it has taken it. Must not wait."""


class EngineClient(Protocol):
    """One replica, as a gateway sees it. Safe to use from many tasks of one event loop."""

    async def connect(self, *, timeout_s: float) -> EngineFacts:
        """Meet the replica; raise EngineUnavailable when it does not answer in time."""
        ...

    def generate(
        self,
        request: EngineRequest,
        *,
        timeout_s: float,
        take_token: TakeToken | None = None,
        send_to: SendTo | None = None,
        ticket: str = "",
        trace_id: str = "",
    ) -> AsyncIterator[RequestEvent]:
        """Submit a request and yield its news until every sample has ended.

        With ``send_to`` only the next token comes, then the event with ``hand_off``; a sample that ends with that token
        comes to its end here. With ``ticket`` tokens come once KV has, beginning with the one that its sender drew.

        ``take_token`` is offered each token that comes alone (no log-probabilities) while the caller waits for the next
        event; what it takes is in no event. That saves waking a task for each token. What it raises, the caller gets.
        Leaving the iterator early, by ``aclose`` or cancellation, aborts the request at the engine.
        Raises: InvalidRequest; Overloaded (retryable); EngineUnavailable (retryable) when the replica is lost;
        DeadlineExceeded when ``timeout_s`` seconds have passed, the request being aborted
        """
        ...

    async def abort_sample(self, request_id: str, index: int) -> None:
        """End one sample (its stop string was found); its last event still comes. Idempotent."""
        ...

    async def go_on(self, request_id: str) -> None:
        """Have a request that waits for KV computed there instead. Idempotent; too late, it does nothing."""
        ...

    def watch_blocks(self, told: Callable[[BlockChanges], None]) -> None:
        """Tell somebody what the replica's prefix cache holds, first all of it, then every change; one at a time."""
        ...

    def load(self) -> EngineLoadReport | None:
        """Return the newest load report, None before the first."""
        ...

    async def drain(self, *, timeout_s: float) -> bool:
        """Ask the replica to take no more requests and wait until it has none; return whether it got there."""
        ...

    async def close(self) -> None:
        """Leave the replica; requests still on their way are aborted."""
        ...
