"""Counts what a process calls of Ray: with this folder on PYTHONPATH, and a folder for the counts in COUNT_RAY_CALLS.

Python loads this file by its name, in every process. Once ``ray`` is loaded, each call of its interface adds a byte to
the process's own file: its size is the number of calls, and a process that has none has called nothing.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

COUNTS = "COUNT_RAY_CALLS"
_METHODS = (("ray.actor", "ActorMethod", "remote"), ("ray.actor", "ActorClass", "remote"))


def _counted(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def count(*arguments: Any, **named: Any) -> Any:
        with (Path(os.environ[COUNTS]) / str(os.getpid())).open("ab") as file:
            file.write(b".")
        return function(*arguments, **named)

    return count


def _count(ray: types.ModuleType) -> None:
    for name, value in list(vars(ray).items()):
        if isinstance(value, types.FunctionType) and not name.startswith("_"):
            setattr(ray, name, _counted(value))
    for module, kind, name in _METHODS:
        owner = getattr(importlib.import_module(module), kind)
        setattr(owner, name, _counted(getattr(owner, name)))


class _Loader(importlib.abc.Loader):
    def __init__(self, real: importlib.abc.Loader) -> None:
        self._real = real

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        self._real.exec_module(module)
        _count(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "ray":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


if COUNTS in os.environ:
    sys.meta_path.insert(0, _Finder())
