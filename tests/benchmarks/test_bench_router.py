"""A short run of ``bench_router`` on its made-up trace: all ways of choosing meet the same requests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from slipstream.benchmarks.router.trace import BLOCK_TOKENS, conversations, within_ticks


def test_a_short_run(tmp_path: Path) -> None:
    path = tmp_path / "router.json"
    command = [sys.executable, "-P", "-m", "slipstream.benchmarks.bench_router", "--json", str(path)]
    # Its limit of time may be missed on a busy machine; nothing else may go wrong.
    done = subprocess.run(
        [*command, "--requests", "300", "--decisions", "100"], check=False, timeout=120, capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stderr
    figures = json.loads(path.read_text())
    (case,) = figures["cases"]
    outcomes = case["outcomes"]
    assert set(outcomes) == {"least loaded", "longest prefix", "router", "shared cache"} and not case["judged"]
    assert (
        outcomes["shared cache"]["hit_share"] >= outcomes["router"]["hit_share"] > outcomes["least loaded"]["hit_share"]
    )
    assert outcomes["router"]["mean_ttft_s"] < outcomes["least loaded"]["mean_ttft_s"]
    assert outcomes["router"]["most_share"] < 0.3 < outcomes["longest prefix"]["most_share"]
    assert all(each["again_s"] > 0 for each in figures["decisions"])


def test_made_up_requests_share_beginnings() -> None:
    arrivals = conversations(200, seed=1)
    assert all(each.hashes[0] == 0 and len(each.prompt()) == each.tokens for each in arrivals)
    assert all(len(each.hashes) == -(-each.tokens // BLOCK_TOKENS) for each in arrivals)
    longer = [
        each for each in arrivals if any(other.hashes[:3] == each.hashes[:3] for other in arrivals if other is not each)
    ]
    assert len(longer) > 20
    moved = within_ticks(arrivals, seed=2)
    assert [each.at_s for each in moved] == sorted(each.at_s for each in moved)
