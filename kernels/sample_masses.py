"""Probability masses as integers: their sums have no rounding order to depend on.

Owns what one unit of mass is, in torch and for kernels.
"""

from __future__ import annotations

from torch import Tensor

from .launch import jit, tl

_CHUNK_ELEMENTS_CPU = 1 << 18  # logits worked on at once: the temporaries stay in cache
_CHUNK_ELEMENTS_GPU = 1 << 24  # bounds the temporaries' memory


def chunk_rows(logits_RV: Tensor) -> int:
    """Return how many rows torch's operations work on at once."""
    elements = _CHUNK_ELEMENTS_GPU if logits_RV.is_cuda else _CHUNK_ELEMENTS_CPU
    return max(1, elements // logits_RV.shape[1])


def mass_scale(vocabulary: int) -> float:
    """Return the mass of a row's best token: the largest power of two of which a whole row still fits 63 bits."""
    return float(1 << (62 - (vocabulary - 1).bit_length()))


def masses(logits_RV: Tensor, best_R: Tensor, temperatures_R: Tensor) -> Tensor:
    """Return ``exp((logit - best) / temperature)`` in fixed point, int64.

    Integer sums are exact and so independent of order, batch and device. For 32k tokens one unit is 2**-47 of the best
    token: the sum of a whole row is off by less than 1.2e-10 of it.
    """
    decay_RV = logits_RV.double().sub_(best_R.double().unsqueeze(-1)).div_(temperatures_R.unsqueeze(-1)).exp_()
    return decay_RV.mul_(mass_scale(logits_RV.shape[1])).round_().long()


@jit
def masses_of(x, best, temperature, mass_scale):
    """As ``masses``, in a kernel: ``x`` and ``best`` float32, the rest float64."""
    mass = tl.exp((x.to(tl.float64) - best.to(tl.float64)) / temperature) * mass_scale
    # Rounded to the nearest integer, ties to even, as every sum from 2**52 on is; larger ones are integers already.
    whole = (mass + 4503599627370496.0) - 4503599627370496.0
    return tl.where(mass < 4503599627370496.0, whole, mass).to(tl.int64)
