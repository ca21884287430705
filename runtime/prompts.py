"""From what a caller hands in (text, token ids, chat messages) to a request that the engine takes.

Owns the checks that need the model: its vocabulary and its length. Raises InvalidRequest, naming the field.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Required, TypedDict

import numpy as np

from ..sdk.errors import InvalidRequest
from ..sdk.params import SamplingParams
from .messages import EngineRequest, Int32Array
from .text.tokenizer import Tokenizer


class TokensPrompt(TypedDict, total=False):
    """A prompt as token ids; ``prompt`` is its text, where the caller has it."""

    prompt_token_ids: Required[list[int]]
    prompt: str
    cache_salt: str


Prompt = str | Sequence[int] | Mapping[str, object]
"""Text; token ids; or a dictionary with ``prompt`` or ``prompt_token_ids`` and, to keep its cached prefix apart from
others', ``cache_salt``."""
_PROMPT_KEYS = frozenset({"prompt", "prompt_token_ids", "cache_salt"})


def is_token_list(value: object) -> bool:
    """Return whether a value is one prompt as a plain list of token ids."""
    if isinstance(value, np.ndarray):
        return value.ndim == 1
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], int)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedPrompt:
    """A prompt ready for the engine.

    Shapes: token_ids [prompt tokens] int32
    """

    text: str | None
    token_ids: Int32Array
    cache_salt: str | None


class Seeds:
    """Where requests without a seed of their own get theirs from; shared by all factories that serve the same callers.

    ``seed`` None draws each from the system's randomness; otherwise they repeat from run to run, in the same order.
    """

    def __init__(self, seed: int | None) -> None:
        self._seed = seed
        self._drawn = 0

    def draw(self) -> int:
        """Return the next seed."""
        if self._seed is None:
            return secrets.randbits(64)
        self._drawn += 1
        digest = hashlib.sha256(f"{self._seed}/{self._drawn}".encode()).digest()
        return int.from_bytes(digest[:8], "little")


class RequestFactory:
    """Makes engine requests for one model."""

    def __init__(
        self,
        *,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        max_model_len: int,
        eos_token_ids: tuple[int, ...],
        seeds: Seeds,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._eos_token_ids = eos_token_ids
        self._seeds = seeds

    def prepare(self, prompt: object) -> PreparedPrompt:
        """Turn a caller's prompt into token ids."""
        if isinstance(prompt, str):
            return self._from_text(prompt, None)
        if is_token_list(prompt):
            return PreparedPrompt(text=None, token_ids=self._checked_ids(prompt), cache_salt=None)
        if not isinstance(prompt, Mapping):
            raise InvalidRequest("prompt", f"must be text, token ids or a dictionary, got {type(prompt).__name__}")
        unknown = sorted(str(key) for key in prompt if key not in _PROMPT_KEYS)
        if unknown:
            raise InvalidRequest("prompt", f"has unknown keys {unknown}; known are {sorted(_PROMPT_KEYS)}")
        salt, text = prompt.get("cache_salt"), prompt.get("prompt")
        if salt is not None and (not isinstance(salt, str) or not salt):
            raise InvalidRequest("cache_salt", f"must be a non-empty string, got {salt!r}")
        if text is not None and not isinstance(text, str):
            raise InvalidRequest("prompt", f"must be text, got {type(text).__name__}")
        if "prompt_token_ids" in prompt:
            ids = self._checked_ids(prompt["prompt_token_ids"])
            return PreparedPrompt(text=text, token_ids=ids, cache_salt=salt)
        if text is None:
            raise InvalidRequest("prompt", "a dictionary needs the key 'prompt' or 'prompt_token_ids'")
        return self._from_text(text, salt)

    def _from_text(self, text: str, salt: str | None) -> PreparedPrompt:
        if self._tokenizer is None:
            raise InvalidRequest("prompt", "is text, but there is no tokenizer (skip_tokenizer_init): give token ids")
        return PreparedPrompt(text=text, token_ids=self._checked_ids(self._tokenizer.encode(text)), cache_salt=salt)

    def _checked_ids(self, ids: object) -> Int32Array:
        if not isinstance(ids, Sequence | np.ndarray) or isinstance(ids, str | bytes):
            raise InvalidRequest("prompt_token_ids", f"must be a list of token ids, got {type(ids).__name__}")
        values = list(ids)
        for place, token in enumerate(values):
            if isinstance(token, bool) or not isinstance(token, int | np.integer):
                raise InvalidRequest("prompt_token_ids", f"entry {place} must be an integer, got {token!r}")
            if not 0 <= token < self._vocab_size:
                raise InvalidRequest(
                    "prompt_token_ids", f"entry {place} is {token}, outside the vocabulary of {self._vocab_size}"
                )
        if not values:
            raise InvalidRequest("prompt", "holds no tokens")
        if len(values) >= self._max_model_len:
            raise InvalidRequest(
                "prompt",
                f"{len(values)} tokens leave no room for an answer within max_model_len={self._max_model_len}",
            )
        return np.array(values, dtype=np.int32)

    def make(
        self,
        request_id: str,
        prompt: PreparedPrompt,
        params: SamplingParams,
        *,
        arrival_time_s: float,
        priority: int = 0,
    ) -> EngineRequest:
        """Make the request: resolve seed, stop ids and length against the model."""
        if not isinstance(params, SamplingParams):
            raise InvalidRequest("sampling_params", f"must be SamplingParams, got {type(params).__name__}")
        for field, ids in (("stop_token_ids", params.stop_ids), ("logit_bias", tuple(params.logit_bias))):
            outside = [token for token in ids if token >= self._vocab_size]
            if outside:
                raise InvalidRequest(field, f"token {outside[0]} is outside the vocabulary of {self._vocab_size}")
        if params.stop_strings and self._tokenizer is None:
            raise InvalidRequest("stop", "stop strings need a tokenizer, and skip_tokenizer_init left it out")
        room = self._max_model_len - len(prompt.token_ids)
        eos = () if params.ignore_eos else self._eos_token_ids
        return EngineRequest(
            request_id=request_id,
            prompt_token_ids=prompt.token_ids,
            params=params,
            seed=self._seeds.draw() if params.seed is None else params.seed % 2**64,
            stop_ids=tuple(dict.fromkeys((*params.stop_ids, *eos))),
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            arrival_time_s=arrival_time_s,
            priority=priority,
            cache_salt=prompt.cache_salt,
        )
