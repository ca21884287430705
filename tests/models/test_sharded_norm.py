"""Whole passes with the residual in shares: on every rank the bits of the plain way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from slipstream.comm.groups import MeshGroups
from slipstream.comm.local_groups import LocalRank
from slipstream.comm.mesh import MeshShape
from slipstream.comm.overlap_split import Cuts
from slipstream.runtime.models.decoder import load_decoder
from slipstream.runtime.models.kv_cache import KvCache
from slipstream.runtime.models.registry import read_model_spec
from slipstream.runtime.models.sharding import Shard
from slipstream.runtime.worker.step_batch import StepRows
from slipstream.runtime.worker.step_forward import StepForward
from slipstream.tests.fakes.thread_peers import local_mesh
from slipstream.tests.models.checkpoints import VOCABULARY, make_checkpoint

CPU = torch.device("cpu")
BLOCK_SIZE = 8
BLOCKS = 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda name: make_checkpoint(name, tmp_path_factory.mktemp("checkpoints") / name))


def rows(tokens: int, generator: torch.Generator) -> StepRows:
    """Two sequences, of which the second has a token at least; a single one where that is all there is."""
    counts = [tokens - tokens // 3, tokens // 3] if tokens >= 3 else [tokens]
    return StepRows(
        token_ids_T=torch.randint(0, VOCABULARY, (tokens,), generator=generator),
        starts=np.zeros(len(counts), np.int32),
        counts=np.array(counts, np.int32),
        prompt_lengths=np.array(counts, np.int32),
        block_tables=np.arange(BLOCKS, dtype=np.int32).reshape(2, -1)[: len(counts)],
    )


def run_mesh(
    path: Path, shape: MeshShape, step: StepRows, *, shares_from: int | None, cuts: Cuts | None, over_tp: bool = False
) -> list[Tensor]:
    """Return what every rank's layers return; later stages are fed the first one's."""
    spec = read_model_spec(path)
    meshes = local_mesh(shape, timeout_s=20.0)

    def run(groups: MeshGroups, hidden_TH: Tensor | None) -> Tensor:
        shard = Shard(place=groups.place, experts_over_tp=over_tp)
        model = load_decoder(path, spec, dtype=torch.float32, device=CPU, groups=groups, shard=shard)
        cache = KvCache.allocate(
            shard.local_spec(spec), num_blocks=BLOCKS, block_size=BLOCK_SIZE, dtype=torch.float32, device=CPU
        )
        layers = StepForward(model, cache, block_size=BLOCK_SIZE, deterministic=True, shares_from=shares_from)
        with torch.inference_mode():
            return layers.run_cut(step, hidden_TH, cuts, None)

    stage_size = shape.size // shape.pp
    results: list[Tensor] = []
    hidden_TH = None
    with ThreadPoolExecutor(max_workers=stage_size) as threads:
        for first in range(0, shape.size, stage_size):
            stage = meshes[first : first + stage_size]
            works = [threads.submit(run, groups, hidden_TH) for groups in stage]
            results += [work.result(60.0) for work in works]
            hidden_TH = results[-1]
    return results


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often groups' operations were called."""
    calls = Counter[str]()
    for name in ("all_reduce", "reduce_scatter"):
        operation = getattr(LocalRank, name)

        def counted(self: LocalRank, x: Tensor, *, name: str = name, operation: object = operation) -> object:
            calls[name] += 1
            return operation(self, x)  # type: ignore[operator]

        monkeypatch.setattr(LocalRank, name, counted)
    return calls


@pytest.mark.parametrize(
    ("name", "shape", "over_tp"),
    [
        ("parallel_dense", MeshShape(tp=2), False),
        ("parallel_dense", MeshShape(tp=4), False),
        ("parallel_dense", MeshShape(pp=2, tp=2), False),
        ("parallel_experts", MeshShape(tp=2), False),
        ("parallel_experts", MeshShape(tp=2), True),
        ("parallel_experts", MeshShape(ep=2, tp=2), False),
        ("parallel_experts", MeshShape(pp=2, ep=2, tp=2), False),
    ],
    ids=str,
)
@pytest.mark.parametrize(("tokens", "cuts"), [(1, None), (3, None), (29, None), (29, (12,)), (29, (3, 20))])
def test_a_pass_in_shares_has_the_bits_of_a_plain_one(
    name: str,
    shape: MeshShape,
    over_tp: bool,
    tokens: int,
    cuts: Cuts | None,
    checkpoint: Callable[[str], Path],
    called: Counter[str],
    seed: int,
) -> None:
    step = rows(tokens, torch.Generator().manual_seed(seed))
    path = checkpoint(name)
    plain = run_mesh(path, shape, step, shares_from=None, cuts=cuts, over_tp=over_tp)
    assert "reduce_scatter" not in called
    shared = run_mesh(path, shape, step, shares_from=0, cuts=cuts, over_tp=over_tp)
    assert "reduce_scatter" in called
    for mine, theirs in zip(shared, plain, strict=True):
        assert torch.equal(mine, theirs)


def test_each_part_of_a_step_has_to_have_enough_tokens(
    checkpoint: Callable[[str], Path], called: Counter[str], seed: int
) -> None:
    step = rows(29, torch.Generator().manual_seed(seed))
    run_mesh(checkpoint("parallel_dense"), MeshShape(tp=2), step, shares_from=15, cuts=(12,))
    # Of 5 layers' two sums, on two ranks: the part with 17 tokens in shares, the one with 12, and embeddings, not.
    assert called == {"reduce_scatter": 2 * 10, "all_reduce": 2 * (10 + 2)}
