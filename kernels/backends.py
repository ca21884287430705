"""The one table of which code carries out which operation, where.

Every operation asks ``backend_for`` with its name and a tensor. Without a choice of one's own, ``Backend.TRITON`` is
taken on GPUs, on a CPU the fastest that is there. A choice is made once for a process, before models are loaded
(``use``), from a list such as ``"torch"`` or ``"norm=torch,sample=triton"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from .launch import HAS_TRITON, runs_triton_on


class Backend(StrEnum):
    """What an operation is made of: torch's operations (compiled C on a CPU, where there is any), or Triton."""

    TORCH = "torch"
    TRITON = "triton"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """A row of the table.

    ``batch_invariant``: whether a row of a batch has the same bits whatever else is in it, by backend, as deterministic
    engines call the operation. Others may take what is faster for the rows at hand: tiles by their number, spans that
    several of them share.
    """

    name: str
    summary: str
    batch_invariant: Mapping[Backend, bool]


_BOTH = {Backend.TORCH: True, Backend.TRITON: True}
_TRITON_ALONE = {Backend.TORCH: False, Backend.TRITON: True}
"""Products with weights: by Triton when asked for one way for any number of rows, as deterministic engines do."""

_NEITHER = {Backend.TORCH: False, Backend.TRITON: False}

TABLE: Mapping[str, Operation] = {
    each.name: each
    for each in (
        Operation(
            name="activation", summary="gated activations, SwiGLU also into 8-bit numbers", batch_invariant=_BOTH
        ),
        Operation(name="attention", summary="paged attention, decoding and prefill", batch_invariant=_BOTH),
        Operation(name="kv_blocks", summary="KV blocks copied and cleared", batch_invariant=_BOTH),
        Operation(name="kv_pack", summary="KV gathered for a transfer, and scattered", batch_invariant=_BOTH),
        Operation(
            name="linear_fixed",
            summary="the product with weights in one order of sums, for deterministic",
            batch_invariant=_TRITON_ALONE,
        ),
        Operation(name="linear_w4a16", summary="4-bit weights, 16-bit activations", batch_invariant=_TRITON_ALONE),
        Operation(
            name="linear_w8a8", summary="8-bit weights and activations, int8 or fp8", batch_invariant=_TRITON_ALONE
        ),
        Operation(name="mla", summary="multi-head latent attention, decoding and prefill", batch_invariant=_BOTH),
        Operation(name="moe_combine", summary="the weighted sum over a token's experts", batch_invariant=_BOTH),
        Operation(name="moe_gemm", summary="experts' products, all in one launch", batch_invariant=_NEITHER),
        Operation(name="moe_route", summary="the choice of experts", batch_invariant=_BOTH),
        Operation(name="norm", summary="RMSNorm, with the residual addition", batch_invariant=_BOTH),
        Operation(name="quantize_rows", summary="rows as 8-bit numbers, each with a scale", batch_invariant=_BOTH),
        Operation(name="rope_kv", summary="rotary positions, and KV written to its blocks", batch_invariant=_BOTH),
        Operation(name="sample", summary="edits of logits, draws, log-probabilities", batch_invariant=_BOTH),
        Operation(name="tree_sum", summary="parts of a sum, added up as a tree", batch_invariant=_BOTH),
    )
}
"""All operations that there is a choice for, by name."""

_chosen: dict[str, Backend] = {}


def backend_for(operation: str, x: Tensor) -> Backend:
    """Return what carries out an operation on ``x``'s device."""
    return backend_on(operation, x.device)


def backend_on(operation: str, device: torch.device) -> Backend:
    """Return what carries out an operation on a device."""
    chosen = _chosen.get(operation)
    if chosen is not None:
        return chosen
    assert operation in TABLE, operation
    return Backend.TRITON if device.type == "cuda" and HAS_TRITON else Backend.TORCH


def uses_triton(operation: str, x: Tensor) -> bool:
    """Return whether an operation on ``x`` is carried out by its kernel."""
    return uses_triton_on(operation, x.device)


def uses_triton_on(operation: str, device: torch.device) -> bool:
    """Return whether an operation on a device is carried out by its kernel."""
    return backend_on(operation, device) is Backend.TRITON and runs_triton_on(device)


def parse_choice(text: str) -> dict[str, Backend]:
    """Return the backend of each operation that a list chooses: "auto", a backend, or operation=backend with commas.

    Raises: ValueError naming what is not known
    """
    chosen: dict[str, Backend] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        operation, _, name = entry.rpartition("=")
        if name not in (*Backend, "auto"):
            raise ValueError(f"{name!r} is no backend: use one of auto, {', '.join(Backend)}")
        if operation and operation not in TABLE:
            raise ValueError(f"{operation!r} is no operation: use one of {', '.join(TABLE)}")
        for each in (operation,) if operation else TABLE:
            if name == "auto":
                chosen.pop(each, None)
            else:
                chosen[each] = Backend(name)
    return chosen


def use(text: str) -> None:
    """Choose backends for this process from now on, in place of what was chosen before. Raises: ValueError"""
    chosen = parse_choice(text)
    _chosen.clear()
    _chosen.update(chosen)
