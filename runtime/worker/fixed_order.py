"""What ``deterministic`` cannot be had with: refused by name, before anything is loaded.

With it a position has the same bits whatever stands beside it, however its prompt is cut, and on every number of
tensor-parallel ranks whose parts are whole subtrees of the sums (``kernels.tree_sum``).
"""

from __future__ import annotations

import torch

from ...comm.mesh import MeshShape
from ...kernels.backends import TABLE, Backend, backend_on
from ...kernels.cpu.linear_packed import can_pack
from ...kernels.launch import HAS_TRITON
from ...kernels.tree_sum import LEAVES, subtree_leaves
from ...sdk.errors import ConfigError
from ..models.model_spec import ModelSpec, MoeSpec

_DONE_WITHOUT = ("moe_gemm",)
"""Operations that deterministic engines do not call: their experts' products are multiplied one after the other."""


def check_fixed_order(
    spec: ModelSpec,
    mesh: MeshShape,
    *,
    device: torch.device,
    dtype: torch.dtype,
    experts_over_tp: bool,
) -> None:
    """Refuse what would change bits. Raises: ConfigError naming the option"""
    if not subtree_leaves(mesh.tp):
        raise ConfigError(
            "tensor_parallel_size",
            f"{mesh.tp} ranks cannot add up in the fixed order of 'deterministic': use 1, 2, 4 or {LEAVES}",
        )
    if mesh.tp > 1:
        for what, size in _sums(spec, experts_over_tp=experts_over_tp).items():
            if size % LEAVES:
                raise ConfigError(
                    "tensor_parallel_size",
                    f"{mesh.tp} ranks share sums over the {size} {what}, which 'deterministic' cuts into {LEAVES} "
                    "equal chunks: use 1 rank, or leave 'deterministic' out",
                )
    if device.type == "cuda":
        _check_operations(device)
    elif not can_pack(dtype, device):
        named = str(dtype).removeprefix("torch.")
        raise ConfigError("deterministic", f"needs float32 or bfloat16, as this CPU multiplies them, got {named}")


def _sums(spec: ModelSpec, *, experts_over_tp: bool) -> dict[str, int]:
    """Return the sizes of sums that tensor-parallel ranks share, by what is summed."""
    value_size = spec.head_dim if spec.latent is None else spec.latent.value_dim
    sums = {"values of all attention heads": spec.num_heads * value_size}
    for layer in spec.layers:
        if isinstance(layer.mlp, MoeSpec) and layer.mlp.shared is not None:
            shared = layer.mlp.shared.intermediate_size
            sums[f"intermediate values of experts that all tokens share, {shared} wide"] = shared
        if not (experts_over_tp and isinstance(layer.mlp, MoeSpec)):
            sums[f"intermediate values of an {layer.mlp.intermediate_size} wide MLP"] = layer.mlp.intermediate_size
    return sums


def _check_operations(device: torch.device) -> None:
    """Refuse operations on a GPU that give a row other bits in other company, as all of torch's ways may there."""
    if not HAS_TRITON:
        raise ConfigError("deterministic", "needs Triton on a GPU: install it, or use the CPU")
    for operation in TABLE.values():
        backend = backend_on(operation.name, device)
        own_bits = operation.batch_invariant[backend] and backend is not Backend.TORCH
        if operation.name not in _DONE_WITHOUT and not own_bits:
            raise ConfigError(
                "deterministic",
                f"{operation.name} ({operation.summary}) by {backend} gives a row other bits in other company: "
                "leave the choice of kernels to 'auto'",
            )
