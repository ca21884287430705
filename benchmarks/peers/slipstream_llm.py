"""Slipstream through its ``LLM``, as a contender."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from slipstream import LLM, SamplingParams
from slipstream.sdk.errors import ConfigError

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "int8": "bfloat16", "int4": "bfloat16"}


def load(options: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Load the model; a format that the engine does not know is refused as ``unsupported``."""
    format_ = options["format"]
    chosen: dict[str, Any] = {} if format_ in ("fp32", "bf16") else {"quantization": format_}
    try:
        llm = LLM(
            options["model"],
            dtype=_DTYPES[format_],
            device=options["device"],
            skip_tokenizer_init=True,
            max_model_len=options["max_model_len"],
            max_num_seqs=options["max_batch"],
            kv_cache_memory_bytes=options["kv_bytes"],
            # Every prompt is new, and so are the peers'.
            enable_prefix_caching=False,
            **chosen,
        )
    except ConfigError as error:
        if error.field == "quantization":
            raise NotImplementedError(f"unsupported: {error}") from error
        raise

    def run(request: dict[str, Any]) -> dict[str, Any]:
        params = SamplingParams(temperature=0.0, max_tokens=request["new_tokens"], ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        events: list[tuple[float, int, int]] = []
        outputs: dict[int, list[int]] = {}
        began_s = time.perf_counter()
        for piece in llm.stream(prompts, params):
            # Request ids count up in the prompts' order, whichever comes first.
            if piece.token_ids:
                events.append((time.perf_counter() - began_s, int(piece.request_id), len(piece.token_ids)))
            if piece.output.finished:
                outputs[int(piece.request_id)] = piece.output.outputs[0].token_ids
        first = min(outputs)
        return {
            "events": [(at_s, request_id - first, count) for at_s, request_id, count in events],
            "tokens": [outputs[request_id] for request_id in sorted(outputs)],
        }

    return run
