"""What config.json says of models whose layers have windows in turns, and whose attention has caps or sinks.

Owns the field names of Gemma 2 and gpt-oss that no other family has, and their defaults, which are those of
transformers.
"""

from __future__ import annotations

from ...kernels.gate import Gate, GateKind
from .config_fields import ConfigFields
from .model_spec import ScoreSpec

GPT_OSS_ROPE: dict[str, object] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""What gpt-oss has where config.json says nothing of rotary positions."""

_SLIDING, _FULL = "sliding_attention", "full_attention"


def alternating_windows(fields: ConfigFields, num_layers: int, default: int) -> tuple[int | None, ...]:
    """Return the window of each layer: as ``layer_types`` says, or without it every other layer's, the first's too."""
    window: int | None = default
    if fields.has("sliding_window"):
        window = fields.integer("sliding_window") if fields.is_set("sliding_window") else None
    kinds = fields.items("layer_types") or tuple(_FULL if layer % 2 else _SLIDING for layer in range(num_layers))
    if len(kinds) != num_layers:
        raise fields.problem("layer_types", f"{num_layers} layers need as many entries, got {len(kinds)}")
    for kind in kinds:
        if kind not in (_SLIDING, _FULL):
            raise fields.problem("layer_types", f"{kind!r} is not supported")
    return tuple(window if kind == _SLIDING else None for kind in kinds)


def gemma2_windows(fields: ConfigFields, num_layers: int) -> tuple[int | None, ...]:
    """Return the window of each layer of Gemma 2."""
    if fields.boolean("use_bidirectional_attention", False):
        raise fields.problem("use_bidirectional_attention", "attention to later tokens is not supported")
    return alternating_windows(fields, num_layers, 4096)


def gpt_oss_windows(fields: ConfigFields, num_layers: int) -> tuple[int | None, ...]:
    """Return the window of each layer of gpt-oss."""
    return alternating_windows(fields, num_layers, 128)


def gemma2_gate(fields: ConfigFields) -> Gate:
    """Return Gemma 2's activation; older files name it twice, and the newer name counts."""
    name = "hidden_activation" if fields.is_set("hidden_activation") else "hidden_act"
    activation = fields.text(name, "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise fields.problem(name, f"{activation!r} is not supported; only 'gelu_pytorch_tanh' is")
    return Gate(kind=GateKind.GELU_TANH)


def gemma2_scores(fields: ConfigFields) -> ScoreSpec:
    """Return how Gemma 2 scores keys."""
    scale = fields.number("query_pre_attn_scalar", 256.0) ** -0.5
    return ScoreSpec(scale=scale, soft_cap=_cap(fields, "attn_logit_softcapping", 50.0))


def gemma2_logit_cap(fields: ConfigFields) -> float | None:
    """Return the soft cap of Gemma 2's logits."""
    return _cap(fields, "final_logit_softcapping", 30.0)


def gpt_oss_gate(fields: ConfigFields) -> Gate:
    """Return the activation of gpt-oss's experts."""
    alpha, limit = fields.number("swiglu_alpha", 1.702), fields.number("swiglu_limit", 7.0)
    return Gate(kind=GateKind.CLAMPED, alpha=alpha, limit=limit)


def _cap(fields: ConfigFields, name: str, default: float) -> float | None:
    """Return a cap; null is none, and a missing one the default."""
    if not fields.has(name):
        return default
    return fields.number(name) if fields.is_set(name) else None
