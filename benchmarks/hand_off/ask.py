"""Asks replicas directly, without a gateway, and takes the times; runs on a host of its own.

``python -P ask.py`` reads lines of JSON (``Question``) from standard input and answers each with one (``Times``).
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
from dataclasses import asdict, dataclass

import numpy as np

from slipstream.comm.handshake import secret_from
from slipstream.runtime.clock import monotonic_clock
from slipstream.runtime.messages import EngineRequest
from slipstream.runtime.rpc.client import GrpcEngineClient
from slipstream.runtime.rpc.engine_client import HandOffReport, SendTo
from slipstream.sdk.params import SamplingParams

_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One request of ``prompt`` tokens, drawn by ``seed``.

    ``prefill``: an address, "" where ``decode`` computes the prompt too.
    """

    prefill: str
    decode: str
    decode_name: str
    prompt: int
    vocabulary: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds from asking to the first and to the second token, and what is said of the hand-off.

    Units: as of ``HandOffReport``
    """

    first_s: float
    second_s: float
    bytes_moved: int = 0
    wire_s: float = 0.0
    hidden_s: float = 0.0
    wait_s: float = 0.0


class Asker:
    """Keeps a session with each replica."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._clients: dict[str, GrpcEngineClient] = {}

    async def ask(self, question: Question) -> Times:
        """Ask, and wait for two tokens."""
        request = _request(question)
        decode = await self._client(question.decode)
        asked_s = monotonic_clock()
        if not question.prefill:
            first_s, second_s = await _two_tokens(decode, request, "")
            return Times(first_s=first_s - asked_s, second_s=second_s - asked_s)
        prefill = await self._client(question.prefill)
        ticket = secrets.token_hex(16)
        waiting = asyncio.create_task(_two_tokens(decode, request, ticket))
        send_to = SendTo(replica=question.decode_name, address=question.decode, ticket=ticket)
        sent_s, report = await _send(prefill, request, send_to)
        _, second_s = await waiting
        return Times(
            first_s=sent_s - asked_s,
            second_s=second_s - asked_s,
            bytes_moved=report.bytes_moved,
            wire_s=report.wire_s,
            hidden_s=report.hidden_s,
            wait_s=report.wait_s,
        )

    async def _client(self, address: str) -> GrpcEngineClient:
        if address not in self._clients:
            client = self._clients[address] = GrpcEngineClient(address, secret=self._secret)
            await client.connect(timeout_s=_TIMEOUT_S)
        return self._clients[address]


def _request(question: Question) -> EngineRequest:
    draw = np.random.default_rng(question.seed)
    return EngineRequest(
        request_id=secrets.token_hex(8),
        prompt_token_ids=draw.integers(0, question.vocabulary, question.prompt, dtype=np.int32),
        params=SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True, detokenize=False),
        seed=question.seed,
        stop_ids=(),
        max_tokens=2,
        arrival_time_s=0.0,
    )


async def _two_tokens(client: GrpcEngineClient, request: EngineRequest, ticket: str) -> tuple[float, float]:
    """Return when the first and when the second token came."""
    times: list[float] = []
    async for event in client.generate(request, timeout_s=_TIMEOUT_S, ticket=ticket):
        now_s = monotonic_clock()
        times += [now_s for sample in event.samples for _ in sample.token_ids]
    first_s, second_s = times
    return first_s, second_s


async def _send(client: GrpcEngineClient, request: EngineRequest, send_to: SendTo) -> tuple[float, HandOffReport]:
    """Return when the sender's token came, and how the hand-off ended."""
    first_s = 0.0
    async for event in client.generate(request, timeout_s=_TIMEOUT_S, send_to=send_to):
        if event.samples and not first_s:
            first_s = monotonic_clock()
        if event.hand_off is not None:
            if event.hand_off.ending != "committed":
                raise RuntimeError(f"the hand-off ended as {event.hand_off.ending}")
            return first_s, event.hand_off
    raise RuntimeError("the hand-off was not heard of")


async def main() -> None:
    """Answer questions until there are no more."""
    asker = Asker(secret_from(os.environ))
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(asdict(await asker.ask(Question(**json.loads(line))))), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
