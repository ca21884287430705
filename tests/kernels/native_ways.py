"""The ways of an operation: with compiled kernels, with those of another machine, and by torch's operations alone."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from slipstream.kernels.cpu.native import SWITCH, Native, load, native
from slipstream.kernels.cpu.native_build import NativeBuildError, find_compiler


def compiled_or_skip() -> Native:
    """Return the compiled kernels, or skip the test and say why there are none."""
    found = native()
    if found is not None:
        return found
    try:
        load(os.environ)
    except NativeBuildError as error:
        pytest.skip(f"no compiled kernels: {error}")
    pytest.skip(f"compiled kernels are switched off ({SWITCH})")


@contextmanager
def environment(**changes: str) -> Iterator[None]:
    """Change the environment within the block, and let the kernels be looked for anew."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    native.cache_clear()
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value
        native.cache_clear()


@contextmanager
def torch_alone() -> Iterator[None]:
    """Switch the compiled kernels off within the block."""
    with environment(**{SWITCH: "0"}):
        yield


@contextmanager
def compiled_without(feature: str, folder: Path) -> Iterator[None]:
    """Compile the kernels for a machine that lacks ``feature``, and what builds on it, within the block.

    ``folder`` gets a compiler that is told so last: what it finds on this machine does not count then.
    """
    if platform.machine() != "x86_64":
        pytest.skip("features of x86-64")
    compiler = folder / "compiler"
    command = shlex.join(find_compiler(os.environ).command)
    compiler.write_text(f'#!/bin/sh\nexec {command} "$@" -mno-{feature}\n', encoding="utf-8")
    compiler.chmod(0o700)
    with environment(CC=str(compiler), XDG_CACHE_HOME=str(folder)):
        yield
