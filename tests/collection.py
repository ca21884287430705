"""A pytest plugin: the root of the repository is a package, but not a package of tests; kernels are interpreted.

Without it pytest finds the root's ``__init__.py`` above ``tests/`` and imports it under the name of the clone's folder:
a second copy of the package, or an error where the folder's name is no identifier.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Take the root for a plain folder; leave all others to pytest."""
    if path == parent.config.rootpath:
        return pytest.Dir.from_parent(parent, path=path)
    return None


# Read when kernels are imported, which may be before any test module is. Nothing runs by Triton on a CPU unless asked.
os.environ.setdefault("TRITON_INTERPRET", "1")
