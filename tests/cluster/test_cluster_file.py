"""Cluster files as people write them: what is taken, what is refused and how, and the published schema."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from slipstream.placement.objectives import Goal
from slipstream.placement.plan import Degrees, Role
from slipstream.runtime.cluster.cluster_file import ClusterFile, read_cluster_file
from slipstream.runtime.cluster.schema import schema_text
from slipstream.runtime.cluster.sections import MAX_FILE_BYTES, parse_section
from slipstream.sdk.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = ROOT / "docs" / "cluster-file.schema.json"

SMALLEST = """
model: {path: /models/some}
workload: {prompt_tokens: 100, output_tokens: 20}
"""

FULL = """
name: chat
model: {path: /models/some, served_names: [chat]}
pools:
  - {name: prefill, role: prefill, degrees: {tp: 2, pp: 2}, replicas: 2, devices: {types: [h100-sxm], spread: rack}}
  - name: decode
    role: decode
    degrees: auto
    replicas: {min: 1, max: 4}
    devices: {labels: {zone: a}, nodes: [one]}
    engine: {max_num_seqs: 64}
engine: {max_num_seqs: 128, block_size: 32}
workload:
  prompt_tokens: {median: 100, p95: 1000}
  output_tokens: {values: [10, 20]}
  requests_per_s: 3
objectives: {optimize: cost, time_to_first_token_s: 1, time_per_token_s: 0.05}
kv_transport: {kind: tcp}
limits: {max_queued_requests: 10}
autoscaling: {policy: target_utilization, target: 0.5}
device_types:
  my-gpu: {memory_gib: 24, tflops: {bfloat16: 100}, memory_gbytes_per_s: 6e2}
place_what_fits: true
"""


def parse(text: str) -> ClusterFile:
    return parse_section(text, ClusterFile, file="cluster.yaml")


def test_the_smallest_file_leaves_all_else_to_the_planner() -> None:
    file = parse(SMALLEST)
    assert file.pools is None and file.autoscaling.policy == "static"
    workload = file.read_workload(Path("."))
    assert (workload.mean_prompt, workload.mean_output, workload.requests_per_s) == (100, 20, None)


def test_a_full_file_says_what_it_says() -> None:
    file = parse(FULL)
    assert file.pools is not None
    prefill, decode = file.pools
    assert prefill.kind is Role.PREFILL and prefill.degrees is not None
    assert prefill.degrees.value == Degrees(tp=2, pp=2)
    assert (prefill.replicas.min, prefill.replicas.max, prefill.replicas.fixed) == (2, 2, 2)
    assert prefill.devices.value.device_types == {"h100-sxm"} and prefill.devices.value.spread == "rack"
    assert decode.degrees is None and (decode.replicas.min, decode.replicas.max) == (1, 4)
    assert decode.devices.value.nodes == {"one"} and decode.devices.value.labels == {"zone": "a"}
    assert file.objectives.value.goal is Goal.COST
    assert file.device_types["my-gpu"].named("my-gpu").memory_bytes == 24 << 30


def test_a_pools_engine_options_are_over_the_files_own() -> None:
    file = parse(FULL)
    assert file.pools is not None
    prefill, decode = (file.engine_of(pool) for pool in file.pools)
    assert (prefill.max_num_seqs, prefill.block_size) == (128, 32)
    assert (decode.max_num_seqs, decode.block_size) == (64, 32)
    options = prefill.options("/models/some", Degrees(tp=2, pp=2))
    assert (options.tensor_parallel_size, options.pipeline_parallel_size, options.max_num_seqs) == (2, 2, 128)


def test_lengths_have_the_median_and_the_tail_that_were_asked_for() -> None:
    lengths = parse(FULL).workload.prompt_tokens
    assert lengths is not None
    middle = sorted(lengths.lengths)
    assert middle[3] <= 100 <= middle[4] and 700 < middle[-1] < 1000


@pytest.mark.parametrize(
    ("change", "where", "what"),
    [
        ("poolz: auto", "cluster.yaml: poolz", "is not a known key"),
        ("objectives: {optimise: cost}", "cluster.yaml: objectives.optimise", "is not a known key"),
        ("pools: []", "cluster.yaml: pools", "at least 1"),
        ("pools: [{name: a, degrees: {tp: 0}}]", "cluster.yaml: pools[0].degrees.tp", "greater than or equal to 1"),
        ("pools: [{name: a, degrees: {tp: two}}]", "cluster.yaml: pools[0].degrees.tp", "valid integer"),
        ("pools: [{name: a, replicas: {min: 3, max: 2}}]", "cluster.yaml: pools[0].replicas", "below min 3"),
        ("pools: [{name: A}]", "cluster.yaml: pools[0].name", "pattern"),
        ("pools: [{name: a, role: both}]", "cluster.yaml: pools[0].role", "'prefill', 'decode' or 'mixed'"),
        ("pools: [{name: a}, {name: a}]", "cluster.yaml", "two pools are called 'a'"),
        ("pools: [{name: a, role: prefill}]", "cluster.yaml", "need one of role decode"),
        ("pools: [{name: a}]\ndevices: {types: [l4]}", "cluster.yaml", "devices is for pools: auto"),
        ("pools: [{name: a, engine: {max_seqs: 3}}]", "cluster.yaml: pools[0].engine.max_seqs", "not a known key"),
        ("engine: {max_num_seqs: 4096}", "cluster.yaml: engine", "max_num_batched_tokens"),
        (
            "pools: [{name: a, degrees: {tp: 2, ep: 2, experts_over_tp: true}}]",
            "cluster.yaml: pools[0].degrees",
            "both",
        ),
        ("autoscaling: {policy: magic}", "cluster.yaml: autoscaling", "magic"),
        ("autoscaling: {policy: slo, margin: 2}", "cluster.yaml: autoscaling.margin", "less than 1"),
        ("limits: {request_timeout_s: .inf}", "cluster.yaml: limits.request_timeout_s", "finite"),
        ("name: chat\nname: chat", "cluster.yaml", "'name' is there twice"),
        ("name: &x chat\nengine: *x", "cluster.yaml", "aliases"),
        ("name: [", "cluster.yaml", "not valid YAML"),
        ("3: 4", "cluster.yaml", "not text"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_path(change: str, where: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(SMALLEST + change)
    assert str(caught.value).startswith(f"{where}: ")
    assert what in str(caught.value)


@pytest.mark.parametrize(
    ("workload", "what"),
    [
        ("{prompt_tokens: 3}", "both prompt_tokens and output_tokens"),
        ("{trace: a.csv, prompt_tokens: 3, output_tokens: 4}", "give trace, or"),
        ("{prompt_tokens: {median: 9, p95: 3}, output_tokens: 4}", "p95 3 is below median 9"),
        ("{prompt_tokens: {}, output_tokens: 4}", "give median"),
        ("{prompt_tokens: 0, output_tokens: 4}", "greater than or equal to 1"),
    ],
)
def test_workloads_that_say_too_little_or_too_much_are_refused(workload: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        parse(f"model: {{path: a}}\nworkload: {workload}")
    assert str(caught.value).startswith("cluster.yaml: workload")


def test_a_trace_gives_lengths_and_rate(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("prompt_tokens,output_tokens,gap_ms\n100,0,500\n300,40,500\n", encoding="utf-8")
    file = parse("model: {path: a}\nworkload: {trace: trace.csv}")
    workload = file.read_workload(tmp_path)
    assert workload.requests_per_s == 2 and workload.mean_prompt == 200 and workload.mean_output == 20.5
    (tmp_path / "trace.csv").write_text("prompt_tokens,output_tokens\n100,x\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"trace.csv: line 2"):
        file.read_workload(tmp_path)
    (tmp_path / "trace.csv").write_text("prompts\n1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="has no column prompt_tokens"):
        file.read_workload(tmp_path)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        read_cluster_file(tmp_path / "nowhere.yaml")
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match="larger than"):
        read_cluster_file(large)


def test_the_published_schema_is_current() -> None:
    assert SCHEMA.read_text(encoding="utf-8") == schema_text(), (
        "write it again: python -m slipstream.runtime.cluster.schema > docs/cluster-file.schema.json"
    )


def test_the_published_schema_takes_what_we_take() -> None:
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    for text in (SMALLEST, FULL.replace("6e2", "600")):
        validator.validate(yaml.safe_load(text))
    assert not validator.is_valid({**yaml.safe_load(SMALLEST), "poolz": "auto"})
    assert not validator.is_valid({**yaml.safe_load(SMALLEST), "pools": [{"name": "a", "degrees": "many"}]})
