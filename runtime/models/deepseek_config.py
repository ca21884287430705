"""What config.json says of the DeepSeek families alone: latent attention, and experts chosen by groups.

Owns their field names and defaults, which are those of transformers. Refuses what the references do not agree on.
"""

from __future__ import annotations

from .config_fields import ConfigFields
from .model_spec import MAX_EXPERTS, DenseMlpSpec, LatentSpec, MoeSpec, RouterSpec
from .rope_config import score_magnitude


def read_latent(fields: ConfigFields, *, query_rank: int | None, interleaved: bool) -> LatentSpec:
    """Return how a model attends to its latent; ``query_rank``: of a file without that key.

    Raises: CheckpointError naming the field
    """
    if fields.has("q_lora_rank"):
        query_rank = fields.integer("q_lora_rank") if fields.is_set("q_lora_rank") else None
    plain_dim, rotary_dim = fields.integer("qk_nope_head_dim", 128), fields.integer("qk_rope_head_dim", 64)
    return LatentSpec(
        query_rank=query_rank,
        kv_rank=fields.integer("kv_lora_rank", 512),
        plain_dim=plain_dim,
        rotary_dim=rotary_dim,
        value_dim=fields.integer("v_head_dim", 128),
        scale=(plain_dim + rotary_dim) ** -0.5 * score_magnitude(fields) ** 2,
        interleaved=interleaved,
    )


def v2_latent(fields: ConfigFields) -> LatentSpec:
    """Return the attention of DeepSeek-V2."""
    return read_latent(fields, query_rank=1536, interleaved=True)


def v3_latent(fields: ConfigFields) -> LatentSpec:
    """Return the attention of DeepSeek-V3."""
    return read_latent(fields, query_rank=1536, interleaved=fields.boolean("rope_interleave", True))


def v2_mlps(fields: ConfigFields, num_layers: int) -> tuple[DenseMlpSpec | MoeSpec, ...]:
    """Return the MLPs of DeepSeek-V2: experts by a softmax, perhaps of the groups with the best one."""
    _only(fields, "scoring_func", "softmax")
    method = fields.text("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise fields.problem("topk_method", f"{method!r} is not supported; known are greedy, group_limited_greedy")
    if fields.boolean("norm_topk_prob", False):
        raise fields.problem("norm_topk_prob", "true is not supported: references differ in whether it scales, too")
    grouped = method == "group_limited_greedy"
    router = RouterSpec(
        groups=fields.integer("n_group") if grouped else 1,
        top_groups=fields.integer("topk_group") if grouped else 1,
        scaling=fields.number("routed_scaling_factor", 1.0),
        is_wide=True,
    )
    mixture = _mixture(fields, experts=64, top_k=None, size=1407, shared=2, normalize=False, router=router)
    return _layers(fields, num_layers, mixture, first_dense=0)


def v3_mlps(fields: ConfigFields, num_layers: int) -> tuple[DenseMlpSpec | MoeSpec, ...]:
    """Return the MLPs of DeepSeek-V3: experts by scores of their own, of the groups with the two best together."""
    _only(fields, "scoring_func", "sigmoid")
    _only(fields, "topk_method", "noaux_tc")
    groups = fields.integer("n_group", 8)
    router = RouterSpec(
        sigmoid=True,
        corrected=True,
        groups=groups,
        top_groups=fields.integer("topk_group", 4),
        sums_two=groups > 1,
        scaling=fields.number("routed_scaling_factor", 2.5),
        is_wide=True,
    )
    normalize = fields.boolean("norm_topk_prob", True)
    mixture = _mixture(fields, experts=256, top_k=8, size=2048, shared=1, normalize=normalize, router=router)
    return _layers(fields, num_layers, mixture, first_dense=3)


def _mixture(
    fields: ConfigFields,
    *,
    experts: int,
    top_k: int | None,
    size: int,
    shared: int,
    normalize: bool,
    router: RouterSpec,
) -> MoeSpec:
    experts = fields.integer("n_routed_experts", experts)
    if experts > MAX_EXPERTS:
        raise fields.problem("n_routed_experts", f"{experts} is more than the {MAX_EXPERTS} we allow")
    top_k = fields.integer("num_experts_per_tok", top_k)
    size = fields.integer("moe_intermediate_size", size)
    if fields.has("n_shared_experts"):
        shared = fields.integer("n_shared_experts", 0, minimum=0) if fields.is_set("n_shared_experts") else 0
    _check_groups(fields, router, experts=experts, top_k=top_k)
    return MoeSpec(
        num_experts=experts,
        top_k=top_k,
        intermediate_size=size,
        normalize_top_k=normalize,
        router=router,
        shared=DenseMlpSpec(intermediate_size=shared * size) if shared else None,
    )


def _check_groups(fields: ConfigFields, router: RouterSpec, *, experts: int, top_k: int) -> None:
    if experts % router.groups:
        raise fields.problem("n_group", f"{router.groups} groups do not divide the {experts} experts")
    size = experts // router.groups
    if router.sums_two and size < 2:
        raise fields.problem("n_group", f"{router.groups} groups of {experts} experts have fewer than two each")
    if router.top_groups > router.groups:
        raise fields.problem("topk_group", f"{router.top_groups} is more than the {router.groups} groups there are")
    if top_k > size * router.top_groups:
        raise fields.problem(
            "num_experts_per_tok", f"{top_k} is more than the {size * router.top_groups} experts to choose from"
        )


def _layers(
    fields: ConfigFields, num_layers: int, mixture: MoeSpec, *, first_dense: int
) -> tuple[DenseMlpSpec | MoeSpec, ...]:
    activation = fields.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise fields.problem("hidden_act", f"{activation!r} is not supported; only 'silu' is")
    first, step = fields.integer("first_k_dense_replace", first_dense, minimum=0), fields.integer("moe_layer_freq", 1)
    return tuple(mixture if layer >= first and layer % step == 0 else _dense(fields) for layer in range(num_layers))


def _dense(fields: ConfigFields) -> DenseMlpSpec:
    return DenseMlpSpec(intermediate_size=fields.integer("intermediate_size"))


def _only(fields: ConfigFields, name: str, value: str) -> None:
    given = fields.text(name, value)
    if given != value:
        raise fields.problem(name, f"{given!r} is not supported; only {value!r} is")
