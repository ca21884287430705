"""The choice of experts for each token: scores of all experts, the best of them, their weights.

Shapes: T tokens, H hidden size, E experts, A chosen experts per token, G groups of experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from .backends import uses_triton
from .compile_case import CompileCase, pointer
from .launch import KernelConfig, jit, launch, tl
from .linear import linear


class Score(StrEnum):
    """What a router's logits become: probabilities over all experts, or each expert's own."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How experts are chosen.

    - ``normalize``: a token's weights add up to ``scaling``; otherwise they are ``scaling`` times the scores.
    - ``groups``: experts stand in so many groups of equal size, one after the other, and only those of the
      ``top_groups`` best groups can be chosen. A group is as good as its best expert, or, with ``sums_two``, as its two
      best together.

    Raises: ValueError naming what does not fit
    """

    top_k: int
    normalize: bool
    score: Score = Score.SOFTMAX
    groups: int = 1
    top_groups: int = 1
    sums_two: bool = False
    scaling: float = 1.0

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if not 1 <= self.top_groups <= self.groups:
            raise ValueError(f"top_groups must be from 1 to the {self.groups} groups, got {self.top_groups}")

    def check(self, logits_TE: Tensor, bias_E: Tensor | None) -> None:
        """Raise ValueError unless experts can be chosen from these logits."""
        experts = logits_TE.shape[-1]
        if logits_TE.dim() != 2:
            raise ValueError(f"logits_TE must be [tokens, experts], got {list(logits_TE.shape)}")
        if experts % self.groups:
            raise ValueError(f"logits_TE has {experts} experts, which {self.groups} groups do not divide")
        if self.top_k > experts // self.groups * self.top_groups:
            raise ValueError(f"top_k {self.top_k} is more than the experts of {self.top_groups} groups of logits_TE")
        if self.sums_two and experts // self.groups < 2:
            raise ValueError(f"sums_two needs two experts in each group, logits_TE has {experts // self.groups}")
        if bias_E is not None and (bias_E.shape != (experts,) or bias_E.dtype != torch.float32):
            raise ValueError(f"bias_E must be [{experts}] float32, got {list(bias_E.shape)} {bias_E.dtype}")


def choose_experts_reference(
    logits_TE: Tensor, routing: Routing, bias_E: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (weights, experts) of each token, best expert first; of equal ones the first is the better.

    ``bias_E`` is added to scores for the choice alone, not to the weights (it balances loads).

    Shapes: logits_TE [tokens, experts] any float type; bias_E [experts] float32; weights [tokens, top_k] float32;
    experts [tokens, top_k] int64
    Source: Mixtral (arXiv 2401.04088), section 2.1; groups and bias: DeepSeek-V2 (arXiv 2405.04434), section 2.2.2,
    and DeepSeek-V3 (arXiv 2412.19437), section 2.1.2
    """
    routing.check(logits_TE, bias_E)
    scores_TE = _scores(logits_TE, routing)
    wanted_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if routing.groups > 1:
        wanted_TGS = wanted_TE.unflatten(1, (routing.groups, -1))
        best_TG = wanted_TGS.topk(2 if routing.sums_two else 1, dim=-1).values.sum(-1)
        chosen_TG = torch.sort(best_TG, dim=-1, descending=True, stable=True).indices[:, : routing.top_groups]
        out_TG = torch.ones_like(best_TG, dtype=torch.bool).scatter_(1, chosen_TG, value=False)
        wanted_TE = wanted_TGS.masked_fill(out_TG[:, :, None], -torch.inf).flatten(1)
    experts_TA = torch.sort(wanted_TE, dim=-1, descending=True, stable=True).indices[:, : routing.top_k]
    return _weights(scores_TE, experts_TA, routing), experts_TA


def _scores(logits_TE: Tensor, routing: Routing) -> Tensor:
    if routing.score is Score.SIGMOID:
        return torch.sigmoid(logits_TE.float())
    return torch.softmax(logits_TE, dim=-1, dtype=torch.float32)


def _weights(scores_TE: Tensor, experts_TA: Tensor, routing: Routing) -> Tensor:
    weights_TA = scores_TE.gather(1, experts_TA)
    if routing.normalize:
        # What keeps 0 / 0 away changes no other sum.
        weights_TA = weights_TA / (weights_TA.sum(-1, keepdim=True) + 1e-20)
    return weights_TA if routing.scaling == 1.0 else weights_TA * routing.scaling


@jit
def _sort_keys(values, places):
    """Return int64 numbers that are ordered as the values are, the first of equal ones greatest; NaN is above all."""
    # Adding 0 makes one number of both zeros.
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32) | (0x7FFFFFFF - places).to(tl.int64)


@jit
def _keys_of_best_groups(
    keys,
    wanted,
    groups,
    top_groups,
    sums_two,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Return the keys of the experts in each token's best groups; of the others the lowest number."""
    lowest = tl.full((), -9223372036854775808, tl.int64)
    group = tl.arange(0, BLOCK_G)
    keys_TGS = tl.reshape(keys, (BLOCK_T, BLOCK_G, BLOCK_S))
    wanted_TGS = tl.reshape(wanted, (BLOCK_T, BLOCK_G, BLOCK_S))
    is_best = keys_TGS == tl.max(keys_TGS, axis=2)[:, :, None]
    best = tl.sum(tl.where(is_best, wanted_TGS, 0.0), axis=2)
    is_second = keys_TGS == tl.max(tl.where(is_best, lowest, keys_TGS), axis=2)[:, :, None]
    best += tl.where(sums_two != 0, tl.sum(tl.where(is_second, wanted_TGS, 0.0), axis=2), 0.0)
    group_keys = tl.where((group < groups)[None, :], _sort_keys(best, group[None, :]), lowest)
    left = group_keys
    for _ in range(top_groups):
        left = tl.where(left == tl.max(left, axis=1)[:, None], lowest, left)
    is_in = group_keys != left
    return tl.reshape(tl.where(is_in[:, :, None], keys_TGS, lowest), (BLOCK_T, BLOCK_G * BLOCK_S))


@jit
def _choose_experts_kernel(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    experts_ptr,
    tokens,
    top_k,
    groups,
    group_size,
    top_groups,
    biased,
    sums_two,
    normalize,
    is_sigmoid,
    scaling,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """One program chooses the experts of BLOCK_T tokens: the best of all, one after the other."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    group, member = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_S)
    expert_GS = group[:, None] * group_size + member[None, :]
    is_expert_GS = (group < groups)[:, None] & (member < group_size)[None, :]
    is_there = (token < tokens)[:, None, None] & is_expert_GS[None, :, :]
    offsets = token.to(tl.int64)[:, None, None] * (groups * group_size) + expert_GS[None, :, :]
    logits = tl.load(logits_ptr + offsets, mask=is_there, other=float("-inf")).to(tl.float32)
    lowest = tl.full((), -9223372036854775808, tl.int64)

    BLOCK_E: tl.constexpr = BLOCK_G * BLOCK_S
    logits = tl.reshape(logits, (BLOCK_T, BLOCK_E))
    # Tokens behind the last have no largest logit.
    largest = tl.where(token < tokens, tl.max(logits, axis=1), 0.0)
    odds = tl.exp(logits - largest[:, None])
    total = tl.where(token < tokens, tl.sum(odds, axis=1), 1.0)
    scores = tl.where(is_sigmoid != 0, 1.0 / (1.0 + tl.exp(-logits)), odds / total[:, None])
    bias_GS = tl.load(bias_ptr + expert_GS, mask=is_expert_GS & (expert_GS < biased), other=0.0)
    wanted = scores + tl.reshape(bias_GS, (BLOCK_E,))[None, :]
    expert = tl.reshape(expert_GS, (BLOCK_E,))[None, :]
    keys = tl.where(tl.reshape(is_expert_GS, (BLOCK_E,))[None, :], _sort_keys(wanted, expert), lowest)
    if BLOCK_G > 1:
        keys = _keys_of_best_groups(keys, wanted, groups, top_groups, sums_two, BLOCK_T, BLOCK_G, BLOCK_S)

    choice = tl.arange(0, BLOCK_A)
    chosen = tl.zeros((BLOCK_T, BLOCK_A), tl.int64)
    weights = tl.zeros((BLOCK_T, BLOCK_A), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    for nth in range(top_k):
        key = tl.max(keys, axis=1)
        is_taken = keys == key[:, None]
        weight = tl.sum(tl.where(is_taken, scores, 0.0), axis=1)
        total += weight
        chosen = tl.where((choice == nth)[None, :], 0x7FFFFFFF - (key & 0x7FFFFFFF)[:, None], chosen)
        weights = tl.where((choice == nth)[None, :], weight[:, None], weights)
        keys = tl.where(is_taken, lowest, keys)
    weights = tl.where(normalize != 0, weights / (total + 1e-20)[:, None], weights) * scaling
    out = token.to(tl.int64)[:, None] * top_k + choice[None, :]
    is_chosen = (token < tokens)[:, None] & (choice < top_k)[None, :]
    tl.store(weights_ptr + out, weights, mask=is_chosen)
    tl.store(experts_ptr + out, chosen, mask=is_chosen)


_MOST_CHOSEN = 16
_SIZES = (128, 512)
_GROUPS = 8
_GROUP_SIZES = (64,)


def choose_config(num_experts: int, groups: int) -> KernelConfig | None:
    """Return how experts are chosen by the kernel; None where they are too many, or in too many groups."""
    sizes = _SIZES if groups == 1 else _GROUP_SIZES
    size = next((size for size in sizes if num_experts // groups <= size), None)
    if size is None or groups > _GROUPS:
        return None
    block_groups = 1 if groups == 1 else _GROUPS
    tokens = max(1, 512 // (block_groups * size))
    tiles = {"BLOCK_T": tokens, "BLOCK_G": block_groups, "BLOCK_S": size, "BLOCK_A": _MOST_CHOSEN}
    return KernelConfig(tiles=tiles, num_warps=4, num_stages=1)


def compile_cases() -> Iterator[CompileCase]:
    """Return what ``choose_experts`` launches."""
    shapes = [(1, size) for size in _SIZES] + [(_GROUPS, _GROUPS * size) for size in _GROUP_SIZES]
    numbers = ("tokens", "top_k", "groups", "group_size", "top_groups", "biased", "sums_two", "normalize", "is_sigmoid")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for groups, experts in shapes:
            config = choose_config(experts, groups)
            assert config is not None
            yield CompileCase(
                kernel=_choose_experts_kernel,
                name=f"{pointer(dtype)[1:]} {experts}{f' in {groups}' if groups > 1 else ''}",
                config=config,
                signature={
                    "logits_ptr": pointer(dtype),
                    "bias_ptr": "*fp32",
                    "weights_ptr": "*fp32",
                    "experts_ptr": "*i64",
                    **dict.fromkeys(numbers, "i32"),
                    "scaling": "fp32",
                },
            )


def choose_experts(logits_TE: Tensor, routing: Routing, bias_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As ``choose_experts_reference``."""
    routing.check(logits_TE, bias_E)
    config = choose_config(logits_TE.shape[1], routing.groups)
    if config is not None and routing.top_k <= _MOST_CHOSEN and uses_triton("moe_route", logits_TE):
        return _choose_by_triton(logits_TE.contiguous(), routing, bias_E, config)
    if routing.groups > 1:
        return choose_experts_reference(logits_TE, routing, bias_E)
    scores_TE = _scores(logits_TE, routing)
    experts_TA = _best(scores_TE if bias_E is None else scores_TE + bias_E, routing.top_k)
    return _weights(scores_TE, experts_TA, routing), experts_TA


def _best(wanted_TE: Tensor, top_k: int) -> Tensor:
    """Return the best experts; with many tokens sooner than a stable sort."""
    bits_TE = (wanted_TE + 0.0).view(torch.int32)
    ordered_TE = (bits_TE ^ ((bits_TE >> 31) & 0x7FFFFFFF)).to(torch.int64)
    keys_TE = (ordered_TE << 32) + torch.arange(0x7FFFFFFF, 0x7FFFFFFF - wanted_TE.shape[1], -1, device=bits_TE.device)
    return 0x7FFFFFFF - (torch.topk(keys_TE, top_k, dim=-1).values & 0x7FFFFFFF)


def _choose_by_triton(
    logits_TE: Tensor, routing: Routing, bias_E: Tensor | None, config: KernelConfig
) -> tuple[Tensor, Tensor]:
    tokens, experts = logits_TE.shape
    weights_TA = torch.empty((tokens, routing.top_k), dtype=torch.float32, device=logits_TE.device)
    experts_TA = torch.empty((tokens, routing.top_k), dtype=torch.int64, device=logits_TE.device)
    launch(
        _choose_experts_kernel,
        (-(-tokens // config.tiles["BLOCK_T"]),),
        config,
        logits_ptr=logits_TE,
        bias_ptr=weights_TA if bias_E is None else bias_E.contiguous(),
        weights_ptr=weights_TA,
        experts_ptr=experts_TA,
        tokens=tokens,
        top_k=routing.top_k,
        groups=routing.groups,
        group_size=experts // routing.groups,
        top_groups=routing.top_groups,
        biased=0 if bias_E is None else experts,
        sums_two=int(routing.sums_two),
        normalize=int(routing.normalize),
        is_sigmoid=int(routing.score is Score.SIGMOID),
        scaling=routing.scaling,
    )
    return weights_TA, experts_TA


def route(x_TH: Tensor, gate_EH: Tensor, *, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Return (weights, experts): the ``top_k`` most likely experts of each token, most likely first.

    The softmax over experts and the weights are float32 whatever the type of ``x``.

    Shapes: x_TH [tokens, hidden]; gate_EH [experts, hidden]; weights [tokens, top_k] float32; experts
    [tokens, top_k] int64
    Source: Mixtral (arXiv 2401.04088), section 2.1
    """
    return choose_experts(linear(x_TH, gate_EH), Routing(top_k=top_k, normalize=normalize))
