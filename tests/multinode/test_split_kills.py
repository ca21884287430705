"""A split deployment over hosts under load, hurt in every way: no answer is wrong, none is missing, none hangs.

Two decode replicas are on the first and the last host, two prefill replicas and a gateway on the one between, and
clients ask through that gateway all the while. A decode replica is killed, a prefill replica, the link from the gateway
and both prefill replicas to one decode replica is cut for ten seconds, the driver of the other one stands still for
twenty, and meanwhile the controller is killed. What a client notices is a pause.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from slipstream.runtime.api_client.metrics_text import figures
from slipstream.runtime.clock import monotonic_clock
from slipstream.runtime.demo.main import PROMPTS
from slipstream.runtime.operations.status import DeploymentStatus
from slipstream.tests.multinode.deployed import CONTROLLER, RANKS, Commands, Views, processes, secret_of
from slipstream.tests.multinode.namespaces import Host, hosts, missing
from slipstream.tests.multinode.questions import Question, questions_of
from slipstream.tests.multinode.raylets import start_raylet, wait_for_nodes
from slipstream.tests.multinode.stream_load import Load, stream_load

pytest.importorskip("ray")

MODEL = Path(__file__).resolve().parents[2] / "examples" / "demo_model"
PATIENCE_S = 90.0
"""A request that takes longer hangs."""

LOST = 'slipstream_replicas{state="lost"}'
NOTICED_S = 5.0
"""A replica that says nothing is lost after so long: what clients wait longer is what recovery takes."""

SLACK_S = 5.0
"""For a machine that has other things to do, and for requests that met the fault twice."""

COMMITTED = 'slipstream_hand_offs_total{ending="committed"}'
CLIENTS = 12
REQUESTS = 500
CUT_S = 10.0
STOP_S = 20.0
FILE = f"""
name: kills
model: {{path: {MODEL}, served_names: [demo]}}
pools:
  - {{name: prompts, role: prefill, degrees: {{tp: 1}}, replicas: 2, devices: {{nodes: [b]}}}}
  - {{name: answers, role: decode, degrees: {{tp: 1}}, replicas: 2, devices: {{nodes: [a, c]}}}}
engine:
  {{device: cpu, dtype: float32, num_threads: 1, max_num_seqs: 16, max_model_len: 256, kv_cache_memory_bytes: 33554432,
    enable_prefix_caching: false}}
kv_transport: {{split_from_tokens: 8}}
workload: {{prompt_tokens: 72, output_tokens: 24}}
gateway: {{count: 2}}
"""


@pytest.fixture(scope="module")
def network() -> Iterator[tuple[Host, ...]]:
    if (reason := missing()) is not None:
        pytest.skip(reason)
    with hosts(3) as made:
        yield made


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return questions_of(MODEL, PROMPTS)


@contextmanager
def deployed(network: tuple[Host, ...], commands: Commands, file: Path) -> Iterator[DeploymentStatus]:
    """Start Ray on all hosts, with as many devices as there are to be replicas, and the deployment on it."""
    raylets: list[subprocess.Popen[bytes]] = []
    try:
        for name, host in zip("abc", network, strict=True):
            head = network[0].address if raylets else None
            raylets.append(start_raylet(host, name, head, devices=2 if name == "b" else 1))
            # One after the other: of two that start at once on one machine, one at times does not come up.
            wait_for_nodes(network[0], commands.ray, len(raylets))
        told = commands.run("up", str(file), "--detach", "--json", "--timeout", "180").splitlines()[-1]
        assert json.loads(told)["outcome"] == "done"
        yield commands.status()
    finally:
        for raylet in reversed(raylets):
            raylet.kill()
            raylet.wait()


def drivers_on(host: Host) -> list[int]:
    """Return the drivers' processes on a host."""
    return processes(host, RANKS, b"--rank\x000\x00")


def whole(status: DeploymentStatus) -> bool:
    return status.controller and all(pool.serving == pool.wanted for pool in status.pools)


def both_pools(now: dict[str, str]) -> bool:
    return sorted(now.values()) == ["answers", "answers", "prompts", "prompts"]


def metrics(host: Host, url: str) -> dict[str, float]:
    with ThreadPoolExecutor(1, initializer=host.enter) as pool:
        return figures(pool.submit(httpx.get, f"{url}/metrics", timeout=PATIENCE_S, trust_env=False).result().text)


@dataclass(slots=True)
class Noticing:
    """When the gateway saw a replica as lost: as its metrics say, asked all the time."""

    seen: list[tuple[float, bool]] = field(default_factory=list)

    def after_s(self, fault_s: float) -> float | None:
        """Return how long after a fault a replica was lost that was not before, None if none was."""
        return next((at_s - fault_s for at_s, lost in self.seen if at_s > fault_s and lost), None)


@contextmanager
def noticing(host: Host, url: str) -> Iterator[Noticing]:
    """Look at a gateway from its own host, several times a second."""
    noticed, ending = Noticing(), threading.Event()

    def look() -> None:
        with httpx.Client(timeout=PATIENCE_S, trust_env=False) as client:
            while not ending.wait(0.2):
                told = figures(client.get(f"{url}/metrics").text)
                noticed.seen.append((monotonic_clock(), told.get(LOST, 0) > 0))

    with ThreadPoolExecutor(1, initializer=host.enter) as pool:
        looking = pool.submit(look)
        try:
            yield noticed
        finally:
            ending.set()
            looking.result(PATIENCE_S)


def recovery(load: Load, noticed: Noticing, what: str, fault_s: float) -> float:
    """Say how requests fared that met a fault; return the longest wait for a token among them."""
    waited_s = load.longest_wait_s(fault_s)
    noticed_s = noticed.after_s(fault_s)
    if noticed_s is None:
        after = f"noticed by nobody; {max(0.0, waited_s - NOTICED_S):.2f} s longer than noticing takes at most"
    else:
        after = f"noticed after {noticed_s:.2f} s, gone on {max(0.0, waited_s - noticed_s):.2f} s later"
    print(f"{load.told(what, fault_s)}; {after}")
    return waited_s


def wait_until(what: str, check: object, *, pause_s: float = 0.2) -> None:
    assert callable(check)
    deadline_s, never = monotonic_clock() + PATIENCE_S, threading.Event()
    while not check():
        assert monotonic_clock() < deadline_s, f"{what}: it has not become so"
        never.wait(pause_s)


def serving_requests(load: Load, count: int) -> None:
    """Wait until so many more requests have been answered: it goes on."""
    goal = load.answered + count
    wait_until(f"{count} more answers", lambda: load.answered >= goal)


def test_a_split_deployment_survives_its_parts(
    network: tuple[Host, ...], questions: list[Question], tmp_path: Path
) -> None:
    a, b, c = network
    file = tmp_path / "kills.yaml"
    file.write_text(FILE, encoding="utf-8")
    commands = Commands(host=a, ray=f"{a.address}:6379", folder=tmp_path)
    never = threading.Event()
    with ExitStack() as opened:
        seen = opened.enter_context(deployed(network, commands, file))
        roles = {device: each.role for each in seen.replicas for device in each.devices}
        assert roles == {"a/0": "decode", "b/0": "prefill", "b/1": "prefill", "c/0": "decode"}
        (gateway,) = [each for each in seen.gateways if each.node == "b"]
        url = f"http://{gateway.address}"
        views = Views(a, seen.watch_address, secret_of(gateway.pid))
        opened.callback(views.close)
        views.until("the view", both_pools, began_s=monotonic_clock())
        first = set(views.now)
        with (
            noticing(b, url) as noticed,
            stream_load(b, url, questions, clients=CLIENTS, patience_s=PATIENCE_S) as load,
        ):
            serving_requests(load, 2 * CLIENTS)

            (decoding,) = drivers_on(a)
            killed_decode_s = monotonic_clock()
            os.kill(decoding, signal.SIGKILL)
            serving_requests(load, 2 * CLIENTS)
            killed_prefill_s = monotonic_clock()
            os.kill(drivers_on(b)[0], signal.SIGKILL)
            serving_requests(load, 2 * CLIENTS)
            views.until("both are missed", lambda now: len(first & set(now)) == 2, began_s=killed_decode_s)
            views.until("and replaced", both_pools, began_s=killed_prefill_s)

            cut_s = monotonic_clock()
            b.cut_from(c)
            never.wait(CUT_S)
            b.heal_from(c)
            serving_requests(load, 2 * CLIENTS)

            (stopped,) = drivers_on(a)
            stopped_s = monotonic_clock()
            os.kill(stopped, signal.SIGSTOP)
            try:
                (controller,) = processes(a, CONTROLLER)
                os.kill(controller, signal.SIGKILL)
                never.wait(STOP_S)
            finally:
                os.kill(stopped, signal.SIGCONT)
            wait_until(f"{REQUESTS} answers", lambda: load.answered >= REQUESTS)
            commands.until("the controller is back, and all serve", whole)
        for what, at_s in (
            ("a decode replica is killed", killed_decode_s),
            ("a prefill replica is killed", killed_prefill_s),
            ("the way to a decode replica is cut for 10 s", cut_s),
            ("a decode driver stands still for 20 s, and the controller is killed", stopped_s),
        ):
            assert recovery(load, noticed, what, at_s) < NOTICED_S + SLACK_S, what
        told = metrics(b, url)
        print(
            f"{load.answered} answers, {len(load.failed)} failed, {len(load.wrong)} wrong; "
            f"{told.get(COMMITTED, 0):.0f} hand-offs, "
            f"{told.get('slipstream_kv_bytes_moved_total', 0):,.0f} bytes of KV moved, "
            f"{told.get('slipstream_requests_moved_total', 0):.0f} requests moved"
        )
        assert load.wrong == [] and load.failed == []
        assert load.answered >= REQUESTS
        # It was a split that survived, and requests did go elsewhere.
        assert told["slipstream_kv_bytes_moved_total"] > 0 and told["slipstream_requests_moved_total"] > 0
        wait_until("no block is lost", lambda: _everything_is_free(metrics(b, url)))


def _everything_is_free(told: dict[str, float]) -> bool:
    free, blocks = (told[f"slipstream_kv_blocks{part}"] for part in ("_available", ""))
    return told["slipstream_gateway_in_flight"] == 0 and free == blocks > 0
