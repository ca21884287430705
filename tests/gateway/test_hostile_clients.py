"""A thousand hostile clients of the real server, over real sockets, while a good one goes on being served."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from slipstream.tests.gateway.hostile import GOOD, hostile
from slipstream.tests.gateway.server_process import PATIENCE_S, Server, eventually, make_model, running_server

BODIES = 1000
CLIENTS = 16
SLOW_SENDERS = 8
LARGEST_BODY = 8 << 20
GOOD_REQUEST = {"model": "tiny", "prompt": "The quick", "max_tokens": 12, "temperature": 0.0}
HEADERS = {"content-type": "application/json"}

HEAVY: list[bytes] = [
    b"",
    b"\xff\xfe\x00{}",
    b'{"prompt": NaN}',
    b'{"prompt": "x", "temperature": Infinity}',
    b'{"prompt": "x", "seed": 1' + b"0" * 5000 + b"}",
    b"[" * 100_000,
    b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    b'{"prompt": "' + b"a" * 10_000_000 + b'"}',
    b'{"prompt": "' + b"\\u0000" * 100_000 + b'"}',
    b'{"prompt": "\\ud800", "stop": ["\\udfff"]}',
    b'{"prompt": "\xed\xa0\x80"}',
    b'{"prompt": "x", "prompt": "y", "n": 1, "n": 1e400}',
    b'{"prompt": "x", "repetition_penalty": 5e-324, "temperature": 1e-308, "top_p": 5e-324, "min_p": 5e-324}',
    b'{"prompt": "x", "logit_bias": {"' + b"9" * 100_000 + b'": 1}}',
    b'{"' + b"k" * 1_000_000 + b'": 1}',
    b"{" + b",".join(b'"k%d": 1' % key for key in range(200_000)) + b"}",
    b'{"prompt": "x", "stop": ["(a+)+$", "' + b"a" * 2000 + b'"]}',
    json.dumps({"prompt": [[1] * 100] * 1000}).encode(),
    b'{"prompt": "x", "structured_outputs": {"json": ' + b'{"items":' * 900 + b"{}" + b"}" * 900 + b"}}",
    b'{"prompt": "x", "structured_outputs": {"regex": "' + b"(" * 30_000 + b"a" + b")" * 30_000 + b'"}}',
    b'{"prompt": "x", "max_tokens": 150, "structured_outputs": {"regex": "(((a{0,99}){0,99}){0,99}b?){0,99}"}}',
    b'{"prompt": "x", "structured_outputs": {"grammar": "start: ' + b"(" * 30_000 + b'"}}',
    json.dumps({"prompt": "x", "logit_bias": {str(token): 1 for token in range(5000)}}).encode(),
]


async def attack(server: Server, seed: int) -> Counter[int]:
    """Send every body, slow senders beside them and a good client throughout; return the statuses."""
    draw = random.Random(seed)
    paths = sorted(GOOD)
    bodies = [(draw.choice(paths), hostile(draw, draw.choice(paths))) for _ in range(BODIES - len(HEAVY))]
    bodies += [("/v1/completions", content) for content in HEAVY]
    draw.shuffle(bodies)
    statuses: Counter[int] = Counter()
    over = asyncio.Event()
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
        waiting = iter(bodies)

        async def work() -> None:
            for path, content in waiting:
                status = await send(client, path, content)
                statuses[status] += 1
                assert status < 500, (path, content[:300])

        good = asyncio.create_task(be_served(client, over))
        slow = [await send_half(server) for _ in range(SLOW_SENDERS)]
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(work())
            group.create_task(send_headers_without_end(server))
        over.set()
        assert await good > 10
        for writer in slow:
            writer.close()
    return statuses


async def send(client: httpx.AsyncClient, path: str, content: bytes) -> int:
    """Return the status; a body over the limit may find the connection closed before all of it is sent."""
    try:
        return (await client.post(path, content=content, headers=HEADERS)).status_code
    except (httpx.ReadError, httpx.WriteError):
        assert len(content) > LARGEST_BODY, (path, content[:300])
        return 413


async def be_served(client: httpx.AsyncClient, over: asyncio.Event) -> int:
    """Ask the same thing again and again: the answer never changes. Return how often it came."""
    texts: Counter[str] = Counter()
    while not over.is_set():
        answer = await client.post("/v1/completions", json=GOOD_REQUEST)
        assert answer.status_code == 200, answer.text
        texts[answer.json()["choices"][0]["text"]] += 1
    assert len(texts) == 1, texts
    return texts.total()


async def send_half(server: Server) -> asyncio.StreamWriter:
    """Open a connection, announce a body, send half of it, and keep silent."""
    target = urlsplit(server.url)
    _, writer = await asyncio.open_connection(target.hostname, target.port)
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n"
    writer.write(head.encode() + b'{"prompt": "x", ')
    await writer.drain()
    return writer


async def send_headers_without_end(server: Server) -> None:
    """Send headers until the server hangs up, which it must do long before it has 100 MB of them."""
    target = urlsplit(server.url)
    _, writer = await asyncio.open_connection(target.hostname, target.port)
    writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n")
    with pytest.raises(ConnectionError):
        for _ in range(1000):
            writer.write(b"a: b\r\n" * 16_384)
            await writer.drain()
    writer.close()


def test_a_thousand_hostile_clients(tmp_path: Path, seed: int) -> None:
    model = make_model(tmp_path / "tiny")
    options = ("--max-num-seqs", "32", "--max-model-len", "256", "--kv-cache-memory-bytes", "16000000")
    with running_server(model, tmp_path / "server.log", *options) as server:
        driver = server.driver().pid
        statuses = asyncio.run(attack(server, seed))
        assert statuses.total() == BODIES
        # Both kinds must have come up for the test to mean anything.
        assert statuses[200] > 50 and statuses[400] > 50, statuses
        eventually(server.everything_is_free, within_s=20.0, what="all free, slow senders cut off")
        assert server.driver().pid == driver, "the driver was lost on the way"
