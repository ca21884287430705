"""A soak of the real server: a trace of conversations, clients that leave, malformed bodies.

Lengths and arrivals are those of ``tests/data/azure_conversation_2000.csv``, scaled down. Every good answer is compared
with that of ``LLM``.
"""

from __future__ import annotations

import asyncio
import csv
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from slipstream import LLM, SamplingParams
from slipstream.tests.gateway.harness import make_tokenizer
from slipstream.tests.gateway.server_process import PATIENCE_S, Server, eventually, make_model, running_server

TRACE = Path(__file__).parents[1] / "data" / "azure_conversation_2000.csv"
SCALE = 24
"""Tokens of the trace for one here: its longest request then has about 300."""
STRETCH = 100
SPEEDS = (10, 20, 50)
"""How much faster than in the trace requests arrive, changing with each of its stretches: at ease, busy, overloaded."""
MEBIBYTE = 1 << 20
MAY_GROW_MIB = 24
WORDS = ["def", "return", "self", "the", "quick", "Grüße", "import", "value", "=", "(x)", "\n", "数"]
MALFORMED: list[Any] = [
    {"model": "tiny"},
    {"model": "tiny", "prompt": "x", "max_tokens": -1},
    {"model": "tiny", "prompt": "x", "temperature": "warm"},
    {"model": "tiny", "prompt": [1, 10**9]},
    {"model": "tiny", "prompt": "x", "n": 10**6},
    {"model": "nobody", "prompt": "x"},
    {"model": "tiny", "prompt": "x", "surprise": 1},
    [1, 2, 3],
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One client's request: ``leaves`` after its first pieces, or ``body`` is not what a server takes."""

    at_s: float
    body: Any
    leaves: bool = False
    malformed: bool = False
    streams: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One row of the trace."""

    prompt_tokens: int
    output_tokens: int
    gap_s: float


def read_trace() -> list[Arrival]:
    with TRACE.open(encoding="utf-8", newline="") as file:
        return [
            Arrival(
                prompt_tokens=int(row["prompt_tokens"]),
                output_tokens=int(row["output_tokens"]),
                gap_s=int(row["gap_ms"]) / 1000,
            )
            for row in csv.DictReader(file)
        ]


def draw_jobs(trace: list[Arrival], seed: int) -> list[Job]:
    """Make a request of each row, 1/``SCALE`` as long, at the trace's times and at several speeds."""
    draw = random.Random(seed)
    tokenizer = make_tokenizer()
    jobs = []
    at_s = 0.0
    for number, arrival in enumerate(trace):
        at_s += arrival.gap_s / SPEEDS[number // STRETCH % len(SPEEDS)]
        if draw.random() < 0.05:
            jobs.append(Job(at_s=at_s, body=draw.choice(MALFORMED), malformed=True))
            continue
        length = max(1, arrival.prompt_tokens // SCALE)
        text = " ".join(draw.choice(WORDS) for _ in range(length))
        token_ids = tokenizer.encode(text, add_special_tokens=False)[:length]
        body = {
            "model": "tiny",
            "prompt": token_ids if draw.random() < 0.5 else tokenizer.decode(token_ids),
            "max_tokens": max(1, arrival.output_tokens // SCALE),
            "temperature": draw.choice([0.0, 0.8]),
            "top_p": 0.95,
            "seed": number,
        }
        leaves = draw.random() < 0.1
        jobs.append(Job(at_s=at_s, body=body, leaves=leaves, streams=leaves or draw.random() < 0.5))
    return jobs


async def run_job(client: httpx.AsyncClient, job: Job) -> str | None:
    """Return the text of a good answer, None for the others, which are checked here."""
    if job.malformed:
        answer = await client.post("/v1/completions", json=job.body)
        assert 400 <= answer.status_code < 500 and answer.json()["error"]["message"], (job, answer.text)
        return None
    if not job.streams:
        answer = await client.post("/v1/completions", json=job.body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])
    text = ""
    async with client.stream("POST", "/v1/completions", json={**job.body, "stream": True}) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if job.leaves and text:
                return None
            if line.startswith("data: {"):
                text += httpx.Response(200, content=line[6:]).json()["choices"][0]["text"]
    return None if job.leaves else text


async def run_jobs(url: str, jobs: list[Job]) -> list[str | None]:
    """Run the jobs, each at its time whatever has become of those before it."""
    loop = asyncio.get_running_loop()
    # One connection each: a client that waited for another's would not arrive at its time.
    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, limits=limits) as client,
        asyncio.TaskGroup() as group,
    ):
        start_s = loop.time() - jobs[0].at_s
        tasks: list[asyncio.Task[str | None]] = []

        async def arrive(job: Job) -> str | None:
            arrived = loop.create_future()
            loop.call_at(start_s + job.at_s, arrived.set_result, None)
            await arrived
            return await run_job(client, job)

        tasks += [group.create_task(arrive(job)) for job in jobs]
    return [task.result() for task in tasks]


def expected_texts(model: Path, jobs: list[Job]) -> list[str]:
    good = [job.body for job in jobs if not job.malformed]
    names = ("max_tokens", "temperature", "top_p", "seed")
    params = [SamplingParams(**{name: body[name] for name in names}) for body in good]
    with LLM(str(model), max_num_seqs=16, kv_cache_memory_bytes=16_000_000) as llm:
        outputs = llm.generate([body["prompt"] for body in good], params)
    return [output.outputs[0].text for output in outputs]


def resident_bytes(server: Server) -> dict[str, int]:
    processes = {"gateway": psutil.Process(server.process.pid), "driver": server.driver()}
    return {name: process.memory_info().rss for name, process in processes.items()}


def test_soak(tmp_path: Path, seed: int) -> None:
    model = make_model(tmp_path / "tiny")
    jobs = draw_jobs(read_trace(), seed)
    expected = iter(expected_texts(model, jobs))
    third = len(jobs) // 3
    options = ("--max-num-seqs", "16", "--kv-cache-memory-bytes", "16000000")
    with running_server(model, tmp_path / "server.log", *options) as server:
        answers = asyncio.run(run_jobs(server.url, jobs[:third]))
        eventually(server.everything_is_free, within_s=5.0, what="all blocks free after the first third")
        before = resident_bytes(server)
        answers += asyncio.run(run_jobs(server.url, jobs[third:]))
        eventually(server.everything_is_free, within_s=5.0, what="all blocks free at the end")
        after = resident_bytes(server)
    for job, answer in zip(jobs, answers, strict=True):
        if not job.malformed:
            want = next(expected)
            assert job.leaves or answer == want, job
    grown = {name: (after[name] - before[name]) / MEBIBYTE for name in before}
    print(f"MiB more than after the first third: {grown}")
    assert all(mebibytes < MAY_GROW_MIB for mebibytes in grown.values()), grown
