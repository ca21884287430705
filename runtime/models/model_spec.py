"""What a model is, as far as computing it goes: frozen values without torch.

Owns the vocabulary between the registry (which fills it in from config.json), the weights, the decoder and
the engine. Knows nothing of files and nothing of tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...kernels.gate import SILU, Gate
from ...placement.model_facts import ModelFacts
from ..config import prefix_cache_key

MAX_EXPERTS = 10_000
"""Of a layer; a file that names more is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary positions without scaling, and what all kinds of scaling share."""

    theta: float
    head_dim: int

    @property
    def depends_on_prompt_length(self) -> bool:
        """Say whether the rotation of a position depends on how long the prompt is."""
        return False

    @property
    def prompt_length_threshold(self) -> int | None:
        """Return the longest prompt whose length does not matter; None when it never does."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearRope(RopeSpec):
    """Positions divided by ``factor``."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicRope(RopeSpec):
    """NTK scaling whose base grows with the length once it exceeds ``max_positions`` (see ``rope``)."""

    factor: float
    max_positions: int

    @property
    def depends_on_prompt_length(self) -> bool:
        """Say whether the rotation of a position depends on how long the prompt is: here it does."""
        return True

    @property
    def prompt_length_threshold(self) -> int | None:
        """Return the longest prompt whose length does not matter."""
        return self.max_positions


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Rope(RopeSpec):
    """Llama 3.1: long wavelengths divided by ``factor``, short ones kept, a smooth ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnRope(RopeSpec):
    """YaRN: a ramp over dimensions between interpolation and extrapolation, and scaled cosines and sines."""

    factor: float
    original_max_positions: int
    attention_factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseMlpSpec:
    """A gated MLP: ``down(act(gate(x)) * up(x))``."""

    intermediate_size: int
    gate: Gate = SILU


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpec:
    """How experts are chosen, besides how many: as ``kernels.moe_route.Routing`` has it.

    - ``sigmoid``: each expert has a score of its own, in place of a share of a softmax.
    - ``corrected``: a stored bias is added to scores for the choice alone.
    - ``is_wide``: scores are computed in float32, whatever the model's type.
    """

    sigmoid: bool = False
    corrected: bool = False
    groups: int = 1
    top_groups: int = 1
    sums_two: bool = False
    scaling: float = 1.0
    is_wide: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeSpec:
    """A mixture of gated MLPs; each token goes to its ``top_k`` most likely experts, and to ``shared``.

    ``has_biases``: of the router, and of both products of an expert.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    normalize_top_k: bool
    gate: Gate = SILU
    has_biases: bool = False
    router: RouterSpec = RouterSpec()
    shared: DenseMlpSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSpec:
    """Attention to a latent, of which the keys and values of all heads are linear functions.

    - ``query_rank``: the size of a latent that queries are made of; None: they are made of the hidden state.
    - ``kv_rank``: the size of the latent that is cached, and beside it the rotated part of keys, ``rotary_dim``.
    - ``plain_dim``: of a query and a key, what is not rotated; ``value_dim``: of a value.
    - ``scale``: of scores. ``interleaved``: pairs that are rotated stand side by side, not half a head apart.

    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1
    """

    query_rank: int | None
    kv_rank: int
    plain_dim: int
    rotary_dim: int
    value_dim: int
    scale: float
    interleaved: bool
    norm_epsilon: float = 1e-6

    @property
    def width(self) -> int:
        """The numbers of a position in the cache of a layer."""
        return self.kv_rank + self.rotary_dim

    @property
    def query_dim(self) -> int:
        """The numbers of a head's query."""
        return self.plain_dim + self.rotary_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One layer: token i sees token j when 0 <= i - j < ``window``; None sees all before it.

    ``ladder``: attention and MLP read the residual without what the module before them adds, so that its sum over
    ranks may be on the wire while they compute.
    """

    window: int | None
    mlp: DenseMlpSpec | MoeSpec
    ladder: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NormSpec:
    """The norms of hidden states. ``is_wide``: weights are float32, and multiplied before anything is rounded.

    ``added``: to each weight as it is stored. ``behind``: outputs of attentions and MLPs have norms too, before they
    are added to the residual.
    """

    is_wide: bool = False
    added: float = 0.0
    behind: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSpec:
    """The scores of attention. ``scale``: what they are multiplied by, None for one over the root of the head size.

    ``soft_cap``: they become ``soft_cap * tanh(score / soft_cap)``. ``has_sinks``: each query head has a score more,
    without a value.
    """

    scale: float | None = None
    soft_cap: float | None = None
    has_sinks: bool = False


PLAIN_NORMS, PLAIN_SCORES = NormSpec(), ScoreSpec()


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAs:
    """How a checkpoint has the weights of linear layers that it has quantized: "awq", "gptq",
    "fp8", or "mxfp4", which is of experts alone.

    - ``group``: inputs that share a scale; None is all of them. ``block_outputs``: outputs that do, of float8 numbers.
    - ``zeros_less_one``: zero points are stored one too low.
    """

    method: str
    group: int | None = None
    block_outputs: int | None = None
    zeros_less_one: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One model, complete: two equal specs compute the same function of their weights.

    ``dtype`` is the name the checkpoint gives ("float32", "bfloat16", "float16"), None when it gives none.
    ``stored_as`` says how linear layers are stored, None plainly. ``ladder_follows``: of a stage that is not the last,
    whether the next one begins with a ladder layer. ``embedding_scale``: what embeddings are multiplied by.
    ``logit_soft_cap``: as that of attention, of the logits. With ``latent``, attention has one KV head, as large as
    what is cached of a position, whatever the number of query heads.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: RopeSpec
    layers: tuple[LayerSpec, ...]
    max_position_embeddings: int
    dtype: str | None
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    ladder_follows: bool = False
    stored_as: StoredAs | None = None
    norms: NormSpec = PLAIN_NORMS
    scores: ScoreSpec = PLAIN_SCORES
    embedding_scale: float = 1.0
    logit_soft_cap: float | None = None
    latent: LatentSpec | None = None

    @property
    def score_scale(self) -> float:
        """Return what products of queries and keys are multiplied by."""
        return self.head_dim**-0.5 if self.scores.scale is None else self.scores.scale

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Return the distinct windows of the layers, in order of first use."""
        return tuple(dict.fromkeys(layer.window for layer in self.layers))

    @property
    def max_model_len(self) -> int:
        """Return the longest sequence the model is made for, scaled positions included."""
        if isinstance(self.rope, DynamicRope):
            return int(self.rope.max_positions * self.rope.factor)
        return self.max_position_embeddings

    def prefix_cache_key(self, prompt_length: int) -> str | None:
        """Return what a cached block's keys depend on besides its tokens, None when on nothing."""
        return prefix_cache_key(prompt_length, self.rope.prompt_length_threshold)

    def facts(self) -> ModelFacts:
        """Return the sizes that placement works with."""
        attention = self._attention_parameters()
        total = active = 0
        for layer in self.layers:
            norms = (4 if self.norms.behind else 2) * self.hidden_size
            total += attention + norms + _mlp_parameters(self, layer.mlp, active=False)
            active += attention + norms + _mlp_parameters(self, layer.mlp, active=True)
        table = self.vocab_size * self.hidden_size
        total += self.hidden_size + table * (1 if self.tie_word_embeddings else 2)
        active += self.hidden_size + table
        return ModelFacts(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            parameters=total,
            active_parameters=active,
            windows=tuple(layer.window for layer in self.layers),
            cached_numbers=None if self.latent is None else self.latent.width,
        )

    def _attention_parameters(self) -> int:
        if self.latent is not None:
            return self._latent_parameters(self.latent)
        q_size = self.num_heads * self.head_dim
        qkv_size = q_size + 2 * self.num_kv_heads * self.head_dim
        biases = qkv_size * self.qkv_bias + self.hidden_size * self.o_bias
        sinks = self.num_heads * self.scores.has_sinks
        return self.hidden_size * (qkv_size + q_size) + biases + sinks + 2 * self.head_dim * self.qk_norm

    def _latent_parameters(self, latent: LatentSpec) -> int:
        q_size, out_size = self.num_heads * latent.query_dim, self.num_heads * latent.value_dim
        queries = self.hidden_size * q_size
        down = latent.width
        if latent.query_rank is not None:
            queries = latent.query_rank * (q_size + 1)
            down += latent.query_rank
        up = latent.kv_rank * (self.num_heads * (latent.plain_dim + latent.value_dim) + 1)
        biases = down * self.qkv_bias + self.hidden_size * self.o_bias
        return queries + self.hidden_size * (down + out_size) + up + biases


def _mlp_parameters(spec: ModelSpec, mlp: DenseMlpSpec | MoeSpec, *, active: bool) -> int:
    """Count an MLP's numbers; the bias of a choice is none of its weights."""
    size = mlp.intermediate_size
    one = 3 * spec.hidden_size * size
    if isinstance(mlp, DenseMlpSpec):
        return one + (2 * size + spec.hidden_size) * spec.mlp_bias
    experts = mlp.top_k if active else mlp.num_experts
    one += (2 * size + spec.hidden_size) * mlp.has_biases
    shared = 0 if mlp.shared is None else _mlp_parameters(spec, mlp.shared, active=active)
    return one * experts + (spec.hidden_size + mlp.has_biases) * mlp.num_experts + shared
