"""Weights as 4-bit integers: made by rounding, or read from the layouts that AWQ and GPTQ write.

Owns what the integers mean (``Int4Codes``) and how the two layouts keep them; knows nothing of how they are multiplied
with. All of it is plain torch and runs once, when weights are loaded, on any device.

Shapes: O outputs, I inputs, G groups of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

GROUPS = (32, 64, 128)
"""Inputs of an output that share a scale, as the kernel takes them."""
_PER_WORD = 8
_LARGEST, _OFFSET, _SMALLEST_SCALE = 7.0, 8, 1e-8
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""AWQ writes output 2 i of eight as nibble i, and 2 i + 1 as nibble i + 4 of a word."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4Codes:
    """A weight of 4-bit integers: input i of output o is ``(codes[o, i] - zeros[o, g]) * scales[o, g]``.

    ``g`` is ``i // group``. ``order_I``: where the inputs were sorted by their groups (GPTQ's act-order), input i of
    the codes is input ``order_I[i]`` of the layer.

    Shapes: codes_OI [outputs, inputs] uint8 of 0 to 15; scales_OG [outputs, groups] float32; zeros_OG [outputs, groups]
    uint8 of 0 to 16; order_I [inputs] int64
    """

    codes_OI: Tensor
    scales_OG: Tensor
    zeros_OG: Tensor
    order_I: Tensor | None = None

    @property
    def group(self) -> int:
        """The inputs that share a scale."""
        return self.codes_OI.shape[1] // max(1, self.scales_OG.shape[1])

    def to(self, device: torch.device) -> Int4Codes:
        """Return the same on a device."""
        return Int4Codes(
            codes_OI=self.codes_OI.to(device),
            scales_OG=self.scales_OG.to(device),
            zeros_OG=self.zeros_OG.to(device),
            order_I=None if self.order_I is None else self.order_I.to(device),
        )

    def weight(self) -> Tensor:
        """Return what the integers stand for.

        Shapes: returns [outputs, inputs] float32, the layer's inputs in their own order
        """
        outputs, inputs = self.codes_OI.shape
        groups_OGI = self.codes_OI.view(outputs, -1, self.group).float() - self.zeros_OG.unsqueeze(-1).float()
        weight_OI = groups_OGI.mul_(self.scales_OG.unsqueeze(-1)).view(outputs, inputs)
        if self.order_I is None:
            return weight_OI
        return torch.empty_like(weight_OI).index_copy_(1, self.order_I, weight_OI)


def can_quantize_int4(weight_OI: Tensor, group: int) -> bool:
    """Return whether a weight has whole groups."""
    return weight_OI.shape[1] % group == 0


def quantize_int4(weight_OI: Tensor, *, group: int) -> Int4Codes:
    """Quantize a weight by rounding, symmetrically; the same integers as the CPU's format.

    Shapes: weight_OI [outputs, inputs] any float type
    Source: group-wise round to nearest (as the baseline of GPTQ, arXiv 2210.17323, section 4)
    """
    outputs, inputs = weight_OI.shape
    groups_OGI = weight_OI.float().view(outputs, inputs // group, group)
    # The scale has the weight's type, as on a CPU.
    scales_OG1 = (groups_OGI.abs().amax(-1, keepdim=True) / _LARGEST).clamp_min(_SMALLEST_SCALE)
    scales_OG1 = scales_OG1.to(weight_OI.dtype).float()
    codes_OGI = (groups_OGI / scales_OG1).round_().clamp_(-_OFFSET, _LARGEST).add_(_OFFSET)
    return Int4Codes(
        codes_OI=codes_OGI.to(torch.uint8).view(outputs, inputs),
        scales_OG=scales_OG1.squeeze(-1),
        zeros_OG=torch.full((outputs, inputs // group), _OFFSET, dtype=torch.uint8, device=weight_OI.device),
    )


def read_awq(qweight_IW: Tensor, qzeros_GW: Tensor, scales_GO: Tensor) -> Int4Codes:
    """Read a layer as AWQ writes it.

    Shapes: qweight_IW [inputs, outputs / 8], qzeros_GW [groups, outputs / 8] int32; scales_GO [groups, outputs] float16
    Source: AWQ (arXiv 2306.00978), its "gemm" version
    """
    return Int4Codes(
        codes_OI=_nibbles(qweight_IW, _AWQ_PLACES).flatten(1).t().contiguous(),
        scales_OG=scales_GO.float().t().contiguous(),
        zeros_OG=_nibbles(qzeros_GW, _AWQ_PLACES).flatten(1).t().contiguous(),
    )


def read_gptq(
    qweight_WO: Tensor, qzeros_GW: Tensor, scales_GO: Tensor, g_idx_I: Tensor | None = None, *, zeros_less_one: bool
) -> Int4Codes:
    """Read a layer as GPTQ's tools write it; inputs are sorted by their groups where ``g_idx_I`` is not sorted.

    ``zeros_less_one``: zero points are stored one too low, as all files but those of "gptq_v2" have them.

    Shapes: qweight_WO [inputs / 8, outputs], qzeros_GW [groups, outputs / 8] int32; scales_GO [groups, outputs]
    float16; g_idx_I [inputs] int32, the group of each input
    Source: GPTQ (arXiv 2210.17323), section 3 and "act-order"
    Raises: ValueError when the groups of ``g_idx_I`` are not all of one size
    """
    words_OW = qweight_WO.t()
    codes_OI = _nibbles(words_OW, tuple(range(_PER_WORD))).flatten(1)
    zeros_OG = _nibbles(qzeros_GW, tuple(range(_PER_WORD))).flatten(1).t()
    codes = Int4Codes(
        codes_OI=codes_OI.contiguous(),
        scales_OG=scales_GO.float().t().contiguous(),
        zeros_OG=((zeros_OG + 1) if zeros_less_one else zeros_OG).contiguous(),
    )
    return codes if g_idx_I is None else _sorted_by_group(codes, g_idx_I.to(torch.int64))


def _nibbles(words: Tensor, places: tuple[int, ...]) -> Tensor:
    """Return the eight numbers of each word, the i-th from nibble ``places[i]``: a further axis of 8, uint8."""
    return torch.stack([((words >> (4 * place)) & 15).to(torch.uint8) for place in places], dim=-1)


def _sorted_by_group(codes: Int4Codes, g_idx_I: Tensor) -> Int4Codes:
    inputs, groups = codes.codes_OI.shape[1], codes.scales_OG.shape[1]
    in_place_I = torch.arange(inputs, device=g_idx_I.device) // codes.group
    if torch.equal(g_idx_I, in_place_I):
        return codes
    order_I = torch.argsort(g_idx_I, stable=True)
    if not torch.equal(g_idx_I[order_I], in_place_I):
        raise ValueError(f"g_idx: {inputs} inputs in {groups} groups must have {codes.group} inputs in each group")
    return replace(codes, codes_OI=codes.codes_OI[:, order_I].contiguous(), order_I=order_I)


def concatenated(parts: list[Int4Codes]) -> Int4Codes:
    """Return several weights of the same inputs as one, their outputs one after the other.

    Raises: ValueError when their groups differ, or the order of their inputs
    """
    first = parts[0]
    for part in parts[1:]:
        if part.group != first.group:
            raise ValueError(f"weights in groups of {first.group} and of {part.group} inputs cannot be one")
        if not _have_one_order(part.order_I, first.order_I):
            raise ValueError("weights whose inputs are in different orders (g_idx) cannot be one")
    return Int4Codes(
        codes_OI=torch.cat([part.codes_OI for part in parts]),
        scales_OG=torch.cat([part.scales_OG for part in parts]),
        zeros_OG=torch.cat([part.zeros_OG for part in parts]),
        order_I=first.order_I,
    )


def _have_one_order(one_I: Tensor | None, other_I: Tensor | None) -> bool:
    if one_I is None or other_I is None:
        return one_I is other_I
    return torch.equal(one_I, other_I)


def in_kernel_groups(codes: Int4Codes) -> Int4Codes:
    """Return the codes in groups of a size that the kernel takes: larger groups become several of 128.

    Raises: ValueError when they cannot
    """
    group = codes.group
    if group in GROUPS:
        return codes
    largest = GROUPS[-1]
    if group % largest:
        raise ValueError(f"groups of {group} inputs: the kernel takes {GROUPS} and multiples of {largest}")
    times = group // largest
    return replace(
        codes,
        scales_OG=codes.scales_OG.repeat_interleave(times, dim=1),
        zeros_OG=codes.zeros_OG.repeat_interleave(times, dim=1),
    )
