"""llama.cpp through llama-cpp-python's low-level API, as a contender: ``llama_decode`` and an argmax, no more."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

_KINDS = {"fp32": "f32", "bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}
_BATCH_TOKENS = 2_048
_ROOM_TOKENS = 64
"""Room that a context has at least beside the prompt: a warm-up of few tokens uses the same one."""


class _Batch:
    """A ``llama_batch`` of up to a number of tokens, filled from lists."""

    def __init__(self, tokens: int) -> None:
        self.batch = llama_cpp.llama_batch_init(tokens, 0, 1)
        # Views of the library's arrays: a prompt is written at once.
        self._tokens = np.ctypeslib.as_array(self.batch.token, (tokens,))
        self._positions = np.ctypeslib.as_array(self.batch.pos, (tokens,))
        self._wanted = np.ctypeslib.as_array(self.batch.logits, (tokens,))
        np.ctypeslib.as_array(self.batch.n_seq_id, (tokens,))[:] = 1
        self._sequences = [np.ctypeslib.as_array(self.batch.seq_id[place], (1,)) for place in range(tokens)]

    def fill(self, entries: list[tuple[int, int, int, bool]]) -> None:
        """Take ``(token, position, sequence, whether its logits are wanted)``."""
        tokens, positions, sequences, wanted = zip(*entries, strict=True)
        count = self.batch.n_tokens = len(entries)
        self._tokens[:count] = tokens
        self._positions[:count] = positions
        self._wanted[:count] = wanted
        for place, sequence in enumerate(sequences):
            self._sequences[place][0] = sequence


class _Model:
    """A loaded model, and a context for each shape of request: the cache in fp16, flash attention where it chooses."""

    def __init__(self, path: Path, threads: int) -> None:
        llama_cpp.llama_backend_init()
        self._threads = threads
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._contexts: dict[tuple[int, int], Any] = {}
        self._batch = _Batch(_BATCH_TOKENS)

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Take the prompts one after the other, then all sequences a token at a time."""
        prompts, new_tokens = request["prompts"], request["new_tokens"]
        count, length = len(prompts), len(prompts[0])
        context = self._context(count, length + max(new_tokens, _ROOM_TOKENS))
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        tokens: list[list[int]] = [[] for _ in prompts]
        events: list[tuple[float, int, int]] = []
        began_s = time.perf_counter()

        def step(entries: list[tuple[int, int, int, bool]]) -> None:
            drawn = self._decode(context, entries)
            at_s = time.perf_counter() - began_s
            for sequence, token in drawn:
                tokens[sequence].append(token)
                events.append((at_s, sequence, 1))

        entries = [
            (token, position, sequence, position == length - 1)
            for sequence, ids in enumerate(prompts)
            for position, token in enumerate(ids)
        ]
        for begin in range(0, len(entries), _BATCH_TOKENS):
            step(entries[begin : begin + _BATCH_TOKENS])
        for place in range(new_tokens - 1):
            step([(tokens[sequence][-1], length + place, sequence, True) for sequence in range(count)])
        return {"events": events, "tokens": tokens}

    def _decode(self, context: Any, entries: list[tuple[int, int, int, bool]]) -> list[tuple[int, int]]:
        self._batch.fill(entries)
        status = llama_cpp.llama_decode(context, self._batch.batch)
        if status != 0:
            raise RuntimeError(f"llama_decode: status {status}")
        sequences = [sequence for _, _, sequence, wanted in entries if wanted]
        if not sequences:
            llama_cpp.llama_synchronize(context)
            return []
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(sequences), self._vocabulary))
        return list(zip(sequences, logits.argmax(axis=1).tolist(), strict=True))

    def _context(self, sequences: int, length: int) -> Any:
        key = (sequences, length)
        if key not in self._contexts:
            params = llama_cpp.llama_context_default_params()
            # Room is given out to each sequence in multiples of 256.
            params.n_ctx = sequences * -(-length // 256) * 256
            params.n_batch = _BATCH_TOKENS
            params.n_seq_max = sequences
            params.n_threads = params.n_threads_batch = self._threads
            context = llama_cpp.llama_init_from_model(self._model, params)
            if not context:
                raise RuntimeError(f"llama.cpp has no context of {sequences} sequences of {length} tokens")
            self._contexts[key] = context
        return self._contexts[key]


def load(options: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Convert the checkpoint, once, and load the model."""
    kind = _KINDS[options["format"]]
    checkpoint = Path(options["model"])
    path = Path(options["work_directory"]) / f"{checkpoint.name}-{kind}.gguf"
    if not path.exists():
        # In a process of its own, whose memory is given back.
        script = Path(__file__).with_name("llama_cpp_convert.py")
        subprocess.run([sys.executable, str(script), str(checkpoint), str(path), kind], check=True)
    return _Model(path, options["threads"]).run
