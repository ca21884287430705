"""The arithmetic of ``bench_sequence_parallel``, and, where namespaces can be made, one small run of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from slipstream.benchmarks.bench_sequence_parallel import figures_of
from slipstream.tests.multinode.namespaces import missing

ROOT = Path(__file__).resolve().parents[2]


def test_the_slower_rank_counts() -> None:
    def answer(divided: list[float], *, exposed_s: float) -> dict[str, object]:
        times_s = {"alone": [0.1, 0.1, 0.1], "divided": divided, "serial": [6.4] * 3, "wire": [0.4, 0.5, 0.6]}
        work_s = {"alone": [8.0, 8.0, 8.0], "divided": [4.0, 5.0, 6.0]}
        return {"times_s": times_s, "work_s": work_s, "compute_s": 4.0, "exposed_s": exposed_s, "others": 0.02}

    first = answer([5.0, 7.0, 4.0], exposed_s=0.1)
    first["times_s"] = {**first["times_s"], "alone": [9.0, 10.0, 11.0]}  # type: ignore[dict-item]
    found = figures_of([first, answer([6.0, 5.0, 3.0], exposed_s=0.25)], tokens=4096, chunk=2048, link=1000)
    assert (found.alone_s, found.divided_s, found.wire_s) == (10.0, 6.0, 0.5)
    assert found.speedup == pytest.approx(10 / 6)
    assert found.work_speedup == pytest.approx(8 / 5)
    assert found.hidden == pytest.approx((6.4 - 6.0) / 0.5)


@pytest.mark.multinode
def test_a_small_run_measures_every_arm(tmp_path: Path) -> None:
    if (reason := missing()) is not None:
        pytest.skip(reason)
    report = tmp_path / "sequence_parallel.json"
    command = [sys.executable, "-P", str(ROOT / "benchmarks" / "bench_sequence_parallel.py"), "--quick"]
    options = ["--repeats", "2", "--links", "1000", "--models", str(tmp_path / "models"), "--json", str(report)]
    subprocess.run([*command, *options], check=True, timeout=240)
    (line,) = json.loads(report.read_text())["lines"]
    assert min(line[f"{arm}_s"] for arm in ("alone", "divided", "serial", "wire", "compute")) > 0
    assert line["speedup"] > 0
