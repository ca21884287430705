"""What a gateway reads of models: tokenizers and what their makers suggest, each once, beside the event loop.

Replicas may serve different models while one takes another's place. How many are kept is bounded; what is in use
stays, whatever is kept here.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from pathlib import Path

from ..clock import strftime_now
from ..models.generation_defaults import read_generation_defaults
from ..text.tokenizer import Tokenizer
from .replica import ModelText, model_text

_MAX_KEPT = 4


class ModelFiles:
    """Models' text sides, by where their files are. ``tokenizer``: another directory for that of all of them."""

    def __init__(self, *, tokenizer: str | None = None, max_kept: int = _MAX_KEPT) -> None:
        self._tokenizer = tokenizer
        self._max_kept = max_kept
        self._kept: OrderedDict[tuple[str, int], ModelText] = OrderedDict()
        # One at a time: several replicas of one model are met at once, and only one has to read it.
        self._reading = asyncio.Lock()

    async def read(self, model: str, generation: int) -> ModelText:
        """Return what is needed of a model; ``generation`` tells what was in its directory before from what is now.

        Raises: CheckpointError; OSError
        """
        key = (model, generation)
        async with self._reading:
            if key not in self._kept:
                self._kept[key] = await asyncio.to_thread(read_model_text, model, tokenizer=self._tokenizer)
            self._kept.move_to_end(key)
            while len(self._kept) > self._max_kept:
                self._kept.popitem(last=False)
            return self._kept[key]


def read_model_text(model: str, *, tokenizer: str | None = None) -> ModelText:
    """Read a model's tokenizer, or another one, and its makers' suggestions. Raises: CheckpointError; OSError"""
    directory = Path(tokenizer or model).expanduser()
    return model_text(
        Tokenizer.from_directory(directory, strftime_now=strftime_now),
        read_generation_defaults(Path(model).expanduser()),
    )
