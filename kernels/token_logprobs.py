"""Log-probabilities of given tokens, their ranks, and the most likely tokens.

Two ways come to the same numbers: torch's operations, and kernels that sort nothing. Both add masses as integers.

Shapes: R rows, V vocabulary, K the most likely tokens, T tiles of a row (``sample_tiles``), G groups of tiles
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .backends import uses_triton
from .compile_case import CompileCase, pointer
from .launch import KernelConfig, jit, launch, tl
from .sample_masses import chunk_rows, mass_scale, masses, masses_of
from .sample_tiles import ROW_SIZES, fits_tiles, row_config, scan
from .sample_walk import order_of


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobRows:
    """Log-probabilities of given tokens, and of the most likely ones from the top down (lowest id first among equals).

    Shapes: logprobs_R [R] float32, ranks_R [R] int64 (from 1), top_ids_RK [R, K] int64, top_logprobs_RK [R, K] float32
    """

    logprobs_R: Tensor
    ranks_R: Tensor
    top_ids_RK: Tensor
    top_logprobs_RK: Tensor


# Exponentials in float64 take registers: eight logits a thread.
_MASS = KernelConfig(tiles={"BLOCK": 2048}, num_warps=8, num_stages=1)


@jit
def _mass_kernel(
    logits_ptr,
    token_ids_ptr,
    best_ptr,
    masses_ptr,
    above_ptr,
    vocabulary,
    groups,
    row_stride,
    mass_scale,
    BLOCK: tl.constexpr,
):
    """One program adds the masses of BLOCK tokens of one row, and counts what is above the row's given token."""
    program = tl.program_id(0)
    row, group = program // groups, program % groups
    row_ptr = logits_ptr + row.to(tl.int64) * row_stride
    columns = group * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(row_ptr + columns, mask=columns < vocabulary, other=float("-inf"))
    temperature = tl.full((), 1.0, tl.float64)
    masses = masses_of(x, tl.load(best_ptr + row), temperature, mass_scale)
    is_above = x > tl.load(row_ptr + tl.load(token_ids_ptr + row))
    tl.store(masses_ptr + program, tl.sum(masses, axis=0))
    tl.store(above_ptr + program, tl.sum(is_above.to(tl.int32), axis=0))


@jit
def _logprob_kernel(
    logits_ptr,
    token_ids_ptr,
    best_ptr,
    masses_ptr,
    above_ptr,
    logprobs_ptr,
    ranks_ptr,
    top_ids_ptr,
    top_logprobs_ptr,
    vocabulary,
    tiles,
    groups,
    row_stride,
    mass_scale,
    k,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """One program does the rest for one row: the given token's log-probability, and the k most likely, one by one.

    Tokens are in the order of int64 numbers: the logit's place among all float32, and then the lower id first. Tiles
    are in the order of what is left of them; the one that comes first is read again, and has the next token.
    """
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * row_stride
    tiles_T = tl.arange(0, TILES)
    best_T = tl.load(best_ptr + row.to(tl.int64) * tiles + tiles_T, mask=tiles_T < tiles, other=float("-inf"))
    groups_G = tl.arange(0, GROUPS)
    mass = tl.sum(tl.load(masses_ptr + row * groups + groups_G, mask=groups_G < groups, other=0), axis=0)
    above = tl.sum(tl.load(above_ptr + row * groups + groups_G, mask=groups_G < groups, other=0), axis=0)
    normalizer = tl.max(best_T, axis=0).to(tl.float64) + tl.log(mass.to(tl.float64) / mass_scale)
    chosen = tl.load(row_ptr + tl.load(token_ids_ptr + row)).to(tl.float64)
    tl.store(logprobs_ptr + row, (chosen - normalizer).to(tl.float32))
    tl.store(ranks_ptr + row, above.to(tl.int64) + 1)

    # A tile number or a column is at most 2**18, so it goes below the place as it is, counted from the end.
    last = 0x7FFFFFFF
    nothing = tl.full((), -0x7FFFFFFFFFFFFFFF, tl.int64)
    left_T = (order_of(best_T + 0.0).to(tl.int64) << 32) + (last - tiles_T)
    left_T = tl.where(tiles_T < tiles, left_T, nothing)
    before = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)
    for place in range(0, k):
        tile = last - (tl.max(left_T, axis=0) & 0xFFFFFFFF).to(tl.int32)
        columns = tile * TILE + tl.arange(0, TILE)
        x = tl.load(row_ptr + columns, mask=columns < vocabulary, other=0.0)
        tokens = (order_of(x + 0.0).to(tl.int64) << 32) + (last - columns)
        tokens = tl.where((columns < vocabulary) & (tokens < before), tokens, nothing)
        before = tl.max(tokens, axis=0)
        # Where a logit is no number the order is none, and nothing may be left.
        column = tl.minimum(last - (before & 0xFFFFFFFF).to(tl.int32), vocabulary - 1)
        tl.store(top_ids_ptr + row.to(tl.int64) * k + place, column.to(tl.int64))
        logit = tl.load(row_ptr + column).to(tl.float64)
        tl.store(top_logprobs_ptr + row.to(tl.int64) * k + place, (logit - normalizer).to(tl.float32))
        following = tl.max(tl.where(tokens < before, tokens, nothing), axis=0)
        left = tl.where(following > nothing, ((following >> 32) << 32) + (last - tile), nothing)
        left_T = tl.where(tiles_T == tile, left, left_T)


def _rest_config(vocabulary: int) -> KernelConfig:
    row = row_config(vocabulary).tiles
    groups = row["TILES"] * row["TILE"] // _MASS.tiles["BLOCK"]
    return KernelConfig(tiles={"TILES": row["TILES"], "TILE": row["TILE"], "GROUPS": groups}, num_stages=1)


def compile_cases() -> Iterator[CompileCase]:
    """Return what ``token_logprobs`` launches beside the scan of ``sample_tiles``."""
    shared = {
        **dict.fromkeys(("logits_ptr", "best_ptr"), pointer(torch.float32)),
        **dict.fromkeys(("token_ids_ptr", "masses_ptr"), pointer(torch.int64)),
        "above_ptr": pointer(torch.int32),
        **dict.fromkeys(("vocabulary", "groups", "row_stride"), "i32"),
        "mass_scale": "fp32",
    }
    aligned = ("vocabulary", "row_stride")
    yield CompileCase(kernel=_mass_kernel, name="masses", config=_MASS, signature=shared, aligned=aligned)
    for vocabulary in ROW_SIZES:
        yield CompileCase(
            kernel=_logprob_kernel,
            name=f"up to {vocabulary} tokens",
            config=_rest_config(vocabulary),
            signature={
                **shared,
                **dict.fromkeys(("logprobs_ptr", "top_logprobs_ptr"), pointer(torch.float32)),
                **dict.fromkeys(("ranks_ptr", "top_ids_ptr"), pointer(torch.int64)),
                **dict.fromkeys(("tiles", "k"), "i32"),
            },
            aligned=aligned,
        )


def token_logprobs_reference(logits_RV: Tensor, token_ids_R: Tensor, k: int) -> LogprobRows:
    """Return log-softmax of the model's own logits: each row's given token with its rank, and its k most likely.

    The rank is one more than the number of tokens strictly more likely. ``k`` beyond the vocabulary means all of it.

    Shapes: logits_RV [R, V] float32, not edited; token_ids_R [R] int64
    """
    logprobs_RV = logits_RV.double().log_softmax(dim=-1)
    top = logits_RV.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    chosen_R1 = token_ids_R.unsqueeze(-1)
    return LogprobRows(
        logprobs_R=logprobs_RV.gather(1, chosen_R1).squeeze(-1).float(),
        ranks_R=(logits_RV > logits_RV.gather(1, chosen_R1)).sum(dim=-1) + 1,
        top_ids_RK=top,
        top_logprobs_RK=logprobs_RV.gather(1, top).float(),
    )


def token_logprobs(logits_RV: Tensor, token_ids_R: Tensor, k: int) -> LogprobRows:
    """As ``token_logprobs_reference``."""
    if uses_triton("sample", logits_RV) and fits_tiles(logits_RV):
        return _by_tiles(logits_RV, token_ids_R, min(k, logits_RV.shape[1]))
    return _by_torch(logits_RV, token_ids_R, k)


def _by_tiles(logits_RV: Tensor, token_ids_R: Tensor, k: int) -> LogprobRows:
    rows, vocabulary = logits_RV.shape
    device = logits_RV.device
    groups = -(-vocabulary // _MASS.tiles["BLOCK"])
    # Temperature 0: of the scan, only the best logits are wanted.
    nothing_3R = torch.zeros((3, rows), dtype=torch.int64, device=device)
    best_RT = scan(logits_RV, nothing_3R.view(torch.float64), nothing_3R)[0]
    made = LogprobRows(
        logprobs_R=torch.empty(rows, dtype=torch.float32, device=device),
        ranks_R=torch.empty(rows, dtype=torch.int64, device=device),
        top_ids_RK=torch.empty((rows, k), dtype=torch.int64, device=device),
        top_logprobs_RK=torch.empty((rows, k), dtype=torch.float32, device=device),
    )
    shared = {
        "logits_ptr": logits_RV,
        "token_ids_ptr": token_ids_R.contiguous(),
        "masses_ptr": torch.empty((rows, groups), dtype=torch.int64, device=device),
        "above_ptr": torch.empty((rows, groups), dtype=torch.int32, device=device),
        "vocabulary": vocabulary,
        "groups": groups,
        "row_stride": logits_RV.stride(0),
        "mass_scale": mass_scale(vocabulary),
    }
    launch(_mass_kernel, (rows * groups,), _MASS, **shared, best_ptr=best_RT.amax(-1))
    launch(
        _logprob_kernel,
        (rows,),
        _rest_config(vocabulary),
        **shared,
        best_ptr=best_RT,
        tiles=best_RT.shape[1],
        logprobs_ptr=made.logprobs_R,
        ranks_ptr=made.ranks_R,
        top_ids_ptr=made.top_ids_RK,
        top_logprobs_ptr=made.top_logprobs_RK,
        k=k,
    )
    return made


def _by_torch(logits_RV: Tensor, token_ids_R: Tensor, k: int) -> LogprobRows:
    vocabulary = logits_RV.shape[1]
    best_R = logits_RV.amax(dim=-1)
    ones_R = torch.ones_like(best_R, dtype=torch.float64)
    masses_R = torch.empty_like(token_ids_R)
    for start in range(0, logits_RV.shape[0], step := chunk_rows(logits_RV)):
        part = slice(start, start + step)
        masses_R[part] = masses(logits_RV[part], best_R[part], ones_R[part]).sum(dim=-1)
    normalizer_R = best_R.double() + torch.log(masses_R.double() / mass_scale(vocabulary))
    chosen_R1 = logits_RV.gather(1, token_ids_R.unsqueeze(-1))
    top_ids_RK = _largest(logits_RV, min(k, vocabulary))
    top_logits_RK = logits_RV.gather(1, top_ids_RK)
    return LogprobRows(
        logprobs_R=(chosen_R1.squeeze(-1).double() - normalizer_R).float(),
        ranks_R=(logits_RV > chosen_R1).sum(dim=-1) + 1,
        top_ids_RK=top_ids_RK,
        top_logprobs_RK=(top_logits_RK.double() - normalizer_R.unsqueeze(-1)).float(),
    )


def _largest(logits_RV: Tensor, k: int) -> Tensor:
    """Return the ids of the k largest logits in order, the lowest id first among equals."""
    vocabulary = logits_RV.shape[1]
    if k == 0:
        return torch.empty((logits_RV.shape[0], 0), dtype=torch.int64, device=logits_RV.device)
    top = logits_RV.topk(min(k + 1, vocabulary), dim=-1)
    ids_RK = top.indices[:, :k].clone()
    tied_N = (top.values[:, 1:] == top.values[:, :-1]).any(dim=-1).nonzero().squeeze(-1)
    if tied_N.numel():
        # topk leaves the order of equals open. Unique integers do not: the float's bits made monotonic, then the id.
        bits_NV = (logits_RV[tied_N] + 0.0).view(torch.int32)
        ordered_NV = (bits_NV ^ ((bits_NV >> 31) & 0x7FFFFFFF)).long()
        descending_V = torch.arange(vocabulary - 1, -1, -1, device=logits_RV.device)
        ids_RK[tied_N] = ((ordered_NV << 32) + descending_V).topk(k, dim=-1).indices
    return ids_RK
