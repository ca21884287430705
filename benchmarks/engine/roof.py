"""The roof: what a point could reach on this machine if memory or arithmetic were used to the full.

A decode step reads every linear weight and the head once (not the embedding, of which it needs a few rows), and the
keys and values of each sequence, and multiplies each row by every weight. It takes at least as long as the bytes need
at the read bandwidth, and at least as long as the products need at the matrix rate; the roof is whichever is longer.
Both rates are measured in the same run, in turn with the contenders (``peers/roof_rates.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

from slipstream.benchmarks.engine.points import Format, Kind, Point, Shape

WEIGHT_BYTES = {
    Format.FP32: 4.0,
    Format.BF16: 2.0,
    # Beside each weight its share of a scale: one a row for int8, a bf16 scale and zero point for 32 weights of int4.
    Format.INT8: 1.0,
    Format.INT4: 0.5 + 4 / 32,
}
HEAD_BYTES = {**WEIGHT_BYTES, Format.INT4: WEIGHT_BYTES[Format.INT8]}
"""With int4 the head stays at 8 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What the machine reached just now."""

    read_bytes_per_s: float
    bf16_flop_per_s: float
    fp32_flop_per_s: float


def weight_bytes(shape: Shape, format_: Format) -> float:
    """Return the bytes of weights that a decode step reads."""
    return shape.layer_weights * WEIGHT_BYTES[format_] + shape.head_weights * HEAD_BYTES[format_]


def kv_bytes_per_token(shape: Shape, format_: Format) -> int:
    """Return the bytes of keys and values of one token in all layers."""
    return 2 * shape.layers * shape.kv_heads * shape.head_size * (4 if format_ is Format.FP32 else 2)


def step_roof_s(shape: Shape, format_: Format, batch: int, context: float, rates: Rates) -> float:
    """Return the least time of a decode step of ``batch`` sequences that have ``context`` tokens each."""
    read_bytes = weight_bytes(shape, format_) + batch * context * kv_bytes_per_token(shape, format_)
    attention = 4 * shape.layers * shape.hidden * context
    flop = batch * (2 * (shape.layer_weights + shape.head_weights) + attention)
    return max(read_bytes / rates.read_bytes_per_s, flop / _flop_per_s(format_, rates))


def prefill_roof_s(shape: Shape, format_: Format, batch: int, tokens: int, rates: Rates) -> float:
    """Return the least time of the prompts: each position through the layers, the last one through the head."""
    attention = 4 * shape.layers * shape.hidden * (tokens + 1) / 2
    flop = batch * (tokens * (2 * shape.layer_weights + attention) + 2 * shape.head_weights)
    return max(weight_bytes(shape, format_) / rates.read_bytes_per_s, flop / _flop_per_s(format_, rates))


def roof_tokens_per_s(shape: Shape, format_: Format, point: Point, rates: Rates) -> float:
    """Return the roof of a point's own rate: new tokens for a decode point, prompt tokens for a prefill point."""
    if point.kind is Kind.PREFILL:
        tokens = point.batch * point.prompt_tokens
        return tokens / prefill_roof_s(shape, format_, point.batch, point.prompt_tokens, rates)
    context = point.prompt_tokens + (point.new_tokens + 1) / 2
    return point.batch / step_roof_s(shape, format_, point.batch, context, rates)


def _flop_per_s(format_: Format, rates: Rates) -> float:
    return rates.fp32_flop_per_s if format_ is Format.FP32 else rates.bf16_flop_per_s
