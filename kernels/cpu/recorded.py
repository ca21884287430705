"""Recordings of passes that are nothing but compiled calls: noted once, and run again by a single one.

A compiled call of a small step takes a good part of its time in Python, and in gathering and letting go the team of
threads. A pass makes the same calls, of the same shapes, at every step of as many rows: ``record`` runs it once and has
the library note each call (``native/record.c``), ``Recording.replay`` runs them all in one, the threads staying
together. Pieces and sums are those of single calls, and so are the bits.

What calls are given are addresses. What a pass allocates stands in a ``StepMemory`` while it is recorded, and stays
there. What it is given must stay where it is too: weights, cache, and the inputs that differ from step to step, which
are written to the same places before a replay. What a kernel does not do would be missing in a recording: every
operation of torch's is seen, and all but allocations and views refuse it. (What is read as a numpy array is not seen.)

``SLIPSTREAM_RECORDED_STEPS=0`` in the environment switches it off.

Knows nothing of models and steps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from ..launch import KernelConfig, observed_launches
from .native import OFF, Native

SWITCH = "SLIPSTREAM_RECORDED_STEPS"
_SMALLEST_SLOT_BYTES = 1 << 10
_aten = torch.ops.aten
_ALLOCATIONS = (
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
)


def switched_on(environment: Mapping[str, str]) -> bool:
    """Return whether the environment leaves recordings on."""
    return environment.get(SWITCH, "").strip().lower() not in OFF


class StepMemory:
    """Memory that recorded passes compute in, at addresses that stay.

    As in a pass that is not recorded, what a tensor leaves is used by later ones. Recordings share it: no two of them
    run at the same time.
    """

    def __init__(self) -> None:
        self._slots: list[_Slot] = []

    @property
    def bytes(self) -> int:
        """Return the bytes it has taken."""
        return sum(slot.memory.nbytes for slot in self._slots)

    def like(self, made: Tensor) -> Tensor:
        """Return a contiguous tensor of the shape and type of ``made``."""
        fitting = [slot for slot in self._slots if slot.memory.nbytes >= made.nbytes and slot.is_free]
        slot = min(fitting, key=lambda each: each.memory.nbytes, default=None)
        if slot is None:
            # Powers of two, so that passes of about as many rows find the same places.
            wanted = max(_SMALLEST_SLOT_BYTES, 1 << (made.nbytes - 1).bit_length())
            slot = _Slot(torch.empty(wanted, dtype=torch.uint8))
            self._slots.append(slot)
        return slot.take(made)


class _Slot:
    """A piece of memory, and who uses it."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self._user: weakref.ref[NDArray[np.uint8]] | None = None

    @property
    def is_free(self) -> bool:
        return self._user is None or self._user() is None

    def take(self, made: Tensor) -> Tensor:
        # A tensor of a buffer holds on to the buffer, and so do all views of it: when this array goes, they have gone.
        user = self.memory.numpy()[: made.nbytes]
        self._user = weakref.ref(user)
        return torch.frombuffer(user, dtype=made.dtype, count=made.numel()).view(made.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What came of recording a pass: its output, and the recording, or why there is none."""

    output: Tensor
    recording: Recording | None
    refusal: str | None


class Recording:
    """A recorded pass over inputs at the addresses that it was recorded with. One thread at a time may use it."""

    def __init__(self, compiled: Native, list_address: int, output: Tensor, memory: StepMemory) -> None:
        """Take over the list of calls, and keep what they write to."""
        self._compiled = compiled
        self._list_address = list_address
        self._output = output
        self._memory = memory
        weakref.finalize(self, compiled.free_recording, list_address)

    def replay(self) -> Tensor:
        """Run the pass on what stands in its inputs now. What is returned is valid until the next pass in the same
        memory.
        """
        self._compiled.replay(self._list_address, torch.get_num_threads())
        return self._output


def record(compiled: Native, run: Callable[[], Tensor], memory: StepMemory) -> Recorded:
    """Run a pass, and return its output and, if it was nothing but compiled calls, its recording.

    Runs under ``torch.inference_mode()``, as a replay does: nothing else may hold on to tensors that the pass makes.
    """
    list_address = compiled.new_recording()
    if list_address is None:
        return Recorded(output=run(), recording=None, refusal="there is no memory for it")
    watch = _Watch(memory)
    try:
        compiled.record(list_address)
        with watch, observed_launches(watch.see_launch):
            output = run()
    except BaseException:
        compiled.record(None)
        compiled.free_recording(list_address)
        raise
    compiled.record(None)
    refusal = watch.refusal
    calls = compiled.recorded_calls(list_address)
    if refusal is None and calls <= 0:
        refusal = "a kernel that cannot be recorded" if calls < 0 else "no compiled call"
    if refusal is not None:
        compiled.free_recording(list_address)
        return Recorded(output=output, recording=None, refusal=refusal)
    return Recorded(output=output, recording=Recording(compiled, list_address, output, memory), refusal=None)


class _Watch(TorchDispatchMode):
    """Sees every operation of torch's: gives allocations their places, and notes the first that computes."""

    def __init__(self, memory: StepMemory) -> None:
        super().__init__()  # torch's
        self._memory = memory
        self.refusal: str | None = None

    def see_launch(self, kernel: Any, config: KernelConfig, arguments: Mapping[str, Any]) -> None:
        """Note a kernel of Triton's, which in the interpreter no operation of torch's shows."""
        self.refusal = self.refusal or f"the kernel {kernel.__name__}"

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS and result.is_cpu and result.is_contiguous() and result.numel():
            return self._memory.like(result)
        if self.refusal is None and not (func.is_view and _is_view(result, args)):
            self.refusal = f"the operation {func}"
        return result


def _is_view(result: Tensor | Sequence[Tensor], args: tuple[Any, ...]) -> bool:
    """Return whether a view was made: operations such as ``reshape`` copy where they have to."""
    views = [result] if isinstance(result, Tensor) else result
    seen = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
    return all(view.untyped_storage().data_ptr() in seen for view in views)
