"""Multi-head latent attention: what it is, and the loop over keys that decoding and prefill share.

A token's cache is one row for all heads: a latent, of which a model's keys and values are linear functions, and the
rotated part of the keys. The functions are folded into queries and outputs ("absorbed"), so that heads attend to the
latent itself: it is the keys, with the rotated part beside it, and the values.

Shapes: T tokens, N query heads, B blocks, S block size, L latent size, W = L + rotated size, R rows; a tile has M rows
of queries and N keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from .attention_span import as_type_of, log2_scores, take_scores
from .compile_case import pointer
from .launch import KernelConfig, jit, next_power_of_2, tl
from .tiles import dot, rounded


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaOptions:
    """How a model attends to its latent.

    - ``scale``: of scores; that of the heads before absorbing, 1 / sqrt(their size), not of the latent's size.
    - ``latent``: how many of a row's numbers, the first ones, are values too.
    - ``cache_scale``: what the numbers of a float8 cache are to be multiplied with.
    - ``deterministic``: a position gets the same bits whether it is decoded or computed in a chunk.
    """

    scale: float
    latent: int
    cache_scale: float = 1.0
    deterministic: bool = False


def mla_reference(
    q_TNW: Tensor, cache_BSW: Tensor, positions_T: Tensor, tables_TB: Tensor, options: MlaOptions
) -> Tensor:
    """Return each token's attention over the latents of its sequence up to its position; the softmax is float32.

    A token at position -1 sees nothing and becomes zeros.

    Shapes: q_TNW [tokens, heads, latent + rotated] absorbed queries; cache_BSW [blocks, block size, latent + rotated];
    positions_T [tokens]; tables_TB [tokens, blocks] each token's block table; returns [tokens, heads, latent]
    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.2, equations 10 and 13 to 19
    """
    out_TNL = q_TNW.new_empty((*q_TNW.shape[:2], options.latent))
    for token, (position, table_B) in enumerate(zip(positions_T.tolist(), tables_TB.long(), strict=True)):
        blocks_B = table_B[: position // cache_BSW.shape[1] + 1]
        keys_KW = cache_BSW[blocks_B].flatten(0, 1)[: position + 1].float() * options.cache_scale
        weights_NK = torch.softmax(q_TNW[token].float() @ keys_KW.T * options.scale, -1)
        out_TNL[token] = (weights_NK @ keys_KW[:, : options.latent]).to(q_TNW.dtype)
    return out_TNL


@jit
def load_mla_queries(q_ptr, rows_M, is_row_M, LATENT: tl.constexpr, ROPE: tl.constexpr):
    """Return the two parts of a tile's queries; ``rows_M``: their places from ``q_ptr`` on, 32 bits are enough."""
    place_M1 = rows_M[:, None] * (LATENT + ROPE)
    latent_ML = tl.load(q_ptr + (place_M1 + tl.arange(0, LATENT)[None, :]), mask=is_row_M[:, None], other=0.0)
    rope_MR = tl.load(q_ptr + (place_M1 + LATENT + tl.arange(0, ROPE)[None, :]), mask=is_row_M[:, None], other=0.0)
    return latent_ML, rope_MR


@jit
def attend_latents(
    q_latent_ML,
    q_rope_MR,
    position_M,
    cache_ptr,
    table_ptr,
    begin,
    end,
    block_size,
    scale,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Return the partial (result, peak, total) of a tile's rows with the latents ``begin`` to before ``end``.

    Row m sees the keys up to ``position_M``. ``begin`` is a multiple of BLOCK_N; nothing outside of [begin, end) is
    read. ``table_ptr``: the blocks of one sequence.
    """
    result_ML = tl.zeros([BLOCK_M, LATENT], tl.float32)
    peak_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total_M = tl.zeros([BLOCK_M], tl.float32)
    for first in range(begin, end, BLOCK_N):
        key_n = first + tl.arange(0, BLOCK_N)
        is_there_n = key_n < end
        block_n = tl.load(table_ptr + key_n // block_size, mask=is_there_n, other=0)
        # Caches are larger than 2^31 numbers.
        row_n1 = (block_n.to(tl.int64) * block_size + key_n % block_size)[:, None] * (LATENT + ROPE)
        is_read_n1 = is_there_n[:, None]
        latent_nL = tl.load(cache_ptr + row_n1 + tl.arange(0, LATENT)[None, :], mask=is_read_n1, other=0.0)
        rope_nR = tl.load(cache_ptr + row_n1 + LATENT + tl.arange(0, ROPE)[None, :], mask=is_read_n1, other=0.0)
        latent_nL = as_type_of(latent_nL, q_latent_ML.dtype)
        rope_nR = as_type_of(rope_nR, q_latent_ML.dtype)
        products_Mn = dot(q_rope_MR, tl.trans(rope_nR), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        products_Mn = dot(q_latent_ML, tl.trans(latent_nL), products_Mn)
        scores_Mn = log2_scores(products_Mn, scale, 0.0, False)
        is_seen_Mn = (key_n[None, :] <= position_M[:, None]) & is_there_n[None, :]
        scores_Mn = tl.where(is_seen_Mn, scores_Mn, float("-inf"))
        weights_Mn, kept_M, peak_M, total_M = take_scores(scores_Mn, peak_M, total_M)
        # The same numbers, as values: a latent is read once.
        result_ML = dot(rounded(weights_Mn, q_latent_ML.dtype), latent_nL, result_ML * kept_M[:, None])
    return result_ML, peak_M, total_M


_IS_AMD = torch.version.hip is not None


def mla_rows(heads: int, dtype: torch.dtype, *, deterministic: bool, is_amd: bool = _IS_AMD) -> int:
    """Return how many queries a tile of decoding has: heads of one token, at least 16.

    A tile of 64 keeps its sums (64 x 512 in float32) in the registers of 8 warps. A deterministic prefill keeps two
    tiles of sums, a span's and all spans', so it has half of that, and decoding has as many. AMD's memory beside the
    processors holds a tile of 32, float32 takes 16 everywhere.
    """
    most = 16 if dtype == torch.float32 else 32 if deterministic or is_amd else 64
    return min(most, max(16, next_power_of_2(heads)))


def mla_config(rows: int, dtype: torch.dtype, *, is_amd: bool = _IS_AMD) -> KernelConfig:
    """Return how tiles of so many queries are computed: the same for all contexts and batches."""
    keys = 16 if dtype == torch.float32 or is_amd else 32
    return KernelConfig(tiles={"BLOCK_M": rows, "BLOCK_N": keys}, num_warps=4 if is_amd else 8, num_stages=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaVariant:
    """Types and tiles that kernels are compiled with, and where."""

    dtype: torch.dtype
    cache_dtype: torch.dtype
    rows: int
    config: KernelConfig
    targets: tuple[str, ...]

    @property
    def spill_bytes(self) -> int:
        """Return the bound: addresses of queries and of what is stored; next to nothing inside the loop over keys."""
        return {16: 96, 32: 288, 64: 768}[self.rows]

    @property
    def name(self) -> str:
        """Return what tells it from the others."""
        types = dict.fromkeys(pointer(each)[1:] for each in (self.dtype, self.cache_dtype))
        return f"{' cache '.join(types)} {self.rows} rows{' amd' if self.targets == ('gfx942',) else ''}"


def mla_variants() -> Iterator[MlaVariant]:
    """Return all that decoding and prefill are launched with."""
    for dtype, is_amd in product((torch.bfloat16, torch.float16, torch.float32), (False, True)):
        most = mla_rows(1 << 16, dtype, deterministic=False, is_amd=is_amd)
        caches = (dtype, torch.float8_e4m3fn) if dtype == torch.bfloat16 else (dtype,)
        for rows, cache_dtype in product((16, 32, 64), caches):
            nvidia = ("sm_80", "sm_90", "sm_100") if cache_dtype == dtype else ("sm_90", "sm_100")
            if rows <= most:
                yield MlaVariant(
                    dtype=dtype,
                    cache_dtype=cache_dtype,
                    rows=rows,
                    config=mla_config(rows, dtype, is_amd=is_amd),
                    targets=("gfx942",) if is_amd else nvidia,
                )


def takes_latents(latent: int, rope: int) -> bool:
    """Return whether there are kernels for latents of this size, with so many rotated numbers."""
    return all(size >= 16 and next_power_of_2(size) == size for size in (latent, rope))


def check_mla(q_TNW: Tensor, cache_BSW: Tensor, options: MlaOptions, out_TNL: Tensor) -> None:
    """Raises: ValueError naming the tensor that does not fit."""
    width, rope = q_TNW.shape[-1], q_TNW.shape[-1] - options.latent
    if not takes_latents(options.latent, rope):
        raise ValueError(f"q has {options.latent} latent and {rope} rotated numbers: powers of two from 16 are taken")
    if cache_BSW.dim() != 3 or cache_BSW.shape[-1] != width or not cache_BSW.is_contiguous():
        raise ValueError(f"cache must be [blocks, block size, {width}] and contiguous, not {list(cache_BSW.shape)}")
    is_float8 = cache_BSW.dtype == torch.float8_e4m3fn and q_TNW.dtype == torch.bfloat16
    if cache_BSW.dtype != q_TNW.dtype and not is_float8:
        raise ValueError(
            f"cache is {cache_BSW.dtype}, q is {q_TNW.dtype}: use one type, or float8_e4m3fn with bfloat16 queries"
        )
    if out_TNL.shape != (*q_TNW.shape[:2], options.latent) or not out_TNL.is_contiguous():
        raise ValueError(f"out must be [tokens, heads, {options.latent}] and contiguous, not {list(out_TNL.shape)}")
