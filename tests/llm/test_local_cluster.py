"""A deployment of one's own comes up on a Ray of its own, answers, and nothing of it stays behind."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from slipstream.runtime.local_cluster import ClusterFailed, part_of, running_cluster
from slipstream.tests.gateway.server_process import PATIENCE_S, eventually

pytest.importorskip("ray")

DEMO = (sys.executable, "-P", "-m", "slipstream.runtime.cli", "demo")
DEMO_TIMEOUT_S = 240.0


@pytest.fixture(autouse=True)
def nothing_stays_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever was started carries a word in its environment by which it is known, wherever it went."""
    word = "SLIPSTREAM_TEST_OF_A_LOCAL_CLUSTER"
    monkeypatch.setenv(word, "1")

    def marked() -> list[str]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(word) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline()))
            except psutil.Error:
                continue
        return found

    yield
    eventually(lambda: not marked(), what="all has ended")


def test_the_demo_shows_answers_and_what_was_moved_and_where() -> None:
    done = subprocess.run(
        [*DEMO, "--max-tokens", "8"], capture_output=True, text=True, timeout=DEMO_TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    shown = done.stdout
    print(shown)
    assert all(f"prompt [{place}]" in shown for place in range(1, 7))
    # Six answers, each as long as was asked for, as the server counted them.
    assert shown.count("length") == 6 and re.search(r"all +│ +\d+ +│ +48 +│", shown)
    moved = re.search(r"│ +(\d+) +│ +([\d,]+) bytes +│ +([\d.]+) +│ +(\d+)% +│", shown)
    assert moved is not None and int(moved[1]) == 6 and int(moved[2].replace(",", "")) > 0
    for role in ("prefill", "decode"):
        assert re.search(rf"│ {role}-\d+ +│ {role} +│ +0 +│ the whole model +│ \S+/\d+ +│", shown)


@pytest.mark.slow
def test_a_demo_that_is_stopped_leaves_nothing() -> None:
    with subprocess.Popen([*DEMO, "--max-tokens", "180"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            # Tokens come: it is in the middle of six streams.
            assert any(line.startswith(b"[") for line in process.stdout)
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=PATIENCE_S * 2)
        finally:
            process.kill()
    assert process.returncode == 143, said
    assert b"Traceback" not in said


def test_a_file_that_cannot_run_is_named_and_nothing_is_started(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("model: {path: nowhere}\nworkload: {prompt_tokens: 1, output_tokens: 1}\n", encoding="utf-8")
    told: list[str] = []
    with (
        pytest.raises(ClusterFailed, match=r"nowhere is not a directory with a model"),
        running_cluster(file, start_timeout_s=PATIENCE_S, told=told.append),
    ):
        pytest.fail("it came up")
    assert told == []


@pytest.mark.parametrize(
    ("rank", "degrees", "expected"),
    [
        (0, (1, 1, 1), "the whole model"),
        (1, (1, 1, 2), "part 2 of 2 of every layer"),
        (5, (2, 1, 4), "stage 2 of 2, part 2 of 4 of every layer"),
        (6, (2, 2, 2), "stage 2 of 2, experts 2 of 2, part 1 of 2 of every layer"),
    ],
)
def test_a_rank_has_its_part(rank: int, degrees: tuple[int, int, int], expected: str) -> None:
    pp, ep, tp = degrees
    assert part_of(rank, pp=pp, ep=ep, tp=tp) == expected
