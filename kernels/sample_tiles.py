"""Drawing by kernels, without a sort: one pass over the logits, and then a look at the few tiles that matter.

``_scan_kernel`` reads every logit once and keeps three numbers for each tile of 128 tokens: its best logit, an estimate
of its best score, and an estimate of its mass. ``_draw_kernel`` (``sample_walk`` has its steps) goes on from these, a
row a program: a tile is read again only if a token that decides can be in it.

Shapes: R rows, V vocabulary, T tiles of a row
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .compile_case import CompileCase, pointer
from .launch import KernelConfig, jit, launch, tl
from .sample_masses import mass_scale
from .sample_noise import row_keys
from .sample_settings import COLDEST_TEMPERATURE, DrawnTokens, DrawSettings
from .sample_walk import estimate_again, first_largest_of, floor_of_top_k, is_outside, times_of, winner

TILE = 128  # four numbers for each thread of a warp: a tile is reduced within one
_DOUBT = 1e-4  # of the whole mass: nearer to the cut than this, estimates do not decide; they are good to about 1e-5
_CHOOSE = KernelConfig(tiles={"BLOCK": 128}, num_warps=4, num_stages=1)
_SCAN = KernelConfig(tiles={"TILE": TILE, "GROUP": 16}, num_warps=4, num_stages=1)
ROW_SIZES = (1 << 17, 1 << 18)  # the largest vocabularies of the configurations for rows


@jit
def _scan_kernel(
    logits_ptr,
    numbers_ptr,
    integers_ptr,
    best_ptr,
    estimate_ptr,
    mass_ptr,
    rows,
    vocabulary,
    tiles,
    groups,
    row_stride,
    first_id,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program reads GROUP tiles of one row.

    The estimate of a score is never too low, see ``sample_walk``. Both estimates are relative to the tile's best logit.
    """
    program = tl.program_id(0)
    row, group = program // groups, program % groups
    tiles_G = group * GROUP + tl.arange(0, GROUP)
    columns_GT = tiles_G[:, None] * TILE + tl.arange(0, TILE)[None, :]
    x = tl.load(
        logits_ptr + row.to(tl.int64) * row_stride + columns_GT, mask=columns_GT < vocabulary, other=float("-inf")
    )
    # NaN counts as +inf: neither belongs to a distribution.
    best_G = tl.max(tl.where(x == x, x, float("inf")), axis=1)
    out_G = row.to(tl.int64) * tiles + tiles_G
    is_there_G = tiles_G < tiles
    tl.store(best_ptr + out_G, best_G, mask=is_there_G)
    temperature = tl.load(numbers_ptr + row)
    if temperature > 0:
        scale = (1.4426950408889634 / temperature).to(tl.float32)
        level_G = tl.where((best_G > float("-inf")) & (best_G < float("inf")), best_G, 0.0)
        decay_GT = (x - level_G[:, None]) * scale
        times_GT = times_of(decay_GT, tl.load(integers_ptr + row), columns_GT + first_id)
        tl.store(estimate_ptr + out_G, -tl.log2(tl.min(times_GT, axis=1)), mask=is_there_G)
        if tl.load(numbers_ptr + rows + row) < 1.0:
            tl.store(mass_ptr + out_G, tl.sum(tl.exp2(decay_GT), axis=1), mask=is_there_G)


@jit
def _draw_kernel(
    logits_ptr,
    numbers_ptr,
    integers_ptr,
    best_ptr,
    estimate_ptr,
    mass_ptr,
    list_ptr,
    ids_ptr,
    scores_ptr,
    rows,
    vocabulary,
    tiles,
    row_stride,
    first_id,
    mass_scale,
    doubt,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program draws the token of one row, and writes its score: NaN where the logits are no distribution.

    A nucleus is not searched for: the winner of all is drawn, then it is asked whether it lies in the nucleus. If it
    does not, nothing from its logit down does, and what is above it goes on. The most likely token always does.
    """
    row = tl.program_id(0)
    first_tile = row.to(tl.int64) * tiles
    the_row = (logits_ptr + row.to(tl.int64) * row_stride, list_ptr + first_tile, vocabulary)
    estimate_ptr += first_tile
    mass_ptr += first_tile
    tiles_T = tl.arange(0, TILES)
    is_there_T = tiles_T < tiles
    best_T = tl.load(best_ptr + first_tile + tiles_T, mask=is_there_T, other=float("-inf"))
    best, token, score = first_largest_of(the_row, best_T, TILE)
    temperature = tl.load(numbers_ptr + row)
    if (temperature > 0) & (score > float("-inf")):  # a score that is NaN is neither
        top_p = tl.load(numbers_ptr + rows + row)
        top_k = tl.load(integers_ptr + rows + row)
        scale = (1.4426950408889634 / temperature).to(tl.float32)
        drawing = (best, temperature, scale, tl.load(integers_ptr + row), first_id)
        cut = tl.full((), float("-inf"), tl.float32)
        floor = (best.to(tl.float64) + temperature * tl.load(numbers_ptr + 2 * rows + row)).to(tl.float32)
        if top_k > 0:
            floor = tl.maximum(floor, floor_of_top_k(the_row, best_T, best, top_k, TILES, TILE, GROUP))
        # What is relative to a tile's best becomes relative to the row's.
        level_T = (best_T - best) * scale
        estimate_T = tl.load(estimate_ptr + tiles_T, mask=is_there_T, other=float("-inf")) + level_T
        total = tl.full((), 0.0, tl.float32)
        if floor > cut:
            estimate_T, total = estimate_again(
                the_row, drawing, estimate_ptr, mass_ptr, best_T, floor, cut, TILES, TILE, GROUP
            )
        elif top_p < 1.0:
            total = tl.sum(tl.load(mass_ptr + tiles_T, mask=is_there_T, other=0.0) * tl.exp2(level_T), axis=0)
        is_open = temperature > 0
        while is_open:
            token, score, value = winner(the_row, drawing, estimate_T, floor, cut, TILES, TILE, GROUP)
            # Every turn cuts higher, so this ends.
            is_open = (top_p < 1.0) & (value > cut)
            if is_open:
                cut = value
                estimate_T, above = estimate_again(
                    the_row, drawing, estimate_ptr, mass_ptr, best_T, floor, cut, TILES, TILE, GROUP
                )
                is_open = is_outside(
                    the_row, drawing, best_T, floor, cut, above, total, top_p, mass_scale, doubt, TILES, TILE, GROUP
                )
    tl.store(ids_ptr + row, token.to(tl.int64) + first_id)
    tl.store(scores_ptr + row, score)


@jit
def _choose_kernel(scores_ptr, ids_ptr, best_ptr, chosen_ptr, slices, rows, BLOCK: tl.constexpr):
    """One program finds the best of all slices for BLOCK rows: its score, and its token, the lowest among equals."""
    rows_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_there = rows_B < rows
    best_B = tl.full((BLOCK,), float("-inf"), tl.float64)
    chosen_B = tl.zeros((BLOCK,), tl.int64)
    for each in range(0, slices):
        scores_B = tl.load(scores_ptr + each * rows + rows_B, mask=is_there, other=float("-inf"))
        ids_B = tl.load(ids_ptr + each * rows + rows_B, mask=is_there, other=0)
        # A score that is NaN stays the best, and is no token.
        is_better_B = (scores_B > best_B) | (scores_B != scores_B) | ((scores_B == best_B) & (ids_B < chosen_B))
        is_better_B = is_better_B & (best_B == best_B) & (scores_B != float("-inf"))
        best_B = tl.where(is_better_B, scores_B, best_B)
        chosen_B = tl.where(is_better_B & (scores_B == scores_B), ids_B, tl.where(is_better_B, 0, chosen_B))
    tl.store(best_ptr + rows_B, best_B, mask=is_there)
    tl.store(chosen_ptr + rows_B, chosen_B, mask=is_there)


def fits_tiles(logits_RV: Tensor) -> bool:
    """Return whether kernels take such logits: float32, a row's numbers side by side, at most 262,144 tokens."""
    is_plain = logits_RV.dtype == torch.float32 and logits_RV.stride(-1) == 1
    return is_plain and 0 < logits_RV.shape[1] <= ROW_SIZES[-1]


def row_config(vocabulary: int) -> KernelConfig:
    """Return how a row's tiles are held: all of them at once, eight read again side by side."""
    tiles = next(each for each in ROW_SIZES if vocabulary <= each) // TILE
    return KernelConfig(tiles={"TILES": tiles, "TILE": TILE, "GROUP": 8}, num_warps=4, num_stages=1)


def compile_cases() -> Iterator[CompileCase]:
    """Return what ``draw_by_tiles``, ``best_by_tiles`` and ``choose_by_kernel`` launch."""
    yield CompileCase(
        kernel=_choose_kernel,
        name="slices",
        config=_CHOOSE,
        signature={
            **dict.fromkeys(("scores_ptr", "best_ptr"), pointer(torch.float64)),
            **dict.fromkeys(("ids_ptr", "chosen_ptr"), pointer(torch.int64)),
            **dict.fromkeys(("slices", "rows"), "i32"),
        },
    )
    shared = {
        **dict.fromkeys(("logits_ptr", "best_ptr", "estimate_ptr", "mass_ptr"), pointer(torch.float32)),
        "numbers_ptr": pointer(torch.float64),
        "integers_ptr": pointer(torch.int64),
        **dict.fromkeys(("rows", "vocabulary", "tiles", "row_stride", "first_id"), "i32"),
    }
    aligned = ("vocabulary", "row_stride")
    yield CompileCase(
        kernel=_scan_kernel, name="scan", config=_SCAN, signature={**shared, "groups": "i32"}, aligned=aligned
    )
    for vocabulary in ROW_SIZES:
        yield CompileCase(
            kernel=_draw_kernel,
            name=f"up to {vocabulary} tokens",
            config=row_config(vocabulary),
            signature={
                **shared,
                "list_ptr": pointer(torch.int32),
                "ids_ptr": pointer(torch.int64),
                "scores_ptr": pointer(torch.float64),
                "mass_scale": "fp32",
                "doubt": "fp32",
            },
            aligned=aligned,
            # NVIDIA's assembler stops at 168 registers, and keeps a number or two of the row's settings in memory.
            spill_bytes=16,
        )


def upload_settings(settings: DrawSettings, vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the settings on a device, in one copy: temperatures, top_ps and logarithms of min_ps; keys and top_ks.

    A greedy row has temperature 0, and no filter. A filter that is off is 1, -inf or 0.

    Shapes: returns numbers_3R float64, integers_2R int64
    """
    rows = settings.temperatures.size
    packed_5R = np.empty((5, rows), np.int64)
    numbers_3R = packed_5R[:3].view(np.float64)
    is_greedy = settings.temperatures < COLDEST_TEMPERATURE
    numbers_3R[0] = np.where(is_greedy, 0.0, settings.temperatures)
    numbers_3R[1] = settings.top_ps
    numbers_3R[2] = -math.inf
    np.log(settings.min_ps, where=settings.min_ps > 0, out=numbers_3R[2])
    packed_5R[3] = row_keys(torch.from_numpy(settings.seeds), torch.from_numpy(settings.positions)).numpy()
    packed_5R[4] = np.where(settings.top_ks < vocabulary, settings.top_ks, 0)
    uploaded_5R = torch.from_numpy(packed_5R)
    if device.type == "cuda":
        uploaded_5R = uploaded_5R.pin_memory().to(device, non_blocking=True)
    return uploaded_5R[:3].view(torch.float64), uploaded_5R[3:]


def scan(logits_RV: Tensor, numbers_3R: Tensor, integers_2R: Tensor, *, first_id: int = 0) -> Tensor:
    """Return each tile's best logit (+inf where one is NaN), estimate and mass; these where the settings ask for them.

    Shapes: logits_RV [R, V] float32; numbers_3R, integers_2R as uploaded; returns [3, R, T] float32
    """
    rows, vocabulary = logits_RV.shape
    tiles, groups = -(-vocabulary // TILE), -(-vocabulary // (TILE * _SCAN.tiles["GROUP"]))
    partials_3RT = torch.empty((3, rows, tiles), dtype=torch.float32, device=logits_RV.device)
    launch(
        _scan_kernel,
        (rows * groups,),
        _SCAN,
        logits_ptr=logits_RV,
        numbers_ptr=numbers_3R,
        integers_ptr=integers_2R,
        best_ptr=partials_3RT[0],
        estimate_ptr=partials_3RT[1],
        mass_ptr=partials_3RT[2],
        rows=rows,
        vocabulary=vocabulary,
        tiles=tiles,
        groups=groups,
        row_stride=logits_RV.stride(0),
        first_id=first_id,
    )
    return partials_3RT


def draw_by_tiles(logits_RV: Tensor, settings: DrawSettings) -> DrawnTokens:
    """As ``sample.draw``."""
    scores_R, ids_R = best_by_tiles(logits_RV, settings, first_id=0)
    return DrawnTokens(token_ids_R=ids_R, valid_R=scores_R.isfinite())


def best_by_tiles(logits_RV: Tensor, settings: DrawSettings, *, first_id: int) -> tuple[Tensor, Tensor]:
    """As ``sample.draw_best``, with filters within the slice."""
    rows, vocabulary = logits_RV.shape
    device = logits_RV.device
    tiles = -(-vocabulary // TILE)
    numbers_3R, integers_2R = upload_settings(settings, vocabulary, device)
    partials_3RT = scan(logits_RV, numbers_3R, integers_2R, first_id=first_id)
    list_RT = torch.empty((rows, tiles), dtype=torch.int32, device=device)
    ids_R = torch.empty(rows, dtype=torch.int64, device=device)
    scores_R = torch.empty(rows, dtype=torch.float64, device=device)
    launch(
        _draw_kernel,
        (rows,),
        row_config(vocabulary),
        logits_ptr=logits_RV,
        numbers_ptr=numbers_3R,
        integers_ptr=integers_2R,
        best_ptr=partials_3RT[0],
        estimate_ptr=partials_3RT[1],
        mass_ptr=partials_3RT[2],
        rows=rows,
        vocabulary=vocabulary,
        tiles=tiles,
        row_stride=logits_RV.stride(0),
        first_id=first_id,
        list_ptr=list_RT,
        ids_ptr=ids_R,
        scores_ptr=scores_R,
        mass_scale=mass_scale(vocabulary),
        doubt=_DOUBT,
    )
    return scores_R, ids_R


def choose_by_kernel(scores_SR: Tensor, ids_SR: Tensor) -> DrawnTokens:
    """As ``sample.choose_best``."""
    slices, rows = scores_SR.shape
    best_R = torch.empty(rows, dtype=torch.float64, device=scores_SR.device)
    chosen_R = torch.empty(rows, dtype=torch.int64, device=scores_SR.device)
    launch(
        _choose_kernel,
        (-(-rows // _CHOOSE.tiles["BLOCK"]),),
        _CHOOSE,
        scores_ptr=scores_SR.contiguous(),
        ids_ptr=ids_SR.contiguous(),
        best_ptr=best_R,
        chosen_ptr=chosen_R,
        slices=slices,
        rows=rows,
    )
    return DrawnTokens(token_ids_R=chosen_R, valid_R=best_R.isfinite())
