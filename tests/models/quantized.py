"""Quantized twins of tiny checkpoints: the linear layers as AWQ, GPTQ or float8 tools write them, and what they mean.

Made number by number, by other means than those that read them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 16
CONFIGS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    "gptq_order": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True, "sym": True},
    "gptq_v2": {"quant_method": "gptq", "bits": 4, "group_size": -1, "checkpoint_format": "gptq_v2"},
    "fp8": {"quant_method": "compressed-tensors", "format": "float-quantized"},
    "fp8_whole": {"quant_method": "fp8", "activation_scheme": "static"},
    "fp8_blocks": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, GROUP]},
}
_LINEAR = re.compile(r"model\.layers\..*(proj|proj_with_mqa|experts\.\d+\.w[123])\.weight")
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

Tensors = dict[str, Tensor]


def quantize_checkpoint(directory: Path, kind: str, *, seed: int) -> Tensors:
    """Rewrite a checkpoint in place as ``kind``, with random codes; return what all tensors now stand for."""
    config_file, file = directory / "config.json", directory / "model.safetensors"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, "quantization_config": CONFIGS[kind]}))
    generator, plain, stored = torch.Generator().manual_seed(seed), load_file(file), {}
    order_by_inputs: Tensors = {}
    for name, tensor in list(plain.items()):
        if not _LINEAR.fullmatch(name):
            stored[name] = tensor
            continue
        make = _float8 if kind.startswith("fp8") else _int4
        stem = name.removesuffix(".weight")
        parts, plain[name] = make(kind, tensor.shape[0], tensor.shape[1], generator, order_by_inputs)
        stored |= {f"{stem}.{suffix}": part.contiguous() for suffix, part in parts.items()}
    save_file(stored, file)
    return plain


def _int4(
    kind: str, outputs: int, inputs: int, generator: torch.Generator, order_by_inputs: Tensors
) -> tuple[Tensors, Tensor]:
    group = inputs if kind == "gptq_v2" else GROUP
    groups = inputs // group
    codes = torch.randint(0, 16, (outputs, inputs), generator=generator)
    zeros = torch.randint(1, 16, (outputs, groups), generator=generator)
    scales = (torch.rand(outputs, groups, generator=generator) / 50 + 0.01).half()
    g_idx = torch.arange(inputs) // group
    if kind == "gptq_order":
        # One order for all layers that read the same: q, k and v, gate and up.
        g_idx = order_by_inputs.setdefault(str(inputs), g_idx[torch.randperm(inputs, generator=generator)])
    weight = (codes - zeros[:, g_idx]).float() * scales.float()[:, g_idx]
    if kind == "awq":
        parts = {"qweight": _words(codes.t(), _AWQ_ORDER), "qzeros": _words(zeros.t(), _AWQ_ORDER)}
    else:
        less = 0 if kind == "gptq_v2" else 1
        parts = {
            "qweight": _words(codes, range(8)).t(),
            "qzeros": _words(zeros.t() - less, range(8)),
            "g_idx": g_idx.to(torch.int32),
        }
    return {**parts, "scales": scales.t()}, weight


def _words(numbers: Tensor, order: Any) -> Tensor:
    """Return words of eight numbers of the last axis, nibble i being number ``order[i]`` of the eight."""
    eights = numbers.reshape(numbers.shape[0], -1, 8)[:, :, list(order)]
    words = sum(eights[:, :, nibble] << (4 * nibble) for nibble in range(8))
    assert isinstance(words, Tensor)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _float8(kind: str, outputs: int, inputs: int, generator: torch.Generator, _: Tensors) -> tuple[Tensors, Tensor]:
    values = (torch.randn(outputs, inputs, generator=generator) / 8).to(torch.float8_e4m3fn)
    if kind == "fp8_whole":
        scale = torch.rand((), generator=generator) + 0.5
        return {"weight": values, "weight_scale": scale, "input_scale": torch.ones(())}, values.float() * scale
    if kind == "fp8":
        scales = torch.rand(outputs, 1, generator=generator) + 0.5
        return {"weight": values, "weight_scale": scales}, values.float() * scales
    scales = torch.rand(-(-outputs // 32), -(-inputs // GROUP), generator=generator) + 0.5
    spread = scales[torch.arange(outputs) // 32][:, torch.arange(inputs) // GROUP]
    return {"weight": values, "weight_scale_inv": scales}, values.float() * spread
