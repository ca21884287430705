"""The sampler as its definition reads: one row, one token at a time, the whole vocabulary, nothing pruned."""

from __future__ import annotations

import math

import numpy as np

from slipstream.sdk.params import SamplingParams

MASK_32, MASK_64, GOLDEN_64 = (1 << 32) - 1, (1 << 64) - 1, 0x9E3779B97F4A7C15


def plain_noise(seed: int, position: int, token: int) -> float:
    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK_64
        return z ^ (z >> 31)

    key = mix((mix((seed + GOLDEN_64) & MASK_64) + (position + 1) * GOLDEN_64) & MASK_64)
    z = (token * 0x9E3779B9 + key) & MASK_32
    z = ((z ^ (z >> 16)) * 0x7FEB352D) & MASK_32
    z ^= key >> 32
    z = ((z ^ (z >> 15)) * 0x846CA68B) & MASK_32
    u = (((z ^ (z >> 16)) >> 8) + 1) / (2**24 + 1)
    return -math.log(-math.log(u))


def plain_edits(
    logits: list[float], params: SamplingParams, prompt: list[int], output: list[int], stop: list[int]
) -> list[float]:
    """The edited logits; the engine edits in float32, so this does too."""
    edited = [np.float32(logit) for logit in logits]
    for token, amount in params.logit_bias.items():
        if token < len(edited):
            edited[token] += np.float32(amount)
    if len(output) < params.min_tokens:
        for token in stop:
            if token < len(edited):
                edited[token] = np.float32(-math.inf)
    for token in range(len(edited)):
        if params.repetition_penalty != 1.0 and (token in prompt or token in output):
            penalty = np.float32(params.repetition_penalty)
            edited[token] = edited[token] / penalty if edited[token] > 0 else edited[token] * penalty
        if token in output:
            amount = params.frequency_penalty * output.count(token) + params.presence_penalty
            edited[token] -= np.float32(amount)
    return [float(logit) for logit in edited]


def plain_draw(logits: list[float], params: SamplingParams, seed: int, position: int) -> int:
    best = max(logits)
    if params.temperature == 0:
        return logits.index(best)
    weights = [math.exp((logit - best) / params.temperature) for logit in logits]
    left = [token for token, weight in enumerate(weights) if weight >= params.min_p]
    if 0 < params.top_k < len(left):
        kth = sorted((logits[token] for token in left), reverse=True)[params.top_k - 1]
        left = [token for token in left if logits[token] >= kth]
    if params.top_p < 1:
        total = math.fsum(weights[token] for token in left)
        nucleus = []
        for token in left:
            above = math.fsum(weights[other] for other in left if logits[other] > logits[token])
            if above < params.top_p * total:
                nucleus.append(token)
        left = nucleus
    chosen, chosen_score = -1, -math.inf
    for token in left:
        score = logits[token] / params.temperature + plain_noise(seed % 2**64, position, token)
        if score > chosen_score:
            chosen, chosen_score = token, score
    return chosen
