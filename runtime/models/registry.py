"""From a Hugging Face directory's config.json to a ``ModelSpec``: one small description per architecture.

Owns what each family leaves unsaid in its config.json (the defaults are those of transformers) and what it
never says at all (biases, norms, where experts are). Refuses by name what the decoder does not compute,
rather than computing something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path

from ...kernels.gate import SILU, Gate
from .alternating import (
    GPT_OSS_ROPE,
    gemma2_gate,
    gemma2_logit_cap,
    gemma2_scores,
    gemma2_windows,
    gpt_oss_gate,
    gpt_oss_windows,
)
from .config_fields import ConfigFields, read_json
from .deepseek_config import v2_latent, v2_mlps, v3_latent, v3_mlps
from .model_spec import (
    MAX_EXPERTS,
    PLAIN_NORMS,
    DenseMlpSpec,
    LatentSpec,
    LayerSpec,
    ModelSpec,
    MoeSpec,
    NormSpec,
    ScoreSpec,
)
from .rope_config import read_rope
from .stored_config import read_stored_as

MAX_LAYERS = 10_000
DTYPES = ("float32", "bfloat16", "float16")


def _plain_scores(_: ConfigFields) -> ScoreSpec:
    return ScoreSpec()


def _no_cap(_: ConfigFields) -> float | None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What sets one architecture apart: defaults for absent keys, and functions of the others.

    ``kv_heads`` None means as many as query heads; ``head_dim`` None means hidden_size over heads. ``rope`` is what
    holds where config.json says nothing of rotary positions, None for plain ones; ``dtype`` where it names none.
    ``scales_embeddings``: by the root of the hidden size. With ``latent`` neither heads nor their size count.
    """

    kv_heads: int | None
    head_dim: int | None = None
    max_positions: int
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    qkv_bias: Callable[[ConfigFields], bool]
    o_bias: Callable[[ConfigFields], bool]
    mlp_bias: Callable[[ConfigFields], bool]
    qk_norm: bool = False
    tied: bool = False
    rope: Mapping[str, object] | None = None
    dtype: str | None = None
    norms: NormSpec = PLAIN_NORMS
    scales_embeddings: bool = False
    scores: Callable[[ConfigFields], ScoreSpec] = _plain_scores
    logit_soft_cap: Callable[[ConfigFields], float | None] = _no_cap
    windows: Callable[[ConfigFields, int], tuple[int | None, ...]]
    mlps: Callable[[ConfigFields, int], tuple[DenseMlpSpec | MoeSpec, ...]]
    latent: Callable[[ConfigFields], LatentSpec] | None = None


def read_model_spec(path: str | Path) -> ModelSpec:
    """Read and check config.json in the directory ``path``.

    Raises: CheckpointError naming the file and the field.
    """
    directory = Path(path)
    fields = read_json(directory / "config.json")
    names = fields.items("architectures")
    known = ", ".join(FAMILIES)
    if not names or not isinstance(names[0], str):
        raise fields.problem("architectures", f"names no architecture; known are {known}")
    family = FAMILIES.get(names[0])
    if family is None:
        raise fields.problem("architectures", f"{names[0]!r} is not supported; known are {known}")
    return _describe(names[0], family, fields)


def _describe(architecture: str, family: Family, fields: ConfigFields) -> ModelSpec:
    num_layers = fields.integer("num_hidden_layers")
    if num_layers > MAX_LAYERS:
        raise fields.problem("num_hidden_layers", f"{num_layers} is more than the {MAX_LAYERS} we allow")
    num_heads, hidden_size = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    latent = None if family.latent is None else family.latent(fields)
    if latent is None:
        num_kv_heads, head_dim = _kv_heads(family, fields, num_heads), _head_dim(family, fields, num_heads)
        rotary_dim = head_dim
    else:
        num_kv_heads, head_dim, rotary_dim = 1, latent.width, latent.rotary_dim
    max_positions = fields.integer("max_position_embeddings", family.max_positions)
    windows, mlps = family.windows(fields, num_layers), family.mlps(fields, num_layers)
    ladders = _ladder_layers(architecture, fields, num_layers)
    bos_token_ids = fields.token_ids("bos_token_id", family.bos_token_id)
    return ModelSpec(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", family.rms_norm_eps),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", family.tied),
        qkv_bias=family.qkv_bias(fields),
        o_bias=family.o_bias(fields),
        mlp_bias=family.mlp_bias(fields),
        qk_norm=family.qk_norm,
        rope=read_rope(
            fields,
            head_dim=rotary_dim,
            max_positions=max_positions,
            default_theta=family.rope_theta,
            default_table=family.rope,
        ),
        layers=tuple(
            LayerSpec(window=window, mlp=mlp, ladder=layer in ladders)
            for layer, (window, mlp) in enumerate(zip(windows, mlps, strict=True))
        ),
        max_position_embeddings=max_positions,
        dtype=_dtype(fields) or family.dtype,
        eos_token_ids=fields.token_ids("eos_token_id", family.eos_token_id),
        bos_token_id=bos_token_ids[0] if bos_token_ids else None,
        stored_as=read_stored_as(fields),
        norms=family.norms,
        scores=family.scores(fields),
        embedding_scale=sqrt(hidden_size) if family.scales_embeddings else 1.0,
        logit_soft_cap=family.logit_soft_cap(fields),
        latent=latent,
    )


def _silu(fields: ConfigFields) -> Gate:
    activation = fields.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise fields.problem("hidden_act", f"{activation!r} is not supported; only 'silu' is")
    return SILU


def _dtype(fields: ConfigFields) -> str | None:
    for name in ("dtype", "torch_dtype"):
        if fields.is_set(name):
            dtype = fields.text(name).removeprefix("torch.")
            if dtype not in DTYPES:
                raise fields.problem(name, f"{dtype!r} is not supported; known are {', '.join(DTYPES)}")
            return dtype
    return None


def _kv_heads(family: Family, fields: ConfigFields, num_heads: int) -> int:
    absent = family.kv_heads if not fields.has("num_key_value_heads") else None
    num_kv_heads = fields.integer("num_key_value_heads", absent or num_heads)
    if num_heads % num_kv_heads:
        raise fields.problem("num_key_value_heads", f"{num_heads} heads cannot be shared by {num_kv_heads} KV heads")
    return num_kv_heads


def _head_dim(family: Family, fields: ConfigFields, num_heads: int) -> int:
    if fields.is_set("head_dim"):
        return fields.integer("head_dim")
    if family.head_dim is not None:
        return family.head_dim
    hidden_size = fields.integer("hidden_size")
    if hidden_size % num_heads:
        raise fields.problem("hidden_size", f"{hidden_size} is not a multiple of {num_heads} heads")
    return hidden_size // num_heads


def _ladder_layers(architecture: str, fields: ConfigFields, num_layers: int) -> frozenset[int]:
    """Return the layers with a ladder residual: a list of them, or how many of the last ones.

    Source: Ladder-residual (arXiv 2501.06589), and its authors' configuration class
    """
    if not fields.is_set("ladder_layers"):
        if architecture == _LADDER:
            raise fields.problem("ladder_layers", "is missing; it is a list of layers, or a number of the last ones")
        return frozenset()
    given = fields.values["ladder_layers"]
    if not isinstance(given, list):
        count = fields.integer("ladder_layers", minimum=0)
        if count > num_layers:
            raise fields.problem("ladder_layers", f"{count} is more than the {num_layers} layers there are")
        return frozenset(range(num_layers - count, num_layers))
    for layer in given:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < num_layers:
            raise fields.problem("ladder_layers", f"must name layers from 0 to {num_layers - 1}, got {layer!r}")
    return frozenset(given)


def _never(_: ConfigFields) -> bool:
    return False


def _always(_: ConfigFields) -> bool:
    return True


def _attention_bias(fields: ConfigFields) -> bool:
    return fields.boolean("attention_bias", False)


def _gpt_oss_bias(fields: ConfigFields) -> bool:
    return fields.boolean("attention_bias", True)


def _sinks(_: ConfigFields) -> ScoreSpec:
    return ScoreSpec(has_sinks=True)


def _llama_mlp_bias(fields: ConfigFields) -> bool:
    return fields.boolean("mlp_bias", False)


def _no_windows(fields: ConfigFields, num_layers: int) -> tuple[int | None, ...]:
    return _checked_layer_types(fields, (None,) * num_layers)


def _mistral_windows(fields: ConfigFields, num_layers: int) -> tuple[int | None, ...]:
    absent = not fields.has("sliding_window")
    return _checked_layer_types(fields, (4096 if absent else _window(fields),) * num_layers)


def _mixtral_windows(fields: ConfigFields, num_layers: int) -> tuple[int | None, ...]:
    return _checked_layer_types(fields, (_window(fields),) * num_layers)


def _qwen_window(fields: ConfigFields) -> int | None:
    if not fields.boolean("use_sliding_window", False):
        return None
    return _window(fields) if fields.has("sliding_window") else 4096


def _qwen_windows(fields: ConfigFields, num_layers: int) -> tuple[int | None, ...]:
    window = _qwen_window(fields)
    if not fields.is_set("layer_types"):
        full_layers = fields.integer("max_window_layers", 28, minimum=0)
        return tuple(window if layer >= full_layers else None for layer in range(num_layers))
    kinds = fields.items("layer_types")
    if len(kinds) != num_layers:
        raise fields.problem("layer_types", f"{num_layers} layers need as many entries, got {len(kinds)}")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise fields.problem("layer_types", f"{kind!r} is not supported")
        if kind == "sliding_attention" and window is None:
            raise fields.problem("layer_types", "has sliding layers, but use_sliding_window or sliding_window is off")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _qwen3_moe_windows(fields: ConfigFields, num_layers: int) -> tuple[int | None, ...]:
    return _checked_layer_types(fields, (_qwen_window(fields),) * num_layers)


def _window(fields: ConfigFields) -> int | None:
    return fields.integer("sliding_window") if fields.is_set("sliding_window") else None


def _checked_layer_types(fields: ConfigFields, windows: tuple[int | None, ...]) -> tuple[int | None, ...]:
    # These families give all layers the same window; a layer_types that says otherwise means another
    # architecture.
    kinds = fields.items("layer_types")
    expected = tuple("full_attention" if window is None else "sliding_attention" for window in windows)
    if kinds and kinds != expected:
        raise fields.problem("layer_types", f"this architecture needs {list(expected)}, got {list(kinds)}")
    return windows


def _dense(fields: ConfigFields, gate: Gate) -> DenseMlpSpec:
    return DenseMlpSpec(intermediate_size=fields.integer("intermediate_size"), gate=gate)


def _dense_mlps(fields: ConfigFields, num_layers: int) -> tuple[DenseMlpSpec | MoeSpec, ...]:
    return (_dense(fields, _silu(fields)),) * num_layers


def _gemma2_mlps(fields: ConfigFields, num_layers: int) -> tuple[DenseMlpSpec | MoeSpec, ...]:
    return (_dense(fields, gemma2_gate(fields)),) * num_layers


def _gpt_oss_mlps(fields: ConfigFields, num_layers: int) -> tuple[DenseMlpSpec | MoeSpec, ...]:
    _silu(fields)
    size, experts = fields.integer("intermediate_size"), fields.integer("num_local_experts", 128)
    # A softmax over the chosen is one over all, normalized again.
    plain = _moe(fields, experts=experts, top_k=4, size=size, normalize=True)
    return (replace(plain, gate=gpt_oss_gate(fields), has_biases=True),) * num_layers


def _mixtral_mlps(fields: ConfigFields, num_layers: int) -> tuple[DenseMlpSpec | MoeSpec, ...]:
    size = fields.integer("intermediate_size")
    _silu(fields)
    return (
        _moe(fields, experts=fields.integer("num_local_experts", 8), top_k=2, size=size, normalize=True),
    ) * num_layers


def _qwen3_moe_mlps(fields: ConfigFields, num_layers: int) -> tuple[DenseMlpSpec | MoeSpec, ...]:
    # transformers maps both names to one field; files of either age have one of them.
    experts = fields.integer("num_experts", fields.integer("num_local_experts", 128, minimum=0), minimum=0)
    step, gate = fields.integer("decoder_sparse_step", 1), _silu(fields)
    dense_layers = fields.items("mlp_only_layers")
    normalize = fields.boolean("norm_topk_prob", False)
    mlps: list[DenseMlpSpec | MoeSpec] = []
    for layer in range(num_layers):
        if layer in dense_layers or experts == 0 or (layer + 1) % step:
            mlps.append(_dense(fields, gate))
        else:
            size = fields.integer("moe_intermediate_size")
            mlps.append(_moe(fields, experts=experts, top_k=8, size=size, normalize=normalize))
    return tuple(mlps)


def _moe(fields: ConfigFields, *, experts: int, top_k: int, size: int, normalize: bool) -> MoeSpec:
    top_k = fields.integer("num_experts_per_tok", top_k)
    if experts > MAX_EXPERTS:
        raise fields.problem("num_experts", f"{experts} is more than the {MAX_EXPERTS} we allow")
    if top_k > experts:
        raise fields.problem("num_experts_per_tok", f"{top_k} is more than the {experts} experts there are")
    return MoeSpec(num_experts=experts, top_k=top_k, intermediate_size=size, normalize_top_k=normalize)


_LADDER = "LlamaLadderForCausalLM"
_LLAMA = Family(
    kv_heads=None,
    max_positions=2048,
    bos_token_id=1,
    eos_token_id=2,
    qkv_bias=_attention_bias,
    o_bias=_attention_bias,
    mlp_bias=_llama_mlp_bias,
    windows=_no_windows,
    mlps=_dense_mlps,
)

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": _LLAMA,
    _LADDER: _LLAMA,
    "MistralForCausalLM": Family(
        kv_heads=8,
        max_positions=131_072,
        bos_token_id=1,
        eos_token_id=2,
        qkv_bias=_never,
        o_bias=_never,
        mlp_bias=_never,
        windows=_mistral_windows,
        mlps=_dense_mlps,
    ),
    "Qwen2ForCausalLM": Family(
        kv_heads=32,
        max_positions=32_768,
        qkv_bias=_always,
        o_bias=_never,
        mlp_bias=_never,
        windows=_qwen_windows,
        mlps=_dense_mlps,
    ),
    "Qwen3ForCausalLM": Family(
        kv_heads=32,
        head_dim=128,
        max_positions=32_768,
        qkv_bias=_attention_bias,
        o_bias=_attention_bias,
        mlp_bias=_never,
        qk_norm=True,
        windows=_qwen_windows,
        mlps=_dense_mlps,
    ),
    "MixtralForCausalLM": Family(
        kv_heads=8,
        max_positions=131_072,
        rope_theta=1_000_000.0,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        qkv_bias=_never,
        o_bias=_never,
        mlp_bias=_never,
        windows=_mixtral_windows,
        mlps=_mixtral_mlps,
    ),
    "DeepseekV2ForCausalLM": Family(
        kv_heads=None,
        max_positions=2048,
        bos_token_id=1,
        eos_token_id=2,
        qkv_bias=_attention_bias,
        o_bias=_attention_bias,
        mlp_bias=_llama_mlp_bias,
        windows=_no_windows,
        mlps=v2_mlps,
        latent=v2_latent,
    ),
    "DeepseekV3ForCausalLM": Family(
        kv_heads=None,
        max_positions=4096,
        bos_token_id=0,
        eos_token_id=1,
        qkv_bias=_attention_bias,
        o_bias=_attention_bias,
        mlp_bias=_never,
        windows=_no_windows,
        mlps=v3_mlps,
        latent=v3_latent,
    ),
    "Qwen3MoeForCausalLM": Family(
        kv_heads=4,
        max_positions=32_768,
        qkv_bias=_attention_bias,
        o_bias=_attention_bias,
        mlp_bias=_never,
        qk_norm=True,
        windows=_qwen3_moe_windows,
        mlps=_qwen3_moe_mlps,
    ),
    "Gemma2ForCausalLM": Family(
        kv_heads=4,
        head_dim=256,
        max_positions=8192,
        bos_token_id=2,
        eos_token_id=1,
        qkv_bias=_attention_bias,
        o_bias=_attention_bias,
        mlp_bias=_never,
        tied=True,
        norms=NormSpec(is_wide=True, added=1.0, behind=True),
        scales_embeddings=True,
        scores=gemma2_scores,
        logit_soft_cap=gemma2_logit_cap,
        windows=gemma2_windows,
        mlps=_gemma2_mlps,
    ),
    "GptOssForCausalLM": Family(
        kv_heads=8,
        head_dim=64,
        max_positions=131_072,
        rope_theta=150_000.0,
        rms_norm_eps=1e-5,
        qkv_bias=_gpt_oss_bias,
        o_bias=_gpt_oss_bias,
        mlp_bias=_never,
        rope=GPT_OSS_ROPE,
        dtype="bfloat16",
        norms=NormSpec(is_wide=True),
        scores=_sinks,
        windows=gpt_oss_windows,
        mlps=_gpt_oss_mlps,
    ),
}
