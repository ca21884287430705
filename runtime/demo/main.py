"""``slipstream demo``: several prompts at once to a deployment, streamed to the terminal, then what that cost.

The deployment has prefill and decode replicas: how much was moved between them is asked of its gateway.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from ..api_client.client import ApiClient
from ..api_client.errors import ApiError
from ..clock import monotonic_clock
from ..ending import run_ending_on_signals
from ..local_cluster import RunningCluster
from .asking import Answer, Show, ask_together
from .movement import Movement, movement
from .screen import AnswerScreen, movements, places, timings

# None ends with a space or a line break: the model's tokenizer joins those with what follows. They are long enough that
# computing them on one replica and going on with them on another is seen.
PROMPTS = (
    'def parse_version(text):\n    """Return a version string as a tuple of numbers.\n\n'
    "    Parts that are not numbers are left out, so that '1.2rc1' and '1.2' compare equal.\n"
    '    """\n    parts = []\n    for part in text.split(\'.\'):\n        if not part.isdigit():',
    "class Stack:\n    def __init__(self):\n        self._items = []\n\n    def push(self, item):\n"
    "        self._items.append(item)\n\n    def pop(self):\n        if not self._items:\n"
    "            raise IndexError('pop from an empty stack')\n        return self._items.pop()\n\n    def peek(self):",
    "import os\nimport sys\nimport time\nimport threading\nimport collections\nfrom functools import partial\n"
    "from contextlib import contextmanager\n\n__all__ = ['Timer', 'timeit', 'repeat', 'default_timer']\n\nimport",
    "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n\n"
    "    def __eq__(self, other):\n        if not isinstance(other, Point):\n            return NotImplemented\n"
    "        return self.x == other.x and self.y == other.y\n\n    def __repr__(self):\n        return",
    'def read_lines(path, encoding="utf-8", errors=None):\n    """Read a file and return its lines.\n\n'
    '    The line ends are removed. If the file does not exist, OSError is raised.\n    """\n'
    "    with open(path, encoding=encoding, errors=errors) as file:\n        lines =",
    "def update(self, other=(), /, **kwds):\n    if isinstance(other, Mapping):\n        for key in other:\n"
    "            self[key] = other[key]\n    elif hasattr(other, 'keys'):\n        for key in other.keys():\n"
    "            self[key] = other[key]\n    else:\n        for key, value in other:\n            self[key] = value\n"
    "    for key, value in",
)

_REQUEST_TIMEOUT_S = 60.0
_SETTLE_TIMEOUT_S = 3.0
_LOOK_S = 0.1


def run_demo(cluster: RunningCluster, body: dict[str, Any]) -> None:
    """Ask a deployment the demo's prompts together, show the answers, and then timings, movement and shards.

    ``body`` holds the requests' other fields.
    Raises: ApiError when an answer failed, after all has been shown
    """
    console = Console()
    with AnswerScreen(console, PROMPTS) as screen, asyncio.Runner() as runner:
        answers, moved = run_ending_on_signals(runner, _ask(cluster.url, body, screen.add))
    console.print(timings(answers))
    console.print(movements(moved))
    console.print(places(cluster.shards))
    for answer in answers:
        if answer.record.error is not None:
            raise ApiError(answer.record.error, answer.record.detail)


async def _ask(base_url: str, body: dict[str, Any], show: Show) -> tuple[list[Answer], Movement]:
    async with ApiClient(base_url, max_connections=len(PROMPTS)) as client:
        try:
            async with asyncio.timeout(_REQUEST_TIMEOUT_S):
                model = await client.first_model()
                before = await client.metrics()
        except TimeoutError as error:
            raise ApiError("deadline", f"{client.url} did not say what it serves") from error
        answers = await ask_together(
            client, PROMPTS, {**body, "model": model}, show=show, clock=monotonic_clock, timeout_s=_REQUEST_TIMEOUT_S
        )
        return answers, await _moved(client, before)


async def _moved(client: ApiClient, before: Mapping[str, float]) -> Movement:
    """Return what was moved for the prompts. A hand-off may be heard of after the answer that it led to."""
    moved = Movement()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_SETTLE_TIMEOUT_S):
            while moved.hand_offs < len(PROMPTS):
                moved = movement(before, await client.metrics())
                await asyncio.sleep(_LOOK_S)
    return moved
