"""Of which numbers the KV cache is made: how much it holds, and on which GPUs."""

from __future__ import annotations

import pytest
import torch

from slipstream.comm.mesh import MeshShape
from slipstream.kernels import backends
from slipstream.runtime.config import EngineOptions
from slipstream.runtime.models.kv_cache import KvCache
from slipstream.runtime.models.registry import read_model_spec
from slipstream.runtime.worker.cache_dtype import cache_dtype, check_cache_dtype
from slipstream.runtime.worker.sizing import size_engine
from slipstream.sdk.errors import ConfigError
from slipstream.tests.models.checkpoints import make_checkpoint

CPU = torch.device("cpu")


def test_as_much_memory_holds_twice_as_many_tokens(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = make_checkpoint("llama", tmp_path_factory.mktemp("llama"))
    spec, options = read_model_spec(path), EngineOptions(model=str(path), kv_cache_memory_bytes=200_000)
    blocks = {}
    for option in ("auto", "fp8"):
        kind = cache_dtype(option, torch.bfloat16)
        _, size = size_engine(options, spec, CPU, torch.bfloat16, cache_dtype=kind)
        cache = KvCache.allocate(spec, num_blocks=size.num_blocks, block_size=16, dtype=kind, device=CPU)
        assert 200_000 - 2 * size.block_bytes < cache.bytes <= 200_000
        blocks[option] = size.num_blocks
    assert blocks["fp8"] in (2 * blocks["auto"], 2 * blocks["auto"] + 1)


def test_a_latent_takes_one_row_of_a_layer(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = make_checkpoint("deepseek_v3", tmp_path_factory.mktemp("deepseek"))
    spec, options = read_model_spec(path), EngineOptions(model=str(path), kv_cache_memory_bytes=200_000)
    _, size = size_engine(options, spec, CPU, torch.float32)
    assert size.block_bytes == 3 * 16 * (32 + 16) * 4
    cache = KvCache.allocate(spec, num_blocks=size.num_blocks, block_size=16, dtype=torch.float32, device=CPU)
    assert cache.bytes == size.num_blocks * size.block_bytes
    assert (cache.num_blocks, cache.block_size, cache.parts) == (size.num_blocks, 16, 1)


def test_a_cache_of_latents_is_not_in_8_bits() -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype: 'fp8' is not for models that cache latents: use auto"):
        check_cache_dtype("fp8", torch.bfloat16, CPU, MeshShape(), latent=True)
    check_cache_dtype("auto", torch.bfloat16, CPU, MeshShape(), latent=True)


@pytest.mark.parametrize(
    ("capability", "hip", "fits"), [((9, 0), None, True), ((8, 0), None, False), ((9, 4), "6.2", False)]
)
def test_gpus_that_have_the_type(
    capability: tuple[int, int], hip: str | None, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.version, "hip", hip)
    backends.use("auto")
    if not backends.uses_triton_on("attention", torch.device("cuda")):
        pytest.skip("no Triton here: pip install triton")
    if fits:
        check_cache_dtype("fp8", torch.bfloat16, torch.device("cuda"), MeshShape())
        return
    with pytest.raises(ConfigError, match=r"kv_cache_dtype: 'fp8' .e4m3. is not a type of a GPU"):
        check_cache_dtype("fp8", torch.bfloat16, torch.device("cuda"), MeshShape())
