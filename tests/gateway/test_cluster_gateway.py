"""A cluster's gateway as it runs: processes, a secret, and views from a port that comes and goes."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from slipstream.runtime.controller.view_port import ViewPort
from slipstream.runtime.rpc.client import GrpcEngineClient
from slipstream.runtime.worker.null_executor import null_tokens
from slipstream.tests.fakes.views import view
from slipstream.tests.gateway.harness import parse_events
from slipstream.tests.gateway.server_process import PATIENCE_S, eventually
from slipstream.tests.text.tiny_tokenizers import byte_level

SECRET = "the secret of a test's cluster"
VOCABULARY = byte_level().get_vocab_size()
STEP_S = 0.005
PROMPT = list(range(40))
"""Two blocks and a half: a driver that has computed it has looked for them in its prefix cache."""


class Process:
    """One process of the cluster; ended, whatever happens, with the test."""

    def __init__(self, module: str, *arguments: str, secret: str = SECRET) -> None:
        command = [sys.executable, "-P", "-m", f"slipstream.runtime.{module}", *arguments]
        environment = {**os.environ, "SLIPSTREAM_SECRET": secret}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def ready(self) -> str:
        """Wait until it says that it is ready, and return its address."""
        assert self.process.stdout is not None
        line = json.loads(self.process.stdout.readline())
        assert line["ready"] is True
        return str(line["address"])

    def end(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


class Cluster:
    """Drivers, a port for views, and a gateway before them."""

    def __init__(self, stack: ExitStack, model: Path) -> None:
        self._stack = stack
        self._model = model
        self.epoch = 0
        self.drivers: dict[str, Process] = {}
        self.addresses: dict[str, str] = {}
        self.port = ViewPort("127.0.0.1:0", secret=SECRET.encode())
        self.watch = self.port.address(timeout_s=PATIENCE_S)
        stack.callback(lambda: self.port.close())
        self.gateway = self.process(
            "gateway.cluster_main", "--port", "0", "--watch", self.watch, "--served-model-name", "m"
        )
        self.start("p-1", "p-2")
        self.http = httpx.Client(base_url=f"http://{self.gateway.ready()}", timeout=PATIENCE_S)
        stack.callback(self.http.close)

    def process(self, module: str, *arguments: str, secret: str = SECRET) -> Process:
        process = Process(module, *arguments, secret=secret)
        self._stack.callback(process.end)
        return process

    def start(self, *names: str) -> None:
        """Start drivers; no view has them yet."""
        options = ("--null-vocab-size", str(VOCABULARY), "--null-step-time", str(STEP_S), "--max-num-seqs", "32")
        for name in names:
            self.drivers[name] = self.process(
                "worker.main", "--null", "--listen", "127.0.0.1:0", *options, str(self._model)
            )
        for name in names:
            self.addresses[name] = self.drivers[name].ready()

    def publish(self, *names: str) -> None:
        self.epoch += 1
        self.port.publish(view(self.epoch, {name: self.addresses[name] for name in names}))

    def restart_port(self) -> None:
        """Let the controller fail and come back, at the same address and with nothing in its memory."""
        self.port.close()
        self.port = ViewPort(self.watch, secret=SECRET.encode())
        assert self.port.address(timeout_s=PATIENCE_S) == self.watch

    def replicas(self) -> dict[str, int]:
        """Return how many replicas the gateway sees, by state."""
        found = {}
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith("slipstream_replicas{"):
                found[line.split('"')[1]] = int(float(line.split()[-1]))
        return {state: count for state, count in found.items() if count}

    def metric(self, name: str) -> float:
        """Return a metric's value."""
        lines = self.http.get("/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))

    def complete(self, seed: int, *, max_tokens: int = 4) -> tuple[list[int], str | None]:
        """Stream one answer; return its tokens, and the error that ended it."""
        body: dict[str, Any] = {
            "prompt": PROMPT, "seed": seed, "max_tokens": max_tokens, "stream": True, "return_token_ids": True,
        }  # fmt: skip
        answer = self.http.post("/v1/completions", json=body)
        if answer.status_code != 200:
            return [], answer.json()["error"]["code"]
        tokens: list[int] = []
        for event in parse_events(answer.text):
            if event == "[DONE]":
                return tokens, None
            value = json.loads(event)
            if "error" in value:
                return tokens, value["error"]["code"]
            tokens += value["choices"][0]["token_ids"]
        raise AssertionError("a stream without an end")

    def check(self, count: int) -> None:
        """Send requests side by side; each must have its own tokens, to the last."""
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            answers = list(pool.map(self.complete, range(count)))
        assert answers == [(expected(seed, 4), None) for seed in range(count)]


def expected(seed: int, count: int) -> list[int]:
    positions = np.arange(len(PROMPT), len(PROMPT) + count, dtype=np.uint64)
    return null_tokens(np.full(count, seed, np.uint64), positions, VOCABULARY).tolist()


def misses(address: str) -> int:
    """Return how many blocks of prompts a driver has not found in its prefix cache: none before it had requests."""

    async def ask() -> int:
        client = GrpcEngineClient(address, secret=SECRET.encode())
        await client.connect(timeout_s=PATIENCE_S)
        load = client.load()
        await client.close()
        assert load is not None
        return load.prefix_misses

    return asyncio.run(ask())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    byte_level().save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def cluster(model: Path) -> Iterator[Cluster]:
    with ExitStack() as stack:
        yield Cluster(stack, model)


def test_a_gateway_follows_its_cluster(cluster: Cluster) -> None:
    # It listens before anybody serves, and says so.
    assert cluster.http.get("/health").status_code == 200
    assert cluster.http.get("/ready").status_code == 503
    assert cluster.complete(1) == ([], "engine_unavailable")

    cluster.publish("p-1", "p-2")
    eventually(lambda: cluster.replicas() == {"attached": 2}, what="two replicas are met")
    assert cluster.http.get("/ready").status_code == 200
    cluster.check(24)
    assert cluster.http.get("/v1/models").json()["data"][0]["max_model_len"] == 8192
    assert all(misses(cluster.addresses[name]) for name in ("p-1", "p-2")), "one had no requests"

    # A controller that comes back changes nothing for whoever is being served.
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        running = [pool.submit(cluster.complete, seed, max_tokens=200) for seed in range(8)]
        eventually(lambda: cluster.metric("slipstream_requests_running") == 8, what="all run")
        cluster.restart_port()
        cluster.check(4)
        cluster.start("p-3")
        cluster.publish("p-1", "p-2", "p-3")
        eventually(lambda: cluster.replicas() == {"attached": 3}, what="a new replica is met")
        assert [each.result() for each in running] == [(expected(seed, 200), None) for seed in range(8)]
    cluster.check(24)

    # One that has lost its memory says nothing that counts.
    cluster.restart_port()
    cluster.port.publish(view(1))
    cluster.check(4)
    assert cluster.replicas() == {"attached": 3}

    # What runs on a driver that dies goes on elsewhere, with the tokens that it has.
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        running = [pool.submit(cluster.complete, seed, max_tokens=300) for seed in range(12)]
        eventually(lambda: cluster.metric("slipstream_requests_running") == 12, what="all run")
        cluster.drivers["p-1"].process.kill()
        assert [each.result() for each in running] == [(expected(seed, 300), None) for seed in range(12)]
    assert cluster.metric("slipstream_requests_moved_total") >= 1
    cluster.check(12)
    assert cluster.replicas() == {"attached": 2, "lost": 1}
    cluster.publish("p-2", "p-3")
    eventually(lambda: cluster.replicas() == {"attached": 2}, what="what is gone is forgotten")


def test_what_runs_on_a_driver_that_stands_still_goes_on_elsewhere(cluster: Cluster) -> None:
    # The gateway may have had others before: what counts is that it has met these.
    met = cluster.metric("slipstream_engine_starts_total")
    cluster.start("p-4", "p-5")
    cluster.publish("p-4", "p-5")
    eventually(lambda: cluster.metric("slipstream_engine_starts_total") == met + 2, what="two are met")
    stopped = cluster.drivers["p-4"].process
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        running = [pool.submit(cluster.complete, seed, max_tokens=300) for seed in range(8)]
        eventually(lambda: cluster.metric("slipstream_requests_running") == 8, what="all run")
        stopped.send_signal(signal.SIGSTOP)
        try:
            # Its connection stands, and nobody says anything: it is as good as gone.
            assert [each.result() for each in running] == [(expected(seed, 300), None) for seed in range(8)]
            eventually(lambda: cluster.replicas() == {"attached": 1, "lost": 1}, what="it is noticed")
            cluster.check(4)
        finally:
            stopped.send_signal(signal.SIGCONT)
    eventually(lambda: cluster.replicas() == {"attached": 2}, what="it is met again")
    cluster.check(8)


def test_whoever_does_not_know_the_secret_is_left_out(cluster: Cluster, model: Path) -> None:
    stranger = cluster.process(
        "worker.main", "--null", "--listen", "127.0.0.1:0", str(model), secret="the secret of another cluster"
    )
    cluster.addresses["p-9"] = stranger.ready()
    cluster.publish("p-2", "p-9")
    eventually(lambda: cluster.replicas() == {"attached": 1, "skipped": 1}, what="a stranger is left out")
    cluster.check(4)
    cluster.publish("p-2")


@pytest.mark.parametrize("how", ["stdin", "signal"])
def test_the_end_lets_what_runs_finish(cluster: Cluster, how: str) -> None:
    cluster.publish("p-2")
    gateway = cluster.process(
        "gateway.cluster_main", "--port", "0", "--watch", cluster.watch, "--served-model-name", "m"
    )
    with httpx.Client(base_url=f"http://{gateway.ready()}", timeout=PATIENCE_S) as http:
        eventually(lambda: http.get("/ready").status_code == 200, what="ready")
        body = {"prompt": PROMPT, "max_tokens": 200, "seed": 3, "return_token_ids": True}
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            running = pool.submit(http.post, "/v1/completions", json=body)
            eventually(lambda: "slipstream_requests_running 1.0" in http.get("/metrics").text, what="it runs")
            if how == "stdin":
                assert gateway.process.stdin is not None
                gateway.process.stdin.close()
            else:
                gateway.process.send_signal(signal.SIGTERM)
            eventually(lambda: http.get("/ready").status_code == 503, what="draining")
            assert running.result().json()["choices"][0]["token_ids"] == expected(3, 200)
    assert gateway.process.wait(PATIENCE_S) == 0
    # The replica is the cluster's: it goes on.
    cluster.check(2)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--watch", "nowhere", "--served-model-name", "m"), b"address: must be a socket's path"),
        (("--watch", "host:1", "--served-model-name", ""), b"served_model_name: must name the model"),
        (("--served-model-name", "m"), b"--watch"),
    ],
)
def test_a_wrong_option_is_refused(arguments: tuple[str, ...], problem: bytes) -> None:
    command = [sys.executable, "-P", "-m", "slipstream.runtime.gateway.cluster_main", "--port", "0", *arguments]
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE_S)
    assert ended.returncode == 2 and problem in ended.stderr, ended.stderr
