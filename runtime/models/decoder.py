"""The decoder: token ids in, hidden states and logits out, keys and values in the paged cache.

One class for every architecture of the registry; what differs is in the ``ModelSpec``. The caller runs it
under ``torch.inference_mode()``.

Shapes: T tokens, H hidden size, N selected tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...kernels.attention import prepare_attention
from ...kernels.attention_workspace import AttentionWorkspace
from ...kernels.norm import add_rms_norm, rms_norm
from ...kernels.rope_kv import kv_write_rows
from .attention import Attention, AttentionInputs
from .forward import ForwardBatch
from .kv_cache import KvCache
from .linear_format import choose_format
from .mlp import Mlp, take_mlp
from .model_spec import ModelSpec
from .parameters import Parameters
from .rope import RotaryPositions
from .weights import read_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer:
    """One layer: attention and MLP, each behind a norm.

    Shapes: input_norm_H, mlp_norm_H [hidden size]
    """

    input_norm_H: Tensor
    attention: Attention
    mlp_norm_H: Tensor
    mlp: Mlp


class Decoder:
    """A model on one device. One thread at a time may use it: the workspace is shared by all steps."""

    def __init__(self, spec: ModelSpec, parameters: Parameters) -> None:
        """Assemble the layers from ``parameters``, of one type and device."""
        self.spec = spec
        self._embedding_VH = parameters.tensor("embedding")
        self._final_norm_H = parameters.tensor("final_norm")
        self._head = parameters.head(tied=spec.tie_word_embeddings)
        self._layers = tuple(_take_layer(spec, parameters, index) for index in range(spec.num_layers))
        dtype, device = self._embedding_VH.dtype, self._embedding_VH.device
        self._positions = RotaryPositions(spec.rope, dtype=dtype, device=device)
        self._workspace = AttentionWorkspace(dtype=dtype, device=device)

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of the weights, which is that of the hidden states."""
        return self._embedding_VH.dtype

    @property
    def device(self) -> torch.device:
        """Return where the weights are."""
        return self._embedding_VH.device

    def forward(self, batch: ForwardBatch, cache: KvCache) -> Tensor:
        """Run the layers over the batch, write its keys and values to ``cache``, return normalized hidden
        states.

        Shapes: returns hidden_TH [tokens, hidden size] of the weights' type
        """
        inputs = self._attention_inputs(batch, cache)
        epsilon = self.spec.rms_norm_eps
        residual_TH = torch.nn.functional.embedding(batch.token_ids_T, self._embedding_VH)
        normed_TH = rms_norm(residual_TH, self._layers[0].input_norm_H, epsilon)
        next_norms = [*(layer.input_norm_H for layer in self._layers[1:]), self._final_norm_H]
        for layer, layer_cache, next_norm_H in zip(self._layers, cache.layers, next_norms, strict=True):
            attended_TH = layer.attention(normed_TH, layer_cache, inputs)
            normed_TH, residual_TH = add_rms_norm(attended_TH, residual_TH, layer.mlp_norm_H, epsilon)
            normed_TH, residual_TH = add_rms_norm(layer.mlp(normed_TH), residual_TH, next_norm_H, epsilon)
        return normed_TH

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Return the logits of hidden states from ``forward``.

        Shapes: hidden_NH [selected tokens, hidden size]; returns [selected tokens, vocabulary] float32
        """
        return self._head(hidden_NH, None).float()

    def _attention_inputs(self, batch: ForwardBatch, cache: KvCache) -> AttentionInputs:
        cos_TD, sin_TD = self._positions.cos_sin(batch.positions_T, batch.rope_lengths_T, longest=batch.longest)
        return AttentionInputs(
            cos_TD=cos_TD,
            sin_TD=sin_TD,
            kv_rows=kv_write_rows(
                batch.slot_mapping_T,
                num_blocks=cache.num_blocks,
                kv_heads=self.spec.num_kv_heads,
                block_size=cache.block_size,
            ),
            fresh_blocks_F=batch.fresh_blocks_F,
            attention={
                window: prepare_attention(
                    plan,
                    cache.layers[0],
                    tokens=batch.token_ids_T.shape[0],
                    heads=self.spec.num_heads,
                    workspace=self._workspace,
                )
                for window, plan in batch.attention.items()
            },
        )


def load_decoder(
    path: str | Path,
    spec: ModelSpec,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str = "none",
    deterministic: bool = False,
) -> Decoder:
    """Load the weights in the directory ``path`` and return the decoder.

    Raises: CheckpointError naming the file and the tensor; ConfigError naming the option
    """
    linear_format = choose_format(quantization, dtype=dtype, device=device, deterministic=deterministic)
    parameters = Parameters(linear_format)
    for parameter, tensor in read_parameters(path, spec, dtype=dtype, device=device):
        parameters.add(parameter.name, tensor, parameter.role)
    return Decoder(spec, parameters)


def _take_layer(spec: ModelSpec, parameters: Parameters, index: int) -> DecoderLayer:
    name, layer = f"layers.{index}", spec.layers[index]
    return DecoderLayer(
        input_norm_H=parameters.tensor(f"{name}.input_norm"),
        attention=Attention.take(spec, parameters, f"{name}.attention", window=layer.window),
        mlp_norm_H=parameters.tensor(f"{name}.mlp_norm"),
        mlp=take_mlp(layer.mlp, parameters, f"{name}.mlp"),
    )
