"""Rotary positions as config.json describes them, in the old style and the new, to a ``RopeSpec``.

Old: ``rope_theta`` beside ``rope_scaling`` {type or rope_type, ...}. New: ``rope_parameters`` with everything
in it. Where both are there, ``rope_scaling`` wins, as it does in transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from .config_fields import ConfigFields
from .model_spec import DynamicRope, LinearRope, Llama3Rope, RopeSpec, YarnRope

KNOWN_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


def read_rope(
    fields: ConfigFields,
    *,
    head_dim: int,
    max_positions: int,
    default_theta: float,
    default_table: Mapping[str, object] | None = None,
) -> RopeSpec:
    """Return the rotary description of a model; ``default_table`` is what holds where nothing is said.

    Raises: CheckpointError for a kind we do not know, partial rotation, and missing or senseless numbers.
    """
    rope = _rope_table(fields)
    if not rope.values and default_table is not None:
        rope = ConfigFields(file=fields.file, values=default_table)
    if head_dim % 2:
        raise fields.problem("head_dim", f"rotary positions need an even number, got {head_dim}")
    _refuse_partial_rotation(fields, rope)
    theta = rope.number("rope_theta", fields.number("rope_theta", default_theta))
    kind = rope.text("rope_type", rope.text("type", "default"))
    match kind:
        case "default":
            return RopeSpec(theta=theta, head_dim=head_dim)
        case "linear":
            return LinearRope(theta=theta, head_dim=head_dim, factor=rope.number("factor"))
        case "dynamic":
            factor = rope.number("factor")
            if factor < 1:
                raise rope.problem("factor", f"must be at least 1, got {factor:g}")
            if head_dim <= 2:
                raise fields.problem("head_dim", f"dynamic rope needs more than 2, got {head_dim}")
            return DynamicRope(theta=theta, head_dim=head_dim, factor=factor, max_positions=max_positions)
        case "llama3":
            return _llama3(fields, rope, theta=theta, head_dim=head_dim, max_positions=max_positions)
        case "yarn":
            return _yarn(fields, rope, theta=theta, head_dim=head_dim, max_positions=max_positions)
    raise rope.problem("rope_type", f"{kind!r} is not supported; known are {', '.join(KNOWN_KINDS)}")


def score_magnitude(fields: ConfigFields) -> float:
    """Return what a query and a key are multiplied with each where scaled positions say so (``mscale_all_dim``)."""
    rope = _rope_table(fields)
    kind, scale = rope.text("rope_type", rope.text("type", "default")), _number_or_zero(rope, "mscale_all_dim")
    return 1.0 if kind == "default" or not scale else _yarn_magnitude(rope.number("factor"), scale)


def _rope_table(fields: ConfigFields) -> ConfigFields:
    rope = fields.table("rope_scaling")
    if not rope.values:
        rope = fields.table("rope_parameters")
    nested = [name for name, value in rope.values.items() if isinstance(value, dict)]
    if nested:
        raise rope.problem(nested[0], "rotary parameters that differ by layer are not supported")
    return rope


def _refuse_partial_rotation(fields: ConfigFields, rope: ConfigFields) -> None:
    for source in (fields, rope):
        if source.is_set("partial_rotary_factor") and source.number("partial_rotary_factor") != 1.0:
            share = source.number("partial_rotary_factor")
            raise source.problem("partial_rotary_factor", f"only 1 is supported, got {share:g}")


def _original_max_positions(fields: ConfigFields, rope: ConfigFields, max_positions: int) -> int:
    # The place beside rope_parameters wins, as it does in transformers.
    inner = rope.integer("original_max_position_embeddings", max_positions)
    return fields.integer("original_max_position_embeddings", inner)


def _llama3(fields: ConfigFields, rope: ConfigFields, *, theta: float, head_dim: int, max_positions: int) -> Llama3Rope:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        raise rope.problem("high_freq_factor", f"must be above low_freq_factor={low:g}, got {high:g}")
    return Llama3Rope(
        theta=theta,
        head_dim=head_dim,
        factor=rope.number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_positions=_original_max_positions(fields, rope, max_positions),
    )


def _yarn(fields: ConfigFields, rope: ConfigFields, *, theta: float, head_dim: int, max_positions: int) -> YarnRope:
    original = _original_max_positions(fields, rope, max_positions)
    factor = rope.number("factor", max_positions / original)
    return YarnRope(
        theta=theta,
        head_dim=head_dim,
        factor=factor,
        original_max_positions=original,
        attention_factor=_yarn_attention_factor(rope, factor),
        # Zero means "the usual value" here, as it does in transformers.
        beta_fast=_number_or_zero(rope, "beta_fast") or 32.0,
        beta_slow=_number_or_zero(rope, "beta_slow") or 1.0,
        truncate=rope.boolean("truncate", True),
    )


def _yarn_attention_factor(rope: ConfigFields, factor: float) -> float:
    if rope.is_set("attention_factor"):
        return rope.number("attention_factor")
    scale, scale_all_dim = _number_or_zero(rope, "mscale"), _number_or_zero(rope, "mscale_all_dim")
    if scale and scale_all_dim:
        return _yarn_magnitude(factor, scale) / _yarn_magnitude(factor, scale_all_dim)
    return _yarn_magnitude(factor, 1.0)


def _yarn_magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _number_or_zero(rope: ConfigFields, name: str) -> float:
    if not rope.is_set(name) or rope.values[name] == 0:
        return 0.0
    return rope.number(name)
