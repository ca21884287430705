"""A deployment over hosts with addresses of their own: brought up, asked, hurt in every way, mended, taken down.

``wide`` has its two ranks on two hosts, ``narrow`` one on another. While clients ask all the time, processes are
killed, a link is cut, a host is lost and another one comes. No answer is ever wrong.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from slipstream.runtime.clock import monotonic_clock
from slipstream.tests.multinode.deployed import (
    CONTROLLER,
    GATEWAYS,
    RANKS,
    Commands,
    Views,
    ask,
    clients,
    local_sockets,
    processes,
    secret_of,
)
from slipstream.tests.multinode.namespaces import Host, hosts, missing
from slipstream.tests.multinode.questions import Question, questions_of
from slipstream.tests.multinode.raylets import counting_calls, start_raylet, wait_for_nodes

pytest.importorskip("ray")

MODEL = Path(__file__).resolve().parents[2] / "examples" / "demo_model"
PATIENCE_S = 120.0
DETECTION_S = 4.0
LATE_S = 2.0
"""What a busy machine may add to that."""
FILE = f"""
name: acceptance
model: {{path: {MODEL}, served_names: [demo]}}
pools:
  - {{name: wide, degrees: {{tp: 2}}, replicas: 1}}
  - {{name: narrow, degrees: {{tp: 1}}, replicas: 1}}
engine:
  {{device: cpu, dtype: float32, num_threads: 1, max_num_seqs: 16, max_model_len: 256, kv_cache_memory_bytes: 33554432}}
workload: {{prompt_tokens: 48, output_tokens: 48}}
limits: {{drain_timeout_s: 20}}
place_what_fits: true
"""
PROMPTS = ("Once upon a time", "The little dog", "In the garden there was", "One day, a bird", "Lily had a red ball")


@pytest.fixture(scope="module")
def network() -> Iterator[tuple[Host, ...]]:
    if (reason := missing()) is not None:
        pytest.skip(reason)
    with hosts(4) as made:
        yield made


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return questions_of(MODEL, PROMPTS)


def kill_one(host: Host, *words: bytes) -> float:
    """Kill the process on a host in whose command line these stand; the moment."""
    (pid,) = processes(host, *words)
    at_s = monotonic_clock()
    os.kill(pid, signal.SIGKILL)
    return at_s


def calls(folder: Path) -> dict[int, int]:
    """Return how often each process has called Ray, of those that have."""
    return {int(file.name): file.stat().st_size for file in folder.iterdir()}


def rank(number: int, replica: str) -> tuple[bytes, ...]:
    """Return what stands in the command line of a rank's process."""
    return RANKS, f"--replica\0{replica}\0--rank\0{number}\0".encode()


def without(replica: str) -> Callable[[dict[str, str]], bool]:
    return lambda serving: replica not in serving


def serving(*pools: str) -> Callable[[dict[str, str]], bool]:
    return lambda now: sorted(now.values()) == sorted(pools)


@contextmanager
def raylets(
    network: tuple[Host, ...], commands: Commands, counts: Path
) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Start Ray on all hosts but the last, which comes late; each has one device. Calls of Ray are counted."""
    started: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, host in zip("abc", network, strict=False):
            started[name] = start_raylet(
                host,
                name,
                network[0].address if started else None,
                devices=1,
                environment=counting_calls(counts),
            )
            # One after the other: of two that start at once on one machine, one at times does not come up.
            wait_for_nodes(network[0], commands.ray, len(started))
        yield started
    finally:
        for raylet in reversed(started.values()):
            raylet.kill()
            raylet.wait()


def test_a_deployment_over_hosts(network: tuple[Host, ...], questions: list[Question], tmp_path: Path) -> None:
    a, b, c, late = network
    by_name = dict(zip("abcd", network, strict=True))
    file = tmp_path / "acceptance.yaml"
    file.write_text(FILE, encoding="utf-8")
    commands = Commands(host=a, ray=f"{a.address}:6379", folder=tmp_path)
    with ExitStack() as opened:
        counts = tmp_path / "counts"
        counts.mkdir()
        started = opened.enter_context(raylets(network, commands, counts))

        # Up, where the plan says, with the tokens of one rank, and nowhere localhost.
        last = json.loads(commands.run("up", str(file), "--detach", "--json", "--timeout", "180").splitlines()[-1])
        assert (last["event"], last["outcome"]) == ("end", "done")
        seen = commands.status()
        (wide,) = [each for each in seen.replicas if each.pool == "wide"]
        (narrow,) = [each for each in seen.replicas if each.pool == "narrow"]
        assert len(set(wide.devices)) == 2 and len({*wide.devices, *narrow.devices}) == 3
        for replica in (wide, narrow):
            for number, device in enumerate(replica.devices):
                there = by_name[device.partition("/")[0]]
                assert len(processes(there, *rank(number, replica.replica))) == 1, f"{device} has not what is planned"
            assert replica.address.partition(":")[0] == by_name[replica.devices[0].partition("/")[0]].address
        (gateway,) = seen.gateways
        url = f"http://{gateway.address}"
        for host in (a, b, c):
            for pid in (*processes(host, RANKS), *processes(host, GATEWAYS)):
                assert local_sockets(pid) == [], "an address is localhost"
                assert "_raylet" not in Path(f"/proc/{pid}/maps").read_text(), "what serves has loaded Ray"
        before = calls(counts)
        assert ask(a, url, [body for body, _ in questions] * 10) == [right for _, right in questions] * 10
        after = calls(counts)
        serve = {pid for host in (a, b, c) for pid in (*processes(host, RANKS), *processes(host, GATEWAYS))}
        assert not serve & set(after), "what serves has called Ray"
        (controller,) = processes(a, CONTROLLER)
        print(
            f"100 requests, no call of Ray by what serves; {after[controller] - before[controller]} by the controller"
        )
        assert after[controller] > before[controller] > 0, "calls are not counted"

        (pid,) = processes(by_name[narrow.devices[0][0]], *rank(0, narrow.replica))
        views = Views(a, seen.watch_address, secret_of(pid))
        opened.callback(views.close)
        views.until("the view", serving("wide", "narrow"), began_s=monotonic_clock())

        with clients(a, url, questions, count=3) as tally:
            # The controller: nobody notices.
            began_s = kill_one(a, CONTROLLER)
            back = commands.until(
                "a killed controller is back, and has looked",
                lambda now: now.controller and any(each.phase == "ready" for each in now.replicas),
            )
            print(f"seen {monotonic_clock() - began_s:.1f} s after it was killed")
            assert {each.replica for each in back.replicas} == {wide.replica, narrow.replica}, "one was started anew"
            assert tally.refused == [] and tally.wrong == [] and tally.answered > 0
            views.until("and publishes", serving("wide", "narrow"), began_s=began_s)

            # A rank, then a driver.
            second = by_name[wide.devices[1][0]]
            began_s = kill_one(second, *rank(1, wide.replica))
            took_s = views.until("a killed rank is seen", without(wide.replica), began_s=began_s)
            assert took_s < DETECTION_S + LATE_S
            views.until("and its replica replaced", serving("wide", "narrow"), began_s=began_s)
            driver = by_name[narrow.devices[0][0]]
            began_s = kill_one(driver, *rank(0, narrow.replica))
            took_s = views.until("a killed driver is seen", without(narrow.replica), began_s=began_s)
            assert took_s < DETECTION_S + LATE_S
            views.until("and its replica replaced", serving("wide", "narrow"), began_s=began_s)
            assert tally.wrong == []

            # More than there is, until a host comes late.
            commands.run("scale", "narrow", "2", "--detach")
            short = commands.until("too few devices are said", lambda now: bool(now.shortages))
            assert [shortage.pool for shortage in short.shortages] == ["narrow"]
            began_s = monotonic_clock()
            started["d"] = start_raylet(late, "d", a.address, devices=1)
            views.until("a late host is used", serving("wide", "narrow", "narrow"), began_s=began_s)

            # A raylet, and with it its host's ranks; the head's host stays.
            lost = next(
                each for each in commands.status().replicas if each.pool == "narrow" and each.devices != ("a/0",)
            )
            name = lost.devices[0][0]
            began_s = monotonic_clock()
            started[name].kill()
            started.pop(name).wait()
            took_s = views.until("a killed raylet is seen", without(lost.replica), began_s=began_s)
            assert took_s < DETECTION_S + LATE_S
            began_s = monotonic_clock()
            started[name] = start_raylet(by_name[name], name, a.address, devices=1)
            views.until("and its host is used again", serving("wide", "narrow", "narrow"), began_s=began_s)
            assert tally.wrong == []

            # A link, between the two halves of a replica.
            wide = next(each for each in commands.status().replicas if each.pool == "wide")
            name = next(device[0] for device in wide.devices if device != "a/0")
            began_s = monotonic_clock()
            by_name[name].cut()
            took_s = views.until("a cut link is seen", without(wide.replica), began_s=began_s)
            assert took_s < DETECTION_S + LATE_S
            by_name[name].heal()
            # Ray has given the node up; its raylet ends when it hears of that.
            started.pop(name).wait(PATIENCE_S)
            began_s = monotonic_clock()
            started[name] = start_raylet(by_name[name], name, a.address, devices=1)
            views.until("and healed", serving("wide", "narrow", "narrow"), began_s=began_s)
        print(f"{tally.answered} answers, {len(tally.refused)} refusals, {len(tally.wrong)} wrong")
        assert tally.wrong == []
        assert ask(a, url, [body for body, _ in questions]) == [right for _, right in questions]

        # Down, and nothing is left.
        assert "nothing of it is left" in commands.run("down")
        for host in network:
            for what in (RANKS, GATEWAYS, CONTROLLER, b"ray::RankActor", b"ray::GatewayActor"):
                assert processes(host, what) == []
        commands.run("status", code=1)
