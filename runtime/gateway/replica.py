"""The engine behind a gateway: which incarnation of it serves now, if any.

Owns what is worked out from an engine's facts: how prompts become its requests. It must not know HTTP, nor how the
engine's process is started.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...sdk.errors import EngineUnavailable
from ..models.generation_defaults import GenerationDefaults
from ..prompts import RequestFactory
from ..rpc.engine_client import EngineClient, EngineFacts, EngineLoadReport
from ..text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One incarnation of the engine, with what a request needs to know about its model.

    ``max_prompt_chars``: longer text has more tokens than the model takes, whatever it says.
    """

    client: EngineClient
    facts: EngineFacts
    tokenizer: Tokenizer
    factory: RequestFactory
    max_prompt_chars: int


class Replica:
    """Holds the engine that serves now; it comes and goes as the engine's process does."""

    def __init__(self, *, tokenizer: Tokenizer, defaults: GenerationDefaults, seed: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.defaults = defaults
        self._seed = seed
        # Text cannot be tokenized into fewer tokens than this allows: what is far too long is refused without trying.
        self._longest_token_chars = max(len(tokenizer.id_to_token(id) or "") for id in range(tokenizer.vocab_size))
        self._model: ServedModel | None = None

    @property
    def attached(self) -> bool:
        """Whether an engine is there."""
        return self._model is not None

    def current(self) -> ServedModel:
        """Return the engine that serves now.

        Raises: EngineUnavailable (retryable) while there is none
        """
        if self._model is None:
            raise EngineUnavailable("the engine is not running: it is starting, or starting again after a failure")
        return self._model

    def attach(self, client: EngineClient, facts: EngineFacts) -> None:
        """Serve with an engine that has been met."""
        factory = RequestFactory(
            tokenizer=self.tokenizer,
            vocab_size=facts.vocab_size,
            max_model_len=facts.max_model_len,
            eos_token_ids=facts.eos_token_ids,
            seed=self._seed,
        )
        self._model = ServedModel(
            client=client,
            facts=facts,
            tokenizer=self.tokenizer,
            factory=factory,
            max_prompt_chars=facts.max_model_len * self._longest_token_chars,
        )

    def detach(self) -> None:
        """Stop serving: the engine is lost."""
        self._model = None

    def load(self) -> EngineLoadReport | None:
        """Return the engine's newest load report, None without one."""
        return None if self._model is None else self._model.client.load()
