"""Which of a kernel's configurations is fastest: measured once for a device, kernel version and shape bucket, and kept.

A kernel that has several configurations is launched through ``launch_tuned``. Without a ``Tuning`` in use its first one
is taken: so it is in deterministic mode, where a row's bits must not depend on how many rows there are. With one, what
was measured before is taken, and the first one where nothing was; within ``measuring`` (warming up) what is not known
yet is measured. Nothing is ever measured while requests are served.

The file is JSON, for each device one; entries of older kernels are left out when it is written again. Processes of one
machine share it: each adds what it has measured, under a lock.
"""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

import torch

from .launch import KernelConfig, launch, triton_version

Run = Callable[[], object]
Seconds = Callable[[Run], float]
"""Tells how long a run takes on the device."""

_FORMAT = 1
_SHARED_SOURCES = ("launch.py", "tiles.py")
_ROUNDS = 9

logger = logging.getLogger(__name__)


class Tuning:
    """What is known of one device."""

    def __init__(self, path: Path, device: str, seconds: Seconds) -> None:
        """Read what ``path`` holds of a device; a file that cannot be read counts as empty, and is written anew."""
        self._path = path
        self._device = device
        self._seconds = seconds
        self._known = _read(path, device)
        self._fresh: dict[str, str] = {}
        self._measures = False

    @property
    def measured(self) -> int:
        """Return how many choices were measured since they were last saved."""
        return len(self._fresh)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Within the ``with``, measure what is not known."""
        self._measures = True
        try:
            yield
        finally:
            self._measures = False

    def choose(
        self,
        kernel: Any,
        bucket: Sequence[object],
        configs: Sequence[KernelConfig],
        attempt: Callable[[KernelConfig], None],
    ) -> KernelConfig:
        """Return the configuration for a shape bucket; ``attempt`` launches one, as often as it takes."""
        key = f"{kernel.__name__} {kernel_version(kernel)} {' '.join(map(str, bucket))}"
        by_name = {str(config): config for config in configs}
        known = by_name.get(self._known.get(key, ""))
        if known is not None or not self._measures:
            return known or configs[0]
        best = min(configs, key=lambda config: self._seconds_of(config, attempt))
        self._known[key] = self._fresh[key] = str(best)
        return best

    def save(self) -> None:
        """Add what was measured to the file. A file that cannot be written is told of, and costs the next start."""
        if not self._fresh:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                entries = {**_read(self._path, self._device), **self._fresh}
                versions = dict(key.split()[:2] for key in self._fresh)
                kept = {key: name for key, name in entries.items() if _is_of(key, versions)}
                fresh = self._path.with_suffix(".new")
                fresh.write_text(json.dumps({"format": _FORMAT, "device": self._device, "choices": kept}, indent=1))
                os.replace(fresh, self._path)
        except OSError as error:
            logger.warning("what was measured of kernels is not kept: %s", error)
            return
        self._fresh.clear()

    def _seconds_of(self, config: KernelConfig, attempt: Callable[[KernelConfig], None]) -> float:
        try:
            return self._seconds(lambda: attempt(config))
        except (RuntimeError, ValueError) as error:  # a configuration that this device has no room for
            logger.debug("%s cannot be launched here: %s", config, error)
            return float("inf")


_in_use: Tuning | None = None


def use_tuning(tuning: Tuning | None) -> None:
    """Choose by ``tuning`` from now on in this process; None: every kernel's first configuration."""
    global _in_use
    _in_use = tuning


def launch_tuned(
    kernel: Any,
    grid: Callable[[KernelConfig], tuple[int, ...]],
    configs: Sequence[KernelConfig],
    bucket: Sequence[object],
    **arguments: Any,
) -> KernelConfig:
    """Launch a kernel with one of its configurations, and return which.

    The kernel must leave the same results however often it runs: it may not add to what it writes. ``bucket`` has what
    the choice may depend on (types, rows rounded up to a power of two, sizes of weights), and so must be of few values.
    """
    config = configs[0]
    if _in_use is not None and len(configs) > 1:
        config = _in_use.choose(
            kernel, bucket, configs, lambda config: launch(kernel, grid(config), config, **arguments)
        )
    launch(kernel, grid(config), config, **arguments)
    return config


def tuning_path(environment: Mapping[str, str], device: str) -> Path:
    """Return where what is known of a device is kept."""
    root = environment.get("XDG_CACHE_HOME") or Path(environment.get("HOME") or Path.home()) / ".cache"
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return Path(root) / "slipstream" / "tuning" / f"{name}.json"


def device_name(device: torch.device) -> str:
    """Return what a GPU is, as far as the speed of kernels goes: its name, its architecture, Triton's version."""
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} {properties.major}.{properties.minor} triton {triton_version()}"


def gpu_seconds(run: Run) -> float:
    """Return the median seconds of a run on the current GPU, compiled before."""
    run()
    times = []
    for _ in range(_ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) / 1e3)
    return median(times)


@lru_cache(maxsize=256)
def kernel_version(kernel: Any) -> str:
    """Return a name for the source of a kernel's file and of what all kernels share: it changes when they do."""
    function = getattr(kernel, "fn", kernel)
    file = Path(inspect.getsourcefile(function) or "")
    digest = hashlib.sha256()
    for path in (file, *(Path(__file__).with_name(name) for name in _SHARED_SOURCES)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _is_of(key: str, versions: Mapping[str, str]) -> bool:
    """Return whether an entry is of the version given for its kernel, or of a kernel that none is given for."""
    kernel, version = key.split()[:2]
    return versions.get(kernel, version) == version


def _read(path: Path, device: str) -> dict[str, str]:
    with suppress(OSError, ValueError, AttributeError, KeyError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("format") == _FORMAT and content.get("device") == device:
            return {str(key): str(name) for key, name in content["choices"].items() if len(str(key).split()) >= 2}
    return {}
