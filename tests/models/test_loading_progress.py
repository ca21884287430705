"""How much of a rank's weights is loaded, as it goes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slipstream.comm.mesh import MeshShape
from slipstream.runtime.models.decoder import load_decoder
from slipstream.runtime.models.layout import parameter_layout
from slipstream.runtime.models.registry import read_model_spec
from slipstream.runtime.models.sharding import Shard
from slipstream.runtime.models.weights import read_parameters
from slipstream.tests.models.checkpoints import make_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("parallel_dense", tmp_path_factory.mktemp("model") / "dense")


@pytest.mark.parametrize("shape", [MeshShape(), MeshShape(tp=2, pp=2)], ids=str)
def test_shares_are_of_what_each_rank_has(checkpoint: Path, shape: MeshShape) -> None:
    spec = read_model_spec(checkpoint)
    for rank in range(shape.size):
        shard = Shard(place=shape.place(rank))
        shares: list[float] = []
        sizes: list[int] = []
        for parameter, tensor in read_parameters(
            checkpoint, spec, dtype=torch.float32, device=CPU, shard=shard, progress=shares.append
        ):
            assert len(shares) == len(sizes), "a parameter counts once it has been taken"
            assert isinstance(tensor, torch.Tensor) and tensor.shape == parameter.shape
            sizes.append(tensor.numel())
        expected = [sum(sizes[: place + 1]) / sum(sizes) for place in range(len(sizes))]
        assert shares == pytest.approx(expected)
        assert shares[-1] == 1.0


def test_a_decoder_says_how_much_of_it_is_loaded(checkpoint: Path) -> None:
    shares: list[float] = []
    spec = read_model_spec(checkpoint)
    load_decoder(checkpoint, spec, dtype=torch.float32, device=CPU, progress=shares.append)
    assert len(shares) == len(parameter_layout(spec, ()))
    assert shares == sorted(shares) and shares[-1] == 1.0
