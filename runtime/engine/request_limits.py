"""Which requests a scheduler could never serve, and why: said by the name of the field, before any work is done."""

from __future__ import annotations

import numpy as np

from ...sdk.errors import InvalidRequest
from ..config import SchedulerConfig
from ..messages import EngineRequest


def check_request(request: EngineRequest, config: SchedulerConfig) -> None:
    """Raise InvalidRequest for a request that could never be served."""
    length = len(request.prompt_token_ids)
    if length == 0:
        raise InvalidRequest("prompt", "holds no tokens")
    if length + request.max_tokens > config.max_model_len:
        raise InvalidRequest(
            "prompt" if length >= config.max_model_len else "max_tokens",
            f"{length} prompt tokens and {request.max_tokens} new ones are more than "
            f"max_model_len={config.max_model_len}",
        )
    if request.params.n > config.max_num_seqs:
        raise InvalidRequest("n", f"{request.params.n} samples are more than max_num_seqs={config.max_num_seqs}")
    if request.generated:
        _check_generated(request)


def check_single(request: EngineRequest) -> None:
    """Raise InvalidRequest for a request whose KV cannot be handed from one replica to another."""
    if request.params.n != 1:
        raise InvalidRequest("n", f"KV of one sample can be handed on, not of {request.params.n}")
    if request.params.prompt_logprobs is not None:
        raise InvalidRequest("prompt_logprobs", "need the whole prompt computed where they are asked for")


def _check_generated(request: EngineRequest) -> None:
    """Refuse samples that would go on beyond their end: nobody would notice."""
    generated = request.generated
    if len(generated) != request.params.n:
        raise InvalidRequest("generated", f"has {len(generated)} samples, n is {request.params.n}")
    if all(drawn is None for drawn in generated):
        raise InvalidRequest("generated", "says that every sample is over")
    for index, drawn in enumerate(generated):
        if drawn is None:
            continue
        if len(drawn) >= request.max_tokens:
            raise InvalidRequest(
                "generated", f"sample {index} has {len(drawn)} tokens of max_tokens={request.max_tokens}: it is over"
            )
        if np.isin(drawn, request.stop_ids).any():
            raise InvalidRequest("generated", f"sample {index} has a stop token: it is over")
