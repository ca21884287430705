"""The driver as a process: started, drained, stopped, killed and orphaned; all but once without a model."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slipstream import LLM
from slipstream.runtime.rpc.client import GrpcEngineClient
from slipstream.runtime.worker.exit_status import EXIT_DRAINED, EXIT_REFUSED, EXIT_STOPPED
from slipstream.runtime.worker.null_executor import null_tokens
from slipstream.sdk.errors import EngineUnavailable
from slipstream.tests.contracts.engine_client import Answer, answer, finish, first_event
from slipstream.tests.engine.builders import request
from slipstream.tests.models.checkpoints import make_checkpoint

PATIENCE_S = 60.0
VOCABULARY = 1000
COMMAND = [sys.executable, "-P", "-m", "slipstream.runtime.worker.main"]


@dataclass
class Driver:
    process: asyncio.subprocess.Process
    address: str

    async def exit_status(self) -> int:
        return await asyncio.wait_for(self.process.wait(), PATIENCE_S)


NULL = ("--null", f"--null-vocab-size={VOCABULARY}")


@asynccontextmanager
async def driver(*options: str, what: tuple[str, ...] = NULL) -> AsyncIterator[Driver]:
    """Start a driver on a socket, and wait until it says that it is ready."""
    with tempfile.TemporaryDirectory(prefix="slip") as folder:
        arguments = [*what, "--socket", str(Path(folder) / "engine.sock"), *options]
        process = await asyncio.create_subprocess_exec(*COMMAND, *arguments, stdout=asyncio.subprocess.PIPE)
        try:
            assert process.stdout is not None
            line = await asyncio.wait_for(process.stdout.readline(), PATIENCE_S)
            ready = json.loads(line)
            assert ready["ready"] is True
            yield Driver(process, ready["address"])
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


@asynccontextmanager
async def client_of(address: str) -> AsyncIterator[GrpcEngineClient]:
    client = GrpcEngineClient(address)
    await client.connect(timeout_s=PATIENCE_S)
    try:
        yield client
    finally:
        await client.close()


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(2 * PATIENCE_S):
            await test

    asyncio.run(bounded())


def expected(seed: int, prompt_length: int, count: int) -> list[int]:
    positions = np.arange(prompt_length, prompt_length + count, dtype=np.uint64)
    return null_tokens(np.full(count, seed, np.uint64), positions, VOCABULARY).tolist()


def test_serves_and_drains_on_sigterm() -> None:
    async def test() -> None:
        async with driver("--null-step-time", "0.005") as running, client_of(running.address) as client:
            assert client.load() is not None
            streams = [
                await first_event(client, request(f"r{seed}", [1, 2], seed=seed, max_tokens=60)) for seed in range(5)
            ]
            running.process.send_signal(signal.SIGTERM)
            got = await asyncio.gather(*(finish(stream, first) for stream, first in streams))
            for seed, each in enumerate(got):
                assert each.tokens[0] == expected(seed, 2, 60)
            with pytest.raises(EngineUnavailable):
                await answer(client, request("late", [1]))
            assert await running.exit_status() == EXIT_DRAINED

    run(test())


def test_a_drain_has_a_deadline() -> None:
    async def test() -> None:
        options = ("--null-step-time", "0.02", "--drain-timeout", "0.1")
        async with driver(*options) as running, client_of(running.address) as client:
            stream, first = await first_event(client, request("r", [1], max_tokens=8000))
            running.process.terminate()
            with pytest.raises(EngineUnavailable):
                await finish(stream, first)
            assert await running.exit_status() == EXIT_DRAINED

    run(test())


def test_a_second_signal_stops_at_once() -> None:
    async def test() -> None:
        async with driver("--null-step-time", "0.01") as running, client_of(running.address) as client:
            stream, first = await first_event(client, request("r", [1], max_tokens=8000))
            got = Answer()
            got.add(first)
            running.process.send_signal(signal.SIGTERM)
            # The first signal has arrived when the load says so; two at once might be taken for one.
            while not getattr(client.load(), "draining", False):
                got.add(await anext(stream))
            running.process.send_signal(signal.SIGINT)
            with pytest.raises(EngineUnavailable):
                await finish(stream, got)
            assert await running.exit_status() == EXIT_STOPPED

    run(test())


def test_a_driver_that_is_killed_is_noticed() -> None:
    async def test() -> None:
        async with driver("--null-step-time", "0.01") as running, client_of(running.address) as client:
            stream, first = await first_event(client, request("r", [1], max_tokens=8000))
            running.process.kill()
            with pytest.raises(EngineUnavailable):
                await finish(stream, first)
            assert isinstance(await client.wait_lost(), EngineUnavailable)

    run(test())


def test_a_new_process_on_the_same_socket_is_another_epoch() -> None:
    async def test() -> None:
        async with driver() as one:
            folder = Path(one.address).parent
            epochs = []
            async with client_of(one.address) as client:
                epochs.append((await fresh_facts(one.address)).epoch)
                one.process.kill()
                await client.wait_lost()
            process = await asyncio.create_subprocess_exec(
                *COMMAND, "--null", "--socket", str(folder / "engine.sock"), stdout=asyncio.subprocess.DEVNULL
            )
            try:
                epochs.append((await fresh_facts(one.address)).epoch)
            finally:
                process.kill()
                await process.wait()
            assert len(set(epochs)) == 2

    run(test())


async def fresh_facts(address: str) -> Any:
    client = GrpcEngineClient(address)
    facts = await client.connect(timeout_s=PATIENCE_S)
    await client.close()
    return facts


def test_a_real_model_answers_as_it_does_in_process(tmp_path: Path) -> None:
    model = make_checkpoint("llama", tmp_path / "model")
    options = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 8, "kv_cache_memory_bytes": 16 << 20}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    prompts = [[place + 5 * token for token in range(1, 30)] for place in range(4)]
    wanted = [
        request(f"r{place}", prompt, seed=place, max_tokens=12, n=2, logprobs=2, prompt_logprobs=1, temperature=0.7)
        for place, prompt in enumerate(prompts)
    ]

    async def served() -> list[Answer]:
        async with driver(*flags, what=(str(model),)) as running, client_of(running.address) as client:
            return list(await asyncio.gather(*(answer(client, one) for one in wanted)))

    got = asyncio.run(asyncio.wait_for(served(), PATIENCE_S))
    with LLM(model, skip_tokenizer_init=True, **options) as llm:
        params = [replace(one.params, seed=one.seed, ignore_eos=True) for one in wanted]
        outputs = llm.generate([one.prompt_token_ids.tolist() for one in wanted], params, use_tqdm=False)
    for output, each in zip(outputs, got, strict=True):
        for index, sample in enumerate(output.outputs):
            assert list(sample.token_ids) == each.tokens[index]
            assert sample.logprobs is not None
            for token_id, table, entry in zip(sample.token_ids, sample.logprobs, each.logprobs[index], strict=True):
                assert table[token_id].logprob == pytest.approx(float(entry.logprobs[0]), abs=1e-4)
        assert output.prompt_logprobs is not None
        assert sorted(each.scores) == list(range(1, len(output.prompt_token_ids)))


def test_no_driver_outlives_its_parent() -> None:
    parent = (
        "import subprocess, sys\n"
        "driver = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE)\n"
        "print(driver.stdout.readline().decode(), driver.pid, sep='', flush=True)\n"
        "sys.stdin.read()\n"
    )

    async def test() -> None:
        with tempfile.TemporaryDirectory(prefix="slip") as folder:
            arguments = [*COMMAND, "--null", "--socket", str(Path(folder) / "engine.sock")]
            pipe = asyncio.subprocess.PIPE
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", parent, *arguments, stdin=pipe, stdout=pipe
            )
            assert process.stdout is not None
            ready = json.loads(await asyncio.wait_for(process.stdout.readline(), PATIENCE_S))
            pid = int(await asyncio.wait_for(process.stdout.readline(), PATIENCE_S))
            try:
                async with client_of(ready["address"]) as client:
                    process.kill()
                    await process.wait()
                    assert isinstance(await client.wait_lost(), EngineUnavailable)
            except BaseException:
                os.kill(pid, signal.SIGKILL)
                raise

    run(test())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--socket", "/tmp/s"], "MODEL is missing"),
        (["model"], "--socket"),
        (["--socket", "/tmp/s", "--listen", "localhost:1", "model"], "not allowed with"),
        (["--socket", "/" + 120 * "x", "--null"], "address"),
        (["--socket", "/nowhere/at/all/s", "--null"], "address"),
        (["--listen", "localhost", "--null"], "address"),
        (["--socket", "/tmp/s", "--null", "--drain-timeout", "-1"], "drain-timeout"),
        (["--socket", "/tmp/s", "--null", "--no-such-option"], "no-such-option"),
        (["--socket", "/tmp/s", "--null", "--max-num-seqs", "0"], "max_num_seqs"),
        (["--socket", "/tmp/s", "/nowhere/at/all"], "is not a directory"),
        (["--socket", "/tmp/s", "model", "--rank", "0"], "belong together"),
        (["model", "--rank", "1", "--replica", "a", "--address", "::1"], "belong together"),
        (["model", "--rank=-1", "--replica", "a", "--address", "::1", "--ranks-on-host", "1"], "counts from 0"),
        (["--null", "--rank=1", "--replica", "a", "--address", "::1", "--ranks-on-host", "1"], "one rank"),
        (["--socket", "/tmp/s", "model", "--replica", "a"], "belong together"),
        (["--socket", "/tmp/s", "model", "--role", "prefill"], "--replica is missing"),
        (["--socket", "/tmp/s", "model", "--role", "cook", "--replica", "a"], "--role"),
        (["--socket", "/tmp/s", "model", "--role=decode", "--replica=a", "--kv-transport=none"], "--kv-transport"),
        (["--socket", "/tmp/s", "--null", "--kv-transport=tcp", "--replica=a"], "--null has no KV"),
        (["--socket", "/tmp/s", "model", "--replica=a", "--role=mixed", "--kv-transfer-timeout=0"], "transfer-timeout"),
        (["--socket", "/tmp/s", "model", "--replica=a", "--kv-transport=tcp"], "SLIPSTREAM_SECRET"),
    ],
)
def test_wrong_options_are_refused_by_name(options: list[str], said: str) -> None:
    done = subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == EXIT_REFUSED
    assert said in done.stderr
    assert "Traceback" not in done.stderr and not done.stdout
