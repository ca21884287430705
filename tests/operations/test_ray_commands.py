"""The commands on Ray itself, with ranks and gateways that are processes without a model. Nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from slipstream.runtime.cli import app
from slipstream.runtime.clock import monotonic_clock
from slipstream.runtime.controller.local_ray import ENVIRONMENT, LocalRays, state_folder
from slipstream.runtime.controller.marked_processes import marked, process_mark
from slipstream.runtime.controller.records import from_json
from slipstream.runtime.operations import deployment
from slipstream.runtime.operations.status import UNKNOWN, DeploymentStatus

pytest.importorskip("ray")
ray_bed = pytest.importorskip("slipstream.tests.controller.ray_bed")
operating = pytest.importorskip("slipstream.runtime.controller.ray_operator").operating

MODEL = Path(__file__).resolve().parents[2] / "examples" / "demo_model"
PATIENCE = ("--timeout", "90")
FILE = f"""
name: chat
model: {{path: {MODEL}}}
pools: [{{name: one, degrees: {{tp: 1}}, replicas: 2}}]
gateway: {{port: 0}}
limits: {{drain_timeout_s: 5}}
workload: {{prompt_tokens: 10, output_tokens: 10}}
"""
WIDE = FILE.replace("{tp: 1}, replicas: 2", "{tp: 4}, replicas: 1").replace("port: 0", "port: 0, count: 2")


def run(*arguments: str) -> Result:
    began_s = monotonic_clock()
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    print(f"slipstream {arguments[0]}: {monotonic_clock() - began_s:.1f} s\n{result.output}")
    return result


def status(*where: str) -> DeploymentStatus:
    return from_json(DeploymentStatus, run("status", "--json", *where).stdout)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cluster file, and an environment in which nothing else is found."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(deployment, "RANK_MODULE", "slipstream.tests.fakes.placed_rank")
    monkeypatch.setattr(deployment, "GATEWAY_MODULE", "slipstream.tests.fakes.gateway_program")
    path = tmp_path / "chat.yaml"
    path.write_text(FILE, encoding="utf-8")
    return path


@pytest.fixture
def local(file: Path) -> Iterator[LocalRays]:
    """Where the Ray of this machine is noted; it is ended whatever happens."""
    rays = LocalRays(state_folder(os.environ))
    yield rays
    rays.end()


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two replicas need two cores")
def test_a_deployments_life_on_this_machine(file: Path, local: LocalRays, monkeypatch: pytest.MonkeyPatch) -> None:
    up = run("up", str(file), "--detach", "--address", "local", *PATIENCE, "--json")
    assert up.exit_code == 0
    told = [json.loads(line) for line in up.stdout.splitlines()]
    assert (told[-1]["event"], told[-1]["outcome"]) == ("end", "done")
    assert {line.get("loaded") for line in told if line["event"] == "rank"} >= {1.0}
    noted = local.find()
    assert noted is not None

    seen = status()
    assert [(pool.pool, pool.wanted, pool.serving) for pool in seen.pools] == [("one", 2, 2)]
    assert seen.controller and seen.ray == noted.address and not seen.problem
    (gateway,) = seen.gateways
    assert gateway.state == "ready" and gateway.address.startswith("127.0.0.1:")
    first = seen.replicas[0]
    # A file that says the same changes nothing.
    again = run("up", str(file), *PATIENCE)
    assert again.exit_code == 0 and "nothing changes" in again.stdout
    assert [each.replica for each in status().replicas] == [each.replica for each in seen.replicas]

    lines = run("logs", first.replica).stdout.splitlines()
    assert (
        f"{first.replica}/0 | {first.replica} rank 0 stands in for slipstream.runtime.worker.main, with a secret"
        in lines
    )
    assert "gateway/0 | watches" in run("logs", "gateway", "--lines", "5").stdout

    scaled = run("scale", "one", "1", *PATIENCE)
    assert scaled.exit_code == 0 and "pool one has 1 replicas" in scaled.stdout
    os.kill(gateway.pid, signal.SIGKILL)
    updated = run("update", str(file), *PATIENCE)
    assert updated.exit_code == 0 and "pool one: 1 → 2 replicas" in updated.stdout
    back = status()
    assert [pool.serving for pool in back.pools] == [2] and back.gateways[0].starts == 2

    marks = {line for pid in [back.gateways[0].pid] for line in Path(f"/proc/{pid}/environ").read_text().split("\0")}
    (mark,) = [line.partition("=")[2] for line in marks if line.startswith("SLIPSTREAM_DEPLOYMENT=")]
    assert len(marked(mark)) >= 3
    down = run("down")
    assert down.exit_code == 0 and "chat is down; nothing of it is left" in down.stdout
    assert "the Ray of this machine has ended too" in down.stdout
    assert marked(mark) == [] and local.find() is None and process_mark(noted.process.pid) is None
    assert run("down", "--address", "local").stdout == "nothing runs\n"


def test_ranks_and_gateways_on_two_nodes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**ENVIRONMENT, "RAY_AUTH_MODE": "disabled"}.items():
        monkeypatch.setenv(name, value)
    nodes = ray_bed.RayNodes()
    try:
        for name in ("a", "b"):
            nodes.add(name)
        where = ("--address", nodes.address)
        file.write_text(WIDE, encoding="utf-8")
        assert run("up", str(file), "--detach", *where, *PATIENCE).exit_code == 0
        seen = status(*where)
        (replica,) = seen.replicas
        assert replica.devices == ("a/0", "a/1", "b/0", "b/1")
        assert {(gateway.name, gateway.node, gateway.state) for gateway in seen.gateways} == {
            ("0", "a", "ready"),
            ("1", "b", "ready"),
        }
        assert f"{replica.replica}/3 | {replica.replica} rank 3 stands in" in run("logs", "--rank", "3", *where).stdout
        # Without a controller the ledger is shown; down starts another one, which takes over what runs.
        with operating(nodes.address) as operator:
            operator.end_controller("chat")
        alone = status(*where)
        assert not alone.controller and [each.phase for each in alone.replicas] == [UNKNOWN]
        assert [each.address for each in alone.replicas] == [replica.address]
        down = run("down", "--now", *where)
        assert down.exit_code == 0 and "nothing of it is left" in down.stdout
        assert run("status", *where).exit_code == 1
    finally:
        nodes.shutdown()
