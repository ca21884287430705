"""How many threads a model is worth."""

from __future__ import annotations

import subprocess
import sys

import pytest

from slipstream.runtime.worker.cpu_settings import useful_threads

MIB = 1 << 20


@pytest.mark.parametrize(
    ("weight_bytes", "cores", "threads"), [(1, 8, 1), (31 * MIB, 8, 1), (32 * MIB, 8, 8), (1 << 40, 2, 2), (1, 1, 1)]
)
def test_useful_threads(weight_bytes: int, cores: int, threads: int) -> None:
    assert useful_threads(weight_bytes, cores=cores) == threads


def test_what_is_asked_for_is_set_for_the_process() -> None:
    # In a process of its own: the settings are the process's.
    code = (
        "import torch; from slipstream.runtime.worker.cpu_settings import settle_cpu;"
        "settle_cpu(3, weight_bytes=1); assert torch.get_num_threads() == 3;"
        "settle_cpu(None, weight_bytes=1); assert torch.get_num_threads() == 1"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
