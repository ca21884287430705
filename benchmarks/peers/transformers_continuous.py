"""``transformers``' continuous batching (``generate_batch``), as a contender, with its defaults."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_MOST_PROMPT_TOKENS = 128


def load(options: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Load the model."""
    if options["format"] not in _DTYPES:
        raise NotImplementedError("unsupported: measured in bf16 and fp32 only")
    torch.set_num_threads(options["threads"])
    model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=_DTYPES[options["format"]])
    model = model.to(options["device"]).eval()
    on_cpu = options["device"] == "cpu"

    def run(request: dict[str, Any]) -> dict[str, Any]:
        if on_cpu and len(request["prompts"][0]) > _MOST_PROMPT_TOKENS:
            raise NotImplementedError("unsupported: long prompts take it minutes")
        config = GenerationConfig(do_sample=False, max_new_tokens=request["new_tokens"])
        began_s = time.perf_counter()
        outputs = model.generate_batch(request["prompts"], generation_config=config, record_timestamps=True)
        # Results come in any order; they are told apart by their prompts, which differ.
        by_prompt = {tuple(output.prompt_ids): output for output in outputs.values()}
        ordered = [by_prompt[tuple(ids)] for ids in request["prompts"]]
        events = sorted((at_s - began_s, row, 1) for row, output in enumerate(ordered) for at_s in output.timestamps)
        return {"events": events, "tokens": [list(output.generated_tokens) for output in ordered]}

    return run
