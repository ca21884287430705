"""How the two halves of a gated MLP, gate and up, become one: which function, and its numbers. Without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum


class GateKind(StrEnum):
    """The function. All are ``gate * sigmoid(f(gate))`` times up.

    - SILU: f(x) = x (arXiv 2002.05202).
    - GELU_TANH: GELU by its tanh, as f(x) = 2 sqrt(2 / pi) (x + 0.044715 x^3) (arXiv 1606.08415, section 2).
    - CLAMPED: f(x) = alpha x; gate is at most ``limit``, up between ``-limit`` and ``limit``, and one is added to it
      (arXiv 2508.10925, section 2.1).
    """

    SILU = "silu"
    GELU_TANH = "gelu_tanh"
    CLAMPED = "clamped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A function with its numbers, which are those of CLAMPED alone."""

    kind: GateKind
    alpha: float = 1.0
    limit: float = math.inf


SILU = Gate(kind=GateKind.SILU)
