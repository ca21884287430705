"""Sampling over vocabularies of 32k and 128k: without filters, with each of them, with log-probabilities and masks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from slipstream.kernels.sample import draw
from slipstream.kernels.sample_settings import DrawSettings
from slipstream.kernels.token_logprobs import token_logprobs, token_logprobs_reference
from slipstream.kernels.token_mask import keep_allowed_, keep_allowed_reference

from .case import KernelCase, by_torch

_FILTERS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top_p 0.9": {"top_p": 0.9},
    "top_k 50": {"top_k": 50},
    "top_k 50, top_p 0.9, min_p 0.05": {"top_k": 50, "top_p": 0.9, "min_p": 0.05},
}


def cases(device: torch.device) -> Iterator[KernelCase]:
    """Yield batches of decoding; half the roof is two passes over the logits."""
    shapes = ((1, 128_256), (32, 128_256), (128, 128_256)) if device.type == "cuda" else ((8, 32_000),)
    for rows, vocabulary in shapes:
        # About as peaked as a language model's.
        logits_RV = torch.randn(rows, vocabulary, device=device) * 3
        # Small batches wait for launches.
        wanted = 0.5 if rows > 32 else None
        shape = f"{rows} x {vocabulary}"
        for name, filters in _FILTERS.items():
            yield KernelCase(
                operation=f"draw, {name}",
                shape=shape,
                dtype=torch.float32,
                run=partial(draw, logits_RV, _settings(rows, **filters)),
                bytes=logits_RV.nbytes,
                baselines=by_torch(device, _sorted_draw, logits_RV, filters),
                wanted=wanted,
            )
        ids_R = logits_RV.argmax(-1)
        yield KernelCase(
            operation="token_logprobs, k 5",
            shape=shape,
            dtype=torch.float32,
            run=partial(token_logprobs, logits_RV, ids_R, 5),
            bytes=logits_RV.nbytes,
            baselines=by_torch(device, token_logprobs_reference, logits_RV, ids_R, 5),
        )
        masks_RW = torch.randint(-(2**31), 2**31, (rows, vocabulary // 32), device=device).to(torch.int32)
        rows_R = torch.arange(rows, device=device)
        yield KernelCase(
            operation="keep_allowed_",
            shape=shape,
            dtype=torch.float32,
            run=partial(keep_allowed_, logits_RV.clone(), rows_R, masks_RW),
            # Half of the tokens are barred; their logits are written, and lines of memory are written whole.
            bytes=logits_RV.nbytes + masks_RW.nbytes,
            baselines=by_torch(device, keep_allowed_reference, logits_RV.clone(), rows_R, masks_RW),
        )


def _settings(
    rows: int, temperature: float = 0.8, top_p: float = 1.0, top_k: float = 0.0, min_p: float = 0.0
) -> DrawSettings:
    return DrawSettings(
        temperatures=np.full(rows, temperature),
        top_ps=np.full(rows, top_p),
        top_ks=np.full(rows, int(top_k), np.int64),
        min_ps=np.full(rows, min_p),
        seeds=np.arange(rows, dtype=np.int64),
        positions=np.full(rows, 100, np.int64),
    )


def _sorted_draw(logits_RV: Tensor, filters: dict[str, float]) -> Tensor:
    """Draw as it is often written: all logits sorted, a cumulated softmax, exponential noise."""
    if filters.get("temperature") == 0.0:
        return logits_RV.argmax(-1)
    sorted_RV, order_RV = (logits_RV / 0.8).sort(dim=-1, descending=True)
    chances_RV = sorted_RV.softmax(-1)
    out_RV = chances_RV.cumsum(-1) - chances_RV > filters.get("top_p", 1.0)
    out_RV |= chances_RV < filters.get("min_p", 0.0) * chances_RV[:, :1]
    if "top_k" in filters:
        out_RV[:, int(filters["top_k"]) :] = True
    chances_RV = chances_RV.masked_fill(out_RV, 0.0)
    place_R1 = (chances_RV / torch.empty_like(chances_RV).exponential_()).argmax(-1, keepdim=True)
    return order_RV.gather(1, place_R1)
