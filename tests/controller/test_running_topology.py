"""Links between raylets of this machine, measured by the command; the controller and plans then go by them."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from slipstream.tests.controller.ray_bed import LINK, RayBed, RayNodes

ray_operator = pytest.importorskip("slipstream.runtime.controller.ray_operator")

FILE = """
model: {{path: {model}}}
pools: [{{name: p, role: mixed, degrees: {{tp: 1}}, replicas: 1}}]
engine: {{device: cpu, max_num_seqs: 4, max_model_len: 128, kv_cache_memory_bytes: 33554432}}
workload: {{prompt_tokens: 32, output_tokens: 32}}
device_types: {{cpu: {{memory_gib: 4, tflops: {{float32: 0.1}}, memory_gbytes_per_s: 20}}}}
"""
MODEL = Path(__file__).resolve().parents[2] / "examples" / "demo_model"


def slipstream(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "slipstream.runtime.cli", *arguments],
        capture_output=True, text=True, timeout=120, cwd=tempfile.gettempdir(),
    )  # fmt: skip


def test_what_is_measured_is_what_controller_and_plans_go_by(nodes: RayNodes, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(FILE.format(model=MODEL), encoding="utf-8")
    before = slipstream("plan", str(file), "--address", nodes.address)
    assert "links: 1 of 1 assumed to have 1.25 GB/s and 100 us" in before.stdout, before.stderr
    bed = RayBed(nodes)
    topology = bed.cluster.observe().topology
    assert topology.node_link(topology.node("a"), topology.node("b")) == LINK

    done = slipstream("measure-links", "--address", nodes.address, "--json", "--seconds", "0.2")
    found = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert {(each["source"], each["target"]) for each in found["links"]} == {("a", "b"), ("b", "a")}
    assert "round 1 of 1: a - b" in done.stderr
    slower = min(each["bytes_per_s"] for each in found["links"])

    topology = bed.cluster.observe().topology
    link = topology.node_link(topology.node("a"), topology.node("b"))
    assert link.bytes_per_s == pytest.approx(slower) and link != LINK
    operated = ray_operator.RayOperator().topology({}, LINK, LINK)
    assert operated.node_link(operated.node("a"), operated.node("b")) == link, "a deployment is planned by it too"
    after = slipstream("plan", str(file), "--address", nodes.address)
    assert "links: 1 of 1 measured" in after.stdout and "assumed" not in after.stdout
    assert "a (2 of 2 cpu free), b (2 of 2 cpu free)" in after.stdout


def test_where_no_ray_runs_that_is_said() -> None:
    done = slipstream("measure-links", "--address", "127.0.0.1:1")
    assert done.returncode == 1 and "no Ray can be reached at 127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr
