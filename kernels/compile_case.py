"""What is compiled ahead of time: one case for each way in which a kernel is launched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .launch import KernelConfig

SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""The targets, and the shared memory that a program can have there."""

ALL_TARGETS = tuple(SHARED_BYTES)
FLOAT8_TARGETS = ("sm_90", "sm_100", "gfx942")
"""Where float8 numbers of NVIDIA's kind (e4m3fn) can be computed with; AMD's compiler converts them step by step."""

_TYPES = {
    "float64": "fp64",
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float8_e4m3fn": "fp8e4nv",
    "int8": "i8",
    "uint8": "u8",
}


def targets_for(*dtypes: Any) -> tuple[str, ...]:
    """Return where numbers of all of some torch types can be computed with."""
    return FLOAT8_TARGETS if any(str(dtype) == "torch.float8_e4m3fn" for dtype in dtypes) else ALL_TARGETS


def pointer(dtype: Any) -> str:
    """Return how a signature spells a pointer to numbers of a torch type."""
    name = str(dtype).removeprefix("torch.")
    return "*" + _TYPES.get(name, name.replace("int", "i"))


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileCase:
    """One way in which a kernel is launched.

    - ``signature``: the type of each argument that is no constant ("*bf16", "i32", "fp32"), by name; ``constants``: the
      others, the configuration's tiles left out.
    - ``aligned``: the integers that are multiples of 16 in this case, as strides and sizes mostly are. A launch sees
      that for itself, and loads of whole vectors depend on it.
    - ``targets``: where it can run. Float8 numbers of NVIDIA's kind need sm_89.
    - ``spill_bytes``: the most a thread may spill to memory.
    """

    kernel: Any
    name: str
    config: KernelConfig
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    targets: tuple[str, ...] = ALL_TARGETS
    spill_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What a compiled kernel takes: registers and bytes spilled by a thread, shared memory in bytes by a program."""

    kernel: str
    case: str
    config: str
    target: str
    registers: int
    spilled: int
    shared: int
    spill_bound: int
    error: str = ""

    @property
    def is_good(self) -> bool:
        """Return whether the kernel compiled, spills no more than it may, and fits the target's shared memory."""
        return not self.error and self.spilled <= self.spill_bound and self.shared <= SHARED_BYTES[self.target]
