"""How to sample: the parameters of one request, checked when they are made.

Owns the meaning, the defaults and the limits of every sampling parameter. What depends on the model (its length,
its vocabulary) is checked when the request is submitted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .errors import InvalidRequest
from .structured import StructuredOutputsParams

MAX_N = 128
MAX_STOP_STRINGS = 64
MAX_STOP_STRING_CHARS = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 64
LOGIT_BIAS_LIMIT = 100.0
MIN_REPETITION_PENALTY = 0.01
MAX_REPETITION_PENALTY = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Parameters of one request, with vLLM's names and defaults.

    Order of effects on the logits of a position: ``logit_bias`` and ``min_tokens`` (end tokens masked), repetition,
    frequency and presence penalties, ``structured_outputs``, temperature, ``min_p``, ``top_k``, ``top_p`` (over what
    top-k left). The token is then ``argmax(logits / temperature + gumbel(hash(seed, position, token)))``: it does not
    depend on what else is in the batch, nor on how often the request was interrupted.

    - ``temperature`` 0 is greedy; ``top_p`` 1, ``top_k`` 0 (or -1) and ``min_p`` 0 are off.
    - ``seed``: with a seed a request repeats; without one the engine draws it. Sequence ``i`` of ``n`` uses a seed
      derived from it; sequence 0 uses it as it is.
    - ``presence_penalty`` and ``frequency_penalty`` count output tokens; ``repetition_penalty`` also the prompt's.
    - ``stop``: strings that end the text, not included unless ``include_stop_str_in_output``; ``stop_token_ids``
      likewise, always kept in ``token_ids``. Neither acts before ``min_tokens``.
    - ``max_tokens`` None: as many as the model's length allows.
    - ``structured_outputs``: what the text must look like. The engine lets no other token be drawn, and the answer ends
      when it is complete; ``min_tokens`` gives way to that, and ``ignore_eos`` does not go with it.
    - ``logprobs`` k: the k most likely tokens and the drawn one; ``prompt_logprobs`` the same over the prompt.

    Raises: InvalidRequest, naming the field.
    Source: Gumbel-max sampling (Gumbel 1954; Maddison et al., arXiv 1411.0030, section 2).
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] | list[str] | str | None = ()
    stop_token_ids: tuple[int, ...] | list[int] | None = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_lengths()
        for name in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequest(name, f"must be true or false, got {getattr(self, name)!r}")
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _logit_bias(self.logit_bias))
        object.__setattr__(self, "top_k", max(self.top_k, 0))
        if self.stop and not self.detokenize:
            raise InvalidRequest("stop", "stop strings need detokenize=True; use stop_token_ids instead")
        _check_constraint(self.structured_outputs)
        if self.structured_outputs is not None and self.ignore_eos:
            raise InvalidRequest("ignore_eos", "does not go with structured_outputs, which say when the text ends")

    def _check_ranges(self) -> None:
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        # Logits are divided by it: by next to nothing, they are no numbers any more.
        _number("repetition_penalty", self.repetition_penalty, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _number("min_p", self.min_p, 0.0, 1.0)

    def _check_lengths(self) -> None:
        _integer("n", self.n, 1, MAX_N)
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**64 - 1)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
            if self.min_tokens > self.max_tokens:
                raise InvalidRequest("min_tokens", f"{self.min_tokens} is more than max_tokens={self.max_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, always as a tuple."""
        return self.stop if isinstance(self.stop, tuple) else ()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The stop token ids, always as a tuple."""
        return self.stop_token_ids if isinstance(self.stop_token_ids, tuple) else ()


def _number(name: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    bounds = f"{'more than' if above else 'at least'} {low:g} and at most {high:g}"
    # Comparing refuses NaN and infinity too, and takes integers of any size, which math.isfinite does not.
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not low <= value <= high
        or (above and value == low)
    ):
        raise InvalidRequest(name, f"must be a number of {bounds}, got {value!r}")


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequest(name, f"must be an integer from {low} to {high}, got {value!r}")


def _stop_strings(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, tuple | list) or not all(isinstance(s, str) for s in strings):
        raise InvalidRequest("stop", f"must be a string or a list of strings, got {value!r}")
    if len(strings) > MAX_STOP_STRINGS:
        raise InvalidRequest("stop", f"at most {MAX_STOP_STRINGS} strings, got {len(strings)}")
    for s in strings:
        if not s or len(s) > MAX_STOP_STRING_CHARS:
            raise InvalidRequest("stop", f"each string needs 1 to {MAX_STOP_STRING_CHARS} characters, got {len(s)}")
    return tuple(strings)


def _check_constraint(value: object) -> None:
    if value is not None and not isinstance(value, StructuredOutputsParams):
        raise InvalidRequest("structured_outputs", f"must be StructuredOutputsParams, got {type(value).__name__}")


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, Iterable) or isinstance(value, str | bytes):
        raise InvalidRequest(name, f"must be a list of token ids, got {value!r}")
    ids = tuple(value)
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(name, f"at most {MAX_STOP_TOKEN_IDS} ids, got {len(ids)}")
    for i in ids:
        _integer(name, i, 0, 2**31 - 1)
    return ids


def _logit_bias(value: object) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidRequest("logit_bias", f"must map token ids to numbers, got {value!r}")
    if len(value) > MAX_LOGIT_BIAS:
        raise InvalidRequest("logit_bias", f"at most {MAX_LOGIT_BIAS} entries, got {len(value)}")
    bias: dict[int, float] = {}
    for key, number in value.items():
        # Keys of a JSON object are strings; more digits than this fit no token id.
        token = int(key) if isinstance(key, str) and re.fullmatch(r"[0-9]{1,10}", key) else key
        _integer("logit_bias", token, 0, 2**31 - 1)
        _number("logit_bias", number, -LOGIT_BIAS_LIMIT, LOGIT_BIAS_LIMIT)
        bias[token] = float(number)
    return bias
