"""A short run of ``bench_kv``: every way moves, and is set beside what the machine can do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from slipstream.benchmarks.kv.raw import pieces_of


def test_a_short_run(tmp_path: Path) -> None:
    path = tmp_path / "kv.json"
    command = [sys.executable, "-P", "-m", "slipstream.benchmarks.bench_kv", "--json", str(path)]
    subprocess.run([*command, "--mib", "1", "--rounds", "1"], check=True, timeout=120, capture_output=True)
    points = {point["way"]: point for point in json.loads(path.read_text())["points"]}
    assert set(points) == {"tcp", "tcp, checksum", "shm", "shm, checksum", "raw", "raw walk", "copy"}
    assert points["raw"]["to_raw"] == points["copy"]["to_copy"] == 1.0
    assert all(point["gib_per_s"] > 0 and point["cpu_s"] > 0 for point in points.values())


def test_streams_share_what_is_moved() -> None:
    layers = [memoryview(bytearray(5 << 20)) for _ in range(3)]
    for streams in (1, 2, 4):
        shares = [pieces_of(layers, 9 << 20, index, streams) for index in range(streams)]
        assert sum(len(piece) for share in shares for piece in share) == 9 << 20
        alone = [pieces_of(None, 8 << 20, index, streams) for index in range(streams)]
        assert sum(len(piece) for share in alone for piece in share) == 8 << 20
