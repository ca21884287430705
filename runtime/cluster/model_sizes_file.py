"""From a model's config.json to the sizes that planning needs, also for models that we do not run.

Owns the field names of the families. What a family leaves unsaid is taken as transformers does where the registry
knows it; a model outside the registry has to say its sizes itself.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ...placement.model_sizes import (
    Attention,
    DenseMlp,
    ExpertMlp,
    GroupedAttention,
    LatentAttention,
    Layer,
    ModelSizes,
)
from ..models.config_fields import ConfigFields, read_json
from ..models.model_spec import MAX_EXPERTS, ModelSpec, MoeSpec
from ..models.registry import FAMILIES, MAX_LAYERS, read_model_spec

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_QUANTIZED = {"int8": ("int8", 1.0), "int4": ("bfloat16", 0.5625), "fp8": ("float8", 1.0)}
"""Option → what is multiplied in, and bytes a number; groups of 32 numbers of 4 bits have a scale of 2 bytes."""


def read_model_sizes(
    path: str | Path,
    *,
    dtype: str = "auto",
    quantization: str = "none",
    kv_cache_dtype: str = "auto",
    kv_transfer_dtype: str = "auto",
) -> ModelSizes:
    """Read the sizes of the model in a directory, or of the config.json that ``path`` is.

    Raises: CheckpointError naming the file and the field
    """
    place = Path(path).expanduser()
    file = place if place.suffix == ".json" else place / "config.json"
    fields = read_json(file)
    name = file.parent.name or str(path)
    architectures = fields.items("architectures")
    known = bool(architectures) and architectures[0] in FAMILIES and file.name == "config.json"
    # Experts of MXFP4 become plain numbers when they are loaded.
    method = fields.table("quantization_config").text("quant_method", "")
    if known and method in ("", "mxfp4"):
        sizes = _of_registry(file.parent, name, dtype)
    else:
        sizes = _of_fields(fields, name, dtype)
    if kv_cache_dtype == "fp8":
        sizes = replace(sizes, cache_number_bytes=1)
    if kv_transfer_dtype == "fp8":
        sizes = replace(sizes, moved_number_bytes=1)
    if quantization in _QUANTIZED:
        linear_dtype, weight_bytes = _QUANTIZED[quantization]
        sizes = replace(sizes, linear_dtype=linear_dtype, weight_bytes=weight_bytes)
    return sizes


def _of_registry(directory: Path, name: str, dtype: str) -> ModelSizes:
    spec = read_model_spec(directory)
    dtype = spec.dtype or "float32" if dtype == "auto" else dtype
    layers = tuple(
        Layer(
            window=layer.window,
            mlp=ExpertMlp(
                experts=layer.mlp.num_experts,
                top_k=layer.mlp.top_k,
                intermediate=layer.mlp.intermediate_size,
                shared_intermediate=layer.mlp.shared.intermediate_size if layer.mlp.shared is not None else 0,
            )
            if isinstance(layer.mlp, MoeSpec)
            else DenseMlp(intermediate=layer.mlp.intermediate_size),
        )
        for layer in spec.layers
    )
    return ModelSizes(
        name=name,
        hidden=spec.hidden_size,
        vocabulary=spec.vocab_size,
        attention=_attention_of(spec),
        layers=layers,
        tied=spec.tie_word_embeddings,
        longest=spec.max_model_len,
        dtype=dtype,
        number_bytes=_BYTES[dtype],
        linear_dtype=dtype,
        weight_bytes=_BYTES[dtype],
    )


def _attention_of(spec: ModelSpec) -> Attention:
    latent = spec.latent
    if latent is not None:
        return LatentAttention(
            heads=spec.num_heads,
            query_rank=latent.query_rank,
            kv_rank=latent.kv_rank,
            plain_dim=latent.plain_dim,
            rotary_dim=latent.rotary_dim,
            value_dim=latent.value_dim,
        )
    qkv = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    return GroupedAttention(
        heads=spec.num_heads,
        kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        biases=qkv * spec.qkv_bias + spec.hidden_size * spec.o_bias + 2 * spec.head_dim * spec.qk_norm,
    )


def _of_fields(fields: ConfigFields, name: str, dtype: str) -> ModelSizes:
    if dtype == "auto":
        stored = fields.text("dtype", fields.text("torch_dtype", "bfloat16")).removeprefix("torch.")
        dtype = stored if stored in _BYTES else "bfloat16"
    layers = fields.integer("num_hidden_layers")
    if layers > MAX_LAYERS:
        raise fields.problem("num_hidden_layers", f"{layers} is more than the {MAX_LAYERS} we allow")
    linear_dtype, weight_bytes = dtype, float(_BYTES[dtype])
    if fields.is_set("quantization_config"):
        linear_dtype, weight_bytes = _stored_as(fields, dtype)
    return ModelSizes(
        name=name,
        hidden=fields.integer("hidden_size"),
        vocabulary=fields.integer("vocab_size"),
        attention=_attention(fields),
        layers=_layers(fields, layers),
        tied=fields.boolean("tie_word_embeddings", False),
        longest=fields.integer("max_position_embeddings"),
        dtype=dtype,
        number_bytes=_BYTES[dtype],
        linear_dtype=linear_dtype,
        weight_bytes=weight_bytes,
    )


def _stored_as(fields: ConfigFields, dtype: str) -> tuple[str, float]:
    """Return what a quantized checkpoint's linear layers are multiplied in, and the bytes of a number."""
    table = fields.table("quantization_config")
    method = table.text("quant_method", "unknown")
    if method in ("fp8", "fbgemm_fp8"):
        return "float8", 1.0
    if method in ("awq", "gptq"):
        return dtype, table.integer("bits", 4) / 8 * 1.0625
    raise fields.problem(
        "quantization_config", f"the size of {method!r} weights is not known; known are fp8, awq, gptq"
    )


def _attention(fields: ConfigFields) -> Attention:
    heads = fields.integer("num_attention_heads")
    if fields.is_set("kv_lora_rank"):
        return LatentAttention(
            heads=heads,
            query_rank=fields.integer("q_lora_rank") if fields.is_set("q_lora_rank") else None,
            kv_rank=fields.integer("kv_lora_rank"),
            plain_dim=fields.integer("qk_nope_head_dim"),
            rotary_dim=fields.integer("qk_rope_head_dim"),
            value_dim=fields.integer("v_head_dim"),
        )
    head_dim = fields.integer("head_dim", fields.integer("hidden_size") // heads)
    kv_heads = fields.integer("num_key_value_heads", heads)
    return GroupedAttention(heads=heads, kv_heads=kv_heads, head_dim=head_dim)


def _layers(fields: ConfigFields, count: int) -> tuple[Layer, ...]:
    window = fields.integer("sliding_window") if fields.is_set("sliding_window") else None
    experts = next(
        (fields.integer(key) for key in ("n_routed_experts", "num_local_experts", "num_experts") if fields.is_set(key)),
        0,
    )
    dense = Layer(mlp=DenseMlp(intermediate=fields.integer("intermediate_size")), window=window)
    if not experts:
        return (dense,) * count
    if experts > MAX_EXPERTS:
        raise fields.problem("num_experts", f"{experts} is more than the {MAX_EXPERTS} we allow")
    size = fields.integer("moe_intermediate_size", fields.integer("intermediate_size"))
    shared = size * _count(fields, "n_shared_experts") or _count(fields, "shared_expert_intermediate_size")
    top_k = fields.integer("num_experts_per_tok")
    if top_k > experts:
        raise fields.problem("num_experts_per_tok", f"{top_k} is more than the {experts} experts there are")
    mixture = Layer(
        mlp=ExpertMlp(experts=experts, top_k=top_k, intermediate=size, shared_intermediate=shared), window=window
    )
    first_dense = _count(fields, "first_k_dense_replace")
    step = fields.integer("moe_layer_freq", fields.integer("decoder_sparse_step", 1))
    return tuple(mixture if index >= first_dense and index % step == 0 else dense for index in range(count))


def _count(fields: ConfigFields, name: str) -> int:
    """Return a number that is 0 where the model does not say it."""
    return fields.integer(name, minimum=0) if fields.is_set(name) else 0
