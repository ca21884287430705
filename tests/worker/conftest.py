"""What tests of steps on compiled kernels share with those of the kernels."""

from __future__ import annotations

from slipstream.tests.kernels.conftest import compiled, threads

__all__ = ["compiled", "threads"]
