"""The option ``kv_cache_dtype``: of which numbers the KV cache is made, and what it cannot go together with."""

from __future__ import annotations

import torch

from ...comm.mesh import MeshShape
from ...kernels.backends import uses_triton_on
from ...sdk.errors import ConfigError

CACHE_OPERATIONS = ("attention", "rope_kv")
"""What reads the cache or writes it: a cache of 8 bits is for their kernels alone."""

_FP8_CAPABILITY = (8, 9)


def cache_dtype(option: str, dtype: torch.dtype) -> torch.dtype:
    """Return the type of the cache for weights of type ``dtype``."""
    return torch.float8_e4m3fn if option == "fp8" else dtype


def check_cache_dtype(
    option: str, dtype: torch.dtype, device: torch.device, mesh: MeshShape, *, latent: bool = False
) -> None:
    """Refuse a cache that cannot be read, by a model of type ``dtype`` on a device; ``latent``: of latents.

    Raises: ConfigError
    """
    if option == "auto":
        return
    if latent:
        raise ConfigError("kv_cache_dtype", f"{option!r} is not for models that cache latents: use auto")
    by_torch = [name for name in CACHE_OPERATIONS if not uses_triton_on(name, device)]
    if by_torch:
        raise ConfigError(
            "kv_cache_dtype", f"{option!r} is for Triton's kernels, and on {device} {by_torch[0]} is not one of them"
        )
    if dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise ConfigError("kv_cache_dtype", f"{option!r} is for dtype bfloat16, the dtype is {name}")
    if mesh.sp > 1:
        raise ConfigError(
            "kv_cache_dtype",
            f"{option!r} is not for sequence_parallel_size {mesh.sp}: shared prompts are not in 8 bits",
        )
    if device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(device) < _FP8_CAPABILITY):
        raise ConfigError("kv_cache_dtype", f"{option!r} (e4m3) is not a type of {torch.cuda.get_device_name(device)}")
