"""What a gateway is set up with: limits, names, keys. One frozen object, checked once.

Every bound on what a client may cost is here, and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from ...sdk.errors import ConfigError
from ..config import require_positive

TOOL_CALL_PARSERS = ("auto", "none", "hermes", "llama3_json", "mistral")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """Bounds on what clients may ask for; what is over them is refused by name.

    - ``max_concurrent_requests``: prompts on their way at once, over all clients; one more gets 429.
    - ``max_waiting_requests``: that wait for their turn when there is no room, each API key in its own queue; 0: none.
    - ``max_prompts``: prompts in one completion request. ``max_sequences``: its prompts times ``n``.
    - ``request_timeout_s``: from arrival to last byte; ``body_timeout_s``: until the body has come;
      ``headers_timeout_s``: until a connection's next headers have come, of ``max_headers_bytes`` at most;
      ``turn_timeout_s``: for its turn.

    Raises: ConfigError, naming the option.
    """

    max_concurrent_requests: int = 2048
    max_waiting_requests: int = 256
    max_headers_bytes: int = 64 << 10
    max_body_bytes: int = 8 << 20
    max_prompts: int = 1024
    max_sequences: int = 1024
    max_messages: int = 4096
    max_tools: int = 128
    request_timeout_s: float = 600.0
    headers_timeout_s: float = 30.0
    body_timeout_s: float = 30.0
    turn_timeout_s: float = 10.0

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name.endswith("_s"):
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                    raise ConfigError(each.name, f"must be a number of seconds above 0, got {value!r}")
            elif each.name != "max_waiting_requests" or value != 0:
                require_positive(each.name, value)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """How one gateway serves one model.

    ``served_model_names``: what clients may call the model; answers carry the first. ``api_keys`` empty: no key is
    needed. ``ready_cache_s``: for how long one proof of readiness holds.

    Raises: ConfigError, naming the option.
    """

    served_model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    limits: RequestLimits = field(default_factory=RequestLimits)
    tool_call_parser: str = "auto"
    ready_cache_s: float = 1.0
    ready_timeout_s: float = 10.0

    def __post_init__(self) -> None:
        if not self.served_model_names or not all(self.served_model_names):
            raise ConfigError("served_model_name", "must name the model")
        if self.tool_call_parser not in TOOL_CALL_PARSERS:
            known = ", ".join(TOOL_CALL_PARSERS)
            raise ConfigError("tool_call_parser", f"must be one of {known}, got {self.tool_call_parser!r}")

    @property
    def model_name(self) -> str:
        """The name that answers carry."""
        return self.served_model_names[0]
