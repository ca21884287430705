"""Run a raw decoder over several sequences through the paged cache, as an engine would, but plainly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from slipstream.runtime.models.decoder import Decoder
from slipstream.runtime.models.forward import build_forward_batch
from slipstream.runtime.models.kv_cache import KvCache

WHOLE = 1 << 30


class PagedRunner:
    """Sequences with shuffled blocks in a cache that held something that is not a number before."""

    def __init__(self, decoder: Decoder, *, sequences: int, longest: int, block_size: int, seed: int = 0) -> None:
        self.decoder = decoder
        self.block_size = block_size
        blocks_each = -(-longest // block_size)
        num_blocks = sequences * blocks_each + 3
        shuffled = np.random.default_rng(seed).permutation(num_blocks)[: sequences * blocks_each]
        self.block_tables = shuffled.reshape(sequences, blocks_each).astype(np.int32)
        self.cache = KvCache.allocate(
            decoder.spec,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=decoder.dtype,
            device=decoder.device,
        )
        for layer in self.cache.layers:
            layer.fill_(float("nan"))

    def step(self, rows: Sequence[tuple[int, int, Tensor]], prompt_lengths: Sequence[int]) -> Tensor:
        """Compute rows of (sequence, first position, token ids); return the logits of all their tokens."""
        sequences = np.array([sequence for sequence, _, _ in rows], dtype=np.int32)
        batch = build_forward_batch(
            token_ids=torch.cat([tokens for _, _, tokens in rows]),
            starts=np.array([start for _, start, _ in rows], dtype=np.int32),
            counts=np.array([len(tokens) for _, _, tokens in rows], dtype=np.int32),
            prompt_lengths=np.array([prompt_lengths[s] for s in sequences], dtype=np.int32),
            block_tables=self.block_tables[sequences],
            block_size=self.block_size,
            spec=self.decoder.spec,
            dtype=self.decoder.dtype,
            device=self.decoder.device,
        )
        with torch.inference_mode():
            return self.decoder.logits(self.decoder.forward(batch, self.cache))

    def prefill(self, prompts: Sequence[Tensor], chunks: Sequence[int]) -> list[Tensor]:
        """Compute all prompts side by side, the i-th in chunks of ``chunks[i % len(chunks)]``; return their
        logits.
        """
        lengths = [len(prompt) for prompt in prompts]
        done = [0] * len(prompts)
        logits: list[list[Tensor]] = [[] for _ in prompts]
        while True:
            rows = []
            for sequence, prompt in enumerate(prompts):
                count = min(chunks[sequence % len(chunks)], len(prompt) - done[sequence])
                if count:
                    rows.append((sequence, done[sequence], prompt[done[sequence] : done[sequence] + count]))
            if not rows:
                return [torch.cat(parts) for parts in logits]
            results = self.step(rows, lengths).split([len(tokens) for _, _, tokens in rows])
            for (sequence, _, tokens), result in zip(rows, results, strict=True):
                logits[sequence].append(result)
                done[sequence] += len(tokens)
