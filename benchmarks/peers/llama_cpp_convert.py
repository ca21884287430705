"""Converts the benchmark's Llama checkpoints to GGUF, in llama.cpp's environment: tensors by ``gguf``, then quantized.

python llama_cpp_convert.py CHECKPOINT OUTPUT.gguf f32|bf16|q8_0|q4_0
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import torch
from safetensors import safe_open

_LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_f32(checkpoint: Path, output: Path) -> None:
    """Write a checkpoint as GGUF, every tensor in fp32, without a vocabulary."""
    config = json.loads((checkpoint / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(output), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(llama_cpp.LLAMA_FTYPE_ALL_F32)
    for name, tensor in _tensors(checkpoint):
        values = tensor.float()
        if ".attn_q." in name or ".attn_k." in name:
            # llama.cpp rotates neighbours of a head, the checkpoint its halves.
            parts = heads if ".attn_q." in name else kv_heads
            rows, columns = values.shape
            values = values.view(parts, 2, rows // parts // 2, columns).transpose(1, 2).reshape(rows, columns)
        writer.add_tensor(name, values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, output: Path, kind: str) -> None:
    """Write a GGUF file in another format, as ``llama-quantize`` does by default.

    Raises: RuntimeError with the library's status.
    """
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(output).encode(), ctypes.byref(params))
    if status != 0:
        raise RuntimeError(f"llama_model_quantize: status {status}")


def _tensors(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dictionary)
                yield _gguf_name(name.removesuffix(".weight")), file.get_tensor(name)


def _gguf_name(name: str) -> str:
    if name in _TOP_NAMES:
        return f"{_TOP_NAMES[name]}.weight"
    _, _, layer, part = name.split(".", 3)
    return f"blk.{layer}.{_LAYER_NAMES[part]}.weight"


def main(arguments: list[str]) -> Any:
    """Convert; a half-written file does not get the output's name."""
    checkpoint, output, kind = Path(arguments[0]), Path(arguments[1]), arguments[2]
    output.parent.mkdir(parents=True, exist_ok=True)
    plain = output.with_name(output.name.replace(f"-{kind}.gguf", "-f32.gguf"))
    if not plain.exists():
        partial = plain.with_suffix(".partial")
        write_f32(checkpoint, partial)
        partial.rename(plain)
    if kind != "f32":
        partial = output.with_suffix(".partial")
        quantize(plain, partial, kind)
        partial.rename(output)


if __name__ == "__main__":
    main(sys.argv[1:])
