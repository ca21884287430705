"""The angles of rotary positions: every kind of scaling, as cosines and sines per token.

Owns the tables and dynamic scaling's dependence on lengths. The arithmetic is float32 in the order
transformers does it, because an angle is a position times a frequency: at position 100,000 the last bit of a
frequency shows.

**Dynamic NTK** raises the base with the length of the sequence, once that exceeds the model's positions.
Which length is meant matters: an implementation that takes the length so far gives different keys for
different chunkings of one prompt. transformers computes a prompt whole, so all its positions are rotated for
the prompt's full length, and then token by token, each rotated for the length it brings; cached keys keep the
rotation they had. So the length for position p of a request is ``max(prompt_length, p + 1)``, whatever the
chunks, the cache hits and the interruptions.

Shapes: T tokens, P table rows, D head size, F = D / 2 frequencies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .model_spec import DynamicRope, LinearRope, Llama3Rope, RopeSpec, YarnRope

SMALLEST_TABLE = 1024


def inverse_frequencies(spec: RopeSpec) -> Tensor:
    """Return the angle per position of every pair of dimensions, [F] float32; for dynamic rope, of short
    lengths.
    """
    match spec:
        case LinearRope():
            return _plain(spec) / spec.factor
        case Llama3Rope():
            return _llama3(spec)
        case YarnRope():
            return _yarn(spec)
    return _plain(spec)


def attention_factor(spec: RopeSpec) -> float:
    """Return what cosines and sines are multiplied with."""
    return spec.attention_factor if isinstance(spec, YarnRope) else 1.0


class RotaryPositions:
    """Cosines and sines of one model, from a table that grows with the longest position asked for."""

    def __init__(self, spec: RopeSpec, *, dtype: torch.dtype, device: torch.device) -> None:
        """Start with an empty table; cosines and sines will have the given type and device."""
        self._spec = spec
        self._dtype = dtype
        self._device = device
        self._cos_PD = torch.empty((0, spec.head_dim), dtype=dtype, device=device)
        self._sin_PD = self._cos_PD

    def cos_sin(self, positions_T: Tensor, lengths_T: Tensor | None, *, longest: int) -> tuple[Tensor, Tensor]:
        """Return (cos, sin) for ``apply_rope_``: each angle in both halves, the first half of sin negated.

        Shapes: positions_T [tokens] int64, all below ``longest``; lengths_T [tokens] int64, max(prompt
        length, position + 1), needed by dynamic rope only; returns two [tokens, head size]
        """
        if isinstance(self._spec, DynamicRope):
            if lengths_T is None:
                raise ValueError("dynamic rope needs the length of every token's sequence")
            return self._in_halves(_cos_sin(positions_T, _dynamic(self._spec, lengths_T), 1.0))
        self._grow(longest)
        return self._cos_PD.index_select(0, positions_T), self._sin_PD.index_select(0, positions_T)

    def reserve(self, longest: int) -> None:
        """Let the table reach all positions below ``longest``: it stays where it is then."""
        if not isinstance(self._spec, DynamicRope):
            self._grow(longest)

    def _in_halves(self, both_TD: Tensor) -> tuple[Tensor, Tensor]:
        cos_TF, sin_TF = both_TD.to(device=self._device, dtype=self._dtype).chunk(2, dim=-1)
        return torch.cat((cos_TF, cos_TF), dim=-1), torch.cat((-sin_TF, sin_TF), dim=-1)

    def _grow(self, longest: int) -> None:
        rows = self._cos_PD.shape[0]
        if longest <= rows:
            return
        positions_P = torch.arange(rows, max(longest, 2 * rows, SMALLEST_TABLE))
        both_PD = _cos_sin(positions_P, inverse_frequencies(self._spec), attention_factor(self._spec))
        cos_PD, sin_PD = self._in_halves(both_PD)
        self._cos_PD, self._sin_PD = torch.cat((self._cos_PD, cos_PD)), torch.cat((self._sin_PD, sin_PD))


def _cos_sin(positions_T: Tensor, frequencies_F: Tensor, factor: float) -> Tensor:
    angles_TF = positions_T.float().unsqueeze(-1) * frequencies_F
    return torch.cat((angles_TF.cos(), angles_TF.sin()), dim=-1) * factor


def _exponents(spec: RopeSpec) -> Tensor:
    return torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float() / spec.head_dim


def _plain(spec: RopeSpec) -> Tensor:
    return 1.0 / torch.pow(spec.theta, _exponents(spec))


def _dynamic(spec: DynamicRope, lengths_T: Tensor) -> Tensor:
    lengths_T = lengths_T.clamp(min=spec.max_positions)
    growth_T = spec.factor * lengths_T / spec.max_positions - (spec.factor - 1)
    bases_T = spec.theta * growth_T ** (spec.head_dim / (spec.head_dim - 2))
    return 1.0 / torch.pow(bases_T.unsqueeze(-1), _exponents(spec).to(lengths_T.device))


def _llama3(spec: Llama3Rope) -> Tensor:
    plain_F = _plain(spec)
    wavelengths_F = 2 * math.pi / plain_F
    original = spec.original_max_positions
    # 1 at the short end (kept as it is), 0 at the long end (divided by the factor), a straight line between.
    span = spec.high_freq_factor - spec.low_freq_factor
    kept_F = (original / wavelengths_F - spec.low_freq_factor) / span
    blended_F = (1 - kept_F) * plain_F / spec.factor + kept_F * plain_F
    is_long_F = wavelengths_F > original / spec.low_freq_factor
    is_short_F = wavelengths_F < original / spec.high_freq_factor
    return torch.where(is_long_F, plain_F / spec.factor, torch.where(is_short_F, plain_F, blended_F))


def _yarn(spec: YarnRope) -> Tensor:
    base_F = torch.pow(spec.theta, _exponents(spec))
    low, high = _yarn_range(spec)
    ramp_F = (torch.arange(spec.head_dim // 2, dtype=torch.float32) - low) / (high - low)
    extrapolated_F = 1 - ramp_F.clamp(0, 1)
    return 1.0 / (spec.factor * base_F) * (1 - extrapolated_F) + 1.0 / base_F * extrapolated_F


def _yarn_range(spec: YarnRope) -> tuple[float, float]:
    low = _dimension_of(spec, spec.beta_fast)
    high = _dimension_of(spec, spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.head_dim - 1)
    return (low, high + 0.001) if low == high else (low, high)


def _dimension_of(spec: YarnRope, rotations: float) -> float:
    """Return the dimension that turns ``rotations`` times over the original length (arXiv 2309.00071, section
    3.2).
    """
    turns = spec.original_max_positions / (rotations * 2 * math.pi)
    return spec.head_dim * math.log(turns) / (2 * math.log(spec.theta))
