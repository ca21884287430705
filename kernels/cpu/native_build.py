"""Compiles the C sources beside this file into a shared library, once a machine, and keeps it in the user's cache.

Owns the compiler's command, the name under which a result is found again, and who may have written it. Knows nothing
of what the library does. A library is code that will run: one is only taken from a directory that nobody but its owner
(this user, or root) can write to.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "native"
FLAGS = (
    "-O2", "-march=native", "-std=gnu11", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-math-errno",
    "-fno-trapping-math", "-w",
)  # fmt: skip
TIMEOUT_S = 120.0
_COMPILERS = ("cc", "gcc", "clang")
_LIBRARY = "kernels.so"


class NativeBuildError(Exception):
    """There is no library; the message says why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiler:
    """A C compiler: how it is called and what it calls itself."""

    command: tuple[str, ...]
    version: str


def library(environment: Mapping[str, str]) -> Path:
    """Return the compiled library, compiling it if this machine has not yet.

    Several processes may do so at once: each compiles into a file of its own, and the last one's stays.

    Raises: NativeBuildError
    """
    compiler = find_compiler(environment)
    sources = sorted(SOURCES.glob("*.[ch]"))
    folder = private_folder(cache_root(environment) / _key(sources, compiler))
    target = folder / _LIBRARY
    if not target.exists():
        _compile(compiler, [path for path in sources if path.suffix == ".c"], target)
    _refuse_others(target, target.lstat(), is_kind=stat.S_ISREG)
    return target


def find_compiler(environment: Mapping[str, str]) -> Compiler:
    """Return the compiler that ``CC`` names, or the first of the usual ones. Raises: NativeBuildError"""
    named = environment.get("CC", "").strip()
    for command in [shlex.split(named)] if named else [[name] for name in _COMPILERS]:
        path = shutil.which(command[0], path=environment.get("PATH"))
        if path is not None:
            version = _run([path, *command[1:], "--version"], TIMEOUT_S)
            if version.returncode != 0:
                raise NativeBuildError(f"{path} --version failed: {first_line(version.stderr)}; set CC to a C compiler")
            return Compiler(command=(path, *command[1:]), version=version.stdout)
    if named:
        raise NativeBuildError(f"there is no {named!r}, which CC names; set CC to a C compiler")
    raise NativeBuildError("there is no C compiler; install gcc or clang, or set CC")


def cache_root(environment: Mapping[str, str]) -> Path:
    """Return where compiled libraries are kept."""
    root = environment.get("XDG_CACHE_HOME") or Path(environment.get("HOME") or Path.home()) / ".cache"
    return Path(root) / "slipstream" / "native"


def private_folder(folder: Path) -> Path:
    """Make a folder of mode 0700 where there is none, and return its real path.

    Raises: NativeBuildError when it cannot be made, or if others could change what is in it
    """
    try:
        for missing in [each for each in (*reversed(folder.parents), folder) if not each.exists()]:
            # One by one: ``parents=True`` would leave the mode of all but the last to the umask.
            missing.mkdir(mode=0o700, exist_ok=True)
        folder = folder.resolve(strict=True)
        for each in (folder, *folder.parents):
            _refuse_others(each, each.lstat(), is_kind=stat.S_ISDIR)
    except OSError as error:
        raise NativeBuildError(
            f"cannot keep compiled kernels in {folder}: {error.strerror}; set XDG_CACHE_HOME to a directory of your own"
        ) from error
    return folder


def _refuse_others(path: Path, found: os.stat_result, *, is_kind: object) -> None:
    """Raise unless this user or root owns a path, and nobody else can write to it.

    In a directory with the sticky bit, such as /tmp, others can make files but not replace ours.
    """
    assert callable(is_kind)
    shared = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX
    if not is_kind(found.st_mode) or found.st_uid not in (0, os.geteuid()) or shared:
        raise NativeBuildError(
            f"compiled kernels are not loaded through {path}, which others than its owner can change; "
            f"chmod go-w {path}, or set XDG_CACHE_HOME to a directory of your own"
        )


def _key(sources: list[Path], compiler: Compiler) -> str:
    """Return a name for all that the result depends on."""
    digest = hashlib.sha256()
    for part in (*FLAGS, *compiler.command, compiler.version, _cpu()):
        digest.update(part.encode() + b"\0")
    for path in sources:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:32]


def _cpu() -> str:
    """Return what this machine's processor is and can: a cache may be shared by machines."""
    lines: set[str] = set()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.partition(":")[0].strip() in ("model name", "flags", "Features", "CPU part"):
                lines.add(line)
    return "\n".join([platform.machine(), platform.processor(), *sorted(lines)])


def _compile(compiler: Compiler, sources: list[Path], target: Path) -> None:
    handle, name = tempfile.mkstemp(prefix="building-", suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        done = _run([*compiler.command, *FLAGS, "-o", name, *map(str, sources), "-lm"], TIMEOUT_S)
        if done.returncode != 0:
            raise NativeBuildError(f"{compiler.command[0]} failed: {first_line(done.stderr)}; set CC to another one")
        os.chmod(name, 0o700)
        os.replace(name, target)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)


def _run(command: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout_s, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as error:
        raise NativeBuildError(f"{command[0]} took more than {timeout_s:.0f} s; set CC to another compiler") from error
    except OSError as error:
        raise NativeBuildError(f"{command[0]} does not run: {error.strerror}; set CC to a C compiler") from error


def first_line(text: str) -> str:
    """Return the first line that names an error, or else the first one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no message")
