"""Links that are known to carry so much, measured: between two hosts, and between the nodes of a Ray over three."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from slipstream.runtime.controller.link_actor import LinkAnswer
from slipstream.runtime.controller.link_wire import ProbeLimits
from slipstream.runtime.controller.links import LinkFigures
from slipstream.runtime.controller.records import from_json, to_json
from slipstream.tests.multinode.namespaces import Host, hosts, missing
from slipstream.tests.multinode.raylets import ENVIRONMENT, start_raylet, wait_for_nodes

MBIT_PER_S = 200.0
DELAY_S = 5e-3
OFF = 0.15
TOKEN = "0123456789abcdef" * 4
LIMITS = ProbeLimits(seconds=1.5, exchanges=60, timeout_s=20.0)
CLUSTER_FILE = """
model: {{path: {model}}}
pools: [{{name: p, role: mixed, degrees: {{tp: 1}}, replicas: 3}}]
engine: {{device: cpu, max_num_seqs: 4, max_model_len: 128, kv_cache_memory_bytes: 33554432}}
workload: {{prompt_tokens: 32, output_tokens: 32}}
"""
MODEL = Path(__file__).resolve().parents[2] / "examples" / "demo_model"


@pytest.fixture(autouse=True)
def _can_make_hosts() -> None:
    if (reason := missing()) is not None:
        pytest.skip(reason)


def end(host: Host, *arguments: str) -> subprocess.Popen[str]:
    command = host.command(sys.executable, "-P", "-m", "slipstream.tests.multinode.link_end", *arguments)
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def between(source: Host, target: Host) -> LinkFigures:
    """Measure what comes from one host to another."""
    with end(source, "listen", source.address, TOKEN, to_json(LIMITS)) as listener:
        assert listener.stdout is not None and listener.stdin is not None
        where = from_json(LinkAnswer, listener.stdout.readline()).where
        # Nothing is listened to on all addresses, nor on loopback.
        assert where.startswith(f"{source.address}:")
        with end(target, "measure", where, TOKEN, to_json(LIMITS)) as measurer:
            answer = from_json(LinkAnswer, measurer.communicate(timeout=LIMITS.timeout_s + 20)[0])
        listener.stdin.close()
    assert answer.figures is not None, answer.problem
    print(f"{answer.figures.bytes_per_s * 8e-6:.0f} Mb/s, {answer.figures.round_trip_s * 1e3:.2f} ms")
    return answer.figures


def test_a_shaped_link_has_its_rate_in_both_directions() -> None:
    with hosts(2, mbit_per_s=MBIT_PER_S) as (one, other):
        for source, target in ((one, other), (other, one)):
            assert between(source, target).bytes_per_s * 8e-6 == pytest.approx(MBIT_PER_S, rel=OFF)


def test_a_delay_is_seen_in_the_round_trip() -> None:
    with hosts(2) as (one, other):
        try:
            one.delay(milliseconds=DELAY_S * 1e3)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"delays need netem: {error.stderr.strip()}")
        assert between(other, one).round_trip_s == pytest.approx(DELAY_S, rel=OFF, abs=1e-3)


@contextmanager
def raylets(made: tuple[Host, ...]) -> Iterator[str]:
    """Start Ray over hosts called a, b and so on, and return its address."""
    started = []
    try:
        for host, name in zip(made, "abc", strict=False):
            head = None if host is made[0] else made[0].address
            started.append(start_raylet(host, name, head))
            wait_for_nodes(made[0], f"{made[0].address}:6379", len(started))
        yield f"{made[0].address}:6379"
    finally:
        for raylet in reversed(started):
            raylet.kill()
            raylet.wait()


def run(host: Host, *arguments: str) -> str:
    """Run Python on a host, and return what it prints."""
    done = subprocess.run(
        host.command(sys.executable, "-P", *arguments),
        env=ENVIRONMENT, cwd=tempfile.gettempdir(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_links_of_a_running_ray_are_measured_kept_saved_and_planned_on(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with hosts(3) as made:
        for host, mbit_per_s in zip(made, (400.0, 400.0, 40.0), strict=True):
            host.shape(mbit_per_s=mbit_per_s)
        with raylets(made) as address:
            saved = tmp_path / "saved.yaml"
            slipstream = ("-m", "slipstream.runtime.cli")
            found = json.loads(
                run(made[0], *slipstream, "measure-links", "--address", address, "--json", "--save", str(saved))
            )
            rates = {(each["source"], each["target"]): each["bytes_per_s"] * 8e-6 for each in found["links"]}
            print({pair: round(rate) for pair, rate in rates.items()})
            assert len(rates) == 6 and not found["missing"]
            for pair, rate in rates.items():
                assert rate == pytest.approx(40 if "c" in pair else 400, rel=OFF)
            assert found["suspicious"] == [each for each in found["suspicious"] if each.startswith("c: its links have")]
            assert found["suspicious"]

            file = tmp_path / "cluster.yaml"
            types = "device_types: {cpu: {memory_gib: 4, tflops: {float32: 0.1}, memory_gbytes_per_s: 20}}\n"
            file.write_text(CLUSTER_FILE.format(model=MODEL) + types)
            seen = run(made[0], *slipstream, "plan", str(file), "--address", address)
            assert "a running Ray, nodes a (2 of 2 cpu free), b (2 of 2 cpu free), c (2 of 2 cpu free)" in seen
            assert "links: 3 of 3 measured" in seen and "Where the first plan's ranks are" in seen
        planned = run(made[0], *slipstream, "plan", str(file), "--topology", str(saved))
        assert f"topology: {saved}" in planned and "Where the first plan's ranks are" in planned
