"""From cluster files to what is wanted: what is taken from a plan, and which changes raise which number."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from slipstream.placement.device_table import DEVICE_TABLE
from slipstream.placement.plan import Degrees, Role
from slipstream.placement.topology import Link, Node, Topology
from slipstream.runtime.cluster.cluster_file import ClusterFile
from slipstream.runtime.cluster.planning import plan_cluster
from slipstream.runtime.cluster.sections import parse_section
from slipstream.runtime.controller.launch import MARK_VARIABLE, RankOrder
from slipstream.runtime.controller.ledger import Deployment
from slipstream.runtime.controller.records import from_json, to_json
from slipstream.runtime.operations.changes import changes
from slipstream.runtime.operations.deployment import (
    Given,
    NoPlan,
    check_can_run,
    choose,
    leaves_open,
    make_deployment,
)
from slipstream.runtime.reconcile.desired import Generation, Limits
from slipstream.runtime.reconcile.observed import ReplicaId, ReplicaSpec
from slipstream.runtime.worker.main import main as driver_main
from slipstream.sdk.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "cluster_configs"
GIVEN = Given(secret="s" * 64, mark="chat/0", watch_address="10.0.0.1:2000", nodes=("a", "b"))

BASE = """
name: chat
model: {path: ../examples/demo_model}
pools:
  - {name: one, degrees: {tp: 1}, replicas: 2}
  - {name: two, degrees: {tp: 2}, replicas: 1}
engine: {dtype: float32, max_num_seqs: 8}
workload: {prompt_tokens: 10, output_tokens: 10}
"""


def parse(text: str) -> ClusterFile:
    return parse_section(text, ClusterFile, file="chat.yaml")


def make(text: str, previous: Deployment | None = None, given: Given = GIVEN) -> Deployment:
    file = parse(text)
    return make_deployment(
        file,
        choose(file, None),
        directory=FOLDER,
        given=given,
        device_types=DEVICE_TABLE,
        previous=previous or Deployment(),
    )


def generations(deployment: Deployment) -> dict[str, str]:
    return {pool.name: str(pool.generation) for pool in deployment.desired.pools}


def topology(devices: int) -> Topology:
    link = Link(bytes_per_s=1e9, latency_s=1e-4)
    nodes = tuple(
        Node(name=name, address=name, device_type="cpu-core", devices=devices, device_link=link) for name in "ab"
    )
    return Topology(nodes=nodes, device_types=DEVICE_TABLE, network=link)


# ------------------------------------------------------------------ what is wanted


def test_a_file_becomes_pools_launches_gateways_and_limits() -> None:
    wanted = make(BASE + "limits: {start_timeout_s: 9, drain_timeout_s: 8, max_queued_requests: 7}\n")
    pools = {pool.name: pool for pool in wanted.desired.pools}
    assert {name: (pool.role, pool.degrees, pool.replicas) for name, pool in pools.items()} == {
        "one": (Role.MIXED, Degrees(), 2),
        "two": (Role.MIXED, Degrees(tp=2), 1),
    }
    assert wanted.limits == Limits(loading_s=9, drain_s=8)
    assert wanted.model_path == str(ROOT / "examples" / "demo_model") and wanted.served_names == ("demo_model",)
    assert generations(wanted) == {"one": "1.1", "two": "1.1"} and wanted.highest == Generation(model=1, cut=1)
    arguments = wanted.launches["two"].arguments
    assert arguments[-2:] == ("--", wanted.model_path)
    joined = " ".join(arguments)
    for part in ("--tensor-parallel-size 2", "--dtype float32", "--max-num-seqs 8", "--max-queued-requests 7"):
        assert part in joined
    (gateway,) = wanted.gateways
    assert (gateway.node, gateway.host, gateway.port, gateway.watch) == ("a", "", 8000, ("10.0.0.1:2000",))
    assert "--served-model-name demo_model" in " ".join(gateway.arguments)
    assert "--drain-timeout-s 8" in " ".join(gateway.arguments)
    assert from_json(Deployment, to_json(wanted)) == wanted


def test_the_secret_is_in_environments_and_nowhere_else() -> None:
    wanted = make(BASE)
    for environment in (wanted.launches["one"].environment, wanted.gateways[0].environment):
        assert environment == {"SLIPSTREAM_SECRET": GIVEN.secret, MARK_VARIABLE: "chat/0"}
    bare = replace(wanted, secret="", launches={}, gateways=())
    assert GIVEN.secret not in to_json(bare) + repr(wanted.gateways[0].arguments) + repr(replace(bare, secret="x" * 64))
    assert "x" * 64 not in repr(replace(bare, secret="x" * 64))


def test_a_driver_takes_what_it_is_started_with(capsys: pytest.CaptureFixture[str]) -> None:
    """The options of the engine are those that the driver has; what places a rank is asked of it elsewhere."""
    wanted = make(BASE.replace("max_num_seqs: 8", "max_num_seqs: 8, enable_prefix_caching: false, num_threads: 1"))
    arguments = list(wanted.launches["one"].arguments)
    engine = arguments[arguments.index("--listen") :]
    with pytest.raises(SystemExit) as ended:
        driver_main([*[argument.replace("{address}", "h") for argument in engine[:-2]], "--help"])
    assert ended.value.code == 0 and "--no-enable-prefix-caching" in engine
    capsys.readouterr()


def test_ranks_find_their_own_in_the_arguments() -> None:
    launch = make(BASE).launches["two"]
    spec = ReplicaSpec(
        id=ReplicaId(pool="two", incarnation=4), role=Role.MIXED, generation=Generation(), degrees=Degrees(tp=2)
    )
    order = RankOrder(spec=spec, rank=1, address="10.0.0.7", device=0, launch=launch, ranks_on_host=1, ranks_per_host=1)
    joined = " ".join(order.arguments())
    assert joined.startswith(
        "--replica two-4 --rank 1 --address 10.0.0.7 --ranks-on-host 1 --ranks-per-host 1 "
        "--start-timeout 1800.0 --listen 10.0.0.7:0 "
    )
    assert "{" not in joined


def test_gateways_are_spread_and_do_not_share_a_port() -> None:
    wanted = make(BASE + "gateway: {count: 3, port: 9000, host: 0.0.0.0}\n")
    found = [(order.name, order.node, order.host, order.port) for order in wanted.gateways]
    assert found == [("0", "a", "0.0.0.0", 9000), ("1", "b", "0.0.0.0", 9000), ("2", "a", "0.0.0.0", 9001)]
    free = make(BASE + "gateway: {count: 2, port: 0}\n")
    assert [order.port for order in free.gateways] == [0, 0]


# ------------------------------------------------------------------ generations


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("replicas: 2", "replicas: 5", {"one": "1.1", "two": "1.1"}),
        (
            "name: chat",
            "name: chat\nlimits: {drain_timeout_s: 3, max_queued_requests: 9}",
            {"one": "1.1", "two": "1.1"},
        ),
        ("name: chat", "name: chat\ngateway: {count: 2}", {"one": "1.1", "two": "1.1"}),
        ("max_num_seqs: 8", "max_num_seqs: 8, seed: 3", {"one": "1.1", "two": "1.1"}),
        ("name: chat", "name: chat\nplace_what_fits: true", {"one": "1.1", "two": "1.1"}),
        ("workload: {prompt_tokens: 10", "workload: {prompt_tokens: 99", {"one": "1.1", "two": "1.1"}),
        ("degrees: {tp: 2}", "degrees: {tp: 4}", {"one": "1.1", "two": "1.2"}),
        ("max_num_seqs: 8", "max_num_seqs: 9", {"one": "1.2", "two": "1.2"}),
        ("replicas: 1}", "replicas: 1, engine: {block_size: 32}}", {"one": "1.1", "two": "1.2"}),
        ("replicas: 1}", "replicas: 1, devices: {nodes: [a]}}", {"one": "1.1", "two": "1.2"}),
        ("replicas: 1}", "replicas: 1, devices: {spread: rack}}", {"one": "1.1", "two": "1.1"}),
        ("dtype: float32", "dtype: bfloat16", {"one": "2.1", "two": "2.1"}),
        ("dtype: float32", "dtype: float32, quantization: int8", {"one": "2.1", "two": "2.1"}),
        ("dtype: float32", "dtype: float32, deterministic: true", {"one": "2.1", "two": "2.1"}),
        ("../examples/demo_model", "/elsewhere/model", {"one": "2.1", "two": "2.1"}),
        ("replicas: 1}", "replicas: 1, engine: {dtype: bfloat16}}", {"one": "1.1", "two": "2.1"}),
        ("dtype: float32, max_num_seqs: 8", "dtype: bfloat16, max_num_seqs: 9", {"one": "2.2", "two": "2.2"}),
    ],
)
def test_what_changes_which_number(old: str, new: str, expected: dict[str, str]) -> None:
    assert old in BASE
    before = make(BASE)
    after = make(BASE.replace(old, new), before)
    assert generations(after) == expected
    assert (after.secret, after.mark, after.watch_address) == (before.secret, before.mark, before.watch_address)


def test_numbers_are_never_given_twice() -> None:
    """What was taken away may still be draining: what comes in its place is not to be mistaken for it."""
    first = make(BASE)
    other = make(BASE.replace("float32", "bfloat16").replace("tp: 2", "tp: 4"), first)
    assert generations(other) == {"one": "2.1", "two": "2.2"}
    without = make(BASE.replace("  - {name: two, degrees: {tp: 2}, replicas: 1}\n", ""), other)
    assert generations(without) == {"one": "3.1"} and without.highest == Generation(model=3, cut=2)
    again = make(BASE, without)
    assert generations(again) == {"one": "3.1", "two": "3.3"} and again.highest == Generation(model=3, cut=3)
    assert generations(make(BASE, again)) == generations(again)


def test_drained_nodes_stay_drained() -> None:
    before = make(BASE)
    before = replace(before, desired=replace(before.desired, cordoned=frozenset({"a"})))
    assert make(BASE.replace("replicas: 2", "replicas: 3"), before).desired.cordoned == {"a"}


# ------------------------------------------------------------------ what is left open, what is refused


def test_what_the_file_leaves_open_is_as_planned() -> None:
    text = BASE.replace("degrees: {tp: 1}, replicas: 2", "degrees: auto, replicas: {min: 1, max: 2}")
    file = parse(text)
    assert leaves_open(file) and not leaves_open(parse(BASE))
    ranking = plan_cluster(file, topology(2), directory=FOLDER)
    best = {pool.name: pool for pool in ranking.plans[0].pools}
    one, two = choose(file, ranking)
    assert (one.degrees, one.replicas) == (best["one"].degrees, len(best["one"].replicas))
    assert (two.degrees, two.replicas) == (Degrees(tp=2), 1)


def test_pools_that_are_left_open_are_split_where_that_is_planned_first() -> None:
    file = parse(BASE[: BASE.index("pools:")] + BASE[BASE.index("engine:") :])
    ranking = plan_cluster(file, topology(2), directory=FOLDER)
    for split in (True, False):
        plans = tuple(sorted(ranking.plans, key=lambda plan: plan.figures.split is not split))
        assert plans[0].figures.split is split
        chosen = choose(file, replace(ranking, plans=plans))
        assert {pool.role for pool in chosen} == ({Role.PREFILL, Role.DECODE} if split else {Role.MIXED})


def test_what_does_not_fit_is_said() -> None:
    file = parse(
        BASE.replace("degrees: {tp: 2}", "degrees: {tp: 4}, devices: {nodes: [a]}").replace(
            "replicas: 2", "replicas: auto"
        )
    )
    with pytest.raises(NoPlan, match="no plan fits on this cluster"):
        choose(file, plan_cluster(file, topology(2), directory=FOLDER))


SPLIT = BASE.replace("{name: one,", "{name: one, role: prefill,").replace("{name: two,", "{name: two, role: decode,")


@pytest.mark.parametrize(
    ("kind", "nodes", "expected"),
    [
        ("auto", ("a",), "--kv-transport auto --kv-address {address} "),
        ("auto", ("a", "b"), "--kv-transport auto --kv-address {address} --kv-across-hosts "),
        ("tcp", ("a", "b"), "--kv-transport tcp --kv-address {address} --kv-across-hosts "),
        ("shm", ("a", "b"), "--kv-transport shm --kv-address {address} "),
    ],
)
def test_replicas_of_a_split_are_told_their_part(kind: str, nodes: tuple[str, ...], expected: str) -> None:
    wanted = make(SPLIT + f"kv_transport: {{kind: {kind}}}\n", given=replace(GIVEN, nodes=nodes))
    for name, role in (("one", "prefill"), ("two", "decode")):
        arguments = " ".join(wanted.launches[name].arguments)
        assert f" --role {role} {expected}--kv-transfer-timeout 30.0 --kv-max-parked-bytes 2147483648 " in arguments
        assert ("--kv-across-hosts" in arguments) is ("--kv-across-hosts" in expected)
    assert "--role" not in " ".join(make(BASE).launches["one"].arguments)
    assert {pool.name: pool.role for pool in wanted.desired.pools} == {"one": Role.PREFILL, "two": Role.DECODE}


def test_numbers_on_their_way_are_told_to_both_sides() -> None:
    wanted = make(SPLIT + "kv_transport: {dtype: fp8}\n")
    for name in ("one", "two"):
        assert " --kv-transfer-dtype fp8 " in " ".join(wanted.launches[name].arguments)
        assert "--kv-transfer-dtype" not in " ".join(make(SPLIT).launches[name].arguments)


@pytest.mark.parametrize("change", ["kind: tcp", "dtype: fp8"])
def test_another_transport_replaces_replicas_of_a_split_and_no_others(change: str) -> None:
    for text, expected in ((SPLIT, "1.2"), (BASE, "1.1")):
        after = make(text + f"kv_transport: {{{change}}}\n", make(text))
        assert generations(after) == {"one": expected, "two": expected}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (SPLIT + "kv_transport: {kind: nixl}\n", r"kv_transport\.kind: nixl can be planned with .* auto, tcp, shm"),
        (
            SPLIT.replace("max_num_seqs: 8}", "deterministic: true}") + "kv_transport: {dtype: fp8}\n",
            r"kv_transport\.dtype: fp8 rounds, which deterministic engines do not: use auto",
        ),
        (
            SPLIT.replace("replicas: 2}", "replicas: 2, engine: {quantization: int8}}"),
            r"pools\[0\]\.engine: pool 'one' has nobody to hand its prompts to",
        ),
    ],
)
def test_a_split_that_cannot_run_is_refused(text: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        check_can_run(parse(text))
    check_can_run(parse(SPLIT))
    check_can_run(parse(BASE + "kv_transport: {kind: nixl}\n"))


# ------------------------------------------------------------------ in words


def test_changes_are_told() -> None:
    before = make(BASE)
    after = make(BASE.replace("replicas: 2", "replicas: 3").replace("tp: 2", "tp: 4") + "gateway: {count: 2}\n", before)
    assert changes(before, after) == (
        "pool one: 2 → 3 replicas",
        "pool two: its replicas are replaced, generation 1.1 → 1.2: tensor_parallel_size 2 → 4",
        "gateway 1 is new, on b",
    )
    assert changes(before, before) == ()
    assert changes(before, make(BASE.replace("{name: two", "{name: six"), before)) == (
        "pool six is new: 1 replicas",
        "pool two goes away",
    )
    moved = make(BASE.replace("float32", "bfloat16") + "gateway: {port: 1}\n", before)
    assert changes(before, moved) == (
        "pool one: its replicas are replaced, generation 1.1 → 2.1: dtype float32 → bfloat16",
        "pool two: its replicas are replaced, generation 1.1 → 2.1: dtype float32 → bfloat16",
        "gateway 0 is drained and started anew",
    )
