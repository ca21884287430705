"""The decoder: token ids in, hidden states and logits out, keys and values in the paged cache.

One class for every architecture of the registry; what differs is in the ``ModelSpec``. The caller runs it
under ``torch.inference_mode()``.

Shapes: T tokens, H hidden size, N selected tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ...comm.collectives import Collectives
from ...comm.groups import ALONE, MeshGroups
from ...comm.overlap import Parts, Steps, run_plain
from ...comm.tree_sum import TreeGroup
from ...kernels.attention import prepare_attention
from ...kernels.cpu.attention_workspace import AttentionWorkspace
from ...kernels.kv_blocks import clear_blocks
from ...kernels.rope_kv import kv_write_rows
from .attention import Attention, AttentionInputs
from .expert_ranks import ExpertRanks
from .formats import choose_formats
from .forward import ForwardBatch
from .kv_cache import KvCache
from .latent_attention import LatentAttention
from .mlp import Mlp, MoeMlp, take_mlp
from .model_spec import ModelSpec
from .parallel import Output, summed
from .parameters import Parameters
from .residual import normalized_for, open_residual
from .ring_attention import RingInputs
from .rope import RotaryPositions
from .sharding import WHOLE, Shard
from .weights import Progress, read_parameters

LayerDone = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer:
    """One layer: attention and MLP, each behind a norm; ``ladder`` as in ``LayerSpec``.

    Those at the ends: of what attention and MLP add to the residual, None where that is added as it is.

    Shapes: input_norm_H, mlp_norm_H, attention_end_norm_H, mlp_end_norm_H [hidden size]
    """

    input_norm_H: Tensor
    attention: Attention | LatentAttention
    mlp_norm_H: Tensor
    mlp: Mlp
    ladder: bool
    attention_end_norm_H: Tensor | None
    mlp_end_norm_H: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PassInputs:
    """What the layers compute on, all that differs from step to step.

    Shapes: hidden_TH [tokens, ``received_size``]
    """

    hidden_TH: Tensor
    attention: AttentionInputs


class Decoder:
    """A rank's part of a model, on one device. One thread at a time may use it: the workspace is shared by all steps.

    What needs other ranks is written as parts (``comm.overlap``): run by themselves they wait where they must.
    """

    def __init__(self, spec: ModelSpec, parameters: Parameters, groups: MeshGroups, shard: Shard) -> None:
        """Assemble the layers from ``parameters``, of one type and device; ``spec`` is what this rank has of them."""
        self.spec = spec
        self.vocabulary = shard.vocabulary(spec.vocab_size)
        self._groups = groups
        self._sums = groups.tp
        if groups.tp is not None and shard.fixed_order:
            self._sums = TreeGroup(groups.tp, parameters.dtype)
        self._layers = tuple(
            _take_layer(spec, parameters, index, groups, shard, self._sums) for index in range(spec.num_layers)
        )
        self._embedding_VH = self._final_norm_H = self._head = None
        if groups.place.is_first_stage:
            self._embedding_VH = parameters.tensor("embedding")
        if groups.place.is_last_stage:
            self._final_norm_H = parameters.tensor("final_norm")
            self._head = parameters.head(tied=spec.tie_word_embeddings)
        self.dtype, self.device = parameters.dtype, parameters.device
        # As the type has it: what it is multiplied with is of that type too.
        self._embedding_scale = float(torch.tensor(spec.embedding_scale, dtype=self.dtype))
        self._positions = RotaryPositions(spec.rope, dtype=self.dtype, device=self.device)
        self._workspace = AttentionWorkspace(dtype=self.dtype, device=self.device)

    def forward(self, batch: ForwardBatch, cache: KvCache) -> Tensor:
        """Run all layers over the batch and return normalized hidden states; see ``forward_parts``."""
        return run_plain(self.forward_parts(batch, cache))

    def forward_parts(
        self,
        batch: ForwardBatch,
        cache: KvCache,
        hidden_TH: Tensor | None = None,
        *,
        sharded_norm: bool = False,
        layer_done: LayerDone | None = None,
    ) -> Parts:
        """Run this stage's layers over the batch and write its keys and values to ``cache``.

        ``hidden_TH`` comes from the stage before; the first one embeds the batch's tokens. The last stage returns
        normalized hidden states, every other what goes to the next. ``sharded_norm``: keep the residual in shares, one
        on each tensor-parallel rank. ``layer_done`` is told of each layer, as this rank counts them, whose keys and
        values are in the cache (on a GPU: will be, once what was queued so far has run).

        Shapes: hidden_TH [tokens, ``received_size``]; returns [tokens, hidden size], or what the next stage receives,
        of the weights' type
        """
        inputs = yield from self.open_parts(batch, cache, hidden_TH)
        return (yield from self.layer_parts(inputs, cache, sharded_norm=sharded_norm, layer_done=layer_done))

    def open_parts(self, batch: ForwardBatch, cache: KvCache, hidden_TH: Tensor | None = None) -> Steps[PassInputs]:
        """Prepare a pass: what its layers have in common, and the cache. As ``forward_parts``."""
        inputs = self._attention_inputs(batch, cache)
        if batch.fresh_blocks_F.shape[0]:
            clear_blocks(batch.fresh_blocks_F, cache.layers)
        if hidden_TH is None:
            hidden_TH = yield from self._embed(batch.token_ids_T)
            if self._embedding_scale != 1.0:
                hidden_TH = hidden_TH * self._embedding_scale
        return PassInputs(hidden_TH=hidden_TH, attention=inputs)

    def layer_parts(
        self, inputs: PassInputs, cache: KvCache, *, sharded_norm: bool = False, layer_done: LayerDone | None = None
    ) -> Parts:
        """Run this stage's layers over what ``open_parts`` has returned. As ``forward_parts``."""
        epsilon, tp = self.spec.rms_norm_eps, self._sums
        residual, residual_TH = open_residual(
            inputs.hidden_TH, hidden_size=self.spec.hidden_size, epsilon=epsilon, shares=tp if sharded_norm else None
        )
        first = self._layers[0]
        normed_TH = normalized_for(first.attention.takes, residual_TH, first.input_norm_H, epsilon)
        for index, (layer, layer_cache) in enumerate(zip(self._layers, cache.layers, strict=True)):
            attended_TH = yield from layer.attention.parts(normed_TH, layer_cache, inputs.attention)
            attended = Output(attended_TH, tp, layer.attention_end_norm_H)
            if layer_done is not None:
                layer_done(index)
            normed_TH = yield from residual.add(attended, layer.mlp_norm_H, ladder=layer.ladder, takes=layer.mlp.takes)
            added = replace((yield from layer.mlp.parts(normed_TH)), end_norm_H=layer.mlp_end_norm_H)
            next_norm_H, next_ladder, takes = self._after(index)
            if next_norm_H is None:
                return (yield from residual.end(added, ladder=next_ladder))
            normed_TH = yield from residual.add(added, next_norm_H, ladder=next_ladder, takes=takes)
        assert isinstance(normed_TH, Tensor), "a final norm's"
        return normed_TH

    @property
    def received_size(self) -> int:
        """The values of a token that come from the stage before: a ladder that crosses stages takes two rows."""
        crossed = self._layers[0].ladder and not self._groups.place.is_first_stage
        return self.spec.hidden_size * (2 if crossed else 1)

    @property
    def expert_layers(self) -> dict[int, ExpertRanks]:
        """The layers, as this rank counts them, whose experts are spread over ranks."""
        mlps = enumerate(layer.mlp for layer in self._layers)
        return {
            index: mlp.experts
            for index, mlp in mlps
            if isinstance(mlp, MoeMlp) and isinstance(mlp.experts, ExpertRanks)
        }

    def reserve_positions(self, longest: int) -> None:
        """Make room for positions below ``longest``: passes up to there find their angles in memory that stays."""
        self._positions.reserve(longest)

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Return the logits of hidden states from the last stage, for this rank's ``vocabulary``.

        Shapes: hidden_NH [selected tokens, hidden size]; returns [selected tokens, own vocabulary] float32
        """
        assert self._head is not None, "only the last stage has a head"
        logits_NV = self._head(hidden_NH, None).float()
        cap = self.spec.logit_soft_cap
        return logits_NV if cap is None else torch.tanh(logits_NV / cap).mul_(cap)

    def _after(self, index: int) -> tuple[Tensor | None, bool, torch.dtype | None]:
        """Return the norm behind a layer, None where the next stage has it, whether a ladder layer follows, and which
        8-bit numbers it takes.
        """
        if index + 1 < len(self._layers):
            following = self._layers[index + 1]
            return following.input_norm_H, following.ladder, following.attention.takes
        return self._final_norm_H, self.spec.ladder_follows, None

    def _embed(self, token_ids_T: Tensor) -> Parts:
        assert self._embedding_VH is not None, "only the first stage has an embedding"
        if self._groups.tp is None:
            return torch.nn.functional.embedding(token_ids_T, self._embedding_VH)
        # Every token is in one rank's table; the others add zeros, which changes no bits.
        local_T = token_ids_T - self.vocabulary.start
        elsewhere_T = (local_T < 0) | (local_T >= len(self.vocabulary))
        found_TH = torch.nn.functional.embedding(local_T.masked_fill(elsewhere_T, 0), self._embedding_VH)
        return (yield from summed(found_TH.masked_fill_(elsewhere_T.unsqueeze(1), 0), self._groups.tp))

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
                parts=cache.parts,
            ),
            attention={
                window: prepare_attention(
                    plan,
                    cache.layers[0],
                    tokens=batch.attended,
                    heads=self.spec.num_heads,
                    workspace=self._workspace,
                )
                for window, plan in batch.attention.items()
            },
            ring=self._ring_inputs(batch, cache),
        )

    def _ring_inputs(self, batch: ForwardBatch, cache: KvCache) -> RingInputs | None:
        if batch.ring is None:
            return None
        assert self._groups.sp is not None, "a step is divided over sequence-parallel ranks"
        return RingInputs.prepare(
            batch.ring, self._groups.sp, cache, heads=self.spec.num_heads, workspace=self._workspace
        )


def load_decoder(
    path: str | Path,
    spec: ModelSpec,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str = "none",
    groups: MeshGroups = ALONE,
    shard: Shard = WHOLE,
    progress: Progress | None = None,
) -> Decoder:
    """Load the weights in the directory ``path``, or a rank's ``shard`` of them, and return its decoder.

    ``spec`` is the whole model's. With ``shard.fixed_order`` a row's bits depend neither on other rows nor on how many
    tensor-parallel ranks there are. ``progress`` is told how much is loaded.

    Raises: CheckpointError naming the file and the tensor; ConfigError naming the option
    """
    local_spec = shard.local_spec(spec)
    parameters = Parameters(choose_formats(quantization, dtype=dtype, device=device, shard=shard), dtype)
    for parameter, tensor in read_parameters(path, spec, dtype=dtype, device=device, shard=shard, progress=progress):
        parameters.add(parameter.name, tensor, parameter.role)
    return Decoder(local_spec, parameters, groups, shard)


def _take_layer(
    spec: ModelSpec,
    parameters: Parameters,
    index: int,
    groups: MeshGroups,
    shard: Shard,
    sums: Collectives | None,
) -> DecoderLayer:
    name, layer = f"layers.{index}", spec.layers[index]
    attention: Attention | LatentAttention
    if spec.latent is None:
        attention = Attention.take(spec, parameters, f"{name}.attention", window=layer.window)
    else:
        attention = LatentAttention.take(
            spec, spec.latent, parameters, f"{name}.attention", deterministic=shard.fixed_order
        )
    return DecoderLayer(
        input_norm_H=parameters.tensor(f"{name}.input_norm"),
        attention=attention,
        mlp_norm_H=parameters.tensor(f"{name}.mlp_norm"),
        mlp=take_mlp(layer.mlp, parameters, f"{name}.mlp", groups=groups, shard=shard, sums=sums),
        ladder=layer.ladder,
        attention_end_norm_H=parameters.tensor(f"{name}.attention_end_norm") if spec.norms.behind else None,
        mlp_end_norm_H=parameters.tensor(f"{name}.mlp_end_norm") if spec.norms.behind else None,
    )
