"""The arithmetic of ``bench_overlap``, and, where namespaces can be made, one small run of it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from slipstream.benchmarks.bench_overlap import Figures, verdict
from slipstream.benchmarks.overlap.points import QUICK
from slipstream.tests.multinode.namespaces import missing

ROOT = Path(__file__).resolve().parents[2]
FIGURES = Figures(
    point="dense",
    tokens=256,
    link_mbit_per_s=1000,
    cuts=(128,),
    compute_s=1.0,
    wire_s=0.5,
    serial_s=1.5,
    overlapped_s=1.05,
    compute_cut_s=1.0,
    halves_s=None,
    wire_work=0.1,
    others=0.01,
    metered_hidden_s=0.4,
    expected_overlapped_s=1.0,
)


def test_what_follows_from_the_times() -> None:
    assert FIGURES.ideal_s == 1.0
    assert FIGURES.hidden == pytest.approx(0.9)
    assert FIGURES.over_ideal == pytest.approx(0.05)
    assert FIGURES.over_serial == pytest.approx(-0.3)
    assert [replace(FIGURES, wire_s=wire_s).is_covered for wire_s in (0.2, 0.3, 1.0, 1.1)] == [False, True, True, False]


def test_the_verdict_counts_only_points_that_are_held_to_it() -> None:
    far = replace(FIGURES, overlapped_s=1.2)
    slow = replace(FIGURES, point="slow", wire_s=2.0, serial_s=3.0, overlapped_s=3.3)
    near, slower, disturbed = verdict([FIGURES, far, replace(slow, others=0.5)])
    assert "1 of 2 within 10 % of ideal, the worst +20.0%" in near
    assert "1 of 3, the worst +10.0% (slow, 256 tokens, 1000 Mb/s)" in slower
    assert disturbed.startswith("1 of 3 lines were disturbed")
    assert len(verdict([FIGURES])) == 2, "none was"


@pytest.mark.multinode
def test_a_small_run_measures_every_arm(tmp_path: Path) -> None:
    if (reason := missing()) is not None:
        pytest.skip(reason)
    report = tmp_path / "overlap.json"
    command = [sys.executable, "-P", str(ROOT / "benchmarks" / "bench_overlap.py"), "--quick", "--repeats", "2"]
    subprocess.run([*command, "--links", "1000", "--json", str(report)], check=True, timeout=240)
    points = json.loads(report.read_text())["points"]
    assert [point["point"] for point in points] == [point.name for point in QUICK]
    for point in points:
        assert min(point[f"{arm}_s"] for arm in ("compute", "wire", "serial", "overlapped")) > 0
    # What the link was shaped to: less than half the time would mean that it was not.
    sent_bytes = 2 * QUICK[0].layers * QUICK[0].tokens * QUICK[0].hidden * 4
    assert points[0]["wire_s"] > sent_bytes * 8 / 1e9 / 2
    assert points[-1]["cuts"] is None, "four tokens are below every threshold"
