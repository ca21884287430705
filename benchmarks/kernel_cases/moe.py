"""Mixtures of experts: whole MLPs of decoding and of prefill, and their parts: routing, sorting, the weighted sum.

Tokens choose experts at random, all as often. ``bytes`` counts the weights of the experts that are chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from slipstream.kernels.moe_combine import weighted_sum, weighted_sum_reference
from slipstream.kernels.moe_mlp import StackedExperts, moe_mlp, moe_mlp_stacked
from slipstream.kernels.moe_route import Routing, choose_experts, choose_experts_reference
from slipstream.kernels.moe_sort import sort_by_expert, sort_into_blocks

from .case import KernelCase, Run, by_torch

_DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """The sizes of a layer, and the numbers of tokens that are measured."""

    experts: int
    chosen: int
    hidden: int
    intermediate: int
    tokens: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.chosen} of {self.experts}, {self.hidden} x {self.intermediate}"


_ON_GPU = (
    _Model(experts=128, chosen=8, hidden=2048, intermediate=768, tokens=(1, 32, 128, 8192)),
    _Model(experts=8, chosen=2, hidden=4096, intermediate=14336, tokens=(1, 32, 4096)),
    _Model(experts=32, chosen=8, hidden=7168, intermediate=2048, tokens=(32, 4096)),
)
_ON_CPU = (_Model(experts=8, chosen=2, hidden=512, intermediate=256, tokens=(1, 64)),)


def cases(device: torch.device) -> Iterator[KernelCase]:
    """Yield layers of three models, from many small experts to few large ones."""
    for model in _ON_GPU if device.type == "cuda" else _ON_CPU:
        yield from _mlps(model, device)
    model = (_ON_GPU if device.type == "cuda" else _ON_CPU)[0]
    yield from _parts(model, model.tokens[-1], device)


def _mlps(model: _Model, device: torch.device) -> Iterator[KernelCase]:
    gate_up_shape = (model.experts, 2 * model.intermediate, model.hidden)
    experts = StackedExperts(
        gate_up_EOH=torch.randn(gate_up_shape, dtype=_DTYPE, device=device) / 64,
        down_EHI=torch.randn((model.experts, model.hidden, model.intermediate), dtype=_DTYPE, device=device) / 64,
    )
    for tokens in model.tokens:
        x_TH = torch.randn((tokens, model.hidden), dtype=_DTYPE, device=device)
        logits_TE = torch.randn((tokens, model.experts), device=device)
        weights_TA, experts_TA = choose_experts(logits_TE, Routing(top_k=model.chosen, normalize=True))
        entries = tokens * model.chosen
        one_expert = 3 * model.hidden * model.intermediate
        read = len(experts_TA.unique()) * one_expert * _DTYPE.itemsize
        yield KernelCase(
            operation="moe_mlp",
            shape=f"{tokens} tokens, {model}",
            dtype=_DTYPE,
            run=partial(_mlp, x_TH, weights_TA, experts_TA, experts),
            bytes=read + 2 * x_TH.nbytes,
            flops=2 * entries * one_expert,
            baselines=_baselines(x_TH, weights_TA, experts_TA, experts),
            wanted=0.6 if entries >= 96 * model.experts else None,
        )


def _mlp(x_TH: Tensor, weights_TA: Tensor, experts_TA: Tensor, experts: StackedExperts) -> Tensor:
    if experts.can_multiply(x_TH):
        return moe_mlp_stacked(x_TH, weights_TA, experts_TA, experts)
    return _one_by_one(x_TH, weights_TA, experts_TA, experts)


def _baselines(x_TH: Tensor, weights_TA: Tensor, experts_TA: Tensor, experts: StackedExperts) -> dict[str, Run]:
    arguments = (x_TH, weights_TA, experts_TA, experts)
    return {"eager": partial(_one_by_one, *arguments), "grouped_mm": partial(_by_grouped_mm, *arguments)}


def _one_by_one(x_TH: Tensor, weights_TA: Tensor, experts_TA: Tensor, experts: StackedExperts) -> Tensor:
    gate_up = [partial(_multiply, weight_OH) for weight_OH in experts.gate_up_EOH]
    down = [partial(_multiply, weight_HI) for weight_HI in experts.down_EHI]
    return moe_mlp(x_TH, weights_TA, experts_TA, gate_up, down)


def _multiply(weight_OI: Tensor, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
    return functional.linear(x_TI, weight_OI, bias_O)


def _by_grouped_mm(x_TH: Tensor, weights_TA: Tensor, experts_TA: Tensor, experts: StackedExperts) -> Tensor:
    """Return the same by torch's product of groups of rows."""
    chosen = experts_TA.shape[1]
    order_R, counts_E = sort_by_expert(experts_TA.flatten(), len(experts.down_EHI))
    ends_E = counts_E.cumsum(0).to(torch.int32)
    rows_RH = x_TH.index_select(0, torch.div(order_R, chosen, rounding_mode="floor"))
    gate_RI, up_RI = functional.grouped_mm(rows_RH, experts.gate_up_EOH.mT, offs=ends_E).chunk(2, dim=-1)
    results_RH = functional.grouped_mm(functional.silu(gate_RI) * up_RI, experts.down_EHI.mT, offs=ends_E)
    by_choice_RH = torch.empty_like(results_RH).index_copy_(0, order_R, results_RH)
    return (by_choice_RH.view(len(x_TH), chosen, -1).float() * weights_TA[:, :, None]).sum(1).to(x_TH.dtype)


def _parts(model: _Model, tokens: int, device: torch.device) -> Iterator[KernelCase]:
    logits_TE = torch.randn((tokens, model.experts), dtype=_DTYPE, device=device)
    routing = Routing(top_k=model.chosen, normalize=True)
    weights_TA, experts_TA = choose_experts(logits_TE, routing)
    shape = f"{tokens} tokens, {model}"
    yield KernelCase(
        operation="moe_route",
        shape=shape,
        dtype=_DTYPE,
        run=partial(choose_experts, logits_TE, routing),
        bytes=logits_TE.nbytes + weights_TA.nbytes + experts_TA.nbytes,
        baselines=by_torch(device, choose_experts_reference, logits_TE, routing),
    )
    if device.type == "cuda":
        experts_R = experts_TA.flatten()
        yield KernelCase(
            operation="moe_sort",
            shape=shape,
            dtype=experts_R.dtype,
            run=partial(sort_into_blocks, experts_R, model.experts, 128),
            bytes=2 * experts_R.nbytes + 4 * len(experts_R),
            baselines={"eager": partial(sort_by_expert, experts_R, model.experts)},
        )
    by_choice_TAH = torch.randn((tokens, model.chosen, model.hidden), dtype=_DTYPE, device=device)
    yield KernelCase(
        operation="moe_combine",
        shape=shape,
        dtype=_DTYPE,
        run=partial(weighted_sum, by_choice_TAH, weights_TA),
        bytes=by_choice_TAH.nbytes + by_choice_TAH.nbytes // model.chosen + weights_TA.nbytes,
        baselines=by_torch(device, weighted_sum_reference, by_choice_TAH, weights_TA),
        wanted=0.8 if tokens > 1024 else None,
    )
