"""What ``deterministic`` is refused with, by name; on GPUs that are not there too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slipstream.comm.mesh import MeshShape
from slipstream.kernels import backends
from slipstream.kernels.launch import HAS_TRITON
from slipstream.runtime.models.formats import choose_formats
from slipstream.runtime.models.layout import Role
from slipstream.runtime.models.linear_format import PlainProduct
from slipstream.runtime.models.model_spec import ModelSpec
from slipstream.runtime.models.registry import read_model_spec
from slipstream.runtime.models.sharding import WHOLE
from slipstream.runtime.worker import fixed_order
from slipstream.runtime.worker.fixed_order import check_fixed_order
from slipstream.sdk.errors import ConfigError
from slipstream.tests.models.checkpoints import make_checkpoint

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _no_choice() -> Iterator[None]:
    yield
    backends.use("auto")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return read_model_spec(make_checkpoint("llama", tmp_path_factory.mktemp("llama") / "llama"))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return read_model_spec(Path(make_checkpoint("mixtral", tmp_path_factory.mktemp("mixtral") / "mixtral")))


def wide(spec: ModelSpec, size: int) -> ModelSpec:
    layers = [replace(layer, mlp=replace(layer.mlp, intermediate_size=size)) for layer in spec.layers]
    return replace(spec, layers=tuple(layers))


def check(
    spec: ModelSpec,
    *,
    tp: int = 1,
    device: torch.device = CPU,
    dtype: str = "bfloat16",
    over_tp: bool = False,
) -> None:
    check_fixed_order(
        spec,
        MeshShape(tp=tp),
        device=device,
        dtype=getattr(torch, dtype),
        experts_over_tp=over_tp,
    )


def test_degrees(dense: ModelSpec) -> None:
    for tp in (1, 2, 4, 8):
        check(dense, tp=tp)
    for tp in (3, 5, 6, 16):
        with pytest.raises(ConfigError, match=rf"{tp} ranks cannot add up .*: use 1, 2, 4 or 8") as refused:
            check(dense, tp=tp)
        assert refused.value.field == "tensor_parallel_size"


def test_sums_that_do_not_divide(dense: ModelSpec, experts: ModelSpec) -> None:
    check(wide(dense, 100))
    with pytest.raises(ConfigError, match=r"sums over the 100 intermediate values.*8 equal chunks"):
        check(wide(dense, 100), tp=2)
    with pytest.raises(ConfigError, match="sums over the 100 intermediate values"):
        check(wide(experts, 100), tp=2)
    # Whole experts are on one rank each: no rank shares their sums.
    check(wide(experts, 100), tp=2, over_tp=True)
    with pytest.raises(ConfigError, match="sums over the 60 values of all attention heads"):
        check(replace(dense, head_dim=15), tp=2)


def test_types_on_a_cpu(dense: ModelSpec) -> None:
    with pytest.raises(ConfigError, match=r"needs float32 or bfloat16, .* got float16") as refused:
        check(dense, dtype="float16")
    assert refused.value.field == "deterministic"


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton here")
def test_kernels_on_a_gpu(dense: ModelSpec) -> None:
    check(dense, device=GPU, dtype="float16", tp=4)
    backends.use("linear_fixed=torch")
    with pytest.raises(ConfigError, match=r"linear_fixed .* by torch gives a row other bits") as refused:
        check(dense, device=GPU)
    assert refused.value.field == "deterministic"
    check(dense, device=CPU)
    # Libraries choose by the sizes of a product.
    backends.use("attention=torch")
    with pytest.raises(ConfigError, match=r"attention .* by torch gives a row other bits"):
        check(dense, device=GPU)


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton here")
def test_the_launch_over_all_experts_is_not_asked_for(experts: ModelSpec) -> None:
    """Its tiles go by the number of rows. Experts are stacked for it where their products are plain ones."""
    check(experts, device=GPU)
    backends.use("moe_gemm=torch")
    check(experts, device=GPU)
    shard = replace(WHOLE, fixed_order=True)
    formats = choose_formats("none", dtype=torch.bfloat16, device=GPU, shard=shard)
    for role in (Role.EXPERTS, Role.SUMMED_EXPERTS):
        assert not isinstance(formats.of(role).prepare(torch.zeros(64, 64, dtype=torch.bfloat16)), PlainProduct)


def test_a_gpu_without_triton(dense: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fixed_order, "HAS_TRITON", False)
    with pytest.raises(ConfigError, match="needs Triton on a GPU"):
        check(dense, device=GPU)
