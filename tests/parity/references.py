"""What transformers says about a tiny checkpoint: log-probabilities of given texts, and greedy continuations."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from slipstream.tests.models.checkpoints import CASES, VOCABULARY, make_checkpoint

NEW_TOKENS = 64
LENGTHS = (1, 5, 17, 40, 70, 33)


def prompts(count: int = len(LENGTHS), *, seed: int = 7) -> list[list[int]]:
    """Return prompts of mixed lengths; some begin alike, so that a prefix cache finds something."""
    draw = random.Random(seed)
    shared = [draw.randrange(3, VOCABULARY) for _ in range(48)]
    made = []
    for place in range(count):
        length = LENGTHS[place % len(LENGTHS)]
        kept = min(length - 1, 48) if place % 2 else 0
        made.append(shared[:kept] + [draw.randrange(3, VOCABULARY) for _ in range(length - kept)])
    return made


@dataclass(frozen=True)
class Reference:
    """A checkpoint and the model that transformers makes of it."""

    path: Path
    model: PreTrainedModel

    def reset(self) -> None:
        """Make dynamic rope forget the longest text it has seen."""
        with torch.inference_mode():
            self.model(torch.zeros((1, 1), dtype=torch.int64))

    def logits(self, token_ids: list[int]) -> Tensor:
        """Return the logits after every token. Shapes: [tokens, vocabulary] float32"""
        self.reset()
        with torch.inference_mode():
            return self.model(torch.tensor([token_ids])).logits[0].float()

    def continuation(self, prompt: list[int], count: int) -> tuple[list[int], Tensor]:
        """Decode greedily as transformers does: the prompt at once, then token by token through its cache.

        Returns the tokens and the log-probabilities that each was chosen from. Shapes: [count, vocabulary]
        """
        self.reset()
        tokens: list[int] = []
        rows = []
        with torch.inference_mode():
            step = self.model(torch.tensor([prompt]), use_cache=True)
            for _ in range(count):
                rows.append(step.logits[0, -1].float().log_softmax(-1))
                tokens.append(int(rows[-1].argmax()))
                step = self.model(torch.tensor([tokens[-1:]]), past_key_values=step.past_key_values, use_cache=True)
        return tokens, torch.stack(rows)


def load_reference(name: str, directory: Path) -> Reference:
    """Make the checkpoint of a case and load it with transformers, in float32."""
    assert name in CASES
    path = make_checkpoint(name, directory / name)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval()
    return Reference(path=path, model=model)
