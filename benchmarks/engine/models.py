"""The benchmark's models: Llamas of random weights, made once into a folder, in bf16.

Every contender and every format starts from the same checkpoint, so that their tokens can be compared.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from slipstream.benchmarks.engine.points import MAX_MODEL_LEN, Shape

_SEED = 0


def ensure_model(shape: Shape, folder: Path, device: str = "cpu") -> Path:
    """Return the directory of a shape's checkpoint, making it if need be; on a GPU that takes a tenth of the time."""
    directory = folder / shape.name
    if (directory / "complete").exists():
        return directory
    print(f"making {directory}", flush=True)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        intermediate_size=shape.ffn,
        vocab_size=shape.vocabulary,
        max_position_embeddings=2 * MAX_MODEL_LEN,
        tie_word_embeddings=False,
        # No end of sequence: random weights would draw one now and then, and every answer has to have its length.
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        dtype="bfloat16",
    )
    before = torch.get_default_dtype()
    torch.manual_seed(_SEED)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(directory)
    # Without this file, a directory was left half written by a run that was ended.
    (directory / "complete").touch()
    return directory
