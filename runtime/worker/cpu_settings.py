"""How a process computes on a CPU: how many threads, and what the allocator does with large pieces of memory.

Both are settings of the whole process, made once, when an engine is launched.
"""

from __future__ import annotations

import ctypes
import os
import sys

import torch

_SMALL_MODEL_BYTES = 32 << 20
"""Weights that one core reads, from cache, in the time in which several would wait for one another."""
# glibc's mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20
_TRIM_THRESHOLD = 1 << 30


def settle_cpu(num_threads: int | None, *, weight_bytes: int, ranks: int = 1) -> None:
    """Set threads and allocator for a model of which a token reads ``weight_bytes``; None: as many as help.

    ``ranks``: processes that share the machine's cores.
    """
    torch.set_num_threads(num_threads or useful_threads(weight_bytes, cores=max(1, _cores() // ranks)))
    _keep_freed_memory()


def useful_threads(weight_bytes: int, *, cores: int) -> int:
    """Return how many threads a model is worth."""
    return 1 if weight_bytes < _SMALL_MODEL_BYTES else cores


def _cores() -> int:
    """Return the cores that this process may use, and no more than torch would: it leaves out hardware threads."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, torch.get_num_threads()))


def _keep_freed_memory() -> None:
    """Let the allocator reuse what was freed: a step's temporaries would otherwise be given back, and cleared again by
    the kernel page by page, at every step.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc alone has it
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)
