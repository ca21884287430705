"""``slipstream demo``: several prompts at once to a server, streamed to the terminal, then a table of timings."""

from __future__ import annotations

import asyncio
from typing import Any

from rich.console import Console

from ..api_client.client import ApiClient
from ..api_client.errors import ApiError
from ..clock import monotonic_clock
from ..ending import run_ending_on_signals
from .asking import Answer, Show, ask_together
from .screen import AnswerScreen, timings

# None ends with a space or a line break: the model's tokenizer joins those with what follows.
PROMPTS = (
    'def parse_version(text):\n    """Return a version string as',
    "class Stack:\n    def __init__(self):\n        self._items = []\n\n    def push(self, item):",
    "import os\nimport sys\nimport",
    "    def __repr__(self):\n        return",
    'def read_lines(path):\n    """Read a file and return its lines."""\n    with open(path',
    "    for key, value in",
)

_REQUEST_TIMEOUT_S = 60.0


def run_demo(base_url: str, body: dict[str, Any]) -> None:
    """Ask a server the demo's prompts together, show the answers and then the timings.

    ``body`` holds the requests' other fields.
    Raises: ApiError when an answer failed, after all has been shown
    """
    console = Console()
    with AnswerScreen(console, PROMPTS) as screen, asyncio.Runner() as runner:
        answers = run_ending_on_signals(runner, _ask(base_url, body, screen.add))
    console.print(timings(answers))
    for answer in answers:
        if answer.record.error is not None:
            raise ApiError(answer.record.error, answer.record.detail)


async def _ask(base_url: str, body: dict[str, Any], show: Show) -> list[Answer]:
    async with ApiClient(base_url, max_connections=len(PROMPTS)) as client:
        try:
            async with asyncio.timeout(_REQUEST_TIMEOUT_S):
                model = await client.first_model()
        except TimeoutError as error:
            raise ApiError("deadline", f"{client.url} did not say what it serves") from error
        return await ask_together(
            client, PROMPTS, {**body, "model": model}, show=show, clock=monotonic_clock, timeout_s=_REQUEST_TIMEOUT_S
        )
