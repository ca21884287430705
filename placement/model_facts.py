"""What placement needs to know about a model, as plain numbers.

Owns the arithmetic from sizes to bytes. Must not know where the numbers come from: the model registry fills
them in, tests and the simulator make them up.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """The size of one model.

    ``parameters`` counts every stored number once (tied embeddings once); ``active_parameters`` those that
    one token is multiplied with, so without the embedding table and without the experts it is not sent to.
    ``windows`` says for each layer how many positions its attention sees, None for all. ``cached_numbers``: of a
    position in the cache of a layer; None is keys and values of all KV heads.
    """

    num_layers: int
    hidden_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    parameters: int
    active_parameters: int
    windows: tuple[int | None, ...]
    cached_numbers: int | None = None

    def __post_init__(self) -> None:
        sizes = (
            self.num_layers,
            self.hidden_size,
            self.vocab_size,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.parameters,
            self.active_parameters,
        )
        if min(sizes) < 1:
            raise ValueError(f"model facts must be positive, got {self}")
        if len(self.windows) != self.num_layers:
            raise ValueError(f"{self.num_layers} layers need as many windows, got {len(self.windows)}")

    def attention_ratio(self) -> float:
        """Return attention's multiplications per token and position of context, over the token's others.

        A layer with a window counts with the window: what it adds no longer grows after a few tokens.
        """
        per_position = 2 * self.num_heads * self.head_dim
        windowed = sum(window for window in self.windows if window is not None)
        growing = sum(window is None for window in self.windows)
        # The head is computed for the tokens that are drawn, few of a chunk's.
        linear = max(1, self.active_parameters - self.vocab_size * self.hidden_size)
        return per_position * growing / (linear + per_position * windowed)

    def weight_bytes(self, dtype_bytes: int) -> int:
        """Return the bytes of all weights at ``dtype_bytes`` each."""
        return self.parameters * dtype_bytes

    def step_read_bytes(self, dtype_bytes: int) -> int:
        """Return the bytes of weights that a step with a single token has to read."""
        return self.active_parameters * dtype_bytes

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Return the bytes of keys and values that one token position takes, over all layers."""
        numbers = self.cached_numbers or 2 * self.num_kv_heads * self.head_dim
        return self.num_layers * numbers * dtype_bytes
