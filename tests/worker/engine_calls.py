"""Requests to a driver over its socket, and the same ones to an engine in this process."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

from slipstream import LLM
from slipstream.runtime.rpc.client import GrpcEngineClient
from slipstream.tests.contracts.engine_client import answer
from slipstream.tests.engine.builders import request

PATIENCE_S = 60.0
WANTED = [
    request(
        f"r{row}",
        [3 + (7 * row + index) % 150 for index in range(20 + row)],
        seed=row,
        max_tokens=16,
        temperature=0.7 * (row % 2),
    )
    for row in range(5)
]

Tokens = list[dict[int, list[int]]]


def ask(address: str) -> Tokens:
    """Return what a driver makes of the requests, by sample."""

    async def asked() -> Tokens:
        client = GrpcEngineClient(address)
        await client.connect(timeout_s=PATIENCE_S)
        try:
            answers = await asyncio.gather(*(answer(client, wanted, timeout_s=PATIENCE_S) for wanted in WANTED))
        finally:
            await client.close()
        return [dict(each.tokens) for each in answers]

    return asyncio.run(asyncio.wait_for(asked(), PATIENCE_S))


def ask_in_process(model: Path, **options: Any) -> Tokens:
    """Return what an engine of one rank makes of them."""
    with LLM(str(model), skip_tokenizer_init=True, **options) as llm:
        params = [replace(one.params, seed=one.seed, ignore_eos=True) for one in WANTED]
        outputs = llm.generate([one.prompt_token_ids.tolist() for one in WANTED], params, use_tqdm=False)
    return [{sample.index: list(sample.token_ids) for sample in output.outputs} for output in outputs]
