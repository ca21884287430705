"""A soak of the real server: mixed lengths, clients that leave, malformed bodies; every good answer is compared."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from slipstream import LLM, SamplingParams
from slipstream.tests.gateway.server_process import PATIENCE_S, Server, eventually, make_model, running_server

CLIENTS = 24
MEBIBYTE = 1 << 20
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

    body: Any
    leaves: bool = False
    malformed: bool = False
    streams: bool = False


def draw_jobs(count: int, seed: int) -> list[Job]:
    """Draw requests with lengths shaped like those of a conversation trace (log-normal, a long tail), scaled down."""
    draw = random.Random(seed)
    words = ["def", "return", "self", "the", "quick", "Grüße", "import", "value", "=", "(x)", "\n", "数"]
    jobs = []
    for number in range(count):
        if draw.random() < 0.05:
            jobs.append(Job(body=draw.choice(MALFORMED), malformed=True))
            continue
        length = min(200, max(1, round(draw.lognormvariate(3.2, 0.9))))
        body = {
            "model": "tiny",
            "prompt": " ".join(draw.choice(words) for _ in range(length)),
            "max_tokens": min(80, max(1, round(draw.lognormvariate(2.6, 0.9)))),
            "temperature": draw.choice([0.0, 0.8]),
            "top_p": 0.95,
            "seed": number,
        }
        leaves = draw.random() < 0.1
        jobs.append(Job(body=body, leaves=leaves, streams=leaves or draw.random() < 0.5))
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
    """Run the jobs with a fixed number of clients, in order of the list."""
    answers: list[str | None] = [None] * len(jobs)
    waiting = iter(enumerate(jobs))
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as client, asyncio.TaskGroup() as group:

        async def work() -> None:
            for place, job in waiting:
                answers[place] = await run_job(client, job)

        for _ in range(CLIENTS):
            group.create_task(work())
    return answers


def expected_texts(model: Path, jobs: list[Job]) -> list[str]:
    good = [job.body for job in jobs if not job.malformed]
    names = ("max_tokens", "temperature", "top_p", "seed")
    params = [SamplingParams(**{name: body[name] for name in names}) for body in good]
    with LLM(str(model), max_num_seqs=16, kv_cache_memory_bytes=16_000_000) as llm:
        outputs = llm.generate([body["prompt"] for body in good], params)
    return [output.outputs[0].text for output in outputs]


def resident_bytes(server: Server) -> int:
    return sum(process.memory_info().rss for process in (psutil.Process(server.process.pid), server.driver()))


def soak(model: Path, log: Path, jobs: list[Job]) -> None:
    expected = iter(expected_texts(model, jobs))
    third = len(jobs) // 3
    with running_server(model, log, "--max-num-seqs", "16", "--kv-cache-memory-bytes", "16000000") as server:
        answers = asyncio.run(run_jobs(server.url, jobs[:third]))
        before = resident_bytes(server)
        answers += asyncio.run(run_jobs(server.url, jobs[third:]))
        eventually(server.everything_is_free, within_s=5.0, what="all blocks free at the end")
        grown = resident_bytes(server) - before
    for job, answer in zip(jobs, answers, strict=True):
        if not job.malformed:
            want = next(expected)
            assert job.leaves or answer == want, job
    assert grown < 48 * MEBIBYTE, f"{grown / MEBIBYTE:.0f} MiB more than after the first third"


def test_soak(tmp_path: Path, seed: int) -> None:
    soak(make_model(tmp_path / "tiny"), tmp_path / "server.log", draw_jobs(2000, seed))
