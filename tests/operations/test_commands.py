"""The commands, from their arguments to their exit codes, on an imagined cluster with the real controller."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from slipstream.runtime.cli import app
from slipstream.runtime.controller.ledger import Ledger, deployments
from slipstream.runtime.controller.operator import NoCluster, OwnRaySilent
from slipstream.runtime.controller.process_log import ProcessLog
from slipstream.runtime.controller.records import from_json
from slipstream.runtime.operations import commands, up
from slipstream.runtime.operations.status import UNKNOWN, DeploymentStatus
from slipstream.tests.fakes.imagined_operator import ImaginedOperator
from slipstream.tests.simulation.world import Fate

MODEL = Path(__file__).resolve().parents[2] / "examples" / "demo_model"
FILE = f"""
name: chat
model: {{path: {MODEL}}}
pools:
  - {{name: one, degrees: {{tp: 1}}, replicas: 2}}
  - {{name: two, degrees: {{tp: 2}}, replicas: 1}}
workload: {{prompt_tokens: 10, output_tokens: 10}}
place_what_fits: true
"""


class Bench:
    """Commands against an imagined platform."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.operator = ImaginedOperator()

    @property
    def world(self):
        return self.operator.world

    def file(self, text: str = FILE) -> str:
        path = self.folder / "chat.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    def run(self, *arguments: str) -> Result:
        result = CliRunner().invoke(app, list(arguments))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    def up(self, text: str = FILE, *arguments: str) -> Result:
        return self.run("up", self.file(text), "--detach", *arguments)

    def status(self) -> DeploymentStatus:
        return from_json(DeploymentStatus, self.run("status", "--json").stdout)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    made = Bench(tmp_path)
    monkeypatch.setattr(commands, "reach_operator", made.operator.reach)
    monkeypatch.setattr(commands, "real_patience", made.operator.patience)
    yield made


def served(status: DeploymentStatus) -> dict[str, int]:
    return {pool.pool: pool.serving for pool in status.pools}


def ended(result: Result) -> dict[str, object]:
    """Return the last object that a command printed."""
    return dict(json.loads(result.stdout.splitlines()[-1]))


# ------------------------------------------------------------------ up


def test_up_tells_what_happens_and_ends_when_all_serve(bench: Bench) -> None:
    result = bench.up()
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "chat serves demo_model at http://10.0.0.1:8000/v1"
    for part in ("node a at", "one-1 rank 0 on a/0: ready", "two-2 serves at", "gateway 0 on a: ready"):
        assert part in result.stdout
    status = bench.status()
    assert served(status) == {"one": 2, "two": 1} and status.controller and not status.problem
    assert {replica.phase for replica in status.replicas} == {"ready"}


def test_up_in_json_is_an_object_a_line_and_tells_no_secret(bench: Bench) -> None:
    result = bench.up(FILE, "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert {line["event"] for line in lines} >= {"node", "rank", "replica", "gateway", "end"}
    assert (lines[-1]["exit_code"], lines[-1]["outcome"]) == (0, "done")
    assert lines[-1]["status"]["pools"][0]["serving"] == 2
    secret = bench.world.ledger.deployment().secret
    assert len(secret) == 64
    assert secret not in result.output + bench.run("status", "--json").output + bench.run("status").output


def test_up_says_what_is_missing_and_ends_with_1(bench: Bench) -> None:
    result = bench.up(FILE.replace("replicas: 2", "replicas: 4"))
    assert result.exit_code == 1
    assert "there is not room for all" in result.stderr and "pool one: 2 of 4 replicas serve" in result.stderr
    assert "1 devices are needed and 0 are free" in result.stderr
    # A node that comes late is used, and everything is as wanted.
    bench.world.add_node("c", devices=2, device_type="small", rack="r", taken=frozenset())
    assert bench.up(FILE.replace("replicas: 2", "replicas: 4")).exit_code == 0


def test_up_gives_up_on_what_fails_again_and_again(bench: Bench) -> None:
    bench.world.failing_pools = frozenset({"two"})
    result = bench.up()
    assert result.exit_code == 1 and "it does not come up" in result.stderr
    assert "pool two: 0 of 1 replicas serve, 3 starts have failed" in result.stderr
    assert "the checkpoint is cut short" in result.stdout


def test_up_does_not_wait_for_ever(bench: Bench) -> None:
    bench.world.fates = [Fate.SLOW] * 3
    result = bench.up(FILE, "--timeout", "20")
    assert result.exit_code == 1 and "not all serves after 20 s" in result.stderr


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (FILE + "color: red\n", "color: is not a known key"),
        (FILE.replace(str(MODEL), "nowhere"), "is not a directory with a model"),
        (
            FILE.replace("{name: one,", "{name: one, role: prefill,").replace(
                "{name: two,", "{name: two, role: decode,"
            )
            + "kv_transport: {kind: nccl}\n",
            "nccl can be planned with and not be run yet",
        ),
        (FILE + "gateway: {api_keys_env: NO_SUCH_KEYS}\n", "NO_SUCH_KEYS has to hold API keys"),
    ],
)
def test_a_wrong_file_ends_with_2_and_starts_nothing(bench: Bench, text: str, what: str) -> None:
    result = bench.up(text)
    assert result.exit_code == 2 and what in result.stderr
    assert bench.operator.running is None and deployments(bench.operator.store) == []


def test_up_of_what_runs_is_an_update(bench: Bench) -> None:
    bench.up()
    before = bench.world.ledger.deployment()
    result = bench.run("up", bench.file(FILE.replace("replicas: 2", "replicas: 1")))
    assert result.exit_code == 0 and "pool one: 2 → 1 replicas" in result.stdout
    assert served(bench.status()) == {"one": 1, "two": 1}
    after = bench.world.ledger.deployment()
    assert (after.secret, after.mark, after.watch_address) == (before.secret, before.mark, before.watch_address)


def test_up_stays_until_it_is_told_to_end_and_takes_all_down(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    patience = bench.operator.patience()

    def pause(seconds: float) -> None:
        nonlocal looks
        if bench.world.view.replicas and len(bench.world.view.replicas) == 3:
            looks += 1
            if looks == 10:
                raise KeyboardInterrupt
        bench.world.pass_time(seconds)

    monkeypatch.setattr(commands, "real_patience", lambda: type(patience)(clock=patience.clock, pause=pause))
    result = bench.run("up", bench.file())
    assert result.exit_code == 0, result.output
    assert "Ctrl-C takes it down" in result.stdout and "chat is down; nothing of it is left" in result.stdout
    assert bench.operator.remains("chat", "").nothing and not bench.operator.store.values


def test_api_keys_are_given_to_gateways(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHAT_KEYS", " first-key-1, second-key-2\n")
    assert bench.up(FILE + "gateway: {api_keys_env: CHAT_KEYS}\n").exit_code == 0
    assert bench.operator.orders["0"].api_keys == ("first-key-1", "second-key-2")
    assert "first-key-1" not in bench.run("status", "--json").output


# ------------------------------------------------------------------ update, scale, drain


def test_update_replaces_replicas_without_a_gap(bench: Bench) -> None:
    bench.up()
    result = bench.run("update", bench.file(FILE.replace("place_what", "engine: {dtype: float32}\nplace_what")))
    assert result.exit_code == 0, result.output
    assert "its replicas are replaced, generation 1.1 → 2.1: dtype auto → float32" in result.stdout
    status = bench.status()
    assert served(status) == {"one": 2, "two": 1}
    assert {replica.generation for replica in status.replicas} == {"2.1"}


def test_update_starts_and_ends_gateways(bench: Bench) -> None:
    bench.up(FILE + "gateway: {count: 3}\n")
    assert set(bench.operator.orders) == {"0", "1", "2"}
    assert bench.run("update", bench.file(FILE + "gateway: {count: 1, port: 81}\n")).exit_code == 0
    assert {name: order.port for name, order in bench.operator.orders.items()} == {"0": 81}
    assert [name for name, _ in bench.operator.drained_gateways] == ["1", "2"]


def test_update_needs_something_that_runs(bench: Bench) -> None:
    result = bench.run("update", bench.file())
    assert result.exit_code == 2 and "no deployment 'chat' runs" in result.stderr


def test_scale(bench: Bench) -> None:
    bench.up()
    result = bench.run("scale", "one", "1")
    assert result.exit_code == 0 and result.stdout.splitlines()[-1] == "pool one has 1 replicas"
    assert served(bench.status()) == {"one": 1, "two": 1}
    assert ended(bench.run("scale", "one", "2", "--detach", "--json"))["outcome"] == "asked"
    too_many = bench.run("scale", "two", "2", "--json")
    assert too_many.exit_code == 1 and ended(too_many)["outcome"] == "short"
    wrong = bench.run("scale", "three", "1")
    assert wrong.exit_code == 2 and "it has one, two" in wrong.stderr
    assert bench.run("scale", "one", "-1").exit_code == 2


def test_drain_says_what_is_to_move_and_undo_lets_it_stay(bench: Bench) -> None:
    bench.up()
    (replica, *_) = [each.replica for each in bench.status().replicas]
    unknown = bench.run("drain", "nowhere")
    assert unknown.exit_code == 2 and "nodes a, b" in unknown.stderr and replica in unknown.stderr
    assert bench.run("drain", "b", "--detach").exit_code == 0
    assert bench.world.ledger.deployment().desired.cordoned == {"b"}
    assert bench.status().cordoned == ("b",)
    assert bench.run("drain", "b", "--undo", "--detach").exit_code == 0
    assert bench.run("drain", replica, "--detach").exit_code == 0
    assert bench.world.ledger.deployment().desired.leaving == {replica}
    # Asked for, and taken back before anything has moved.
    assert bench.run("drain", replica, "--undo").stdout.splitlines()[-1] == f"{replica} may stay"
    desired = bench.world.ledger.deployment().desired
    assert not desired.cordoned and not desired.leaving
    assert bench.run("drain", "b", "--undo").exit_code == 2


# ------------------------------------------------------------------ status, logs


def test_status_is_for_people_too(bench: Bench) -> None:
    bench.up()
    text = bench.run("status").stdout
    for part in ("chat", "pool", "one", "http://10.0.0.1:8000/v1", "nodes", "a/0  one-1 rank 0: ready", "view "):
        assert part in text
    assert bench.run("status", "--name", "other").exit_code == 2


def test_status_without_a_controller_is_what_the_ledger_has(bench: Bench) -> None:
    bench.up()
    before = bench.status()
    bench.operator.kill_controller()
    after = bench.status()
    assert not after.controller and served(after) == served(before) and after.epoch == before.epoch
    assert [(each.replica, each.address, each.routed, each.devices) for each in after.replicas] == [
        (each.replica, each.address, True, each.devices) for each in before.replicas
    ]
    assert {each.phase for each in after.replicas} == {UNKNOWN}
    assert "the controller is down (no controller runs); what serves goes on" in bench.run("status").stdout
    # The next change starts one, which takes over what runs.
    assert bench.run("scale", "one", "1").exit_code == 0
    assert {each.replica for each in bench.status().replicas} < {each.replica for each in before.replicas}


def test_status_says_that_nothing_runs(bench: Bench) -> None:
    result = bench.run("status")
    assert result.exit_code == 1 and "slipstream up FILE" in result.stderr
    assert ended(bench.run("status", "--json"))["outcome"] == "failed"


def test_logs_of_a_rank_a_replica_and_all(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.up()
    for source in ("rank/one-1/0", "rank/two-2/0", "rank/two-2/1", "gateway/0"):
        log = bench.operator.logs[source] = ProcessLog()
        for number in range(3):
            log.add(f"{source} says {number}")
    assert bench.run("logs", "two-2", "--rank", "1", "--lines", "1").stdout == "two-2/1 | rank/two-2/1 says 2\n"
    everything = bench.run("logs", "--json").stdout.splitlines()
    assert len(everything) == 12
    assert json.loads(everything[-1]) == {"source": "gateway/0", "number": 2, "line": "gateway/0 says 2"}
    assert len(bench.run("logs", "gateway").stdout.splitlines()) == 3
    wrong = bench.run("logs", "three")
    assert wrong.exit_code == 2 and "two-2" in wrong.stderr

    patience, pauses = bench.operator.patience(), []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise KeyboardInterrupt
        bench.operator.logs["gateway/0"].add(f"more {len(pauses)}")

    monkeypatch.setattr(commands, "real_patience", lambda: type(patience)(clock=patience.clock, pause=pause))
    followed = bench.run("logs", "gateway/0", "--follow", "--lines", "1")
    assert followed.exit_code == 130
    assert followed.stdout.splitlines() == [f"gateway/0 | {text}" for text in ("gateway/0 says 2", "more 1", "more 2")]


# ------------------------------------------------------------------ down


def test_down_drains_and_leaves_nothing(bench: Bench) -> None:
    bench.up()
    (name, *_) = [each.replica for each in bench.world.view.replicas]
    assert bench.world.request(name, 3)
    result = bench.run("down")
    assert result.exit_code == 0 and "chat is down; nothing of it is left" in result.stdout
    assert bench.operator.remains("chat", "").nothing and not bench.operator.store.values
    assert bench.operator.judge.cut_short == 0
    again = bench.run("down", "--json")
    assert again.exit_code == 0 and ended(again)["outcome"] == "nothing"


def test_down_at_once_cuts_off_what_runs(bench: Bench) -> None:
    bench.up()
    for replica in bench.world.view.replicas:
        bench.world.request(replica.replica, 3)
    for driver in bench.world.drivers.values():
        driver.stuck = True
    began_s = bench.world.now_s
    assert bench.run("down", "--now").exit_code == 0
    assert bench.world.now_s - began_s < 60 and bench.operator.judge.cut_short
    assert bench.operator.drained_gateways == [("0", 0.0)]


def test_down_ends_what_does_not_end(bench: Bench) -> None:
    bench.up()
    for replica in bench.world.view.replicas:
        bench.world.request(replica.replica, 3)
    for driver in bench.world.drivers.values():
        driver.stuck = True
    result = bench.run("down", "--timeout", "5")
    assert result.exit_code == 0 and "ended at once" in result.stdout and "was cut off" in result.stdout
    assert bench.operator.remains("chat", "").nothing


def test_down_without_a_controller(bench: Bench) -> None:
    bench.up()
    bench.operator.kill_controller()
    assert bench.run("down").exit_code == 0
    assert bench.operator.remains("chat", "").nothing and not bench.operator.store.values


def test_down_may_be_interrupted_and_run_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.up()
    patience = bench.operator.patience()

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "real_patience", lambda: type(patience)(clock=patience.clock, pause=interrupted))
    result = bench.run("down")
    assert result.exit_code == 130 and "slipstream down" in result.stderr
    assert Ledger(bench.operator.store, deployment="chat").deployment().mark
    monkeypatch.setattr(commands, "real_patience", bench.operator.patience)
    assert bench.run("down").exit_code == 0
    assert bench.operator.remains("chat", "").nothing and not bench.operator.store.values


def test_down_where_there_is_no_cluster(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object):
        raise NoCluster("no Ray runs on this machine")

    monkeypatch.setattr(commands, "reach_operator", none)
    assert bench.run("down").exit_code == 0
    status = bench.run("status")
    assert status.exit_code == 1 and "no Ray runs" in status.stderr


def test_our_own_ray_that_does_not_answer_can_be_ended(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object, **__: object):
        raise OwnRaySilent("it runs and does not answer")

    monkeypatch.setattr(commands, "reach_operator", silent)
    result = bench.run("down")
    assert result.exit_code == 1 and "slipstream down --now ends it" in result.stderr
    assert bench.run("down", "--now").exit_code == 0


def test_a_platform_that_does_not_answer_is_an_error(bench: Bench) -> None:
    bench.up()
    bench.operator.silent = True
    result = bench.run("status")
    assert result.exit_code == 1 and "nobody answers" in result.stderr


def test_frozen_list_of_commands() -> None:
    """Who adds a command adds it to docs/operations.md."""
    text = (Path(up.__file__).resolve().parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
    for name in ("up", "update", "status", "scale", "drain", "logs", "down"):
        assert f"## `slipstream {name}" in text
