"""The noise of sampling: an integer hash of (seed, position, token), the same bits on every device.

Owns the hash, in torch and for kernels, and what is made of it. A key stands for a row's seed and position; from it
each token has 24 bits, a uniform number between 0 and 1, and standard Gumbel noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import jit, tl

HASH_BITS = 24
HASH_RANGE = 1 << HASH_BITS


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


_GOLDEN_64 = _signed(0x9E3779B97F4A7C15, 64)
_MIX_64_1 = _signed(0xBF58476D1CE4E5B9, 64)
_MIX_64_2 = _signed(0x94D049BB133111EB, 64)
_GOLDEN_32 = _signed(0x9E3779B9, 32)
_MIX_32_1 = _signed(0x7FEB352D, 32)
_MIX_32_2 = _signed(0x846CA68B, 32)


def gumbel_noise(seeds_B: Tensor, positions_B: Tensor, token_ids_BK: Tensor) -> Tensor:
    """Return the standard Gumbel noise of tokens at positions: a pure function of (seed, position, token).

    Seed and position are mixed in 64 bits, once a row; the token is mixed into that key in 32 bits, because on a CPU
    whole vocabularies are hashed, and 32-bit products are several times faster. The two halves of the key enter at
    different rounds, so that rows whose low halves are near each other still differ.

    Shapes: seeds_B, positions_B [rows] int64; token_ids_BK [rows, K] int64; returns [rows, K] float64 in [-2.9, 16.7]
    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014) for the key; the rounds
    of Wellons's lowbias32 (github.com/skeeto/hash-prospector) for the token
    """
    keys_B = row_keys(seeds_B, positions_B)
    return noise_of(token_hash(keys_B.unsqueeze(-1), token_ids_BK.to(torch.int32)))


def row_keys(seeds_R: Tensor, positions_R: Tensor) -> Tensor:
    """Return the key of each row's seed and position, int64."""
    return _mix_64(_mix_64(seeds_R + _GOLDEN_64) + (positions_R + 1) * _GOLDEN_64)


def _mix_64(z: Tensor) -> Tensor:
    # Products wrap modulo 2**64 in two's complement on CPU and GPU alike, as the unsigned original's do; torch shifts
    # arithmetically, so the copies of the sign bit are masked away.
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _MIX_64_1
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _MIX_64_2
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def token_hash(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Return 24 bits for each token id, int32; the shapes broadcast. In place where it can: this is the hot loop."""
    z = token_ids * _GOLDEN_32 + keys.to(torch.int32)
    shifted = torch.empty_like(z)
    _xor_shift_32_(z, 16, shifted).mul_(_MIX_32_1).bitwise_xor_((keys >> 32).to(torch.int32))
    _xor_shift_32_(z, 15, shifted).mul_(_MIX_32_2)
    _xor_shift_32_(z, 16, shifted)
    return z.bitwise_right_shift_(32 - HASH_BITS).bitwise_and_(HASH_RANGE - 1)


def _xor_shift_32_(z: Tensor, bits: int, scratch: Tensor) -> Tensor:
    torch.bitwise_right_shift(z, bits, out=scratch)
    return z.bitwise_xor_(scratch.bitwise_and_((1 << (32 - bits)) - 1))


def uniform(hashed: Tensor) -> Tensor:
    """Return hashes as numbers above 0 and below 1, float64."""
    return (hashed.double() + 1.0) / (HASH_RANGE + 1.0)


def noise_of(hashed: Tensor) -> Tensor:
    """Return the noise of hashes, float64."""
    return -torch.log(-torch.log(uniform(hashed)))


@jit
def hash_tokens(key, token_ids):
    """As ``token_hash``, in a kernel: ``key`` is an int64, the hashes are int32."""
    z = token_ids.to(tl.uint32) * 0x9E3779B9 + key.to(tl.uint32)
    z = (z ^ (z >> 16)) * 0x7FEB352D
    z ^= (key >> 32).to(tl.uint32)
    z = (z ^ (z >> 15)) * 0x846CA68B
    z ^= z >> 16
    return (z >> 8).to(tl.int32)


@jit
def noise_of_hashes(hashed):
    """As ``noise_of``, in a kernel."""
    return -tl.log(-tl.log((hashed.to(tl.float64) + 1.0) / 16777217.0))
