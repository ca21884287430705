"""Products of rows with the weights of their experts, all experts in one launch; biases are added in it, and of two
products the first ends with the gated activation: SwiGLU, or gpt-oss's clamped one.

Two ways, each for a product of gate and up, and for one of down:

- *blocks* (prefill): entries are sorted into blocks of one expert each (``moe_sort``), one program a block and tile of
  outputs;
- *masked* (few tokens): nothing is sorted. One program an expert and tile of outputs, over all tokens; those that have
  not chosen the expert are masked. A launch reads the weights of chosen experts alone, so it takes as long as these.

Shapes: T tokens, A chosen experts per token, R = T * A entries, E experts, I inputs, O outputs (the activation's, where
gate and up are multiplied: weights have 2 * O then, gate first), B blocks, M places of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .backends import uses_triton
from .compile_case import SHARED_BYTES, CompileCase, pointer
from .gate import SILU, Gate, GateKind
from .gated import gate_and_mul_reference
from .launch import KernelConfig, jit, launch, next_power_of_2, tl
from .moe_sort import MOST_EXPERTS, ExpertBlocks
from .tiles import dot, rounded
from .tuning import launch_tuned

MOST_MASKED_TOKENS = 32
"""The most tokens of the masked way."""

_TYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_CHOSEN = 16
_UNIT = 16
"""Sizes are handed over in units of so many, so that the compiler knows that rows are aligned: loads are wide then."""
_PLACES = (64, 128)
_GROUP = tl.constexpr(8)


def expert_product_reference(
    x_TI: Tensor,
    weights_EOI: Tensor,
    experts_R: Tensor,
    *,
    chosen: int,
    is_gated: bool,
    biases_EO: Tensor | None = None,
    gate: Gate = SILU,
) -> Tensor:
    """Multiply each entry with its expert's weights; ``is_gated``: return what ``gate`` makes of the two halves.

    Products, their sums and the activation are float32, whatever the type of ``x``; one rounding at the end. Entry r is
    of row ``r // chosen``. An expert of ``num_experts`` or more is none: the entry's outputs have no meaning (here 0).

    Shapes: x_TI [entries / chosen, inputs]; weights_EOI [experts, outputs, inputs], twice the outputs if gated;
    experts_R [entries] int64; biases_EO [experts, outputs], as many as of weights; returns [entries, outputs] of x's
    type
    Source: SwiGLU (arXiv 2002.05202), section 2
    """
    rows_RI = x_TI.repeat_interleave(chosen, dim=0).float()
    outputs = weights_EOI.shape[1] // (2 if is_gated else 1)
    out_RO = torch.zeros((len(experts_R), outputs), dtype=x_TI.dtype, device=x_TI.device)
    for expert, weight_OI in enumerate(weights_EOI):
        product_RO = rows_RI[experts_R == expert] @ weight_OI.float().T
        if biases_EO is not None:
            product_RO += biases_EO[expert].float()
        if is_gated:
            product_RO = gate_and_mul_reference(product_RO, gate)
        out_RO[experts_R == expert] = product_RO.to(x_TI.dtype)
    return out_RO


@jit
def _multiply_rows(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    x_row_M,
    out_row_M,
    is_row_M,
    output_N,
    inputs,
    outputs,
    alpha,
    limit,
    IS_GATED: tl.constexpr,
    IS_CLAMPED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Multiply rows with one expert's weights for a tile of outputs, and write the result. All inputs in one order."""
    input_K = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + x_row_M.to(tl.int64)[:, None] * inputs + input_K[None, :]
    weight_ptrs = weight_ptr + output_N[None, :] * inputs + input_K[:, None]
    is_output = (output_N < outputs)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in range(0, inputs, BLOCK_K):
        is_input = input_K < inputs - begin
        x = tl.load(x_ptrs, mask=is_row_M[:, None] & is_input[None, :], other=0.0)
        weight = tl.load(weight_ptrs, mask=is_input[:, None] & is_output, other=0.0)
        acc = dot(x, weight, acc)
        if IS_GATED:
            up = tl.load(weight_ptrs + outputs * inputs, mask=is_input[:, None] & is_output, other=0.0)
            acc_up = dot(x, up, acc_up)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    if HAS_BIAS:
        acc += tl.load(bias_ptr + output_N, mask=output_N < outputs, other=0.0).to(tl.float32)[None, :]
        if IS_GATED:
            acc_up += tl.load(bias_ptr + outputs + output_N, mask=output_N < outputs, other=0.0).to(tl.float32)[None, :]
    if IS_CLAMPED:
        # What is not a number is not above the limit, and stays so.
        acc = tl.where(acc > limit, limit, acc)
        acc_up = tl.where(acc_up > limit, limit, tl.where(acc_up < -limit, -limit, acc_up)) + 1.0
        acc = acc / (1.0 + tl.exp2(acc * alpha * -1.4426950408889634)) * acc_up
    elif IS_GATED:
        acc = acc / (1.0 + tl.exp2(acc * -1.4426950408889634)) * acc_up
    out_ptrs = out_ptr + out_row_M.to(tl.int64)[:, None] * outputs + output_N[None, :]
    tl.store(out_ptrs, rounded(acc, out_ptr.dtype.element_ty), mask=is_row_M[:, None] & is_output)


@jit
def _block_product_kernel(
    x_ptr,
    weights_ptr,
    biases_ptr,
    entries_ptr,
    experts_ptr,
    rows_ptr,
    out_ptr,
    blocks,
    entries_per_row,
    input_units,
    output_units,
    alpha,
    limit,
    IS_GATED: tl.constexpr,
    IS_CLAMPED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program multiplies one block's rows with BLOCK_N outputs of its expert."""
    inputs, outputs = input_units * UNIT, output_units * UNIT
    # Programs that run side by side share weights (up to 8 blocks, often of one expert) and rows.
    tiles = tl.cdiv(outputs, BLOCK_N)
    group = tl.program_id(0) // (_GROUP * tiles)
    in_group = tl.minimum(blocks - group * _GROUP, _GROUP)
    rest = tl.program_id(0) % (_GROUP * tiles)
    block = group * _GROUP + rest % in_group
    rows = tl.load(rows_ptr + block)
    if rows > 0:
        place_M = tl.arange(0, BLOCK_M)
        is_row_M = place_M < rows
        entry_M = tl.load(entries_ptr + block * BLOCK_M + place_M, mask=is_row_M, other=0)
        rows_each = outputs * 2 if IS_GATED else outputs
        expert = tl.load(experts_ptr + block).to(tl.int64)
        output_N = rest // in_group * BLOCK_N + tl.arange(0, BLOCK_N)
        _multiply_rows(
            x_ptr, weights_ptr + expert * rows_each * inputs, biases_ptr + expert * rows_each, out_ptr,
            entry_M // entries_per_row, entry_M, is_row_M, output_N, inputs, outputs, alpha, limit,
            IS_GATED, IS_CLAMPED, HAS_BIAS, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@jit
def _masked_product_kernel(
    x_ptr,
    weights_ptr,
    biases_ptr,
    experts_ptr,
    out_ptr,
    tokens,
    chosen,
    entries_per_row,
    input_units,
    output_units,
    alpha,
    limit,
    IS_GATED: tl.constexpr,
    IS_CLAMPED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """One program multiplies the tokens that have chosen one expert with BLOCK_N of its outputs."""
    inputs, outputs = input_units * UNIT, output_units * UNIT
    expert = tl.program_id(1)
    token_M = tl.arange(0, BLOCK_M)
    choice_A = tl.arange(0, BLOCK_A)
    is_there = (token_M < tokens)[:, None] & (choice_A < chosen)[None, :]
    choices = tl.load(experts_ptr + token_M[:, None] * chosen + choice_A[None, :], mask=is_there, other=-1)
    # A token chooses an expert once; places count from 1, 0 is for none.
    choice_M = tl.max(tl.where(choices == expert, choice_A[None, :] + 1, 0), axis=1)
    if tl.max(choice_M, axis=0) > 0:
        entry_M = token_M * chosen + choice_M - 1
        is_row_M = choice_M > 0
        rows_each = outputs * 2 if IS_GATED else outputs
        output_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        _multiply_rows(
            x_ptr, weights_ptr + expert.to(tl.int64) * rows_each * inputs, biases_ptr + expert * rows_each, out_ptr,
            entry_M // entries_per_row, entry_M, is_row_M, output_N, inputs, outputs, alpha, limit,
            IS_GATED, IS_CLAMPED, HAS_BIAS, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


def _config(places: int, outputs: int, inputs: int, *, warps: int, stages: int, **more: int) -> KernelConfig:
    tiles = {"BLOCK_M": places, "BLOCK_N": outputs, "BLOCK_K": inputs, **more}
    return KernelConfig(tiles=tiles, num_warps=warps, num_stages=stages)


def block_places(weights_EOI: Tensor, entries: int) -> int:
    """Return how many places blocks have: more where experts have many rows."""
    is_large = weights_EOI.dtype.itemsize == 2 and entries >= 96 * len(weights_EOI)
    return _PLACES[is_large]


def block_configs(dtype: torch.dtype, places: int, *, is_gated: bool, is_wide: bool) -> Sequence[KernelConfig]:
    """Return the ways to multiply blocks; the first unless tuning has found another.

    Gate and up are two products: a program has half as many outputs of them. ``is_wide``: the device multiplies from
    shared memory, and has registers for more sums.
    """
    if dtype.itemsize > 2:
        return (_config(places, 32 if is_gated else 64, 32, warps=8, stages=2),)
    if places == _PLACES[0]:
        return (_config(places, 64 if is_gated else 128, 64, warps=4, stages=4),)
    narrow = _config(places, 64 if is_gated else 128, 64, warps=8, stages=3)
    return (_config(places, 128 if is_gated else 256, 64, warps=8, stages=3), narrow) if is_wide else (narrow,)


def _unit(dtype: torch.dtype) -> int:
    """Return the unit of sizes: rows of 16-bit numbers are aligned (``can_multiply``), others are of any length."""
    return 1 if dtype.itemsize > 2 else _UNIT


@lru_cache(maxsize=16)
def _is_wide(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def masked_config(*, is_gated: bool) -> KernelConfig:
    """Return how few tokens are multiplied: weights come in wide rows, several on their way at once."""
    outputs = 32 if is_gated else 64
    return _config(MOST_MASKED_TOKENS, outputs, 128, warps=4, stages=4, BLOCK_A=MOST_CHOSEN)


def compile_cases() -> Iterator[CompileCase]:
    """Return what ``block_product`` and ``masked_product`` launch."""
    # Of experts with biases, models are served in bfloat16.
    with_biases = ((torch.bfloat16, is_gated, True) for is_gated in (False, True))
    for dtype, is_gated, has_biases in (*product(_TYPES, (False, True), (False,)), *with_biases):
        kind = pointer(dtype)
        sizes = dict.fromkeys(("entries_per_row", "input_units", "output_units"), "i32")
        sizes |= dict.fromkeys(("alpha", "limit"), "fp32")
        pointers = dict.fromkeys(("x_ptr", "weights_ptr", "biases_ptr", "out_ptr"), kind)
        name = f"{kind[1:]} {'gate and up' if is_gated else 'down'}{' and biases' * has_biases}"
        constants = {
            "IS_GATED": is_gated,
            "IS_CLAMPED": is_gated and has_biases,
            "HAS_BIAS": has_biases,
            "UNIT": _unit(dtype),
        }
        for places in _PLACES if dtype.itemsize == 2 else _PLACES[:1]:
            everywhere = block_configs(dtype, places, is_gated=is_gated, is_wide=False)
            for config in block_configs(dtype, places, is_gated=is_gated, is_wide=True):
                tables = dict.fromkeys(("entries_ptr", "experts_ptr", "rows_ptr"), "*i32")
                yield CompileCase(
                    kernel=_block_product_kernel,
                    name=name,
                    config=config,
                    signature={**pointers, **tables, "blocks": "i32", **sizes},
                    constants=constants,
                    targets=tuple(SHARED_BYTES)[config not in everywhere :],
                    spill_bytes=8 if has_biases else 0,
                )
        if dtype.itemsize == 2:
            yield CompileCase(
                kernel=_masked_product_kernel,
                name=name,
                config=masked_config(is_gated=is_gated),
                signature={**pointers, "experts_ptr": "*i64", "tokens": "i32", "chosen": "i32", **sizes},
                constants=constants,
            )


def can_multiply(x_TI: Tensor, weights_EOI: Tensor) -> bool:
    """Return whether the kernels take rows and weights: on a GPU, of one type, experts not too many to sort by.

    Sizes of 16-bit weights have to be multiples of 16.
    """
    is_fit = weights_EOI.dtype == x_TI.dtype in _TYPES and len(weights_EOI) <= MOST_EXPERTS
    is_aligned = not any(size % _unit(x_TI.dtype) for size in weights_EOI.shape[1:])
    return is_fit and is_aligned and weights_EOI.is_contiguous() and uses_triton("moe_gemm", x_TI)


def can_mask(dtype: torch.dtype, tokens: int, chosen: int) -> bool:
    """Return whether the masked way takes so many tokens and choices: few, of 16-bit numbers."""
    return dtype.itemsize == 2 and tokens <= MOST_MASKED_TOKENS and chosen <= MOST_CHOSEN


def block_product(
    x_TI: Tensor,
    weights_EOI: Tensor,
    blocks: ExpertBlocks,
    *,
    entries: int,
    is_gated: bool,
    biases_EO: Tensor | None = None,
    gate: Gate = SILU,
) -> Tensor:
    """As ``expert_product_reference``, for entries in blocks.

    Shapes: x_TI [entries, or a divisor of it, inputs]; weights_EOI contiguous; returns [entries, outputs]
    Raises: ValueError where shapes do not fit
    """
    count, places = blocks.entries_BM.shape
    sizes, out_RO = _prepare(x_TI, weights_EOI, entries, is_gated, biases_EO, gate)
    launch_tuned(
        _block_product_kernel,
        lambda config: (count * -(-out_RO.shape[1] // config.tiles["BLOCK_N"]),),
        block_configs(x_TI.dtype, places, is_gated=is_gated, is_wide=_is_wide(x_TI.device)),
        (x_TI.dtype, tuple(weights_EOI.shape), next_power_of_2(entries)),
        x_ptr=x_TI.contiguous(),
        weights_ptr=weights_EOI,
        entries_ptr=blocks.entries_BM,
        experts_ptr=blocks.experts_B,
        rows_ptr=blocks.rows_B,
        out_ptr=out_RO,
        blocks=count,
        **sizes,
    )
    return out_RO


def masked_product(
    x_TI: Tensor,
    weights_EOI: Tensor,
    experts_TA: Tensor,
    *,
    is_gated: bool,
    biases_EO: Tensor | None = None,
    gate: Gate = SILU,
) -> Tensor:
    """As ``expert_product_reference``, where ``can_mask`` says so; a token's experts are different ones.

    Shapes: x_TI [tokens or entries, inputs]; weights_EOI contiguous; experts_TA [tokens, chosen] int64; returns
    [entries, outputs]
    Raises: ValueError where shapes do not fit
    """
    tokens, chosen = experts_TA.shape
    if not can_mask(x_TI.dtype, tokens, chosen) or experts_TA.dtype != torch.int64:
        raise ValueError(
            f"experts_TA must be int64, at most {[MOST_MASKED_TOKENS, MOST_CHOSEN]}, of 16-bit x_TI, "
            f"got {[tokens, chosen]} {experts_TA.dtype}, {x_TI.dtype}"
        )
    sizes, out_RO = _prepare(x_TI, weights_EOI, tokens * chosen, is_gated, biases_EO, gate)
    config = masked_config(is_gated=is_gated)
    launch(
        _masked_product_kernel,
        (-(-out_RO.shape[1] // config.tiles["BLOCK_N"]), len(weights_EOI) if tokens * chosen else 0),
        config,
        x_ptr=x_TI.contiguous(),
        weights_ptr=weights_EOI,
        experts_ptr=experts_TA.contiguous(),
        out_ptr=out_RO,
        tokens=tokens,
        chosen=chosen,
        **sizes,
    )
    return out_RO


def can_gate(gate: Gate) -> bool:
    """Return whether the kernels have an activation."""
    return gate.kind in (GateKind.SILU, GateKind.CLAMPED)


def _prepare(
    x_TI: Tensor, weights_EOI: Tensor, entries: int, is_gated: bool, biases_EO: Tensor | None, gate: Gate
) -> tuple[dict[str, Any], Tensor]:
    """Return what kernels are told of a product's sizes and end, and room for its result. Raises: ValueError"""
    rows, inputs = x_TI.shape
    if weights_EOI.dim() != 3 or weights_EOI.shape[2] != inputs or not weights_EOI.is_contiguous():
        raise ValueError(
            f"weights_EOI must be [experts, outputs, {inputs}] and contiguous, got {list(weights_EOI.shape)}"
        )
    if weights_EOI.dtype != x_TI.dtype or x_TI.dtype not in _TYPES:
        raise ValueError(f"weights_EOI and x_TI must be of one float type, got {weights_EOI.dtype} and {x_TI.dtype}")
    if not can_gate(gate):
        raise ValueError(f"gate: {gate.kind} is not multiplied with in one launch")
    if biases_EO is not None and (biases_EO.shape != weights_EOI.shape[:2] or biases_EO.dtype != x_TI.dtype):
        wanted = f"{list(weights_EOI.shape[:2])} {x_TI.dtype}"
        raise ValueError(f"biases_EO must be {wanted}, got {list(biases_EO.shape)} {biases_EO.dtype}")
    if is_gated and weights_EOI.shape[1] % 2:
        raise ValueError(f"weights_EOI must have gate and up, got {weights_EOI.shape[1]} outputs")
    if entries % max(rows, 1) or (entries and not rows):
        raise ValueError(f"x_TI has {rows} rows, which do not divide the {entries} entries")
    outputs, unit = weights_EOI.shape[1] // (2 if is_gated else 1), _unit(x_TI.dtype)
    if inputs % unit or outputs % unit:
        raise ValueError(f"weights_EOI of {x_TI.dtype} must be of multiples of {unit}, got {list(weights_EOI.shape)}")
    sizes = {
        "biases_ptr": weights_EOI if biases_EO is None else biases_EO.contiguous(),
        "entries_per_row": entries // max(rows, 1),
        "input_units": inputs // unit,
        "output_units": outputs // unit,
        "alpha": gate.alpha,
        "limit": gate.limit,
        "IS_GATED": is_gated,
        "IS_CLAMPED": is_gated and gate.kind is GateKind.CLAMPED,
        "HAS_BIAS": biases_EO is not None,
        "UNIT": unit,
    }
    return sizes, torch.empty((entries, outputs), dtype=x_TI.dtype, device=x_TI.device)
