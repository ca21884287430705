"""The files that we ship: each says when to use it, is read, and is planned on the cluster beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slipstream.placement.model_cut import Cut
from slipstream.placement.plan import Degrees, Role
from slipstream.runtime.cluster.cluster_file import read_cluster_file
from slipstream.runtime.cluster.model_sizes_file import read_model_sizes
from slipstream.runtime.cluster.plan_command import plan_command
from slipstream.runtime.cluster.planning import plan_cluster
from slipstream.runtime.cluster.topology_sections import read_topology
from slipstream.sdk.errors import ConfigError
from slipstream.tests.placement import planning_cases

CONFIGS = Path(__file__).resolve().parents[2] / "cluster_configs"
FILES = sorted(path for path in CONFIGS.glob("*.yaml") if not path.name.endswith(".topology.yaml"))


def test_all_kinds_are_there() -> None:
    assert [path.stem for path in FILES] == [
        "batch-only", "cpu-three-nodes", "deepseek-wide-ep", "laptop", "one-host-8-gpus", "splitwise-a100-h100",
        "two-node-split",
    ]  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_is_explained_and_planned(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ") and "Use it" in text
    file = read_cluster_file(path)
    topology = read_topology(path.with_name(f"{path.stem}.topology.yaml"))
    ranking = plan_cluster(file, topology, directory=path.parent)
    assert ranking.plans, ranking.refused
    first = ranking.plans[0]
    assert not first.figures.misses, first.figures.misses
    if file.pools is not None:
        assert {pool.name for pool in first.pools} == {pool.name for pool in file.pools}
        for asked, planned in zip(file.pools, first.pools, strict=True):
            assert planned.degrees == asked.degrees.value if asked.degrees else True
            assert asked.replicas.min <= len(planned.replicas) <= (asked.replicas.max or 10**9)


def test_prefill_is_on_the_new_gpus_and_decode_on_the_old_ones() -> None:
    path = CONFIGS / "splitwise-a100-h100.yaml"
    topology = read_topology(CONFIGS / "splitwise-a100-h100.topology.yaml")
    plan = plan_cluster(read_cluster_file(path), topology, directory=CONFIGS).plans[0]
    for pool in plan.pools:
        kinds = {topology.device_type(device).name for place in pool.replicas for device in place.devices}
        assert kinds == {"h100-sxm" if pool.role is Role.PREFILL else "a100-80gb"}


def test_two_ranks_on_two_nodes_and_another_replica_on_the_third() -> None:
    topology = read_topology(CONFIGS / "cpu-three-nodes.topology.yaml")
    plan = plan_cluster(read_cluster_file(CONFIGS / "cpu-three-nodes.yaml"), topology, directory=CONFIGS).plans[0]
    places = [device.node for pool in plan.pools for place in pool.replicas for device in place.devices]
    assert sorted(places) == ["cpu-0", "cpu-1", "cpu-2"]


@pytest.mark.parametrize("place_what_fits", [True, False])
def test_fewer_replicas_are_planned_only_where_the_file_allows_it(place_what_fits: bool, tmp_path: Path) -> None:
    text = (CONFIGS / "cpu-three-nodes.yaml").read_text(encoding="utf-8")
    text = text.replace("replicas: 1", "replicas: 4").replace("../examples", str(CONFIGS.parent / "examples"))
    file = tmp_path / "cluster.yaml"
    file.write_text(text.replace("place_what_fits: true", f"place_what_fits: {place_what_fits}".lower()))
    topology = read_topology(CONFIGS / "cpu-three-nodes.topology.yaml")
    ranking = plan_cluster(read_cluster_file(file), topology, directory=tmp_path)
    if place_what_fits:
        assert [len(pool.replicas) for pool in ranking.plans[0].pools] == [1, 1]
    else:
        assert not ranking.plans and any("devices" in reason for reason in ranking.refused)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("llama-3-8b", planning_cases.llama_3_8b()),
        ("llama-3-70b", planning_cases.llama_3_70b()),
        ("deepseek-v3", planning_cases.deepseek_v3()),
    ],
)
def test_sizes_are_read_from_config_json(name: str, model: object) -> None:
    assert read_model_sizes(CONFIGS / "models" / name) == model
    assert read_model_sizes(CONFIGS / "models" / name / "config.json") == model


def test_sizes_outside_the_registry_are_read_like_those_inside(tmp_path: Path) -> None:
    """A family that we do not run, with the same fields, has the same sizes."""
    for name in ("llama-3-8b", "qwen3-30b-a3b"):
        values = json.loads((CONFIGS / "models" / name / "config.json").read_text(encoding="utf-8"))
        there = tmp_path / name
        there.mkdir()
        (there / "config.json").write_text(json.dumps({**values, "architectures": ["Other"]}), encoding="utf-8")
        ours = read_model_sizes(CONFIGS / "models" / name)
        assert read_model_sizes(there).layers == ours.layers
        assert read_model_sizes(there).kv_bytes_per_token() == ours.kv_bytes_per_token()


def test_sizes_of_latent_attention_are_the_same_from_the_registry(tmp_path: Path) -> None:
    values = json.loads((CONFIGS / "models" / "deepseek-v3" / "config.json").read_text(encoding="utf-8"))
    del values["quantization_config"]
    found = []
    for architecture in ("DeepseekV3ForCausalLM", "Other"):
        there = tmp_path / architecture / "deepseek-v3"
        there.mkdir(parents=True)
        (there / "config.json").write_text(json.dumps({**values, "architectures": [architecture]}), encoding="utf-8")
        found.append(read_model_sizes(there))
    assert found[0] == found[1]


def test_the_command_prints_a_list_reasons_and_a_chart() -> None:
    text, found = plan_command(CONFIGS / "one-host-8-gpus.yaml", topology=None)
    assert found
    for part in ("first token", "limited by:", "Why the first:", "Splitting prefill from decode", "tokens/s", "host["):
        assert part in text


def test_the_command_prints_json() -> None:
    text, found = plan_command(CONFIGS / "two-node-split.yaml", topology=None, as_json=True)
    answer = json.loads(text)
    assert found and answer["objective"] == "time_per_token"
    first = answer["plans"][0]
    assert {pool["role"] for pool in first["pools"]} == {"prefill", "decode"}
    assert all(len(place) == 2 for pool in first["pools"] if pool["role"] == "prefill" for place in pool["replicas"])
    assert first["predicted"]["tokens_per_s"] > 0 and first["limits"]


def test_a_topology_is_asked_for_where_there_is_none(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("model: {path: a}\nworkload: {prompt_tokens: 1, output_tokens: 1}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"--topology FILE, or put cluster\.topology\.yaml"):
        plan_command(file, topology=None)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("nodes: [{name: a, device_type: h9, devices: 1}]\nnetwork: {gbytes_per_s: 1}", "'h9' is unknown"),
        ("nodes: []\nnetwork: {gbytes_per_s: 1}", "nodes: "),
        ("nodes: [{name: a, device_type: l4, devices: 1}]\nnetwork: {gbit: 1}", "network"),
        (
            "nodes: [{name: a, device_type: l4, devices: 1}, {name: a, device_type: l4, devices: 1}]\n"
            "network: {gbytes_per_s: 1}",
            "two nodes are called 'a'",
        ),
        (
            "nodes: [{name: a, device_type: l4, devices: 1}]\nnetwork: {gbytes_per_s: 1}\n"
            "links: [{between: [a, b], link: {gbytes_per_s: 2}}]",
            "node 'b' that is not there",
        ),
    ],
)
def test_topologies_that_do_not_hold_together_are_refused(tmp_path: Path, text: str, what: str) -> None:
    file = tmp_path / "topology.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=what) as caught:
        read_topology(file)
    assert str(caught.value).startswith(str(file))


def test_a_topology_says_links_racks_and_what_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "topology.yaml"
    file.write_text(
        "nodes: [{name: n, count: 4, device_type: h100-sxm, devices: 2, groups: {rack: 2}, taken: [0]}]\n"
        "network: {gbytes_per_s: 10}\nwithin: {rack: {gbytes_per_s: 40}}\n"
        "links: [{between: [n-3, n-0], link: {gbytes_per_s: 1}}]\n"
        "device_types: {h100-sxm: {memory_gib: 1, tflops: {bfloat16: 1}, memory_gbytes_per_s: 1}}\n",
        encoding="utf-8",
    )
    topology = read_topology(file)
    free = tuple(topology.devices())
    assert [str(device) for device in free] == ["n-0/1", "n-1/1", "n-2/1", "n-3/1"]
    speeds = [topology.link(free[0], other).bytes_per_s for other in free[1:]]
    assert speeds == [40e9, 10e9, 1e9]
    assert topology.device_type(free[0]).memory_bytes == 1 << 30
    assert topology.nodes[0].device_link.bytes_per_s == 32e9


def test_numbers_of_8_bits_are_half_of_what_moves() -> None:
    path = CONFIGS / "models" / sorted(each.name for each in (CONFIGS / "models").iterdir() if each.is_dir())[0]
    as_stored, small = (read_model_sizes(path, kv_transfer_dtype=dtype) for dtype in ("auto", "fp8"))
    assert as_stored.moved_bytes_per_token() == as_stored.kv_bytes_per_token() == small.kv_bytes_per_token()
    assert small.moved_bytes_per_token() * as_stored.number_bytes == as_stored.kv_bytes_per_token()


def test_a_cache_of_8_bits_is_half_as_large() -> None:
    path = CONFIGS / "models" / sorted(each.name for each in (CONFIGS / "models").iterdir() if each.is_dir())[0]
    as_stored = read_model_sizes(path)
    small = read_model_sizes(path, kv_cache_dtype="fp8")
    assert small.kv_bytes_per_token() * as_stored.number_bytes == as_stored.kv_bytes_per_token()
    cut, small_cut = (Cut(model=sizes, degrees=Degrees()) for sizes in (as_stored, small))
    assert small_cut.kv_bytes_per_token * as_stored.number_bytes == cut.kv_bytes_per_token
    assert small.number_bytes == as_stored.number_bytes
