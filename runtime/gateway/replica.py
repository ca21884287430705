"""The engines behind a gateway: what a request needs of the one that it is sent to, and which one that is.

Owns what is worked out from an engine's facts: how prompts become its requests. ``Replicas`` is what requests see of
whatever is behind the gateway; ``Replica`` is one engine that comes and goes, and ``ReplicaSet`` (in its own file) are
those of a cluster. It must not know HTTP, nor how engines' processes are started.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from ...sdk.errors import EngineUnavailable, SlipstreamError
from ..models.generation_defaults import GenerationDefaults
from ..prompts import RequestFactory, Seeds
from ..rpc.engine_client import EngineClient, EngineFacts, EngineLoadReport, HandOffReport
from ..text.tokenizer import Tokenizer
from .routes import Ask, Route, Split, Whole


class WatchedClient(EngineClient, Protocol):
    """A client that says when it has lost its replica."""

    async def wait_lost(self) -> SlipstreamError:
        """Wait until the connection is lost and return why."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelText:
    """What a gateway needs of a model's files. ``longest_token_chars``: no token stands for more text."""

    tokenizer: Tokenizer
    defaults: GenerationDefaults
    longest_token_chars: int


def model_text(tokenizer: Tokenizer, defaults: GenerationDefaults) -> ModelText:
    """Return the text side of a model."""
    longest = max(len(tokenizer.id_to_token(id) or "") for id in range(tokenizer.vocab_size))
    return ModelText(tokenizer=tokenizer, defaults=defaults, longest_token_chars=longest)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One incarnation of an engine, with what a request needs to know about its model.

    ``max_prompt_chars``: longer text has more tokens than the model takes, whatever it says. ``generation``: of the
    model, as views count it.
    """

    client: EngineClient
    facts: EngineFacts
    tokenizer: Tokenizer
    defaults: GenerationDefaults
    factory: RequestFactory
    max_prompt_chars: int
    generation: int = 0

    def answers_like(self, other: ServedModel) -> bool:
        """Whether a request that was made for one means the same to the other."""
        return self.kind == other.kind

    @property
    def kind(self) -> tuple[object, ...]:
        """What those that answer alike have in common."""
        facts = self.facts
        return (self.generation, facts.model, facts.vocab_size, facts.max_model_len, facts.eos_token_ids, facts.dtype)


def served_model(
    client: EngineClient, facts: EngineFacts, text: ModelText, *, seeds: Seeds, generation: int = 0
) -> ServedModel:
    """Return an engine that has been met, ready for requests."""
    factory = RequestFactory(
        tokenizer=text.tokenizer,
        vocab_size=facts.vocab_size,
        max_model_len=facts.max_model_len,
        eos_token_ids=facts.eos_token_ids,
        seeds=seeds,
    )
    return ServedModel(
        client=client,
        facts=facts,
        tokenizer=text.tokenizer,
        defaults=text.defaults,
        factory=factory,
        # Text cannot be tokenized into fewer tokens than this allows: what is far too long is refused without trying.
        max_prompt_chars=facts.max_model_len * text.longest_token_chars,
        generation=generation,
    )


class Replicas(Protocol):
    """The engines that serve now, as requests see them. Each has a name, which routes are made of."""

    @property
    def attached(self) -> bool:
        """Whether an engine is there that takes whole requests."""
        ...

    def current(self) -> ServedModel:
        """Return an engine that serves now: requests are made for its model.

        Raises: EngineUnavailable (retryable) while there is none
        """
        ...

    def route(self, ask: Ask, model: ServedModel) -> Route | None:
        """Return where a request goes that was made for this model, None while nobody can have it.

        Whoever asks says ``ended`` of every route.
        """
        ...

    def reach(self, name: str) -> ServedModel:
        """Return an engine of a route that was just given. Raises: EngineUnavailable (retryable) when it is gone"""
        ...

    def where(self, name: str) -> tuple[str, str]:
        """Return by what name and at what address other replicas find one."""
        ...

    def note_hand_off(self, route: Split, report: HandOffReport | None) -> None:
        """Learn from how a hand-off ended; None: nothing was heard of it."""
        ...

    def ended(self, route: Route) -> None:
        """Note that a request is over at its replicas. Idempotent."""
        ...

    async def wait_changed(self) -> None:
        """Wait until an engine comes that was not there."""
        ...

    def has(self, epoch: str) -> bool:
        """Return whether an engine of this incarnation serves now."""
        ...

    @property
    def splits(self) -> bool:
        """Whether there are, or should be, engines that only compute prompts for others."""
        ...

    def load(self) -> EngineLoadReport | None:
        """Return the newest load of all engines together, None without one."""
        ...

    def states(self) -> Mapping[str, int]:
        """Return how many replicas are in each state, for metrics."""
        ...

    @property
    def open_breakers(self) -> int:
        """Pairs of replicas that no request is split over now, because that failed."""
        ...


class Arrivals:
    """Tells those that wait for an engine that one has come."""

    def __init__(self) -> None:
        self._next: asyncio.Future[None] | None = None

    def tell(self) -> None:
        """One has come."""
        if self._next is not None and not self._next.done():
            self._next.set_result(None)
        self._next = None

    async def wait(self) -> None:
        """Wait for the next."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        # Many wait for the same: one that leaves does not end it for the others.
        await asyncio.shield(self._next)


class Replica:
    """The one engine of a gateway that has its own driver; it comes and goes as the driver's process does."""

    def __init__(self, text: ModelText, *, seed: int | None = None) -> None:
        self._text = text
        self._seeds = Seeds(seed)
        self._model: ServedModel | None = None
        self._arrivals = Arrivals()

    @property
    def attached(self) -> bool:
        """Whether an engine is there."""
        return self._model is not None

    def current(self) -> ServedModel:
        """Return the engine that serves now. Raises: EngineUnavailable (retryable) while there is none"""
        if self._model is None:
            raise EngineUnavailable("the engine is not running: it is starting, or starting again after a failure")
        return self._model

    def route(self, ask: Ask, model: ServedModel) -> Route | None:
        """Return the way to the engine that serves now, whose name is that of its incarnation."""
        now = self._model
        if now is None or now.facts.epoch in ask.exclude or not now.answers_like(model):
            return None
        return Whole(replica=now.facts.epoch)

    def reach(self, name: str) -> ServedModel:
        """Return the engine that serves now, if it is the one that was meant."""
        if not self.has(name):
            raise EngineUnavailable("the engine is gone")
        return self.current()

    def where(self, name: str) -> tuple[str, str]:
        """Return nothing of use: nobody else is there."""
        return name, ""

    def note_hand_off(self, route: Split, report: HandOffReport | None) -> None:
        """Do nothing: nothing is split."""

    def ended(self, route: Route) -> None:
        """Do nothing: nothing is chosen."""

    async def wait_changed(self) -> None:
        """Wait until the next engine is attached."""
        await self._arrivals.wait()

    def has(self, epoch: str) -> bool:
        """Return whether an engine of this incarnation serves now."""
        return self._model is not None and self._model.facts.epoch == epoch

    @property
    def splits(self) -> bool:
        """False: there is one."""
        return False

    def attach(self, client: EngineClient, facts: EngineFacts) -> None:
        """Serve with an engine that has been met."""
        self._model = served_model(client, facts, self._text, seeds=self._seeds)
        self._arrivals.tell()

    def detach(self) -> None:
        """Stop serving: the engine is lost."""
        self._model = None

    def load(self) -> EngineLoadReport | None:
        """Return the engine's newest load report, None without one."""
        return None if self._model is None else self._model.client.load()

    def states(self) -> Mapping[str, int]:
        """Return nothing: whether the one engine is there is a metric of its own."""
        return {}

    @property
    def open_breakers(self) -> int:
        """None: nothing is split."""
        return 0
