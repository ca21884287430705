"""The compiled kernels: found, built, loaded and typed; or the reason why there are none.

Operations ask ``native()`` and do with torch's operations what it cannot give. The library computes on torch's own team
of threads: it is linked with no OpenMP runtime, and is handed the ``GOMP_parallel`` that torch uses. A second runtime
would keep a second team, spinning on the same cores.

``SLIPSTREAM_NATIVE_KERNELS=0`` in the environment switches it off.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from .native_build import NativeBuildError, library

SWITCH = "SLIPSTREAM_NATIVE_KERNELS"
_PARALLEL = "GOMP_parallel"
OFF = ("0", "false", "no", "off")

logger = logging.getLogger(__name__)


class DecodeJob(Structure):
    """``struct decode_job`` of attention_decode.c."""

    _fields_ = (
        ("tables", c_void_p),
        ("item_rows", c_void_p),
        ("first_items", c_void_p),
        ("tokens", c_void_p),
        ("positions", c_void_p),
        ("lowest_seen", c_void_p),
        ("partials", c_void_p),
        ("open", c_void_p),
        ("table_columns", c_int64),
        ("num_blocks", c_int64),
        ("kv_heads", c_int64),
        ("group", c_int64),
        ("block_size", c_int64),
        ("head_size", c_int64),
        ("items", c_int64),
        ("query_stride", c_int64),
        ("bf16", c_int32),
        ("threads", c_int32),
        ("queries", c_void_p),
        ("cache", c_void_p),
        ("out", c_void_p),
        ("scale", c_float),
        ("soft_cap", c_float),
        ("sinks", c_void_p),
    )


class PrefillJob(Structure):
    """``struct prefill_job`` of attention_prefill.c."""

    _fields_ = (
        ("tables", c_void_p),
        ("item_rows", c_void_p),
        ("item_firsts", c_void_p),
        ("starts", c_void_p),
        ("counts", c_void_p),
        ("tokens", c_void_p),
        ("scratch", c_void_p),
        ("scratch_bytes", c_int64),
        ("table_columns", c_int64),
        ("num_blocks", c_int64),
        ("kv_heads", c_int64),
        ("group", c_int64),
        ("block_size", c_int64),
        ("head_size", c_int64),
        ("items", c_int64),
        ("tile_queries", c_int64),
        ("window", c_int64),
        ("query_stride", c_int64),
        ("bf16", c_int32),
        ("threads", c_int32),
        ("queries", c_void_p),
        ("cache", c_void_p),
        ("out", c_void_p),
        ("scale", c_float),
        ("soft_cap", c_float),
        ("sinks", c_void_p),
        ("workers", c_int64),
        ("next", c_int64),
        ("count", c_int64),
    )


_P, _N, _I = c_void_p, c_int64, c_int
_ARGUMENTS = {
    "rms_norm": (_P, _P, _P, _P, _P, _N, _N, _N, _N, _N, _N, c_float, _I, _I, _I),
    "silu_and_mul": (_P, _P, _N, _N, _I, _I),
    "gate_and_mul": (_P, _P, _N, _N, _I, c_float, c_float, _I, _I),
    "rope_kv": (_P, _P, _P, _P, _P, _N, _N, _N, _N, _N, _I, _I),
    "attend_decode": (POINTER(DecodeJob),),
    "attend_prefill": (POINTER(PrefillJob),),
    "linear": (_P, _P, _P, _P, _N, _N, _N, _N, _I, _I, _I),
    "linear_int8": (_P, _P, _P, _P, _P, _P, _P, _N, _N, _N, _I, _I, _I),
    "linear_int4": (_P, _P, _P, _P, _P, _N, _N, _N, _N, _I, _I),
    "add_pairs": (POINTER(c_void_p), _P, _N, _N, _I, _I),
    "quantize_rows": (_P, _P, _P, _N, _N, _N, _I, _I),
    "first_largest": (_P, _P, _P, _N, _N, _N, _I),
    "clear": (_P, _N, _N, _I),
    "record": (_P,),
    "replay": (_P, _I),
    "free_recording": (_P,),
}

_SIZES = {"partial_numbers": _N, "prefill_scratch": POINTER(PrefillJob)}


class Native:
    """The loaded library: one attribute for each function, pointers as integers."""

    def __init__(self, loaded: ctypes.CDLL, parallel: int) -> None:
        """Hand the library torch's team, and declare its functions."""
        loaded.slipstream_set_parallel.argtypes = (c_void_p,)
        loaded.slipstream_set_parallel.restype = None
        loaded.slipstream_set_parallel(parallel)
        self.parallel_address = parallel
        for name, arguments in _ARGUMENTS.items():
            function = getattr(loaded, f"slipstream_{name}")
            function.argtypes, function.restype = arguments, None
        for name, measured in _SIZES.items():
            function = getattr(loaded, f"slipstream_{name}")
            function.argtypes, function.restype = (measured,), c_int64
        self.rms_norm = loaded.slipstream_rms_norm
        self.silu_and_mul, self.gate_and_mul = loaded.slipstream_silu_and_mul, loaded.slipstream_gate_and_mul
        self.rope_kv = loaded.slipstream_rope_kv
        self.attend_decode = loaded.slipstream_attend_decode
        self.attend_prefill = loaded.slipstream_attend_prefill
        self.linear = loaded.slipstream_linear
        self.linear_int8 = loaded.slipstream_linear_int8
        self.linear_int4 = loaded.slipstream_linear_int4
        self.add_pairs = loaded.slipstream_add_pairs
        self.quantize_rows = loaded.slipstream_quantize_rows
        self.first_largest, self.clear = loaded.slipstream_first_largest, loaded.slipstream_clear
        self.record, self.replay = loaded.slipstream_record, loaded.slipstream_replay
        self.new_recording, self.free_recording = loaded.slipstream_new_recording, loaded.slipstream_free_recording
        self.new_recording.restype = c_void_p
        self.recorded_calls = loaded.slipstream_recorded_calls
        self.recorded_calls.argtypes, self.recorded_calls.restype = (c_void_p,), c_int64
        self.team_size = loaded.slipstream_team_size
        self.partial_numbers, self.prefill_scratch = (
            loaded.slipstream_partial_numbers,
            loaded.slipstream_prefill_scratch,
        )
        self.lanes, self.span_keys = int(loaded.slipstream_lanes()), int(loaded.slipstream_span_keys())
        kinds = int(loaded.slipstream_panel_kinds())
        self.has_float32_panels, self.has_bfloat16_panels, self.has_int8_panels = (
            bool(kinds >> kind & 1) for kind in range(3)
        )
        self.has_int4 = bool(loaded.slipstream_has_int4())


@lru_cache(maxsize=1)
def native() -> Native | None:
    """Return the compiled kernels, None where there are none. Says so once, and what to do about it."""
    if os.environ.get(SWITCH, "").strip().lower() in OFF:
        return None
    try:
        return load(os.environ)
    except NativeBuildError as error:
        logger.warning("no compiled kernels, torch's operations take their place (%s=0 is quiet): %s", SWITCH, error)
        return None


def load(environment: Mapping[str, str]) -> Native:
    """Build if need be, and load. Raises: NativeBuildError"""
    parallel = torch_parallel()
    path = library(environment)
    try:
        return Native(ctypes.CDLL(str(path)), parallel)
    except (OSError, AttributeError) as error:
        raise NativeBuildError(f"{path} cannot be loaded: {error}; delete it") from error


def torch_parallel() -> int:
    """Return the address of the function that runs a job on torch's team of threads.

    Found as torch's own calls are: what a process has for everybody (its preloaded libraries) comes first, then what
    torch's library brings along.

    Raises: NativeBuildError where torch uses another kind of runtime
    """
    opened = [ctypes.CDLL(None)]
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    with suppress(OSError, AttributeError):  # a torch that is built otherwise, a system without the flag
        opened.append(ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY))
    for each in opened:
        function = getattr(each, _PARALLEL, None)
        if function is not None:
            address = ctypes.cast(function, c_void_p).value
            assert address is not None
            return address
    raise NativeBuildError(f"torch's threads have no {_PARALLEL} here; the kernels need a torch built with OpenMP")


def give_back_freed_memory() -> None:
    """Let the allocator return what was freed: weights as they were read leave holes that it would keep for good."""
    if _TRIM is not None:
        _TRIM(0)


def native_for(x: Tensor) -> Native | None:
    """Return the compiled kernels if they take ``x``: float32 or bfloat16 on the CPU, last axis contiguous."""
    if not x.is_cpu or x.dtype not in _TYPES or x.stride(-1) != 1:
        return None
    return native()


_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
_TYPES = (torch.bfloat16, torch.float32)
