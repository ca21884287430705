"""``transformers``' ``generate``, as a contender, with its defaults: a dynamic cache, SDPA attention."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load(options: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Load the model."""
    if options["format"] not in _DTYPES:
        raise NotImplementedError("unsupported: measured in bf16 and fp32 only")
    torch.set_num_threads(options["threads"])
    model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=_DTYPES[options["format"]])
    model = model.to(options["device"]).eval()

    def run(request: dict[str, Any]) -> dict[str, Any]:
        prompts = torch.tensor(request["prompts"], device=options["device"])
        config = GenerationConfig(do_sample=False, max_new_tokens=request["new_tokens"], pad_token_id=0)
        moments: list[float] = []

        def note(*_: Any, **__: Any) -> torch.Tensor:
            # Called once a step, after the step's tokens have been appended; on a GPU, once they are there.
            if prompts.is_cuda:
                torch.cuda.synchronize()
            moments.append(time.perf_counter())
            return torch.zeros(len(prompts), dtype=torch.bool, device=prompts.device)

        began_s = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                generation_config=config,
                stopping_criteria=[note],
            )
        rows = range(len(prompts))
        return {
            "events": [(moment - began_s, row, 1) for moment in moments for row in rows],
            "tokens": output[:, prompts.shape[1] :].tolist(),
        }

    return run
