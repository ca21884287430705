"""What is asked of a deployment in a test, with what one engine answers to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slipstream import LLM, SamplingParams

Question = tuple[dict[str, object], str]
"""A request's body, and the text that is the right answer to it."""


def questions_of(model: Path, prompts: Sequence[str]) -> list[Question]:
    """Return requests for the model ``demo``, a greedy and a seeded one for each prompt, with one rank's answers."""
    asked: list[Question] = []
    with LLM(str(model), dtype="float32", max_model_len=256, kv_cache_memory_bytes=1 << 25, num_threads=1) as llm:
        for seed, prompt in enumerate(prompts):
            for temperature in (0.0, 0.8):
                given = SamplingParams(max_tokens=24, temperature=temperature, seed=seed, top_k=0, top_p=1.0)
                (output,) = llm.generate([prompt], given, use_tqdm=False)
                body = {name: getattr(given, name) for name in ("max_tokens", "temperature", "seed", "top_k", "top_p")}
                body |= {"model": "demo", "prompt": prompt}
                asked.append((body, output.outputs[0].text))
    return asked
